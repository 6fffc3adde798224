"""Several runs beside each other: their names, and a table of what differs and what came out.

Knows neither trainers nor pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.errors import UserError
from axolotl_gmt.record import (
    EVER_KEPT,
    FORGETTING,
    GRAD_NORM_KEPT,
    KEPT_FRACTION,
    L1_KEPT,
    MASK_OVERLAP,
    MASK_OVERLAP_BY_CHANCE,
    STATE_FILE,
)
from axolotl_gmt.report.log import TrainingLog, find_state, printable, read_log

MOST_RUNS = 10
_NONE = "-"
_WITHOUT_GMT = "no GMT"


class Run(NamedTuple):
    """A run of a comparison; the log's name is one that no other run has."""

    source: Path
    log: TrainingLog

    @property
    def label(self) -> str:
        """What to call the run in a legend."""
        return self.log.name if self.log.has_gmt else f"{self.log.name} ({_WITHOUT_GMT})"

    def as_dict(self) -> dict[str, object]:
        """The run in numbers that JSON can hold."""
        return {**self.log.as_dict(), "source": str(self.source)}


class Column(NamedTuple):
    """One quantity of all runs, as a table shows it."""

    label: str
    cells: list[str]
    """Of shape [runs]."""
    is_setting: bool = False
    """Whether it was chosen before the training, and is a text."""
    lowest: frozenset[int] = frozenset()
    """The runs that have the lowest value, where lower is better."""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the logs of runs, and name them by as much of their paths as tells them apart.

    Args:
        folders: Output folders, checkpoint folders or ``trainer_state.json`` files.

    Raises:
        UserError: If there are too few or too many, if two are the same run, or one has no log.
    """
    if len(folders) < 2:
        raise UserError("one run cannot be compared. Name two or more, or use report for one.")
    if len(folders) > MOST_RUNS:
        raise UserError(
            f"{len(folders)} runs cannot be told apart in one chart. Name {MOST_RUNS} at most."
        )
    states = [find_state(folder) for folder in folders]
    paths = [_run_path(folder) for folder in folders]
    for number, (folder, state, path) in enumerate(zip(folders, states, paths, strict=True)):
        for earlier in range(number):
            if path == paths[earlier] or state.samefile(states[earlier]):
                raise UserError(
                    f"{folders[earlier]} and {folder} are the same run. Name each run once."
                )
    return [
        Run(state, dataclasses.replace(read_log(state), name=printable(name)))
        for state, name in zip(states, short_names(paths), strict=True)
    ]


def _run_path(folder: Path) -> Path:
    """What a run is named after: its folder, or the file that is not its folder's own log."""
    path = folder.resolve()
    return path.parent if path.name == STATE_FILE and path.is_file() else path


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of ``paths``, each as long as it takes to be the only one.

    Args:
        paths: Absolute, and all different. A checkpoint is named with the run that it is of.

    Example:
        >>> short_names([Path("/a/sft"), Path("/b/sft"), Path("/b/dpo/checkpoint-9")])
        ['a/sft', 'b/sft', 'dpo/checkpoint-9']
    """
    lengths = [2 if path.name.startswith("checkpoint-") else 1 for path in paths]
    while True:
        names = [_end(path, length) for path, length in zip(paths, lengths, strict=True)]
        shared = [number for number, name in enumerate(names) if names.count(name) > 1]
        if not shared:
            return names
        for number in shared:
            lengths[number] += 1


def _end(path: Path, length: int) -> str:
    """The last parts of a path; all of it once there are no more."""
    return "/".join(path.parts[-length:]) if length < len(path.parts) else str(path)


def columns(runs: Sequence[Run]) -> list[Column]:
    """The table of a comparison: the settings that differ, then what came out.

    Quantities that no run has are left out.
    """
    logs = [run.log for run in runs]
    return [*_settings(logs), *_results(logs)]


def _settings(logs: Sequence[TrainingLog]) -> Iterator[Column]:
    """GMT's settings and the training's arguments, as far as they are recorded and differ."""
    is_mixed = len({log.has_gmt for log in logs}) > 1
    for key in GMTConfig.model_fields:
        cells = [_setting(log, key) for log in logs]
        if len({*cells} - {_NONE, _WITHOUT_GMT}) > 1 or (is_mixed and key == "mask_ratio"):
            yield Column(key.replace("_", " ").capitalize(), cells, is_setting=True)
    arguments: dict[str, Callable[[TrainingLog], str]] = {
        "Base optimizer": lambda log: log.base_optimizer or _NONE,
        "Highest learning rate": lambda log: _number(log.highest("learning_rate")),
        "Batch size of a process": lambda log: _amount(log.train_batch_size),
        "Epochs": lambda log: _number(log.epoch),
    }
    for label, text in arguments.items():
        cells = [text(log) for log in logs]
        if len({*cells} - {_NONE}) > 1:
            yield Column(label, cells, is_setting=True)


def _setting(log: TrainingLog, key: str) -> str:
    if not log.has_gmt:
        return _WITHOUT_GMT if key == "mask_ratio" else _NONE
    if key == "mask_ratio":
        return _number(log.mask_ratio)
    if not log.settings:
        return _NONE
    # An earlier version did not know of the setting, and did what is now the default.
    value = log.settings.get(key, GMTConfig.model_fields[key].default)
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, list) else str(value)


def _results(logs: Sequence[TrainingLog]) -> Iterator[Column]:
    yield Column("Steps", [_steps(log) for log in logs])
    for label, key, value, text in (
        ("Final loss", "loss", TrainingLog.last, _number),
        ("Best eval loss", "eval_loss", TrainingLog.lowest, _number),
        ("Forgetting", FORGETTING, TrainingLog.last, _change),
        ("Kept fraction", KEPT_FRACTION, TrainingLog.mean, _share),
        ("Gradient norm kept", GRAD_NORM_KEPT, TrainingLog.mean, _share),
        ("L1 norm kept", L1_KEPT, TrainingLog.mean, _share),
        ("Mask overlap", MASK_OVERLAP, TrainingLog.mean, _share),
        ("Overlap by chance", MASK_OVERLAP_BY_CHANCE, TrainingLog.mean, _share),
        ("Ever kept", EVER_KEPT, TrainingLog.last, _share),
    ):
        if any(key in log.curves for log in logs):
            values = [value(log, key) for log in logs]
            cells = [
                "NaN" if number is None and key in log.curves else text(number)
                for log, number in zip(logs, values, strict=True)
            ]
            yield Column(label, cells, lowest=_lowest(values if key == "eval_loss" else []))
    if any(log.train_runtime is not None for log in logs):
        yield Column("Run time", [log.duration or _NONE for log in logs])


def _lowest(values: Sequence[float | None]) -> frozenset[int]:
    """Indices of the smallest value; none if there is only one value to choose from."""
    known = [value for value in values if value is not None]
    return frozenset(n for n, v in enumerate(values) if len(known) > 1 and v == min(known))


def _steps(log: TrainingLog) -> str:
    if log.step is None or not log.max_steps or log.step == log.max_steps:
        return _amount(log.step)
    return f"{log.step:,} of {log.max_steps:,}"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4g}"


def _change(value: float | None) -> str:
    return _NONE if value is None else f"{value:+.4f}"


def _share(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2%}"


def _amount(value: int | None) -> str:
    return _NONE if value is None else f"{value:,}"
