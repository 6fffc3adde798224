"""What in a config should not leave the machine: secrets, paths, accounts.

Knows the keys of Axolotl's YAML by name. It imports nothing of Axolotl and asks no server, so
whether a repository is private is for its owner to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from axolotl_gmt.tokens import hide, hide_in


class Shared(NamedTuple):
    """A config without its secrets, and a line for each thing that should not be shared.

    Attributes:
        config: The config with :data:`tokens.MARK` in place of each secret, so that nothing that
            is said of it later can quote one.
        warnings: A line each, with the key path and what to do instead.
        remarks: Good to know before the file is shared.
    """

    config: dict[str, Any]
    warnings: list[str]
    remarks: list[str]


_COMMENT = re.compile(r"(?:^|\s)#(.*)")

_ABSOLUTE = re.compile(r"(?:file://)?/[\w.@+-]+/.*|~[\w.-]*/.*|[A-Za-z]:[\\/].*|\\\\\w.*")
_SHORT_ABSOLUTE = re.compile(r"/[\w.@+-]+")
_PATH_KEY = re.compile(r"(?:path|dir|file|files|model|config|deepspeed|forgetting)$")
_HOME = re.compile(r"(?<![\w.])(?:/home|/Users)/\w+")
_BUCKET = re.compile(r"(?:s3a?|gs|gcs|az|adl|abfss?|oci|r2)://")

# Keys that tie a run to an account, and what happens to whoever runs the file.
_ACCOUNT_KEYS = {
    "hub_model_id": "training pushes to this repository, which is private when Axolotl makes it; "
    "for others that fails",
    "push_dataset_to_hub": "the prepared data is pushed to this account; for others that fails",
    "wandb_entity": "runs are logged to this wandb account or team; for others that fails",
    "wandb_project": "this turns on reporting to wandb for whoever runs the file",
    "wandb_run_id": "runs are logged into this very run",
    "comet_workspace": "runs are logged to this Comet workspace; for others that fails",
    "comet_project_name": "this turns on reporting to Comet for whoever runs the file",
    "comet_experiment_key": "runs are logged into this very experiment",
    "mlflow_tracking_uri": "runs are logged there, which others may be unable to reach",
    "trackio_space_id": "runs are logged to this Space; for others that fails",
}
# On a hub a name without an owner is that of whoever is logged in.
_OWNED_KEYS = {"hub_model_id", "push_dataset_to_hub", "trackio_space_id"}


def look_over(raw: Mapping[str, object], text: str) -> Shared:
    """What should not be shared in a config.

    Args:
        raw: The config.
        text: The file that it was read from; its comments are looked at too.
    """
    config, found = hide_in(raw, _ACCOUNT_KEYS)
    values = {secret.text for one in found for secret in one.secrets}
    warnings = [
        f"{one.path}: *** looks like {one.secrets[0].kind}. Remove it, revoke it if anyone has "
        "seen the file, and use an environment variable or the tool's own login instead."
        for one in found
    ]
    shared = Shared(config, warnings, [])
    owners = {_owner(shared.config.get(key)) for key in _OWNED_KEYS} - {None}
    for path, key, value in _values(shared.config):
        _check_place(shared, path, key, value)
        if _owner(value) in owners and path not in _OWNED_KEYS:
            shared.warnings.append(
                f"{path}: {value!r} belongs to an account that this file pushes to. If it is "
                "private, others cannot train with it; this cannot be known offline."
            )
    for number, line in enumerate(text.splitlines(), start=1):
        if comment := _COMMENT.search(line):
            _, secrets = hide(comment.group(1), comment=True)
            shared.warnings.extend(
                f"line {number}: *** looks like {secret.kind}. Remove it, and revoke it if anyone "
                "has seen the file."
                for secret in secrets
                if secret.text not in values  # A value can hold a # too.
            )
    for key, consequence in _ACCOUNT_KEYS.items():
        account = shared.config.get(key)
        if not isinstance(account, str) or not account:
            continue
        if key == "mlflow_tracking_uri" and "://" not in account:  # A local folder.
            continue
        if key not in _OWNED_KEYS or _owner(account):
            shared.warnings.append(f"{key}: {account!r}: {consequence}. Leave it empty.")
    if raw.get("hf_use_auth_token") is True:
        shared.remarks.append(
            "hf_use_auth_token: true says that a model or data set here needs a login. Whether it "
            "is gated, or private and so of no use to others, cannot be known offline."
        )
    return shared


def _owner(hub_id: object) -> str | None:
    """The account in ``account/name``."""
    parts = hub_id.split("/") if isinstance(hub_id, str) else []
    return parts[0] if len(parts) == 2 and all(parts) else None


def _values(value: object, path: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    """Key path, last key and text of each text in a config: datasets[0].path."""
    if isinstance(value, str):
        yield path, key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _values(item, f"{path}.{name}" if path else str(name), str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _values(item, f"{path}[{index}]", key)


def _check_place(shared: Shared, path: str, key: str, value: str) -> None:
    if _ABSOLUTE.fullmatch(value) or (_SHORT_ABSOLUTE.fullmatch(value) and _PATH_KEY.search(key)):
        shared.warnings.append(
            f"{path}: {value!r} is a path of this machine. Write one relative to the folder in "
            "which axolotl is run, such as ./data, or a hub id."
        )
    elif home := _HOME.search(value):
        shared.warnings.append(
            f"{path}: names the home directory {home.group()!r}. Write a relative path."
        )
    elif _BUCKET.match(value):
        shared.warnings.append(
            f"{path}: {value!r} lies in a bucket, which others cannot read unless it is public. "
            "Name a public data set, or say who may read it and remove this."
        )
