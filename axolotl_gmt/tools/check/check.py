"""Whether a YAML file for Axolotl is good: the steps of a check, from a file to its report.

Nothing that the file names is run, whatever the file is.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.errors import UserError
from axolotl_gmt.integrations.axolotl.args import read_config
from axolotl_gmt.integrations.axolotl.meta_model import model_on_meta, prepare_model
from axolotl_gmt.integrations.axolotl.raw_config import looks_like_key
from axolotl_gmt.tokens import MARK, hide
from axolotl_gmt.tools.check import sharing, yaml_file
from axolotl_gmt.tools.check.count import count
from axolotl_gmt.tools.check.report import Plan, Report
from axolotl_gmt.tools.check.validation import Validation, validated

# Of a message; those of Axolotl can quote whole values.
MAX_LINE = 2_000
# Of keys that look like one that Axolotl knows; to look for the nearest one takes long.
MAX_SUGGESTIONS = 100


def check(path: Path, gpus: int | None = None, share: bool = False, has_gpu: bool = True) -> Report:
    """Check one file, whatever it holds. Axolotl's plugins are replaced, so not beside a training.

    Args:
        path: A YAML file.
        gpus: How many GPUs train; by default the fewest that the config's own keys ask for.
        share: Warn also of what should not be shared.
        has_gpu: Whether this machine has one, without which Axolotl chooses another precision.
    """
    report = Report(str(path))
    try:
        text = yaml_file.read(path)
        raw, report.warnings = yaml_file.parse(text)
    except UserError as error:
        report.readable = False
        report.errors.append(str(error))
    else:
        shared = sharing.look_over(raw, text)
        _check_config(report, shared.config, gpus)
        if not has_gpu:
            report.remarks += _remarks_on_precision(shared.config)
        if share:
            report.warnings += shared.warnings
            report.remarks += shared.remarks
    said = {key: _shown(getattr(report, key)) for key in ("errors", "warnings", "remarks", "gmt")}
    return replace(report, **said)


def _shown(value: Any) -> Any:
    """A value without secrets, whose texts are lines of a bounded length."""
    if isinstance(value, str):
        # What a terminal would obey is shown as an escape.
        text = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
            for c in " ".join(hide(value)[0].replace(MARK, "***").split())
        )
        return text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]}..."
    if isinstance(value, list | tuple):
        return type(value)(map(_shown, value))
    if isinstance(value, Plan):
        return Plan(**_shown(vars(value)))
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    return value


def _check_config(report: Report, raw: Mapping[str, object], gpus: int | None) -> None:
    result = validated(raw, gpus)
    report.gpus = result.gpus
    report.errors += result.errors
    report.remarks += result.remarks
    if result.known_keys:
        _check_keys(report, raw, result)
    if result.switch is None:
        return
    optimizer = result.config.get("optimizer")
    name = getattr(optimizer, "value", optimizer)  # Axolotl's default is a member of an enum.
    report.gmt = Plan(*result.switch, base_optimizer=name if isinstance(name, str) else None)
    if result.switch.enabled:
        report.remarks += _remarks_on_decay(result.config)
        settings = read_config(result.config)
        report.gmt.settings = settings.model_dump()
        if report.errors:
            report.gmt.not_counted = "the config has errors"
        else:
            _count(report, report.gmt, result, settings)


def _remarks_on_precision(raw: Mapping[str, object]) -> list[str]:
    """Without a GPU Axolotl trains in float16 unless told, and the CPU's first product fails."""
    chosen = ("bf16", "bfloat16", "fp16", "float16", "use_ray")
    if any(raw.get(key) not in (None, "auto") for key in chosen):
        return []
    return [
        "bf16 and fp16 are unset, and this machine has no GPU: here Axolotl would choose fp16, in "
        "which a CPU cannot train. To train here set bf16: false and fp16: false."
    ]


def _remarks_on_decay(cfg: Mapping[str, Any]) -> list[str]:
    decay = cfg.get("weight_decay")
    if not isinstance(decay, int | float) or decay <= 0:
        return []
    return [
        f"weight_decay: {decay!r} moves masked entries too, since it needs no gradient. The paper "
        "trains with 0."
    ]


def _check_keys(report: Report, raw: Mapping[str, object], result: Validation) -> None:
    """Warn of keys that nobody reads; those of plugins that are not imported are not known."""
    refused = " ".join(result.errors)  # Axolotl names keys that it read in former versions.
    unknown = [
        key
        for key in raw
        if not (key in result.known_keys or looks_like_key(key) or f"`{key}`" in refused)
    ]
    perhaps = []
    for index, key in enumerate(unknown):
        known = result.known_keys if index < MAX_SUGGESTIONS else ()
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if result.unknown_plugins and not nearest:
            perhaps.append(key)
            continue
        fix = f"Did you mean {nearest[0]}?" if nearest else "Remove it."
        report.warnings.append(f"{key}: Axolotl has no such key, and ignores it in silence. {fix}")
    if result.unknown_plugins:
        keys = f": {', '.join(perhaps)}" if perhaps else ", if there are any"
        report.remarks.append(
            f"Keys of {', '.join(result.unknown_plugins)} are not known without importing it, so "
            f"they were not checked{keys}."
        )


def _count(report: Report, plan: Plan, result: Validation, settings: GMTConfig) -> None:
    try:
        model = prepare_model(model_on_meta(result.config), result.config)
    except MemoryError:
        raise
    except OSError:
        plan.not_counted = "the model's config is not on this machine"
        return
    # Configs of models make Transformers and PEFT raise errors of nearly every kind.
    except Exception as error:
        plan.not_counted = next(iter(str(error).splitlines()), type(error).__name__)
        return
    if result.may_freeze:
        plan.not_counted = f"{result.may_freeze} may decide what is trained"
        return
    try:
        plan.mask = count(model, settings)
    except ValueError as error:
        report.errors.append(str(error))
        plan.not_counted = "the config has errors"
