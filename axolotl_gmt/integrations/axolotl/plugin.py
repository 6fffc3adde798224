"""GMT as an Axolotl plugin: reads the ``gmt_*`` keys and adds the callback to Axolotl's trainer.

Only this room and :mod:`axolotl_gmt.tools.check` know Axolotl. ``register`` sees a config before
Axolotl validates it, which is where ``optimizer: gmt`` becomes the base optimizer and every bad
setting is refused.
"""

from __future__ import annotations

import difflib
import functools
import json
import sys
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from axolotl.integrations.base import (
    BasePlugin,
    PluginManager,
    normalize_plugin_name,
)
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.enums import CustomSupportedOptimizers
from pydantic import BaseModel, Field, ValidationError, create_model
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from axolotl_gmt.config import GMTConfig, explain
from axolotl_gmt.gradients.zero import check_deepspeed_config
from axolotl_gmt.integrations.axolotl.model_card import add_section
from axolotl_gmt.integrations.callback import GMTCallback
from axolotl_gmt.report.log import parse_state

# Axolotl shows INFO of loggers whose name starts with "axolotl"; this sets the package's level.
LOG = get_logger("axolotl_gmt")

PREFIX = "gmt_"
DEFAULT_BASE_OPTIMIZER = OptimizerNames.ADAMW_TORCH_FUSED.value

# What `plugins:` may call this plugin. The second is the entry point's own name.
BARE_NAME, NAME, LONG_NAME = (
    "axolotl_gmt",
    "axolotl_gmt.GMTPlugin",
    "axolotl_gmt.plugin.GMTPlugin",
)

# They step each parameter inside the backward pass, so step() never sees a gradient to mask.
_STEP_IN_BACKWARD = {
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
}


class _SwitchArgs(BaseModel):
    """The keys that decide whether GMT runs and on what; the rest are GMTConfig's."""

    gmt_enabled: bool | None = Field(
        default=None,
        description="Whether GMT masks gradients. Unset: it does if `optimizer` is `gmt` or the "
        "plugin is listed under `plugins`.",
    )
    gmt_base_optimizer: str | None = Field(
        default=None,
        description="The optimizer that `optimizer: gmt` steps with, any name that Axolotl's "
        f"`optimizer` takes. Unset: {DEFAULT_BASE_OPTIMIZER}.",
    )


_CONFIG_TYPES = get_type_hints(GMTConfig, include_extras=True)
_CONFIG_ARGS: dict[str, Any] = {
    PREFIX + name: (_CONFIG_TYPES[name] | None, Field(default=None, description=field.description))
    for name, field in GMTConfig.model_fields.items()
}
GMTArgs = create_model(
    "GMTArgs",
    __base__=_SwitchArgs,
    __module__=__name__,
    __doc__="The keys that GMT adds to Axolotl's config, all unset by default.",
    **_CONFIG_ARGS,
)


class GMTPlugin(BasePlugin):
    """Gradient-Mask Tuning for Axolotl: ``plugins: [axolotl_gmt]``."""

    def __init__(self) -> None:
        super().__init__()
        # Axolotl would split a listed `axolotl_gmt` at a dot that it lacks, and would make a second
        # active plugin of the long name. Listed names that are loaded already are left alone, and
        # Axolotl creates this entry point first, so plugins that do nothing stand under both.
        plugins = PluginManager().plugins
        for name in (BARE_NAME, LONG_NAME):
            plugins.setdefault(name, BasePlugin())

    def register(self, cfg: DictDefault) -> None:
        """Check the ``gmt_*`` keys of a raw config and put the base optimizer in place of `gmt`.

        Raises:
            ValueError: For a bad setting, naming key, value and fix.
        """
        program = Path(sys.argv[0])  # Of another one an option may mean anything.
        is_axolotl = program.name == "axolotl" or program.match("axolotl/cli/*.py")
        if settle(cfg).enabled or is_axolotl:
            _check_command_line(sys.argv)

    def get_input_args(self) -> str:
        """The keys that join Axolotl's config schema."""
        return f"{__name__}.GMTArgs"

    def add_callbacks_post_trainer(
        self, cfg: DictDefault, trainer: Trainer
    ) -> list[TrainerCallback]:
        """The callback that masks gradients, if GMT is on."""
        return [GMTCallback(read_config(cfg))] if cfg.get("gmt_enabled") else []

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Have each model card that the trainer writes tell of GMT, if it is on.

        Not in ``post_train``: Axolotl calls that after it has pushed the card to the hub, and once
        more before there is a card.
        """
        if not cfg.get("gmt_enabled"):
            return
        create_model_card = trainer.create_model_card

        @functools.wraps(create_model_card)
        def create_model_card_with_section(*args: Any, **kwargs: Any) -> None:
            create_model_card(*args, **kwargs)
            if trainer.is_world_process_zero():
                _complete_model_card(trainer)

        trainer.create_model_card = create_model_card_with_section


def _complete_model_card(trainer: Trainer) -> None:
    card = Path(trainer.args.output_dir, "README.md")
    try:
        add_section(card, parse_state(vars(trainer.state), card.parent.name))
    except Exception as error:  # A card may lack a section, but a trained model must be saved.
        LOG.warning(f"The section on GMT is missing in {card}: {error}")


def read_config(cfg: DictDefault) -> GMTConfig:
    """The settings of GMT in an Axolotl config.

    Raises:
        ValueError: Naming each bad key, its value and the fix.
    """
    settings: dict[str, Any] = {
        name: value
        for name in GMTConfig.model_fields
        if (value := cfg.get(PREFIX + name)) is not None
    }
    if "seed" not in settings and cfg.get("seed") is not None:
        settings["seed"] = cfg["seed"]
    try:
        return GMTConfig(**settings)
    except ValidationError as error:
        raise ValueError(explain(error, PREFIX)) from None


class Switch(NamedTuple):
    """Whether GMT is on, and which key says so."""

    enabled: bool
    why: str


def settle(cfg: DictDefault) -> Switch:
    """Check the ``gmt_*`` keys of a raw config and put the base optimizer in place of `gmt`."""
    _check_keys(cfg)
    switch = _switch(cfg)
    if not switch.enabled:
        _check_nothing_is_set(cfg, sugar=cfg.get("optimizer") == "gmt")
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
        if not isinstance(enabled, bool):
            raise ValueError(f"gmt_enabled: {enabled!r} is not true or false. Set one of these.")
        return Switch(enabled, f"gmt_enabled is {str(enabled).lower()}")
    if cfg.get("optimizer") == "gmt":
        return Switch(True, "optimizer is gmt")
    listed = {normalize_plugin_name(name) for name in cfg.get("plugins") or []}
    if listed & {BARE_NAME, NAME, LONG_NAME}:
        return Switch(True, f"{BARE_NAME} is listed under plugins")
    return Switch(False, f"{BARE_NAME} is not listed under plugins, and optimizer is not gmt")


def _check_command_line(arguments: list[str]) -> None:
    """Refuse ``--gmt-...`` options: Axolotl drops what its own schema lacks without a word."""
    for argument in arguments:
        option, _, value = argument.partition("=")
        if option.startswith(("--gmt-", "--gmt_")):
            key = option.removeprefix("--").replace("-", "_")
            raise ValueError(
                f"{argument}: Axolotl's command line drops the keys of plugins. Write "
                f"{key}: {value or '...'} into the YAML file."
            )


def _set_keys(cfg: DictDefault) -> list[str]:
    return [key for key, value in cfg.items() if str(key).startswith(PREFIX) and value is not None]


def _check_keys(cfg: DictDefault) -> None:
    known = GMTArgs.model_fields
    for key in cfg:
        if str(key).startswith(PREFIX) and key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ValueError(
                f"{key}: {cfg[key]!r} is set, but there is no such key. Did you mean {nearest}? "
                f"The keys are {', '.join(known)}."
            )


def _check_nothing_is_set(cfg: DictDefault, sugar: bool) -> None:
    """Refuse settings of a GMT that is off; with ``optimizer: gmt`` the base still matters."""
    ignored = set(_set_keys(cfg)) - {"gmt_enabled"} - ({"gmt_base_optimizer"} if sugar else set())
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
