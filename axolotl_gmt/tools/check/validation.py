"""What Axolotl and GMT say of a config that is not trained.

Runs in a process that only checks (see :mod:`axolotl_gmt.tools.check.child`): without GPUs and
offline, and with Axolotl's plugins replaced for good.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import logging
import math
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from os.path import exists, expanduser, isfile

import torch
from axolotl.integrations.base import (
    BUILTIN_PLUGINS,
    AdapterCapabilities,
    BasePlugin,
    PluginManager,
    get_builtin_plugins,
    normalize_plugin_name,
)
from axolotl.utils import config as axolotl_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import MultiProcessAdapter
from pydantic import BaseModel, TypeAdapter, ValidationError

from axolotl_gmt.integrations.axolotl.args import PREFIX
from axolotl_gmt.integrations.axolotl.plugin import GMTPlugin
from axolotl_gmt.integrations.axolotl.raw_config import (
    BARE_NAME,
    NAME,
    PARALLEL_SIZES,
    PLUGIN_NAMES,
    Switch,
    check_held_out_text,
    check_known_optimizer,
    context_parallel_size,
    settle,
)

# Their code is Axolotl's or GMT's own.
_TRUSTED = {*PLUGIN_NAMES, *BUILTIN_PLUGINS}

# What a path of this machine looks like, where a name on the hub could stand as well.
_LOCAL = re.compile(r"(?!.*://)(?:\.{0,2}/.*|~.*|.*\.(?:jsonl?|parquet|csv|arrow|txt))")


@dataclass
class Validation:
    """What Axolotl and GMT say of a config before anything is loaded.

    Attributes:
        config: The config as a run would have it: with the base optimizer in place of `gmt` and,
            if there are no errors, with Axolotl's defaults.
        gpus: How many GPUs it was checked for.
        switch: Whether GMT is on; None if its own keys are in error.
        errors: Why a run would not start, a line each.
        remarks: What Axolotl warns of, and what was not checked.
        may_freeze: A plugin that freezes parameters, or may.
        known_keys: Top-level keys that Axolotl, GMT and listed integrations of Axolotl read.
        unknown_plugins: Plugins whose keys are not known, since they are not imported.
    """

    config: DictDefault
    gpus: int = 1
    switch: Switch | None = None
    errors: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    may_freeze: str | None = None
    known_keys: set[str] = field(default_factory=set)
    unknown_plugins: list[str] = field(default_factory=list)


def validated(raw: Mapping[str, object], gpus: int | None = None) -> Validation:
    """Check a config as Axolotl does on a machine with Hopper GPUs, whatever this machine is.

    No plugin is imported but GMT and the two that Axolotl always loads (with GMT on and a
    `gmt_criterion`, also the installed packages that offer criteria, which no file can name), and
    no model, data set or server is touched.

    Args:
        raw: What the YAML file holds, with keys in text; it is left alone.
        gpus: How many GPUs train; by default the fewest that the config's own keys ask for.
    """
    raw = deepcopy(dict(raw))  # Axolotl's validators write into what they validate.
    result = Validation(DictDefault(raw), errors=_misshapen(raw))
    if result.errors:
        return result
    cfg = result.config
    result.gpus = gpus or _fewest_gpus(cfg)
    _read_plugins(cfg, result)
    _only_trusted_plugins(cfg)
    MultiProcessAdapter.warning_once.cache_clear()  # Once for each config, not for each process.
    logger, collector = logging.getLogger("axolotl"), _Collector(result.remarks)
    logger.addHandler(collector)
    try:
        stumbled = None
        try:
            result.switch = settle(cfg)
            if result.switch.enabled:
                check_held_out_text(cfg, may_be_elsewhere=True)
        except ValueError as error:
            result.errors += str(error).splitlines()
        except (AttributeError, TypeError) as error:
            stumbled = error  # Over a nested value of the wrong type; the schema may name it.
        _, schema = axolotl_config.merge_input_args()
        result.known_keys |= _field_names(schema)
        try:
            result.config = _as_on_gpus(cfg, result.gpus)
        except ValidationError as error:
            result.errors += [
                line
                for line in _explain_schema(error, cfg)
                if result.switch or not line.startswith(PREFIX)  # Said already, with the fix.
            ]
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
            result.errors += _wrong_types(schema, raw) or [
                f"Axolotl's own check of the config ends in {type(error).__name__}: {error}"
            ]
        except MemoryError:
            raise
        except Exception as error:  # Its validators raise errors, and warnings, of many kinds.
            result.errors.append(str(error) or type(error).__name__)
        if (
            result.switch and not result.unknown_plugins
        ):  # A plugin can put another name in its place.
            result.errors += _unknown_optimizer(result.config.get("optimizer"))
        if stumbled and not result.errors:
            result.errors.append(f"GMT's check ends in {type(stumbled).__name__}: {stumbled}")
    finally:
        logger.removeHandler(collector)
    _note_what_was_not_checked(result)
    return result


def build_schema_once() -> None:
    """Let Axolotl build the schema of configs for the first file only; it takes most of a check.

    The schema depends on the plugins alone, and :func:`validated` gives each config the same.
    """
    axolotl_config.merge_input_args = functools.cache(axolotl_config.merge_input_args)


def _unknown_optimizer(optimizer: object) -> list[str]:
    """An error, if Axolotl would stop over this name once the model and the data are loaded."""
    if optimizer is None:
        return []
    try:
        check_known_optimizer("optimizer", getattr(optimizer, "value", optimizer))
    except ValueError as error:
        return [str(error)]
    return []


def _as_on_gpus(cfg: DictDefault, gpus: int) -> DictDefault:
    capabilities = {
        "bf16": True,
        "fp8": True,
        "tf32": True,
        "n_gpu": gpus,
        "compute_capability": "sm_90",
    }
    return axolotl_config.validate_config(
        cfg, capabilities, {"torch_version": torch.__version__.partition("+")[0]}
    )


def _misshapen(raw: Mapping[str, object]) -> list[str]:
    """Errors in what is read before Axolotl checks any type."""
    errors = []
    plugins, datasets, deepspeed = raw.get("plugins"), raw.get("datasets"), raw.get("deepspeed")
    if plugins and not (
        isinstance(plugins, list) and all(isinstance(n, str) and n for n in plugins)
    ):
        errors.append(f"plugins: {plugins!r} is not a list of names. Write plugins: [{BARE_NAME}].")
    if datasets and not (isinstance(datasets, list) and all(isinstance(d, dict) for d in datasets)):
        errors.append("datasets: is not a list of mappings. Write each one as '- path: ...'.")
    if isinstance(deepspeed, str) and exists(deepspeed) and not isfile(deepspeed):
        errors.append(f"deepspeed: {deepspeed!r} is not a file. Name a JSON file.")
    for key in PARALLEL_SIZES:
        if isinstance(size := raw.get(key), int) and size < 0:
            errors.append(f"{key}: {size!r} is no number of GPUs. Set 1 or more, or remove it.")
    return errors


def _fewest_gpus(cfg: DictDefault) -> int:
    sizes = [*(cfg.get(key) for key in PARALLEL_SIZES), context_parallel_size(cfg)]
    gpus = math.prod(size for size in sizes if isinstance(size, int) and size > 0)
    return max(gpus, 2) if cfg.get("fsdp_config") or cfg.get("deepspeed") else gpus


def _read_plugins(cfg: DictDefault, result: Validation) -> None:
    """Find out which keys listed plugins add, where their source tells without being run."""
    shipped = {
        entry.name: entry
        for entry in resources.files("axolotl.integrations").iterdir()
        if entry.is_dir()
    }
    listed = {normalize_plugin_name(name) for name in cfg.get("plugins") or []}
    for plugin in sorted({*listed, *get_builtin_plugins()} - _TRUSTED):
        integration = plugin.removeprefix("axolotl.integrations.").partition(".")[0]
        package = plugin.partition(".")[0]
        if integration in shipped:
            result.known_keys |= _keys_in_source(shipped[integration] / "args.py")
            if integration == "spectrum":
                result.may_freeze = plugin
        elif plugin.startswith("axolotl.integrations."):
            result.errors.append(
                f"plugins: {plugin!r} is not in the Axolotl that is installed here."
            )
        elif package == BARE_NAME or (
            difflib.get_close_matches(package, [BARE_NAME], cutoff=0.8)
            and not importlib.util.find_spec(package)
        ):
            result.errors.append(f"plugins: there is no {plugin!r}. Did you mean {BARE_NAME}?")
        else:
            result.unknown_plugins.append(plugin)
            result.may_freeze = plugin
    if listed - _TRUSTED:
        result.remarks.append(
            f"plugins: {', '.join(sorted(listed - _TRUSTED))}: not imported, so what they check "
            "themselves was not checked."
        )


def _keys_in_source(source: Traversable) -> set[str]:
    if not source.is_file():
        return set()
    return {
        node.target.id
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


class _NotImported(BasePlugin):
    """Stands for a plugin whose code is not to run, and vouches for the adapter it may bring."""

    def __init__(self, adapter: object) -> None:
        super().__init__()
        self._adapter = adapter

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(str(self._adapter), lora_like=True, relora=True)]


def _only_trusted_plugins(cfg: DictDefault) -> None:
    """Give Axolotl's plugin manager GMT and what Axolotl always loads, and no code of others."""
    manager = PluginManager()
    manager.plugins = OrderedDict()
    for name in BUILTIN_PLUGINS:
        manager.register(name)
    manager.plugins[NAME] = GMTPlugin()
    for name in (*get_builtin_plugins(), *(cfg.get("plugins") or [])):
        # Axolotl does not load a name that stands there already.
        plugin = _NotImported(cfg.get("adapter"))
        manager.plugins.setdefault(normalize_plugin_name(name), plugin)


class _Collector(logging.Handler):
    """Collects what Axolotl warns of, as remarks."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        line = f"Axolotl warns: {record.getMessage()}"
        if line not in self._lines:
            self._lines.append(line)


def _field_names(schema: type[BaseModel]) -> set[str]:
    """The keys that Axolotl reads: those of its schema, and `strict`, which it reads before."""
    aliases = {setting.alias for setting in schema.model_fields.values() if setting.alias}
    return {*schema.model_fields, *aliases, "strict"}


def _explain_schema(error: ValidationError, cfg: DictDefault) -> list[str]:
    """One line for each key that is wrong: key path, value and every reason."""
    # Axolotl turns data sets into models one after the other, before it checks the rest.
    prefix: tuple[str | int, ...] = ()
    if error.title.endswith("Dataset"):
        prefix = ("datasets", next(i for i, d in enumerate(cfg["datasets"]) if isinstance(d, dict)))
    reasons: dict[str, list[str]] = defaultdict(list)
    for item in error.errors():
        missing = item["type"] == "missing"
        path, value = _follow(cfg, (*prefix, *item["loc"]), missing)
        start = f"{path}: " if path else ""
        if missing:
            reasons[f"{start}is not set, but required."] = []
        elif item["type"] in ("value_error", "assertion_error"):
            reasons[f"{start}{item['ctx']['error']}"] = []
        else:  # A union gives a reason for each member.
            reasons[f"{start}{_shown(value)} is not valid: "].append(item["msg"])
    return [
        start + "; or: ".join(dict.fromkeys(said)) + ("." if said else "")
        for start, said in reasons.items()
    ]


def _shown(value: object) -> str:
    kinds = {Mapping: "a mapping", list: "a list"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), repr(value))


def _follow(
    value: object, location: Sequence[str | int], missing: bool = False
) -> tuple[str, object]:
    """Key path and value at a location of pydantic's, which names members of unions as well."""
    path = ""
    for position, part in enumerate(location, start=1):
        if isinstance(value, Mapping) and (
            part in value or (missing and position == len(location))
        ):
            path, value = f"{path}.{part}" if path else str(part), value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
    return path, value


def _wrong_types(schema: type[BaseModel], raw: Mapping[str, object]) -> list[str]:
    """Errors of each key on its own, for configs over which Axolotl's validators stumble."""
    lines = []
    for name, setting in schema.model_fields.items():
        key = setting.alias or name
        if raw.get(key) is not None:
            try:
                value: object = TypeAdapter(setting.annotation).validate_python(raw[key])
            except ValidationError as error:
                lines.append(f"{key}: {_shown(raw[key])} is not valid: {error.errors()[0]['msg']}.")
            except Exception:  # It is over this value, then, that Axolotl's validators stumble.
                lines.append(f"{key}: {_shown(raw[key])} is not valid.")
            else:  # Which a validator that runs before this conversion cannot know.
                if isinstance(raw[key], str) and isinstance(value, int | float):
                    lines.append(f"{key}: {raw[key]!r} is text. Write {value!r}, without quotes.")
        elif setting.is_required():
            lines.append(f"{key}: is not set, but required.")
    return lines


def _note_what_was_not_checked(result: Validation) -> None:
    attention, deepspeed = (result.config.get(k) for k in ("attn_implementation", "deepspeed"))
    missing = [f"{key}: {path}" for key, path in _inputs(result.config) if not exists(path)]
    if missing:
        result.remarks.append(
            f"{', '.join(missing)}: not here. Paths are relative to the folder in which axolotl is "
            "run; the training needs them."
        )
    if isinstance(attention, str) and attention.startswith("flash_attention"):
        result.remarks.append(
            f"attn_implementation: {attention} was not looked for; it must be where the training "
            "is."
        )
    if isinstance(deepspeed, str) and not isfile(deepspeed):
        result.remarks.append(
            f"deepspeed: {deepspeed} is not here, so what it holds was not checked. Its path is "
            "relative to the folder in which axolotl is run; `axolotl fetch deepspeed_configs` "
            "gets those of Axolotl."
        )


def _inputs(cfg: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Key path and path of the local files and folders that a config reads."""
    named = {key: cfg.get(key) for key in ("base_model", "tokenizer_config", "lora_model_dir")}
    for key in ("datasets", "test_datasets", "pretraining_dataset"):
        entries = cfg.get(key)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, Mapping):
                named[f"{key}[{index}].path"] = entry.get("path")
    for key, value in named.items():
        if isinstance(value, str) and _LOCAL.fullmatch(value):
            yield key, expanduser(value)
    if isinstance(text := cfg.get("gmt_forgetting"), str):  # Never a name on the hub.
        yield "gmt_forgetting", expanduser(text)
