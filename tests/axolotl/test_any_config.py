"""Any Axolotl YAML takes the line ``plugins: [axolotl_gmt]``, or is refused with key and fix.

``configs/accepted`` holds configs that Axolotl takes with and without the line, ``refused`` those
that GMT refuses by design, and ``invalid`` those that Axolotl refuses by itself. The paths in them
are relative to the root of the repository.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from unittest.mock import MagicMock

import axolotl.integrations
import axolotl.utils.config
import pytest
import torch
import yaml
from axolotl.integrations import base
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.integrations.nemo_gym import NemoGymPlugin
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.enums import (
    CANONICAL_ATTN_IMPLS,
    LEGACY_ATTN_FLAG_TO_IMPL,
    ChatTemplate,
    CustomSupportedOptimizers,
    RingAttnFunc,
    RLType,
    TorchAOQuantDType,
)
from axolotl.utils.schemas.peft import LoraConfig
from pydantic import ValidationError
from transformers.training_args import OptimizerNames

from axolotl_gmt import GMTCallback, GMTPlugin, GMTReportCallback

CONFIGS = Path(__file__).parent / "configs"
ACCEPTED = sorted(CONFIGS.glob("accepted/*.yml"))
LINE = "axolotl_gmt"
SPELLINGS = [
    LINE,
    "axolotl_gmt.GMTPlugin",
    "axolotl_gmt:GMTPlugin",
    "axolotl_gmt.plugin.GMTPlugin",
    "axolotl_gmt.plugin:GMTPlugin",
    "axolotl_gmt.integrations.axolotl.plugin.GMTPlugin",
]

# What axolotl.cli.config.gpu_capabilities finds on a node of eight H100s.
NODE = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}
ENVIRONMENT = {"torch_version": torch.__version__.partition("+")[0]}

Raw = dict[str, Any]


@dataclass(frozen=True)
class Refusal:
    """How GMT refuses a config: a pattern that the message matches from its start, beginning with
    the key, and changes to the config that follow the message's advice; None removes a key."""

    message: str
    fix: Raw


def _layerwise(optimizer: str, other: str) -> Refusal:
    return Refusal(rf"optimizer: '{optimizer}' .* Set another one, .*{other}", {"optimizer": other})


def _deepspeed(key: str, fix: str, **zero: Any) -> Refusal:
    return Refusal(rf"deepspeed: .*{re.escape(key)} .*{fix}", {"deepspeed": _zero(**zero)})


def _zero(**zero: Any) -> Raw:
    return {
        "zero_optimization": {"stage": 2, **zero},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


REFUSED = {
    "lomo": _layerwise("lomo", "adamw_torch_fused"),
    "adalomo": _layerwise("adalomo", "adamw_torch_fused"),
    "galore_adamw_layerwise": _layerwise("galore_adamw_layerwise", "galore_adamw"),
    "galore_adamw_8bit_layerwise": _layerwise("galore_adamw_8bit_layerwise", "galore_adamw_8bit"),
    "galore_adafactor_layerwise": _layerwise("galore_adafactor_layerwise", "galore_adafactor"),
    "apollo_adamw_layerwise": _layerwise("apollo_adamw_layerwise", "apollo_adamw"),
    "zero0_inline": _deepspeed("zero_optimization.stage: 0", r"Set 1, 2 or 3\.", stage=1),
    "zero0_file": _deepspeed("zero_optimization.stage: 0", r"Set 1, 2 or 3\.", stage=3),
    "zero3_nvme": _deepspeed(
        "zero_optimization.offload_optimizer.device: 'nvme'",
        r"Set cpu\.",
        stage=3,
        offload_optimizer={"device": "cpu"},
    ),
    "zero3_super_offload": _deepspeed(
        "offload_optimizer.super_offload: True",
        r"Set false\.",
        stage=3,
        offload_optimizer={"device": "cpu", "super_offload": False},
    ),
    "zero2_round_robin": _deepspeed(
        "round_robin_gradients: True", r"Set false\.", round_robin_gradients=False
    ),
    "zero2_zenflow": _deepspeed("zero_optimization.zenflow:", r"Remove it\."),
    "zero3_mics": _deepspeed("zero_optimization.mics_shard_size: 4", r"Remove it\.", stage=3),
    "zero1_one_bit_adam": _deepspeed(
        "optimizer.type: 'onebitadam'", "or remove optimizer", stage=1
    ),
    "deepspeed_file_tensor_parallel": _deepspeed("tensor_parallel:", r"Remove it\.", stage=1),
    "deepspeed_file_compiled": _deepspeed("compile.deepcompile: True", r"Set false\.", stage=3),
    "deepspeed_compiled": Refusal(
        r"deepcompile: True .* Set deepcompile: false\.", {"deepcompile": False}
    ),
    "deepspeed_tensor_parallel": Refusal(
        r"tensor_parallel_size: 2 .* Remove tensor_parallel_size or deepspeed",
        {"tensor_parallel_size": None},
    ),
    "tensor_parallel_lora": Refusal(
        r"tensor_parallel_size: 2 .* Remove tensor_parallel_size or adapter",
        {"tensor_parallel_size": None},
    ),
    "expert_parallel": Refusal(
        r"expert_parallel_size: 4 .* Remove it, and shard with FSDP2",
        {"expert_parallel_size": None},
    ),
    "remote_training": Refusal(
        r"plugins: 'axolotl.integrations.hatchery.HatcheryPlugin' .* Remove it, or remove axolotl",
        {"plugins": None},
    ),
}

# What is found in Axolotl's own message.
INVALID = {
    "attention_of_a_later_transformers": "requires a transformers release",
    "deepspeed_with_flash_optimizer": "flash_adamw optimizer is incompatible with DeepSpeed",
    "deepspeed_with_muon": "Muon optimizer is currently incompatible with DeepSpeed",
    "fsdp1": "fsdp_version: 1 is no longer supported",
    "fsdp1_list": "The top-level `fsdp` list is no longer supported",
    "fsdp2_and_deepspeed": "deepspeed and fsdp cannot be used together",
    "fsdp2_with_8bit_optimizer": "FSDP2 not compatible with adamw_bnb_8bit",
    "fsdp2_with_sharding_strategy": "fsdp_config.sharding_strategy is an FSDP1-only option",
    "grpo_uneven_groups": "divisible by `trl.num_generations`",
    "key_without_a_name": "keywords must be strings",
    "kto_with_dropped_columns": "Set `remove_unused_columns: False`",
    "no_data": "either datasets or pretraining_dataset is required",
    "packed_preferences": "`sample_packing: true` does not work with RLHF",
    "polora_without_adapter": "requires adapter: lora or qlora",
    "pretraining_without_end": "max_steps must be set",
    "quantised_without_adapter": "not supported without setting an adapter",
    "sharegpt": "`type: sharegpt.*` is deprecated",
    "two_fused_losses": "Only one cross entropy optimization",
    "two_warmups": "mutually exclusive",
    "unknown_adapter": "Adapter 'ia3' is not built in",
    "unknown_attention": "Use the canonical name 'flash_attention_2'",
}


@dataclass(frozen=True)
class Outcome:
    """What Axolotl makes of a config.

    Attributes:
        config: As validated; empty if it was refused.
        errors: Of a refused one.
        environment: Variables that plugins have set or changed.
    """

    config: Raw
    errors: list[str]
    environment: dict[str, str]

    def without_gmt(self) -> Outcome:
        """The same, but for the keys that GMT brings and the list that names it."""
        config = {
            key: value
            for key, value in self.config.items()
            if key != "plugins" and not key.startswith("gmt_")
        }
        return Outcome(config, self.errors, self.environment)


Load = Callable[..., Outcome]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """Validates a raw config as ``axolotl train`` does, with or without GMT installed."""
    with pytest.MonkeyPatch.context() as patch:
        # Axolotl writes some DeepSpeed files anew, and the path becomes part of the config.
        folder = str(tmp_path_factory.mktemp("deepspeed"))
        patch.setattr("tempfile.mkdtemp", lambda *args, **kwargs: folder)
        _isolate(patch)
        yield _outcome
        PluginManager.get_instance().plugins.clear()


def _outcome(raw: Raw, installed: bool = True) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        if not installed:
            others = tuple(p for p in base.get_builtin_plugins() if not p.startswith(LINE))
            patch.setattr(base, "get_builtin_plugins", lambda: others)
        before = dict(os.environ)
        patch.setattr(os, "environ", dict(before))
        PluginManager.get_instance().plugins.clear()
        config, errors = _validate(DictDefault(raw))
        changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
        return Outcome(config, errors, changed)


def _isolate(patch: pytest.MonkeyPatch) -> None:
    patch.chdir(CONFIGS.parents[2])
    patch.setattr("sys.argv", ["python"])  # In a command of Axolotl an error ends the process.
    # It clones a repository and waits for servers.
    patch.setattr(NemoGymPlugin, "register", lambda self, cfg: None)
    # Liger's plugin asks whether another test has imported its kernels, which fixes their backend.
    patch.delitem(sys.modules, "liger_kernel.ops", raising=False)
    if importlib.util.find_spec("llmcompressor") is None:
        for name in ("llmcompressor", "llmcompressor.core", "llmcompressor.recipe"):
            patch.setitem(sys.modules, name, MagicMock())
        # So that the plugin is forgotten together with the stand-ins.
        for name in ("llm_compressor", "llm_compressor.plugin"):
            patch.setitem(sys.modules, f"axolotl.integrations.{name}", MagicMock())
            del sys.modules[f"axolotl.integrations.{name}"]
    # The schema depends on which plugins are loaded and on nothing else, and making one takes
    # longer than all else in a validation.
    schemas: dict[tuple[str, ...], Any] = {}
    make = axolotl.utils.config.merge_input_args

    def schema_of_these_plugins() -> Any:
        arguments = tuple(PluginManager.get_instance().get_input_args())
        if arguments not in schemas:
            schemas[arguments] = make()
        return schemas[arguments]

    patch.setattr(axolotl.utils.config, "merge_input_args", schema_of_these_plugins)


def _validate(cfg: DictDefault) -> tuple[Raw, list[str]]:
    try:
        prepare_plugins(cfg)
        machine = (None, None) if cfg.use_ray else (NODE, ENVIRONMENT)
        return validate_config(cfg, *machine).to_dict(), []
    except ValidationError as error:  # Its own text quotes the input, which the line changes.
        return {}, [f"{detail['loc']}: {detail['msg']}" for detail in error.errors()]
    except Exception as error:
        return {}, [str(error)]


def read(file: Path) -> Raw:
    raw: Raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    return raw


def with_line(raw: Raw, line: str = LINE) -> Raw:
    return {**raw, "plugins": [*(raw.get("plugins") or []), line]}


def named(file: Path) -> str:
    return file.stem


@pytest.mark.parametrize("file", ACCEPTED, ids=named)
def test_the_line_changes_nothing_but_the_keys_of_gmt(file: Path, load: Load) -> None:
    without = load(read(file), installed=False)
    assert without.errors == []
    assert load(read(file)) == without, "GMT is installed, but not listed"
    with_it = load(with_line(read(file)))
    assert with_it.errors == []
    assert with_it.without_gmt() == without.without_gmt()
    assert with_it.config["gmt_enabled"] is True
    assert with_it.config["plugins"] == [*without.config.get("plugins", []), LINE]
    assert {key for key in with_it.config if key.startswith("gmt_")} == {"gmt_enabled"}


@pytest.mark.parametrize("file", ACCEPTED, ids=named)
def test_optimizer_gmt_over_any_base_changes_nothing_but_the_keys_of_gmt(
    file: Path, load: Load
) -> None:
    raw = read(file)
    base_optimizer = raw.get("optimizer", "adamw_torch_fused")
    sugar = load({**raw, "optimizer": "gmt", "gmt_base_optimizer": base_optimizer})
    assert sugar.errors == []
    assert sugar.config["gmt_enabled"] is True
    assert sugar.without_gmt() == load(read(file), installed=False).without_gmt()


@pytest.mark.parametrize("name", REFUSED)
def test_gmt_refuses_by_naming_the_key_and_a_fix_that_works(name: str, load: Load) -> None:
    file, refusal = CONFIGS / "refused" / f"{name}.yml", REFUSED[name]
    without = load(read(file), installed=False)
    assert without.errors == []
    assert load(read(file)) == without, "GMT is installed, but not listed"
    (message,) = load(with_line(read(file))).errors
    assert re.match(refusal.message, message), message
    fixed = {**read(file), **refusal.fix}
    fixed = {key: value for key, value in fixed.items() if value is not None}
    with_it = load(with_line(fixed))
    assert with_it.errors == []
    assert with_it.without_gmt() == load(fixed, installed=False).without_gmt()


@pytest.mark.parametrize("name", REFUSED)
def test_gmt_that_is_listed_and_off_refuses_nothing(name: str, load: Load) -> None:
    raw = read(CONFIGS / "refused" / f"{name}.yml")
    off = load(with_line({**raw, "gmt_enabled": False}))
    assert off.errors == []
    assert off.without_gmt() == load(raw, installed=False).without_gmt()


@pytest.mark.parametrize("name", INVALID)
def test_what_axolotl_refuses_it_refuses_in_the_same_words_with_the_line(
    name: str, load: Load
) -> None:
    file = CONFIGS / "invalid" / f"{name}.yml"
    without = load(read(file), installed=False)
    assert INVALID[name] in "\n".join(without.errors)
    assert load(read(file)) == without
    assert load(with_line(read(file))) == without


def test_each_config_is_marked_with_what_is_expected() -> None:
    assert {file.stem for file in CONFIGS.glob("refused/*.yml")} == set(REFUSED)
    assert {file.stem for file in CONFIGS.glob("invalid/*.yml")} == set(INVALID)
    assert {folder.name for folder in CONFIGS.iterdir()} == {
        "accepted",
        "refused",
        "invalid",
        "deepspeed",
    }


# How files write their plugins.
WRITTEN = {
    "no plugins": "",
    "nothing under plugins": "plugins:",
    "an empty list": "plugins: []",
    "another plugin": "plugins:\n  - axolotl.integrations.liger.LigerPlugin",
    "other plugins by an anchor": (
        "shared: &shared [axolotl.integrations.liger:LigerPlugin]\nplugins: *shared"
    ),
    "a merged mapping": (
        "common: &common\n  plugins: [axolotl.integrations.grokfast.GrokfastPlugin]\n<<: *common"
    ),
    "the line already": "plugins: [axolotl_gmt]",
    "two spellings": "plugins: ['axolotl_gmt:GMTPlugin', axolotl_gmt]",
}


@pytest.mark.parametrize("line", SPELLINGS)
@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_every_spelling_of_the_line_joins_whatever_is_under_plugins(
    written: str, line: str, load: Load
) -> None:
    text = (CONFIGS / "accepted/sft_alpaca_defaults.yml").read_text() + written
    raw = yaml.safe_load(text)
    outcome = load(with_line(raw, line))
    assert outcome.errors == []
    assert outcome.config["gmt_enabled"] is True
    others = [name for name in raw.get("plugins") or [] if not name.startswith(LINE)]
    without = load({**raw, "plugins": others}, installed=False)
    assert outcome.without_gmt() == without.without_gmt()
    assert masks_once()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("axolotl_gmt", "plugins: 'axolotl_gmt' is text, not a list of names"),
        ("axolotl.integrations.liger.LigerPlugin", "not enough values to unpack"),  # Axolotl's own.
    ],
)
def test_plugins_that_is_a_string_is_refused(line: str, expected: str, load: Load) -> None:
    raw = read(CONFIGS / "accepted/sft_alpaca_defaults.yml")
    (message,) = load({**raw, "plugins": line}).errors
    assert expected in message


def loaded_plugins() -> list[BasePlugin]:
    return list(PluginManager.get_instance().plugins.values())


def masks_once() -> bool:
    """Whether of all loaded plugins exactly one is GMT's, and adds each callback once."""
    gmt = [plugin for plugin in loaded_plugins() if isinstance(plugin, GMTPlugin)]
    callbacks = gmt[0].add_callbacks_post_trainer(DictDefault(gmt_enabled=True), MagicMock())
    added = [type(callback) for callback in callbacks]
    return len(gmt) == 1 and added == [GMTCallback, GMTReportCallback]


def shipped_plugins() -> dict[str, str]:
    """The class of each plugin that Axolotl ships, and its name as `plugins` takes it."""
    (folder,) = map(Path, axolotl.integrations.__path__)
    found = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(
                isinstance(parent, ast.Name) and parent.id == BasePlugin.__name__
                for parent in node.bases
            ):
                module = ".".join(file.relative_to(folder).with_suffix("").parts)
                module = module.removesuffix(".__init__")
                found[node.name] = f"axolotl.integrations.{module}.{node.name}"
    return found


SHIPPED = shipped_plugins()


def classes_of_plugins(raw: Raw) -> set[object]:
    return {re.split(r"[.:]", name)[-1] for name in raw.get("plugins") or []}


@pytest.mark.parametrize("plugin", SHIPPED)
def test_the_line_stands_before_or_after_any_plugin_of_axolotl(plugin: str, load: Load) -> None:
    file = next(
        file
        for file in [*ACCEPTED, *CONFIGS.glob("refused/*.yml")]
        if plugin in classes_of_plugins(read(file))
    )
    raw = read(file)
    after = load(with_line(raw))
    before = load({**raw, "plugins": [LINE, *raw["plugins"]]})
    if file.stem in REFUSED:
        assert before == after
        assert len(before.errors) == 1
        return
    assert after.errors == before.errors == []
    assert before.without_gmt() == after.without_gmt()
    assert before.config["gmt_enabled"] is after.config["gmt_enabled"] is True
    assert plugin in {type(loaded).__name__ for loaded in loaded_plugins()}
    assert masks_once()


def datasets_of(raw: Raw) -> list[Raw]:
    return [*(raw.get("datasets") or []), *(raw.get("test_datasets") or [])]


def chat_templates(raw: Raw) -> set[object]:
    return {part.get("chat_template") for part in (raw, *datasets_of(raw))}


def deepspeed_stages(raw: Raw) -> set[object]:
    deepspeed = raw.get("deepspeed")
    if deepspeed is None:
        return set()
    inline = isinstance(deepspeed, dict)
    settings = deepspeed if inline else json.loads((CONFIGS.parents[2] / deepspeed).read_text())
    return {(settings["zero_optimization"]["stage"], "inline" if inline else "file")}


def fsdp_versions(raw: Raw) -> set[object]:
    config = raw.get("fsdp_config") or {}
    return {raw.get("fsdp_version"), config.get("fsdp_version")} if config else set()


def quantised_to(raw: Raw) -> set[object]:
    qat = raw.get("qat") or {}
    return {qat.get("weight_dtype"), qat.get("activation_dtype")}


def value_of(key: str) -> Callable[[Raw], set[object]]:
    return lambda raw: {raw.get(key)}


def built_in_adapters() -> set[str]:
    """The adapters that need no plugin, which Axolotl lists in the source of a validator only."""
    source = inspect.getsource(LoraConfig.validate_adapter)
    (names,) = re.findall(r"adapter not in (\(.*?\))", source)
    return set(ast.literal_eval(names))


def literals(key: str) -> set[str]:
    """The strings that a key of Axolotl's schema may be."""
    found: set[str] = set()
    annotations = [AxolotlInputConfig.model_fields[key].annotation]
    while annotations:
        arguments = get_args(annotations.pop())
        found |= {argument for argument in arguments if isinstance(argument, str)}
        annotations += [argument for argument in arguments if not isinstance(argument, str)]
    return found


OPTIMIZERS = {item.value for item in (*OptimizerNames, *CustomSupportedOptimizers)}

# What the collection must hold: the values that Axolotl knows, and where a config has them.
COVERED: dict[str, tuple[set[Any], Callable[[Raw], set[object]]]] = {
    "rl": ({None, *(item.value for item in RLType)}, value_of("rl")),
    "reward models": ({True}, lambda raw: {raw.get("reward_model")}),
    "process reward models": ({True}, lambda raw: {raw.get("process_reward_model")}),
    "optimizer": (OPTIMIZERS, value_of("optimizer")),
    "attn_implementation": (set(CANONICAL_ATTN_IMPLS), value_of("attn_implementation")),
    "older attention keys": (set(LEGACY_ATTN_FLAG_TO_IMPL), lambda raw: {k for k in raw if raw[k]}),
    "adapter": ({None, *built_in_adapters()}, value_of("adapter")),
    "DeepSpeed": (
        {(stage, where) for stage in range(4) for where in ("inline", "file")},
        deepspeed_stages,
    ),
    "FSDP": ({1, 2}, fsdp_versions),
    "chat_template": ({item.value for item in ChatTemplate}, chat_templates),
    "ring_attn_func": ({item.value for item in RingAttnFunc}, value_of("ring_attn_func")),
    "qat": ({item.name for item in TorchAOQuantDType}, quantised_to),
    "gradient_checkpointing": (
        {True, *literals("gradient_checkpointing")},
        value_of("gradient_checkpointing"),
    ),
    "activation_offloading": (
        {True, *literals("activation_offloading")},
        value_of("activation_offloading"),
    ),
    "plugins": (set(SHIPPED), classes_of_plugins),
}


@functools.cache
def collection() -> list[Raw]:
    return [read(file) for file in CONFIGS.glob("*/*.yml")]


@pytest.mark.parametrize("key", COVERED)
def test_the_collection_has_all_that_axolotl_knows(key: str) -> None:
    known, values = COVERED[key]
    found = {value for raw in collection() for value in values(raw)}
    assert known - found == set()


def test_the_collection_has_every_adapter_of_axolotls_plugins(load: Load) -> None:
    known = {
        adapter.name
        for name in SHIPPED.values()
        for adapter in base.load_plugin(name).get_adapter_capabilities()
    }
    assert known - {raw.get("adapter") for raw in collection()} == set()


@pytest.mark.parametrize("file", [*ACCEPTED, *CONFIGS.glob("refused/*.yml")], ids=named)
def test_the_collection_has_no_key_that_axolotl_would_ignore(file: Path, load: Load) -> None:
    raw = read(file)
    load(raw)
    known: set[str | None] = set(AxolotlInputConfig.model_fields)
    known |= {field.alias for field in AxolotlInputConfig.model_fields.values()}
    for arguments in PluginManager.get_instance().get_input_args():
        known |= set(pkgutil.resolve_name(arguments).model_fields)
    assert set(raw) - known == set()
    assert raw.get("optimizer") in {None, *OPTIMIZERS}
