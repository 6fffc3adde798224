"""What the log of a training run says: settings, curves, and what GMT kept in each module.

Reads ``trainer_state.json``, which Transformers writes into every checkpoint and
:class:`~axolotl_gmt.GMTCallback` into the output folder. Nothing in such a file is trusted. Knows
neither trainers nor pictures.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.errors import UserError
from axolotl_gmt.names import model_order, module_type, place, stack_labels

STATE_FILE = "trainer_state.json"
RECORD = "GMTCallback"
"""Under which key of ``stateful_callbacks`` a run's GMT settings are."""

KEPT_FRACTION = "gmt/kept_fraction"
GRAD_NORM_KEPT = "gmt/grad_norm_kept"
STATISTICS = (KEPT_FRACTION, GRAD_NORM_KEPT)
CURVES = ("loss", "eval_loss", "learning_rate", *STATISTICS)

_COLUMNS = 120  # More steps than this are averaged, so that a heat map's cells can be seen.
_LONGEST_NAME = 500
_MOST_LAYERS = 1000
_LARGEST = 1e30  # A larger number is as good as infinite, and would overflow when drawn.

Floats = NDArray[np.float64]


class NothingLoggedError(UserError):
    """A run that has logged no training step."""


@dataclass(frozen=True)
class Curve:
    """One logged quantity: its values, of shape [logs], at ascending optimizer steps.

    A value that was logged as NaN or infinity is NaN.
    """

    steps: Sequence[int]
    values: Floats

    @property
    def finite(self) -> Floats:
        """The values that are numbers, of shape [at most logs]."""
        return np.asarray(self.values[np.isfinite(self.values)])

    @property
    def mean(self) -> float | None:
        """Mean of the finite values."""
        return float(self.finite.mean()) if self.finite.size else None

    @property
    def last(self) -> float | None:
        """The last value; None if it is NaN or infinite."""
        return float(self.values[-1]) if np.isfinite(self.values[-1]) else None


@dataclass(frozen=True)
class Grid:
    """Means of a statistic over modules of one kind, of shape [rows, columns]; NaN where absent."""

    rows: list[str]
    columns: list[int]
    values: Floats

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value; both 0 if there is none."""
        finite = self.values[np.isfinite(self.values)]
        return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


@dataclass(frozen=True)
class Modules:
    """A statistic of each module over a run; neighbouring steps are averaged if there are many.

    Args:
        names: Paths of the modules, such as ``model.layers.3.mlp.down_proj``.
        steps: The first logged step of each column.
        totals: Sum and number of the logged values, of shape [modules, 2, columns].
        logs_a_column: The largest number of logged steps that a column averages.
    """

    names: list[str]
    steps: list[int]
    totals: Floats
    logs_a_column: int

    def by_step(self) -> Grid:
        """Kinds of modules by step, each the mean over layers."""
        means = _group(_kinds(self.names), self.totals)
        return Grid(list(means), self.steps, np.stack(list(means.values())))

    def by_layer(self) -> Grid:
        """Kinds of modules in decoder layers by layer, each the mean over steps."""
        layers = [_layer(name) for name in self.names]
        means = _group(list(zip(_kinds(self.names), layers, strict=True)), self._over_steps)
        inside = [(kind, layer) for kind, layer in means if layer is not None]
        rows = {kind: index for index, kind in enumerate(dict.fromkeys(k for k, _ in inside))}
        columns = {layer: index for index, layer in enumerate(sorted({x for _, x in inside}))}
        values = np.full((len(rows), len(columns)), np.nan)
        for kind, layer in inside:
            values[rows[kind], columns[layer]] = means[kind, layer][0]
        return Grid(list(rows), list(columns), values)

    def means(self) -> dict[str, float]:
        """Mean over layers and steps, by kind of module."""
        means = _group(_kinds(self.names), self._over_steps)
        return {kind: float(mean[0]) for kind, mean in means.items() if np.isfinite(mean[0])}

    @property
    def _over_steps(self) -> Floats:
        return np.asarray(self.totals.sum(axis=2, keepdims=True))


@dataclass(frozen=True)
class TrainingLog:
    """What is known of a run.

    Args:
        name: The run's name, that of its folder.
        settings: GMT's settings as they were recorded; empty if they were not.
        base_optimizer: Class name of the optimizer that GMT masked the gradients of.
        masked_parameters: Entries under the mask.
        step: Optimizer steps made.
        max_steps: Optimizer steps planned.
        epoch: Epochs made.
        curves: What was logged, by its key in the log.
        modules: Statistics of each module, by the key of the statistic, if they were logged.
    """

    name: str
    settings: dict[str, object] = field(default_factory=dict)
    base_optimizer: str | None = None
    masked_parameters: int | None = None
    step: int | None = None
    max_steps: int | None = None
    epoch: float | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    modules: dict[str, Modules] = field(default_factory=dict)

    @property
    def has_gmt(self) -> bool:
        """Whether the run was trained with GMT, as far as its log says."""
        return bool(self.settings) or any(key in self.curves for key in STATISTICS)

    @property
    def mask_ratio(self) -> float | None:
        """The fraction of entries that each step was to mask, if recorded and in use."""
        if self.settings.get("criterion") == "half":  # It freezes half of the matrices instead.
            return None
        ratio = _number(self.settings.get("mask_ratio"))
        return ratio if ratio is not None and 0 <= ratio < 1 else None

    def mean(self, key: str) -> float | None:
        """Mean of a logged quantity over the logged steps."""
        return self.curves[key].mean if key in self.curves else None

    def last(self, key: str) -> float | None:
        """The last value of a logged quantity; None if it is NaN or infinite, or there is none."""
        return self.curves[key].last if key in self.curves else None

    def as_dict(self) -> dict[str, object]:
        """The run in numbers that JSON can hold."""
        return {
            "run": self.name,
            "gmt": self.has_gmt,
            "settings": self.settings,
            "base_optimizer": self.base_optimizer,
            "masked_parameters": self.masked_parameters,
            "step": self.step,
            "max_steps": self.max_steps,
            "epoch": self.epoch,
            "final_loss": self.last("loss"),
            "final_eval_loss": self.last("eval_loss"),
            "mean_kept_fraction": self.mean(KEPT_FRACTION),
            "mean_grad_norm_kept": self.mean(GRAD_NORM_KEPT),
            "modules": {key: modules.means() for key, modules in self.modules.items()},
        }


def find_state(folder: Path) -> Path:
    """The newest ``trainer_state.json`` of a run: in its output folder or in a checkpoint there.

    Args:
        folder: The output folder, a checkpoint folder, or the file itself.

    Raises:
        UserError: If there is none.
    """
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist. Name the output_dir of a run.")
    try:
        states = [folder / STATE_FILE, *folder.glob(f"checkpoint-*/{STATE_FILE}")]
        found = [(path.stat().st_mtime, _step_of(path), path) for path in states if path.is_file()]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}.") from error
    if not found:
        raise UserError(
            f"{folder} has no {STATE_FILE}, neither itself nor in a checkpoint-* folder. Name the "
            "output_dir of a run that has ended or has saved a checkpoint."
        )
    return max(found)[-1]


def read_log(state_file: Path) -> TrainingLog:
    """The run that a ``trainer_state.json`` is of, named after the folder.

    Raises:
        UserError: If the file cannot be read or is no trainer's state.
    """
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{state_file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{state_file} is not JSON ({reason}). If the run was killed while it wrote the file, "
            "name an earlier checkpoint folder."
        ) from error
    folder = state_file.resolve().parent
    is_checkpoint = folder.name.startswith("checkpoint-")
    name = f"{folder.parent.name}/{folder.name}" if is_checkpoint else folder.name
    try:
        return parse_state(state, name)
    except UserError as error:
        raise type(error)(f"{state_file}: {error}") from None


def parse_state(state: object, name: str) -> TrainingLog:
    """The run that a trainer's state is of.

    Args:
        state: The fields of Transformers' ``TrainerState`` by name. Whatever is not as it should
            be is left out.
        name: What to call the run.

    Raises:
        NothingLoggedError: If no training step was logged.
        UserError: If nothing else is left.
    """
    history = state.get("log_history") if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(history, list):
        raise UserError("there is no log_history, so it is not the state of a trainer.")
    entries = [entry for entry in history if isinstance(entry, Mapping)]
    curves = {key: curve for key in CURVES if (curve := _curve(entries, key)) is not None}
    if not curves:
        raise NothingLoggedError(
            "no training step was logged. Wait for the run's first log, or train with a smaller "
            "logging_steps."
        )
    if not any(curve.finite.size for curve in curves.values()):
        raise UserError("every value that was logged is NaN or infinite, so there is none to draw.")
    modules = {key: found for key in STATISTICS if (found := _modules(entries, key)) is not None}
    args, attributes = _record(state)
    optimizer = attributes.get("base_optimizer")
    return TrainingLog(
        name=printable(name),
        settings=_settings(args),
        base_optimizer=printable(optimizer) if isinstance(optimizer, str) else None,
        masked_parameters=_whole_number(attributes.get("masked_parameters")),
        step=_whole_number(state.get("global_step")),
        max_steps=_whole_number(state.get("max_steps")),
        epoch=_number(state.get("epoch")),
        curves=curves,
        modules=modules,
    )


def printable(text: str) -> str:
    """``text`` in ASCII, with escapes for everything that a terminal or a font could choke on."""
    shown = (char if " " <= char <= "~" else ascii(char)[1:-1] for char in text[:_LONGEST_NAME])
    return "".join(shown)


def _step_of(state_file: Path) -> int:
    """The step in a checkpoint folder's name; the output folder's own state comes last of all."""
    number = re.search(r"checkpoint-([0-9]{1,18})$", state_file.parent.name)
    return int(number.group(1)) if number else 10**18


def _record(state: Mapping[str, object]) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """What GMTCallback left in a state: its arguments, and what it found when training began."""
    found: object = state
    for key in ("stateful_callbacks", RECORD):
        found = found.get(key) if isinstance(found, Mapping) else None
    record = found if isinstance(found, Mapping) else {}
    args, attributes = record.get("args"), record.get("attributes")
    return (
        args if isinstance(args, Mapping) else {},
        attributes if isinstance(attributes, Mapping) else {},
    )


def _settings(args: Mapping[str, object]) -> dict[str, object]:
    """The settings in ``args`` that this version knows and can print; unset ones are left out."""
    settings: dict[str, object] = {}
    for key in GMTConfig.model_fields:
        value = args.get(key)
        if isinstance(value, str):
            settings[key] = printable(value)
        elif isinstance(value, bool) or _number(value) is not None:
            settings[key] = value
        elif isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            settings[key] = [printable(item) for item in value]
    return settings


def _number(value: object) -> float | None:
    """``value`` as a finite number; None if it is none."""
    return float(value) if _is_number(value) and abs(value) < _LARGEST else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole_number(value: object) -> int | None:
    """``value`` as a count; None if it is none."""
    return int(value) if _is_number(value) and 0 <= value < 2**53 and value == int(value) else None


def _by_step(entries: Iterable[Mapping[str, object]]) -> Iterable[tuple[int, Mapping[str, object]]]:
    for entry in entries:
        step = _whole_number(entry.get("step"))
        if step is not None:
            yield step, entry


def _curve(entries: Iterable[Mapping[str, object]], key: str) -> Curve | None:
    """What was logged under ``key``; the last of a step that a resumed run logged twice."""
    logged = {
        step: number if (number := _number(entry[key])) is not None else math.nan
        for step, entry in _by_step(entries)
        if _is_number(entry.get(key))
    }
    if not logged:
        return None
    steps = sorted(logged)
    return Curve(steps, np.array([logged[step] for step in steps]))


def _modules(entries: Iterable[Mapping[str, object]], statistic: str) -> Modules | None:
    """What was logged of each module under ``statistic/MODULE``."""
    prefix = f"{statistic}/"
    logged = {
        step: entry
        for step, entry in _by_step(entries)
        if any(isinstance(key, str) and key.startswith(prefix) for key in entry)
    }
    keys = {key for entry in logged.values() for key in entry if str(key).startswith(prefix)}
    modules = {key: printable(str(key).removeprefix(prefix)) for key in keys}
    # A trainer writes its log sorted by alphabet, and keeps it unsorted.
    order = sorted(modules, key=lambda key: model_order(f"{modules[key]}.weight"))
    names = {key: row for row, key in enumerate(order)}
    first, runs = _columns(sorted(logged))
    totals = np.zeros((len(names), 2, len(first)))
    for column, run in enumerate(runs):
        for step in run:
            for key, value in logged[step].items():
                if key in names and (number := _number(value)) is not None:
                    totals[names[key], :, column] += number, 1
    filled = np.flatnonzero(totals[:, 1].any(axis=1))
    found = [modules[order[row]] for row in filled]
    return Modules(found, first, totals[filled], max(map(len, runs))) if found else None


def _columns(numbers: Sequence[int]) -> tuple[list[int], list[Sequence[int]]]:
    """At most ``_COLUMNS`` runs of neighbours of nearly the same length, and the first of each."""
    every = -(-len(numbers) // _COLUMNS) or 1
    runs = [numbers[start : start + every] for start in range(0, len(numbers), every)]
    return [run[0] for run in runs], runs


def _layer(module: str) -> int | None:
    layer = place(f"{module}.weight").layer
    return layer if layer is not None and layer < _MOST_LAYERS else None


def _kinds(names: Sequence[str]) -> list[str]:
    parameters = [f"{name}.weight" for name in names]
    labels = stack_labels(parameters)
    return [module_type(parameter, labels) for parameter in parameters]


def _group[Key: Hashable](keys: Sequence[Key], totals: Floats) -> dict[Key, Floats]:
    """Means, of shape [columns], over all rows of ``totals`` that have the same key."""
    groups: dict[Key, Floats] = {}
    for key, total in zip(keys, totals, strict=True):
        groups[key] = groups[key] + total if key in groups else total
    with np.errstate(invalid="ignore"):  # A cell without a value is 0 / 0, which is NaN.
        return {key: total / count for key, (total, count) in groups.items()}
