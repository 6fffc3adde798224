"""What in a config should not leave the machine: keys and tokens, paths, accounts.

Knows the keys of Axolotl's YAML by name and what secrets look like; it imports nothing of Axolotl
and asks no server, so whether a repository is private is for its owner to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Found(NamedTuple):
    """Warnings, remarks, and the secrets that no other line may show either."""

    warnings: list[str]
    remarks: list[str]
    secrets: set[str]


_TOKENS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}\b",
    "a key of OpenAI or Anthropic": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a wandb key": r"\bwandb_v\d+_[A-Za-z0-9_]{20,}\b",
    "a GitHub token": r"\b(?:gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})\b",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}\b",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a URL with credentials": r"\b(?:https?|ftps?|postgres(?:ql)?|mysql|mongodb(?:\+srv)?|rediss?"
    r"|amqps?)://[^\s/@?#'\"]+@[^\s'\"]+",
}
_TOKEN = re.compile("|".join(f"({pattern})" for pattern in _TOKENS.values()))
_URL = re.compile(r"\bhttps?://[^\s'\"]+")
_SIGNATURE = re.compile(
    r"[?&](?:token|access_token|key|api_key|sig|signature|x-amz-signature|x-goog-signature)=[^&]",
    re.IGNORECASE,
)

# A wandb key is 40 hexadecimal digits and so is a git commit, which pins a model or a data set.
_HEX_40 = re.compile(r"[0-9a-f]{40}")
_COMMIT_KEY = re.compile(r"revision|commit|sha\b|hash")

_SECRET_KEY = re.compile(
    r"(?:^|_)(?:api_?keys?|secret|secret_key|password|passwd|private_key|access_key(?:_id)?"
    r"|(?:auth|access|session|hf|hub|huggingface|wandb|github|bearer|api)_token)$"
    r"|^(?:token|(?:wandb|hf|openai|anthropic|comet|mlflow|swanlab)_key)$"
)
# $WANDB_API_KEY, ${{ secrets.KEY }}, <your key>: what stands where a secret would.
_PLACEHOLDER = re.compile(
    r"\s*(?:\$\{?[A-Z_][A-Z0-9_]*\}?|\$?\{\{.*\}\}|<.*>|\*+|\.\.\."
    r"|(?i:your(?:key|token|secret|password)?(?:[-_ ][a-z]+)*|(?:hf_|sk-)?x{3,}|true|false|none)?)"
    r"\s*"
)
# In a comment, and in a value such as a command to run.
_ASSIGNED = re.compile(r"(\w{1,80})\s{0,3}[:=]\s{0,3}[\"']?([^\s\"']{1,500})")
_EXPORTED = re.compile(r"\b([A-Z][A-Z0-9_]{0,80})=[\"']?([^\s\"']{1,500})")
_COMMENT = re.compile(r"(?:^|\s)#(.*)")

_ABSOLUTE = re.compile(r"(?:file://)?/[\w.@+-]+/.*|~[\w.-]*/.*|[A-Za-z]:[\\/].*|\\\\\w.*")
_SHORT_ABSOLUTE = re.compile(r"/[\w.@+-]+")
_PATH_KEY = re.compile(r"(?:path|dir|file|files|model|config|deepspeed)$")
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


def look_over(raw: Mapping[str, object], text: str) -> Found:
    """What should not be shared in a config.

    Args:
        raw: The config.
        text: The file that it was read from; its comments are looked at too.

    Returns:
        One line for each warning and remark, with the key path and what to do instead. Secrets
        are not shown in them.
    """
    found = Found([], [], set())
    owners = {_owner(raw.get(key)) for key in _OWNED_KEYS} - {None}
    for path, key, value in _values(raw):
        _check_secret(found, path, key, value)
        _check_place(found, path, key, value)
        if _owner(value) in owners and path not in _OWNED_KEYS:
            found.warnings.append(
                f"{path}: {value!r} belongs to an account that this file pushes to. If it is "
                "private, others cannot train with it; this cannot be known offline."
            )
    _check_comments(found, text)
    for key, consequence in _ACCOUNT_KEYS.items():
        account = raw.get(key)
        if not isinstance(account, str) or not account:
            continue
        if key == "mlflow_tracking_uri" and "://" not in account:  # A local folder.
            continue
        if key not in _OWNED_KEYS or _owner(account):
            found.warnings.append(f"{key}: {account!r}: {consequence}. Leave it empty.")
    _note_logins(found, raw)
    return found


def hidden(text: str, secrets: set[str]) -> str:
    """``text`` with each secret replaced by three asterisks."""
    for secret in sorted(secrets, key=len, reverse=True):
        for form in (secret, repr(secret)[1:-1]):  # Messages quote values.
            text = text.replace(form, "***")
    return text


def _owner(hub_id: object) -> str | None:
    """The account in ``account/name``."""
    parts = hub_id.split("/") if isinstance(hub_id, str) else []
    return parts[0] if len(parts) == 2 and all(parts) else None


def _values(value: object, path: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    """Key path, last key and text of each text and number in a config: datasets[0].path."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path, key, str(value)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _values(item, f"{path}.{name}" if path else str(name), str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _values(item, f"{path}[{index}]", key)


def _check_secret(found: Found, path: str, key: str, value: str) -> None:
    tokens = list(_tokens(value))
    if not tokens:
        named = [(key, value), *_EXPORTED.findall(value)]
        tokens = [token for name, text in named for token in _named_secret(name, text)]
    for _, secret in tokens:
        _hide(found, secret)
    if tokens:
        found.warnings.append(
            f"{path}: *** looks like {tokens[0][0]}. Remove it, revoke it if anyone has seen the "
            "file, and use an environment variable or the tool's own login instead."
        )


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Each secret that can be told by its own look, after what it is."""
    for token in _TOKEN.finditer(text):
        kind = list(_TOKENS)[(token.lastindex or 1) - 1]
        yield kind, text if kind == "a private key" else token.group()
    for url in _URL.finditer(text):
        if _SIGNATURE.search(url.group()):
            yield "a signed URL", url.group()


def _named_secret(key: str, value: str) -> Iterator[tuple[str, str]]:
    """A secret that its key gives away, after what it is."""
    if _HEX_40.fullmatch(value.strip()) and not _COMMIT_KEY.search(key.lower()):
        yield "40 hexadecimal digits, as a wandb key has", value.strip()
    elif _SECRET_KEY.search(key.lower()) and not _PLACEHOLDER.fullmatch(value):
        yield "a secret, by the name of the key", value


def _hide(found: Found, secret: str) -> None:
    # A shorter one would blot out parts of other words.
    found.secrets.update(part for part in (secret, *secret.splitlines()) if len(part) > 5)


def _check_place(found: Found, path: str, key: str, value: str) -> None:
    if _ABSOLUTE.fullmatch(value) or (_SHORT_ABSOLUTE.fullmatch(value) and _PATH_KEY.search(key)):
        found.warnings.append(
            f"{path}: {value!r} is a path of this machine. Write one relative to the folder in "
            "which axolotl is run, such as ./data, or a hub id."
        )
    elif home := _HOME.search(value):
        found.warnings.append(
            f"{path}: names the home directory {home.group()!r}. Write a relative path."
        )
    elif _BUCKET.match(value):
        found.warnings.append(
            f"{path}: {value!r} lies in a bucket, which others cannot read unless it is public. "
            "Name a public data set, or say who may read it and remove this."
        )


def _check_comments(found: Found, text: str) -> None:
    """Warn of secrets that are in the file, but in no value: in a comment or in a key."""
    for number, line in enumerate(text.splitlines(), start=1):
        comment = _COMMENT.search(line)
        named = _ASSIGNED.findall(comment.group(1)) if comment else []
        tokens = [*_tokens(line), *(token for pair in named for token in _named_secret(*pair))]
        for kind, secret in tokens:
            if not any(secret in known for known in found.secrets):
                _hide(found, secret)
                found.warnings.append(
                    f"line {number}: *** looks like {kind}. Remove it, and revoke it if anyone has "
                    "seen the file."
                )


def _note_logins(found: Found, raw: Mapping[str, object]) -> None:
    if raw.get("hf_use_auth_token") is True:
        found.remarks.append(
            "hf_use_auth_token: true says that a model or data set here needs a login. Whether it "
            "is gated, or private and so of no use to others, cannot be known offline."
        )
