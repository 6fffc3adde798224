"""A raw Axolotl config, as it is before Axolotl validates it.

``optimizer: gmt`` becomes the base optimizer there, and every bad setting is refused.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from os.path import exists, expanduser, isfile
from pathlib import Path
from typing import NamedTuple

from axolotl.integrations.base import normalize_plugin_name
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import CustomSupportedOptimizers
from transformers.training_args import OptimizerNames

from axolotl_gmt.integrations.axolotl.args import (
    DEFAULT_BASE_OPTIMIZER,
    PREFIX,
    GMTArgs,
    read_config,
)
from axolotl_gmt.integrations.deepspeed_config import check_deepspeed_config
from axolotl_gmt.integrations.held_out_text import HeldOutText

PARALLEL_SIZES = (
    "tensor_parallel_size",
    "expert_parallel_size",
    "dp_shard_size",
    "dp_replicate_size",
)
"""Keys whose product is the least number of GPUs."""

BARE_NAME = "axolotl_gmt"
NAME = "axolotl_gmt.GMTPlugin"
"""The name of the entry point, under which Axolotl loads the plugin."""
PLUGIN_NAMES = frozenset(
    {
        BARE_NAME,
        "axolotl-gmt",  # As package indexes spell it.
        NAME,
        "axolotl_gmt.plugin.GMTPlugin",  # Where the plugin once was.
        "axolotl_gmt.integrations.axolotl.plugin.GMTPlugin",
    }
)
"""What ``plugins:`` may call the plugin, as Axolotl normalizes names: a dot for each colon."""

# They step each parameter inside the backward pass, so step() never sees a gradient to mask.
_STEP_IN_BACKWARD = {
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
}


class Switch(NamedTuple):
    """Whether GMT is on, and which key says so."""

    enabled: bool
    why: str


def settle(cfg: DictDefault) -> Switch:
    """Check the ``gmt_*`` keys of a raw config and put the base optimizer in place of `gmt`."""
    _check_plugins_are_a_list(cfg)
    _check_keys(cfg)
    _check_spelling_of_optimizer(cfg)
    switch = _switch(cfg)
    if not switch.enabled:
        _check_nothing_is_set(cfg, by_optimizer=cfg.get("optimizer") == "gmt")
    _put_base_optimizer(cfg)
    if switch.enabled:
        read_config(cfg)
        _check_exposes_gradients(cfg)
        _check_distribution(cfg)
        cfg["gmt_enabled"] = True
    return switch


def _switch(cfg: DictDefault) -> Switch:
    enabled = cfg.get("gmt_enabled")
    if enabled is not None:
        return Switch(enabled, f"gmt_enabled is {str(enabled).lower()}")
    if cfg.get("optimizer") == "gmt":
        return Switch(True, "optimizer is gmt")
    listed = {normalize_plugin_name(name) for name in cfg.get("plugins") or []}
    if listed & PLUGIN_NAMES:
        return Switch(True, f"{BARE_NAME} is listed under plugins")
    return Switch(False, f"{BARE_NAME} is not listed under plugins, and optimizer is not gmt")


def check_command_line(arguments: list[str]) -> None:
    """Refuse ``--gmt-...`` options: Axolotl drops what its own schema lacks without a word."""
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        option, is_assigned, value = argument.partition("=")
        if option.startswith("--") and looks_like_key(option.removeprefix("--")):
            if not is_assigned and not following.startswith("--"):
                argument, value = f"{argument} {following}", following
            raise ValueError(
                f"{argument}: Axolotl's command line drops the keys of plugins. Write "
                f"{_nearest_key(option)}: {value or '...'} into the YAML file."
            )


def context_parallel_size(cfg: DictDefault) -> object:
    """Over how many GPUs a sequence is split, whichever key says so; None if none does."""
    block = cfg.get("context_parallel")
    return (
        cfg.get("context_parallel_size")
        or cfg.get("sequence_parallel_degree")
        or (block.get("size") if isinstance(block, dict) else None)
    )


def check_held_out_text(cfg: DictDefault, may_be_elsewhere: bool = False) -> None:
    """Read the file of ``gmt_forgetting``, and refuse trainings whose model cannot.

    Args:
        cfg: A raw config in which GMT is on.
        may_be_elsewhere: Whether the training may be on another machine, which has the file.

    Raises:
        ValueError: Naming key, value and fix.
    """
    setting = cfg.get("gmt_forgetting")
    if setting is None or setting is False:
        return
    off = f"Remove it, or gmt_forgetting: {setting!r}."
    if context_parallel_size(cfg) not in (None, 1):
        raise ValueError(
            f"context_parallel_size: {context_parallel_size(cfg)!r} splits each sequence over "
            f"GPUs, also the text on which forgetting is measured. {off}"
        )
    for key in ("reward_model", "process_reward_model"):
        if cfg.get(key):
            raise ValueError(f"{key}: {cfg[key]!r} trains a model that predicts no tokens. {off}")
    for name in cfg.get("plugins") or []:
        if normalize_plugin_name(name).startswith("axolotl.integrations.diffusion."):
            raise ValueError(
                f"plugins: {name!r} trains a model that does not predict the next token, by which "
                f"forgetting is measured. {off}"
            )
    if may_be_elsewhere and isinstance(setting, str) and not exists(expanduser(setting)):
        return
    try:
        HeldOutText.read(setting)
    except ValueError as error:
        raise ValueError(f"gmt_forgetting: {error}") from None


def _set_keys(cfg: DictDefault) -> list[str]:
    return [key for key, value in cfg.items() if str(key).startswith(PREFIX) and value is not None]


def _words(key: object) -> str:
    """A key in the spelling of the keys: ``gmt-maskRatio`` as ``gmt_mask_ratio``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", str(key)).strip("_").lower()
    return words.removeprefix("axolotl_")


def looks_like_key(key: object) -> bool:
    """Whether a key is meant for GMT, in whatever spelling; a key such as ``gmtime`` is not."""
    words = _words(key)
    return f"{words}_".startswith(PREFIX) or words in {
        known.replace("_", "") for known in GMTArgs.model_fields
    }


def _nearest_key(key: object, value: object = None) -> str:
    words = _words(key).removeprefix(PREFIX)
    if words == "gmt":
        return "gmt_enabled" if isinstance(value, bool) else "gmt_mask_ratio"
    return difflib.get_close_matches(PREFIX + words, GMTArgs.model_fields, n=1, cutoff=0)[0]


def _check_plugins_are_a_list(cfg: DictDefault) -> None:
    plugins = cfg.get("plugins")
    if isinstance(plugins, str):
        raise ValueError(
            f"plugins: {plugins!r} is text, not a list of names. Write plugins: [{plugins}]."
        )


def _check_spelling_of_optimizer(cfg: DictDefault) -> None:
    optimizer = cfg.get("optimizer")
    if optimizer != "gmt" and _words(optimizer) == "gmt":
        raise ValueError(f"optimizer: {optimizer!r} is spelled gmt. Write optimizer: gmt.")


def _check_keys(cfg: DictDefault) -> None:
    known = GMTArgs.model_fields
    for key, value in cfg.items():
        if key in known or not looks_like_key(key):
            continue
        if isinstance(value, Mapping):
            lines = [f"{_nearest_key(name)}: {setting}" for name, setting in value.items()]
            raise ValueError(
                f"{key}: GMT's keys stand at the top level of the file, not below {key}. Write "
                f"there: {', '.join(lines) or 'gmt_mask_ratio: 0.5'}."
            )
        raise ValueError(
            f"{key}: {value!r} is set, but there is no such key. Did you mean "
            f"{_nearest_key(key, value)}? The keys are {', '.join(known)}."
        )
    for key in ("gmt_enabled", "gmt_report"):
        if not isinstance(cfg.get(key), bool | None):
            raise ValueError(f"{key}: {cfg[key]!r} is not true or false. Set one of these.")


def _check_nothing_is_set(cfg: DictDefault, by_optimizer: bool) -> None:
    """Refuse settings of a GMT that is off; with ``optimizer: gmt`` the base still matters."""
    ignored = (
        set(_set_keys(cfg)) - {"gmt_enabled"} - ({"gmt_base_optimizer"} if by_optimizer else set())
    )
    if ignored:
        fix = (
            "Set gmt_enabled: true, or remove"
            if cfg.get("gmt_enabled") is False
            else f"Add {BARE_NAME} to plugins (or set optimizer: gmt), or remove"
        )
        key = min(ignored)
        raise ValueError(
            f"{key}: {cfg[key]!r} is set, but GMT is off. {fix} {', '.join(sorted(ignored))}."
        )


def _put_base_optimizer(cfg: DictDefault) -> None:
    base = cfg.get("gmt_base_optimizer")
    if base is not None:
        check_known_optimizer("gmt_base_optimizer", base)
    optimizer = cfg.get("optimizer")
    if optimizer == "gmt" or (optimizer is None and base is not None):
        cfg["optimizer"] = base or DEFAULT_BASE_OPTIMIZER
    elif base not in (None, optimizer):
        raise ValueError(
            f"gmt_base_optimizer: {base!r} has no effect, since optimizer is {optimizer!r}, which "
            "GMT then steps with. Set optimizer: gmt, or remove gmt_base_optimizer."
        )


def check_known_optimizer(key: str, name: object) -> None:
    """Refuse a name that Axolotl cannot make an optimizer of.

    Raises:
        ValueError: Naming ``key``, under which ``name`` stands, and the nearest names.
    """
    if key == "gmt_base_optimizer" and name == "gmt":
        raise ValueError(
            "gmt_base_optimizer: 'gmt' cannot step with itself. Set the optimizer to step with, "
            f"such as {DEFAULT_BASE_OPTIMIZER}."
        )
    names = {item.value for item in (*OptimizerNames, *CustomSupportedOptimizers)}
    known = sorted(names if key == "gmt_base_optimizer" else {*names, "gmt"})
    if name not in known:
        nearest = difflib.get_close_matches(str(name).lower(), known, cutoff=0)
        raise ValueError(
            f"{key}: {name!r} is no optimizer that Axolotl knows. The nearest are "
            f"{', '.join(nearest)}. All are {', '.join(known)}."
        )


def _check_exposes_gradients(cfg: DictDefault) -> None:
    for name in cfg.get("plugins") or []:
        if normalize_plugin_name(name).endswith(".HatcheryPlugin"):
            raise ValueError(
                f"plugins: {name!r} trains on another machine, so no gradient is here to mask. "
                f"Remove it, or remove {BARE_NAME} (with optimizer: gmt, set another optimizer)."
            )
    optimizer = cfg.get("optimizer")
    if optimizer in _STEP_IN_BACKWARD:
        key = "gmt_base_optimizer" if cfg.get("gmt_base_optimizer") else "optimizer"
        raise ValueError(
            f"{key}: {optimizer!r} updates each weight during the backward pass, so there is never "
            f"a whole gradient to mask. Set another one, such as {DEFAULT_BASE_OPTIMIZER}"
            + (f" or {optimizer.removesuffix('_layerwise')}." if "layerwise" in optimizer else ".")
        )


def _check_distribution(cfg: DictDefault) -> None:
    """Refuse ways to shard in which a mask cannot be exact, or is untested."""
    if cfg.get("optimizer") == "polora":
        for key in ("fsdp", "fsdp_config", "dp_shard_size", "tensor_parallel_size"):
            if cfg.get(key) not in (None, 1):
                raise ValueError(
                    f"optimizer: 'polora' with {key} steps tensors that it gathers itself, whose "
                    f"gradients GMT cannot see. Remove {key}, or set another optimizer."
                )
    deepspeed = cfg.get("deepspeed")
    if isinstance(deepspeed, str) and isfile(deepspeed):
        try:
            deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"deepspeed: {deepspeed} is not JSON ({error}). Mend it.") from None
    if isinstance(deepspeed, dict):
        check_deepspeed_config(deepspeed)
    if cfg.get("deepspeed") and cfg.get("deepcompile"):
        raise ValueError(
            "deepcompile: True compiles DeepSpeed's gradient path, where GMT cannot mask. Set "
            "deepcompile: false."
        )
    tensor_parallel = cfg.get("tensor_parallel_size") or 1
    if tensor_parallel != 1 and (cfg.get("deepspeed") or cfg.get("adapter")):
        other = "deepspeed" if cfg.get("deepspeed") else "adapter"
        raise ValueError(
            f"tensor_parallel_size: {tensor_parallel!r} with {other} splits tensors so that GMT "
            f"cannot see their other shards. Remove tensor_parallel_size or {other}; FSDP2 "
            "alone shards as well."
        )
    experts = cfg.get("expert_parallel_size") or 1
    if experts != 1:
        raise ValueError(
            f"expert_parallel_size: {experts!r} keeps other experts on each rank in plain tensors, "
            "of which GMT would mask each rank's alone. Remove it, and shard with FSDP2 or ZeRO-3."
        )
