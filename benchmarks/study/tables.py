"""The study's cells as CSV, and their means and spreads over seeds as a table.

Knows rows, not how they came about: every table and plot can be made from the CSV again.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.data import write_text
from benchmarks.study.grid import Method

Value = str | float | bool | None
Row = dict[str, Value]

COLUMNS = (
    "task",
    "method",
    "ratio",
    "learning_rate",
    "seed",
    "chosen",
    "status",
    "steps",
    "validation_loss",
    "validation_accuracy",
    "test_loss",
    "test_accuracy",
    "prose_loss",
    "last_train_loss",
    "kept_fraction",
    "grad_norm_kept",
    "train_seconds",
    "train_cpu_seconds",
    "kl",
    "weights",
    "autocast",
    "key",
)
_TEXTS = {"task", "method", "status", "weights", "autocast", "key"}


def write_csv(file: Path, rows: Iterable[Row]) -> None:
    """Write one line for each cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.9g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    )
    write_text(file, text.getvalue())


def read_csv(file: Path) -> list[Row]:
    """The rows that :func:`write_csv` wrote."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [
            {name: _parse(name, text) for name, text in row.items()}
            for row in csv.DictReader(lines)
        ]


def _parse(name: str, text: str) -> Value:
    if name in _TEXTS:
        return text
    if name == "chosen":
        return text == "True"
    return float(text) if text else None


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and their sample standard deviation."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """NaN if there is no value."""
        return statistics.fmean(self.values) if self.values else float("nan")

    @property
    def deviation(self) -> float:
        """With n - 1 in the denominator; 0 if there are fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def half_width(self) -> float:
        """Of the 95 % confidence interval of the mean, by Student's t; NaN of fewer than two."""
        from scipy.special import stdtrit

        n = len(self.values)
        return float(stdtrit(n - 1, 0.975)) * self.deviation / n**0.5 if n > 1 else float("nan")

    def interval(self, form: str) -> str:
        """Such as ``-0.0016 [-0.0101, +0.0069]``, mean and 95 % interval; a dash for no value."""
        if not self.values:
            return "-"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.mean:{form}} [{low:{form}}, {high:{form}}]"

    def text(self, form: str) -> str:
        """Such as ``1.234 ± 0.005``; a dash if there is no value."""
        if not self.values:
            return "-"
        if len(self.values) == 1:
            return format(self.mean, form)
        return f"{self.mean:{form}} ± {self.deviation:{form.lstrip('+')}}"


@dataclass(frozen=True)
class Setting:
    """All cells of a method at one task."""

    method: Method
    rows: tuple[Row, ...]

    @property
    def final(self) -> list[Row]:
        """The cells at the chosen learning rate, one for each seed, that were judged."""
        return [row for row in self.rows if row["chosen"] and row["status"] != "failed"]

    @property
    def learning_rate(self) -> float | None:
        """The chosen one."""
        return next(iter(numbers(self.final, "learning_rate")), None)

    def spread(self, column: str) -> Spread:
        """Of the final cells, over seeds."""
        return Spread(numbers(self.final, column))

    def difference(self, column: str, plain: Setting) -> Spread:
        """From the final cell of plain fine-tuning with the same seed, so the same data order."""
        theirs = {row.get("seed"): row for row in plain.final}
        mine = [row for row in self.final if row.get("seed") in theirs]
        others = [theirs[row["seed"]] for row in mine]
        pairs = zip(numbers(mine, column), numbers(others, column), strict=True)
        return Spread(tuple(value - other for value, other in pairs))


def numbers(rows: Iterable[Row], column: str) -> tuple[float, ...]:
    """The values of a column in the rows that have one."""
    found = (row.get(column) for row in rows)
    return tuple(float(value) for value in found if value is not None)


def settings_of(rows: Iterable[Row], task: str) -> dict[str, Setting]:
    """The settings of a task by their label, in the order of the rows."""
    groups: dict[Method, list[Row]] = {}
    for row in rows:
        if row["task"] == task:
            ratio = row.get("ratio")
            method = Method(str(row["method"]), None if ratio is None else float(ratio))
            groups.setdefault(method, []).append(row)
    return {method.label: Setting(method, tuple(found)) for method, found in groups.items()}


Column = tuple[str, Callable[[Setting], str]]


def _columns(task: str, plain: Setting) -> list[Column]:
    def of(column: str, form: str) -> Callable[[Setting], str]:
        return lambda setting: setting.spread(column).text(form)

    def rate(setting: Setting) -> str:
        return "-" if setting.learning_rate is None else f"{setting.learning_rate:g}"

    def difference(setting: Setting) -> str:
        return "-" if setting is plain else setting.difference("test_loss", plain).interval("+.4f")

    loss = "answer loss" if task == "sft" else "DPO loss"
    accuracy = "answers right" if task == "sft" else "preferences right"
    forgotten: list[Column] = []
    if task == "sft":
        forgotten.append(("prose loss", of("prose_loss", ".3f")))
        if numbers(plain.rows, "kl"):
            forgotten.append(("KL from untrained", of("kl", ".4f")))
    return [
        ("learning rate", rate),
        (loss, of("test_loss", ".3f")),
        ("less full's, seed by seed", difference),
        (accuracy, of("test_accuracy", ".1%")),
        *forgotten,
    ]


def summary(rows: Sequence[Row], task: str) -> list[list[str]]:
    """Headings, and a line for each setting: mean ± sample standard deviation over seeds."""
    settings = settings_of(rows, task)
    if "full" not in settings:
        return []
    columns = _columns(task, settings["full"])
    return [
        ["method", *(heading for heading, _ in columns)],
        *([label, *(cell(found) for _, cell in columns)] for label, found in settings.items()),
    ]


_CELL_COLUMNS = {
    "task": "",
    "method": "",
    "ratio": "g",
    "learning_rate": "g",
    "seed": ".0f",
    "validation_loss": ".4f",
    "validation_accuracy": ".3f",
    "test_loss": ".4f",
    "test_accuracy": ".3f",
    "prose_loss": ".4f",
    "kl": ".4f",
    "grad_norm_kept": ".3f",
    "train_cpu_seconds": ".0f",
}


def every_cell(rows: Iterable[Row]) -> list[list[str]]:
    """Headings, and a line for each cell; a failed one says so, and what it lacks is empty.

    What no cell has is no column.
    """
    rows = list(rows)
    columns = {
        column: form
        for column, form in _CELL_COLUMNS.items()
        if any(row.get(column) is not None for row in rows)
    }

    def text(row: Row, column: str, form: str) -> str:
        value = row.get(column)
        if column == "method" and row["status"] == "failed":
            return f"{value} (failed)"
        return "" if value is None else format(value, form)

    headings = [column.replace("_", " ").replace("train cpu", "CPU") for column in columns]
    lines = [[text(row, *column) for column in columns.items()] for row in rows]
    return [headings, *lines]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first line has the headings; empty for an empty one."""
    if not table:
        return ""
    lines = [table[0], ["---", *["---:"] * (len(table[0]) - 1)], *table[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
