"""What the log of a training run says: settings, curves, and what GMT kept in each module.

Reads ``trainer_state.json``, which Transformers writes into every checkpoint and
:class:`~axolotl_gmt.GMTReportCallback` into the output folder. Nothing in such a file is trusted.
Knows neither trainers nor pictures.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeGuard

import numpy as np
import yaml
from numpy.typing import NDArray

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.errors import UserError
from axolotl_gmt.names import kind_name, place
from axolotl_gmt.record import (
    EVER_KEPT,
    FORGETTING,
    FORGETTING_LOSS,
    GRAD_NORM_KEPT,
    KEPT_FRACTION,
    L1_KEPT,
    MASK_OVERLAP,
    MASK_OVERLAP_BY_CHANCE,
    STATE_FILE,
    STATISTICS,
    RunState,
)
from axolotl_gmt.report.modules import module_type, stack_labels

CURVES = (
    "loss",
    "eval_loss",
    FORGETTING,
    FORGETTING_LOSS,
    "learning_rate",
    "grad_norm",
    *STATISTICS,
)

_RUNTIME = "train_runtime"
_TOKENS_PER_SECOND = "train_tokens_per_second"  # Of Transformers, a mean up to each log.
_TRAINED_TOKENS_PER_SECOND = "tokens/train_per_sec_per_gpu"  # Of Axolotl, in each log.
_OF_SPEED = (_RUNTIME, _TOKENS_PER_SECOND, _TRAINED_TOKENS_PER_SECOND)
_OF_MODULE = tuple(f"{key}/" for key in STATISTICS)
_COLUMNS = 120  # More steps than this are averaged, so that a heat map's cells can be seen.
_LONGEST_NAME = 500
_MOST_LAYERS = 1000
_LARGEST_SPEED = 1e9  # Seconds, which is thirty years, or tokens in one.
_LARGEST = 1e30  # A larger number is as good as infinite, and would overflow when drawn.

Floats = NDArray[np.float64]


class NothingLoggedError(UserError):
    """A run that has logged no training step."""


@dataclass(frozen=True)
class Curve:
    """One logged quantity: values at ascending optimizer steps, both of shape [logs].

    A value that was logged as NaN or infinity is NaN.
    """

    steps: NDArray[np.int64]
    values: Floats

    @property
    def finite(self) -> Floats:
        """The values that are numbers, of shape [at most logs]."""
        return np.asarray(self.values[np.isfinite(self.values)])


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
        means = _means(self._kinds, self.totals)
        return Grid(list(means), self.steps, np.stack(list(means.values())))

    def by_layer(self) -> Grid:
        """Kinds of modules in decoder layers by layer, each the mean over steps."""
        cells = list(zip(self._kinds, map(_layer, self.names), strict=True))
        means = {
            (kind, layer): mean
            for (kind, layer), mean in _means(cells, self._over_steps).items()
            if layer is not None
        }
        rows = {kind: row for row, kind in enumerate(dict.fromkeys(kind for kind, _ in means))}
        columns = sorted({layer for _, layer in means})
        values = np.full((len(rows), len(columns)), np.nan)
        for (kind, layer), mean in means.items():
            values[rows[kind], columns.index(layer)] = mean[0]
        return Grid(list(rows), columns, values)

    def means(self) -> dict[str, float]:
        """Mean over layers and steps, by kind of module."""
        means = _means(self._kinds, self._over_steps)
        return {kind: float(mean[0]) for kind, mean in means.items() if np.isfinite(mean[0])}

    @property
    def _kinds(self) -> list[str]:
        parameters = [f"{name}.weight" for name in self.names]
        labels = stack_labels(parameters)
        return [module_type(parameter, labels) for parameter in parameters]

    @property
    def _over_steps(self) -> Floats:
        return np.asarray(self.totals.sum(axis=2, keepdims=True))


@dataclass(frozen=True)
class TrainingLog:
    """What is known of a run.

    Args:
        name: The run's name, that of its folder.
        settings: GMT's settings as they were recorded; empty if they were not.
        base_optimizer: Class name of the optimizer whose gradients GMT masked.
        masked_parameters: Number of entries under the mask.
        step: Optimizer steps made.
        max_steps: Optimizer steps planned.
        epoch: Epochs made.
        train_batch_size: Examples in a batch of one process.
        train_runtime: Seconds that the training took, once it has ended, or up to its last log if
            the trainer counts tokens; those since it was last resumed if it was.
        tokens_per_second: Of all processes over that time, if the trainer counts them.
        trained_tokens_per_second: Tokens that bear on the loss, of each process; mean over logs, if
            the trainer counted them.
        model: Name of the model.
        data: Names of the data sets.
        began: When training began first.
        config_text: Text of the file that the run was configured by.
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
    train_batch_size: int | None = None
    train_runtime: float | None = None
    tokens_per_second: float | None = None
    trained_tokens_per_second: float | None = None
    model: str | None = None
    data: list[str] = field(default_factory=list)
    began: datetime | None = None
    config_text: str = ""
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
        ratio = self.settings.get("mask_ratio")
        return float(ratio) if _is_number(ratio) and 0 <= ratio < 1 else None

    @property
    def settings_yaml(self) -> str:
        """The settings as an Axolotl config spells them; empty if there are none."""
        keys = {f"gmt_{name}": value for name, value in self.settings.items()}
        return yaml.safe_dump(keys, sort_keys=False, width=math.inf) if keys else ""

    @property
    def duration(self) -> str | None:
        """Hours, minutes and seconds that the training took."""
        if self.train_runtime is None:
            return None
        minutes, seconds = divmod(round(self.train_runtime), 60)
        return f"{minutes // 60:,}:{minutes % 60:02}:{seconds:02}"

    def mean(self, key: str) -> float | None:
        """Mean of what was logged; None if nothing but NaN and infinity was."""
        finite = self._finite(key)
        return float(finite.mean()) if finite.size else None

    def last(self, key: str) -> float | None:
        """The last value that was logged; None if it is NaN or infinite, or there is none."""
        value = self.curves[key].values[-1] if key in self.curves else math.nan
        return float(value) if math.isfinite(value) else None

    def lowest(self, key: str) -> float | None:
        """The smallest value that was logged; None if nothing but NaN and infinity was."""
        finite = self._finite(key)
        return float(finite.min()) if finite.size else None

    def highest(self, key: str) -> float | None:
        """The largest value that was logged; None if nothing but NaN and infinity was."""
        finite = self._finite(key)
        return float(finite.max()) if finite.size else None

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
            "train_batch_size": self.train_batch_size,
            "train_runtime": self.train_runtime,
            "tokens_per_second": self.tokens_per_second,
            "trained_tokens_per_second": self.trained_tokens_per_second,
            "model": self.model,
            "data": self.data,
            "began": self.began and self.began.isoformat(),
            "highest_learning_rate": self.highest("learning_rate"),
            "final_loss": self.last("loss"),
            "final_eval_loss": self.last("eval_loss"),
            "best_eval_loss": self.lowest("eval_loss"),
            "final_forgetting": self.last(FORGETTING),
            "final_forgetting_loss": self.last(FORGETTING_LOSS),
            "mean_kept_fraction": self.mean(KEPT_FRACTION),
            "mean_grad_norm_kept": self.mean(GRAD_NORM_KEPT),
            "mean_l1_kept": self.mean(L1_KEPT),
            "mean_mask_overlap": self.mean(MASK_OVERLAP),
            "mean_mask_overlap_by_chance": self.mean(MASK_OVERLAP_BY_CHANCE),
            "final_ever_kept": self.last(EVER_KEPT),
            "modules": {key: modules.means() for key, modules in self.modules.items()},
        }

    def _finite(self, key: str) -> Floats:
        return self.curves[key].finite if key in self.curves else np.array([])


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
        files = [folder / STATE_FILE, *folder.glob(f"checkpoint-*/{STATE_FILE}")]
        states = [(path.stat().st_mtime, _step_of(path), path) for path in files if path.is_file()]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}.") from error
    if not states:
        raise UserError(
            f"{folder} has no {STATE_FILE}, neither itself nor in a checkpoint-* folder. Name the "
            "output_dir of a run that has ended or has saved a checkpoint."
        )
    return max(states)[-1]


def read_log(state_file: Path) -> TrainingLog:
    """The run that a ``trainer_state.json`` is of, named after the folder.

    Raises:
        UserError: If the file cannot be read or is not the state of a trainer.
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
        state: The fields of Transformers' ``TrainerState`` by name. Whatever is not valid is left
            out.
        name: What to call the run.

    Raises:
        NothingLoggedError: If no training step was logged.
        UserError: If nothing else is left.
    """
    run = RunState.read(state)
    if run.log_history is None:
        raise UserError("there is no log_history, so it is not the state of a trainer.")
    logged = _read_history(run.log_history)
    curves = {key: logged[key] for key in CURVES if key in logged}
    if not curves:
        raise NothingLoggedError(
            "no training step was logged. Wait for the run's first log, or train with a smaller "
            "logging_steps."
        )
    if not any(curve.finite.size for curve in curves.values()):
        raise UserError("every value that was logged is NaN or infinite, so there is none to draw.")
    args, attributes = run.record.args, run.record.attributes
    modules = {key: _modules(logged, key, attributes.module_order) for key in STATISTICS}
    optimizer = attributes.base_optimizer
    return TrainingLog(
        name=printable(name),
        settings=known_settings(args),
        base_optimizer=None if optimizer is None else printable(optimizer),
        masked_parameters=attributes.masked_parameters,
        step=run.global_step,
        max_steps=run.max_steps,
        epoch=run.epoch,
        train_batch_size=run.train_batch_size,
        train_runtime=_last_not_negative(logged, _RUNTIME),
        tokens_per_second=_last_not_negative(logged, _TOKENS_PER_SECOND),
        trained_tokens_per_second=_mean(logged, _TRAINED_TOKENS_PER_SECOND),
        model=None if attributes.model_name is None else printable(attributes.model_name),
        data=[printable(name) for name in attributes.data_names],
        began=_time(attributes.began),
        config_text="".join(c for c in attributes.config_text if c.isprintable() or c in "\n\t"),
        curves=curves,
        modules={key: value for key, value in modules.items() if value is not None},
    )


def printable(text: str) -> str:
    """``text`` in ASCII, with escapes for everything that a terminal or a font could choke on."""
    shown = (char if " " <= char <= "~" else ascii(char)[1:-1] for char in text[:_LONGEST_NAME])
    return "".join(shown)


def _step_of(state_file: Path) -> int:
    """The step in a checkpoint folder's name; the output folder's own state comes last of all."""
    number = re.search(r"checkpoint-([0-9]{1,18})$", state_file.parent.name)
    return int(number.group(1)) if number else 10**18


def known_settings(args: Mapping[str, object]) -> dict[str, object]:
    """The settings in ``args`` that this version knows and can print; unset ones are left out."""
    settings: dict[str, object] = {}
    for key in GMTConfig.model_fields:
        value = args.get(key)
        if isinstance(value, str):
            settings[key] = printable(value)
        elif isinstance(value, bool) or (_is_number(value) and abs(value) < _LARGEST):
            settings[key] = value
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            settings[key] = [printable(item) for item in value]
    return settings


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_history(history: Iterable[object]) -> dict[str, Curve]:
    """What was logged under each key that the report shows, in the order of the log's keys."""
    points: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for entry in history:
        if not isinstance(entry, Mapping):
            continue
        step = entry.get("step")
        if not _is_number(step) or not 0 <= step < 2**53 or step != int(step):
            continue
        for key, value in entry.items():
            is_read = key in CURVES or key in _OF_SPEED or key.startswith(_OF_MODULE)
            if is_read and _is_number(value):
                steps, values = points[key]
                steps.append(int(step))
                values.append(float(value) if abs(value) < _LARGEST else math.nan)
    return {key: _curve(*lists) for key, lists in points.items()}


def _last_not_negative(logged: Mapping[str, Curve], key: str) -> float | None:
    value = float(logged[key].values[-1]) if key in logged else math.nan
    return value if 0 <= value < _LARGEST_SPEED else None  # As NaN is not.


def _mean(logged: Mapping[str, Curve], key: str) -> float | None:
    finite = logged[key].finite if key in logged else np.array([])
    mean = float(finite.mean()) if finite.size else math.nan
    return mean if 0 <= mean < _LARGEST_SPEED else None


def _time(text: str | None) -> datetime | None:
    try:
        time = datetime.fromisoformat(text or "")
        return time.astimezone(UTC) if time.tzinfo else None  # Else nobody knows of which zone.
    except (ValueError, OverflowError, OSError):  # As a year that no calendar has.
        return None


def _curve(steps: Sequence[int], values: Sequence[float]) -> Curve:
    """The curve of some points; the last one of a step that a resumed run logged twice."""
    order = np.argsort(steps, kind="stable")
    ordered = np.asarray(steps)[order]
    is_last = np.append(np.diff(ordered) > 0, True)
    return Curve(ordered[is_last], np.asarray(values)[order][is_last])


def _modules(
    logged: Mapping[str, Curve], statistic: str, module_order: Sequence[str]
) -> Modules | None:
    """What was logged of each module under ``statistic/MODULE``; None if there was nothing."""
    prefix = f"{statistic}/"
    of_modules = [
        (key.removeprefix(prefix), curve)
        for key, curve in logged.items()
        if key.startswith(prefix) and curve.finite.size
    ]
    if not of_modules:
        return None
    ranks = {kind: rank for rank, kind in enumerate(module_order)}
    of_modules.sort(key=lambda item: ranks.get(kind_name(item[0]), len(ranks)))
    steps = np.unique(np.concatenate([curve.steps for _, curve in of_modules]))
    every = -(-len(steps) // _COLUMNS)
    first = steps[::every]
    totals = np.zeros((len(of_modules), 2, len(first)))
    for total, (_, curve) in zip(totals, of_modules, strict=True):
        columns = np.searchsorted(steps, curve.steps) // every
        finite = np.isfinite(curve.values)
        total[0] = np.bincount(columns[finite], curve.values[finite], len(first))
        total[1] = np.bincount(columns[finite], minlength=len(first))
    return Modules([printable(name) for name, _ in of_modules], first.tolist(), totals, every)


def _layer(module: str) -> int | None:
    layer = place(f"{module}.weight").layer
    return layer if layer is not None and layer < _MOST_LAYERS else None


def _means[Key: Hashable](keys: Sequence[Key], totals: Floats) -> dict[Key, Floats]:
    """Means, of shape [columns], over all rows of ``totals`` that have the same key."""
    groups: dict[Key, Floats] = {}
    for key, total in zip(keys, totals, strict=True):
        groups[key] = groups[key] + total if key in groups else total
    with np.errstate(invalid="ignore"):  # A cell without a value is 0 / 0, which is NaN.
        return {key: total / count for key, (total, count) in groups.items()}
