"""Whether a YAML for Axolotl is good, before a GPU is rented: what `axolotl gmt check` says of it.

Reads the file, counts parameters on the meta device and gathers what other modules find. Offline;
nothing that the file names is run, whatever the file is.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import yaml

from axolotl_gmt.tools.check import sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from axolotl_gmt.config import GMTConfig
    from axolotl_gmt.tools.check.validation import Validation

MAX_BYTES = 1_000_000
# Of a file with its aliases written out, which would else grow without bounds.
MAX_NODES = 100_000
# Of a whole number. Python itself refuses to print those of thousands.
MAX_DIGITS = 100
# Of a message; those of Axolotl can quote whole values.
MAX_LINE = 2_000


class UnreadableError(Exception):
    """A file that holds no config; the message says why in one line."""


@dataclass(frozen=True)
class Mask:
    """Tensors and parameters that GMT masks, and those that are trained; tied ones count once."""

    masked_tensors: int
    masked_parameters: int
    trained_tensors: int
    trained_parameters: int


@dataclass
class Plan:
    """What GMT would do with a config.

    Attributes:
        enabled: Whether GMT is on.
        why: The key that decides it.
        base_optimizer: What the run steps with; None if unset in a config that is in error.
        settings: Those of :class:`GMTConfig`, empty if GMT is off.
        mask: Counts, None if GMT is off or the model is not known.
        not_counted: Why there are no counts.
    """

    enabled: bool
    why: str
    base_optimizer: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    mask: Mask | None = None
    not_counted: str | None = None


@dataclass
class Report:
    """What was found in one file.

    Attributes:
        path: As it was given.
        readable: Whether the file holds a config at all.
        gpus: How many GPUs the config was checked for.
        errors: Why a run would not start, a line each.
        warnings: What is likely to be regretted: secrets, paths, keys that nobody reads.
        remarks: Good to know; not held against the file.
        gmt: What GMT would do, if its keys can be read.
    """

    path: str
    readable: bool = True
    gpus: int | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    gmt: Plan | None = None

    @property
    def ok(self) -> bool:
        """Whether there are neither errors nor warnings."""
        return not (self.errors or self.warnings)

    def as_dict(self) -> dict[str, object]:
        """The report with ``ok``, for JSON."""
        return {"path": self.path, "ok": self.ok, **asdict(self)}


def check(path: Path, gpus: int | None = None, private: bool = False) -> Report:
    """Check one file. Raises nothing, whatever it holds.

    Args:
        path: A YAML file.
        gpus: How many GPUs train; by default the fewest that the config's own keys ask for.
        private: Leave out the warnings of what should not be shared.
    """
    report = Report(str(path))
    secrets: set[str] = set()
    try:
        text = _read(path)
        raw, report.warnings = _parse(text)
    except UnreadableError as error:
        report.readable = False
        report.errors.append(str(error))
    else:
        shared = sharing.look_over(raw, text)
        secrets = shared.secrets
        _check_config(report, raw, gpus)
        if not private:
            report.warnings += shared.warnings
            report.remarks += shared.remarks

    def shown(value: Any) -> Any:
        """A value with nothing in it that a terminal must not get."""
        if isinstance(value, str):
            return _one_line(sharing.hidden(value, secrets))
        if isinstance(value, list | tuple):
            return type(value)(map(shown, value))
        return (
            {key: shown(item) for key, item in value.items()} if isinstance(value, dict) else value
        )

    report.errors, report.warnings, report.remarks = map(
        shown, (report.errors, report.warnings, report.remarks)
    )
    if report.gmt:
        report.gmt = Plan(**{key: shown(value) for key, value in vars(report.gmt).items()})
    return report


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}.") from error
    if len(content) > MAX_BYTES:
        raise UnreadableError(f"has more than {MAX_BYTES:,} bytes, too many for a config.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"is not UTF-8 text ({error.reason} at byte {error.start}), so no YAML."
        ) from error


def _parse(text: str) -> tuple[dict[str, object], list[str]]:
    """The config in ``text``, and a warning for each key that is given twice.

    Raises:
        UnreadableError: If it is not a YAML mapping with keys in text.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        nodes = _nodes(root)
        if len(nodes) > MAX_NODES:
            raise UnreadableError(
                f"has more than {MAX_NODES:,} values with aliases written out, or contains itself."
            )
        for node in nodes:
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
                line = node.start_mark.line + 1
                raise UnreadableError(
                    f"has a number of more than {MAX_DIGITS} digits in line {line}."
                )
        raw = yaml.safe_load(text)
    except RecursionError as error:
        raise UnreadableError("is nested too deeply to be a config.") from error
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UnreadableError(f"is not valid YAML{place}: {error.problem}.") from error
    except UnreadableError:
        raise
    # PyYAML lets errors of many kinds out of values such as the date 2024-99-99.
    except Exception as error:
        raise UnreadableError(f"is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        kind = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise UnreadableError(f"holds {kind}, not keys and values such as 'base_model: ...'.")
    for key in raw:
        if not isinstance(key, str):
            raise UnreadableError(f"has the key {key!r}, which is not text. Put it in quotes.")
    # An alias brings the same node again.
    return raw, list(dict.fromkeys(line for node in nodes for line in _duplicates(node)))


def _nodes(root: yaml.Node | None) -> list[yaml.Node]:
    """Every node below ``root``, once for each alias; not many more than MAX_NODES."""
    nodes: list[yaml.Node] = []
    waiting = [root] if root else []
    while waiting and len(nodes) <= MAX_NODES:
        node = waiting.pop()
        nodes.append(node)
        if isinstance(node, yaml.MappingNode):
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return nodes


def _duplicates(node: yaml.Node) -> Iterator[str]:
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            line = key.start_mark.line + 1
            if key.value in lines:
                yield (
                    f"{key.value}: is given twice, in lines {lines[key.value]} and {line}. The "
                    "last one wins in silence. Remove one."
                )
            lines[key.value] = line


def _check_config(report: Report, raw: Mapping[str, object], gpus: int | None) -> None:
    with _alone():
        from axolotl_gmt.integrations.axolotl.args import read_config
        from axolotl_gmt.tools.check import validation

        found = validation.validated(raw, gpus)
        report.gpus = found.gpus
        report.errors += found.errors
        report.remarks += found.remarks
        if found.known_keys:
            _check_keys(report, raw, found)
        if found.switch is None:
            return
        optimizer = found.config.get("optimizer")
        name = getattr(optimizer, "value", optimizer)  # Axolotl's default is a member of an enum.
        report.gmt = Plan(*found.switch, base_optimizer=name if isinstance(name, str) else None)
        if found.switch.enabled:
            settings = read_config(found.config)
            report.gmt.settings = settings.model_dump()
            if report.errors:
                report.gmt.not_counted = "the config has errors"
            else:
                _count(report, report.gmt, found, settings)


def _check_keys(report: Report, raw: Mapping[str, object], found: Validation) -> None:
    """Warn of keys that nobody reads; those of plugins that are not imported are not known."""
    refused = " ".join(found.errors)  # Axolotl names keys that it read in former versions.
    unknown = [
        key
        for key in raw
        if not (key in found.known_keys or key.startswith("gmt_") or f"`{key}`" in refused)
    ]
    perhaps = []
    for key in unknown:
        nearest = difflib.get_close_matches(key, found.known_keys, n=1, cutoff=0.8)
        if found.strangers and not nearest:
            perhaps.append(key)
            continue
        fix = f"Did you mean {nearest[0]}?" if nearest else "Remove it."
        report.warnings.append(f"{key}: Axolotl has no such key, and ignores it in silence. {fix}")
    if found.strangers:
        keys = f": {', '.join(perhaps)}" if perhaps else ", if there are any"
        report.remarks.append(
            f"Keys of {', '.join(found.strangers)} are not known without importing it, so they "
            f"were not checked{keys}."
        )


def _count(report: Report, plan: Plan, found: Validation, settings: GMTConfig) -> None:
    from axolotl_gmt.tools.check import validation

    try:
        model = validation.prepare_model(_model_on_meta(found.config), found.config)
    except OSError:
        plan.not_counted = "the model's config is not on this machine"
        return
    # The configs of strangers make Transformers and PEFT raise errors of nearly every kind.
    except Exception as error:
        plan.not_counted = next(iter(str(error).splitlines()), type(error).__name__)
        return
    if found.freezing:
        plan.not_counted = f"{found.freezing} may decide what is trained"
        return
    try:
        plan.mask = count(model, settings)
    except ValueError as error:
        report.errors.append(str(error))
        plan.not_counted = "the config has errors"


def count(model: torch.nn.Module, settings: GMTConfig) -> Mask:
    """What GMT masks of ``model``, whose tensors may lie on the meta device.

    Raises:
        ValueError: If nothing is trained, a pattern matches nothing that is, or the criterion
            cannot do with these parameters, as in training.
    """
    import torch

    from axolotl_gmt.masking.masker import GradientMasker

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("unfrozen_parameters: nothing is trained. Change the patterns.")
    masker = GradientMasker(model.named_parameters(remove_duplicate=False), settings)
    optimizer = torch.optim.SGD(trained)
    masker.attach(optimizer).remove()  # Which checks the patterns.
    masked = [parameter for _, parameter in masker.masked_parameters(optimizer)]
    return Mask(
        len(masked), sum(p.numel() for p in masked), len(trained), sum(p.numel() for p in trained)
    )


def _model_on_meta(cfg: Mapping[str, Any]) -> PreTrainedModel:
    """The model that a validated config trains, without memory for its weights.

    Raises:
        OSError: If its config is neither a local folder nor in the cache of the hub.
    """
    import torch
    import transformers

    options = {"revision": cfg.get("revision_of_model"), "num_labels": cfg.get("num_labels")}
    config = transformers.AutoConfig.from_pretrained(
        cfg.get("base_model_config") or cfg["base_model"],
        local_files_only=True,
        trust_remote_code=False,
        **{key: value for key, value in options.items() if value is not None},
    )
    if cfg.get("trust_remote_code") and hasattr(config, "auto_map"):
        raise ValueError("the model's own code (trust_remote_code) decides, and is not run")
    for key, value in (cfg.get("overrides_of_model_config") or {}).items():
        setattr(config, key, value)
    # Other implementations may be fetched from the hub.
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    name = cfg.get("type_of_model") or "AutoModelForCausalLM"
    with torch.device("meta"):
        if not name.startswith("Auto"):
            return getattr(transformers, name)._from_config(config, **options)
        if (
            name == "AutoModelForCausalLM"
            and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        ):
            name = "AutoModelForImageTextToText"  # As Axolotl does.
        return getattr(transformers, name).from_config(config, trust_remote_code=False, **options)


@contextmanager
def _alone() -> Iterator[None]:
    """No request to the hub, and no word of the libraries that are imported and used.

    bitsandbytes, when imported, looks for kernels on the hub; Axolotl's command line sends all
    warnings to stdout.
    """
    from huggingface_hub import constants

    root = logging.getLogger()
    with (
        patch.object(constants, "HF_HUB_OFFLINE", True),
        patch.object(root, "handlers", [logging.NullHandler()]),
        patch.object(logging.getLogger("torch.utils._pytree"), "disabled", True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _one_line(text: str) -> str:
    """``text`` on one line, not endless, with what a terminal would obey shown as an escape."""
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in " ".join(text.split())
    )
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."
