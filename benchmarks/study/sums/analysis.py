"""The study's runs as CSV, and what ``PLAN.md`` says to compute of them.

Knows rows, not how they came about: every table and picture can be made from the CSV again, with
``python -m benchmarks.study.sums.analysis``.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.study.data import write_text
from benchmarks.study.sums.design import ARMS, FULL, GMT, RANDOM, Run, rate
from benchmarks.study.tables import Spread, markdown

Row = dict[str, Any]

_NUMBERS = (
    "learning_rate",
    "seed",
    "tuning_accuracy",
    "tuning_loss",
    "test_accuracy",
    "test_loss",
    "kl",
    "norm",
    "cosine",
    "changed",
    "ever_kept",
    "l1_kept",
    "grad_norm_kept",
    "train_seconds",
)
_COLUMNS = ("arm", "stage", *_NUMBERS, "commit", "data", "model")
MARGIN = 0.03
"""A difference in accuracy below this is taken for none, by PLAN.md."""


def write(
    results: Sequence[tuple[Run, dict[str, Any]]], base: Path, folder: Path, docs: Path
) -> None:
    """Write ``sums.csv``, ``sums-problems.csv.gz``, ``sums-curves.csv`` and the pictures.

    Args:
        results: Runs and what they found.
        base: What was found of the untrained model, as JSON.
        folder: Where CSV files go.
        docs: Where pictures go.
    """
    untrained = json.loads(base.read_text(encoding="utf-8"))
    rows = [_row("untrained", "", untrained)]
    problems = [("untrained", "", untrained["test"])]
    curves = []
    for run, found in results:
        stage = "counted" if run.is_counted else "tuning"
        facts = {"learning_rate": rate(run.exponent), "seed": run.seed}
        rows.append(_row(run.arm.name, stage, found) | facts)
        curves += [
            (run.arm.name, f"{rate(run.exponent):g}", run.seed, step, f"{loss:.5g}")
            for step, loss in enumerate(found["curve"], start=1)
        ]
        if run.is_counted:
            problems.append((run.arm.name, run.seed, found["test"]))
    write_text(
        folder / "sums.csv", _csv(_COLUMNS, ([row.get(c, "") for c in _COLUMNS] for row in rows))
    )
    write_text(
        folder / "sums-curves.csv", _csv(("arm", "learning_rate", "seed", "step", "loss"), curves)
    )
    lines = (
        (arm, seed, number, int(right), f"{loss:.4g}")
        for arm, seed, judged in problems
        for number, (right, loss) in enumerate(
            zip(judged["is_right"], judged["losses"], strict=True)
        )
    )
    text = _csv(("arm", "seed", "sum", "right", "loss"), lines)
    # Without a time, so that equal results are equal files.
    (folder / "sums-problems.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    from benchmarks.study.sums.plots import draw

    draw(read(folder / "sums.csv"), folder / "sums-curves.csv", docs)


def _row(arm: str, stage: str, found: dict[str, Any]) -> Row:
    row = {"arm": arm, "stage": stage, **{name: found[name] for name in _COLUMNS if name in found}}
    for split in ("tuning", "test"):
        if split in found:
            judged = found[split]
            row[f"{split}_accuracy"] = sum(judged["is_right"]) / len(judged["is_right"])
            row[f"{split}_loss"] = sum(judged["losses"]) / judged["tokens"]
    return {name: f"{x:.8g}" if isinstance(x, float) else x for name, x in row.items()}


def _csv(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return text.getvalue()


def read(file: Path) -> list[Row]:
    """The rows of ``sums.csv``; what a run lacks is None."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [
            {
                name: (float(text) if text else None) if name in _NUMBERS else text
                for name, text in row.items()
            }
            for row in csv.DictReader(lines)
        ]


def by_seed(rows: Iterable[Row], arm: str, column: str) -> dict[int, float]:
    """A column of an arm's counted runs, by seed."""
    return {
        int(row["seed"]): row[column]
        for row in rows
        if row["arm"] == arm and row["stage"] == "counted" and row[column] is not None
    }


@dataclass(frozen=True)
class Paired:
    """Differences between two arms, seed by seed."""

    values: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Mean and 95% interval, by Student's t."""
        return Spread(self.values)

    @property
    def p(self) -> float:
        """Of a two-sided paired t test."""
        return float(stats.ttest_1samp(self.values, 0).pvalue)

    @property
    def inner_interval(self) -> tuple[float, float]:
        """The 90% interval, which lies within a margin if TOST at 5% finds equivalence."""
        low, high = stats.ttest_1samp(self.values, 0).confidence_interval(0.9)
        return float(low), float(high)

    def p_equivalent(self, margin: float) -> float:
        """Of two one-sided tests (TOST) that the mean lies within ± ``margin``."""
        above = stats.ttest_1samp(self.values, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(self.values, margin, alternative="less").pvalue
        return float(max(above, below))


def paired(rows: Sequence[Row], column: str, arm: str, other: str) -> Paired:
    """``arm`` less ``other``, over the seeds that both have."""
    mine, theirs = (by_seed(rows, name, column) for name in (arm, other))
    return Paired(tuple(mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())))


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for there being several (Holm 1979)."""
    order = np.argsort(ps)
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected


PRIMARY = ((GMT.name, FULL.name), (GMT.name, RANDOM.name))
# Of the second batch: what differs in one setting.
CONTROLS = (
    ("GMT 0.9", "random 0.9"),
    ("fixed_random 0.9", "random 0.9"),
    ("GMT 0.9 hold", "GMT 0.9"),
    ("smallest 0.5", RANDOM.name),
)


def primary_table(rows: Sequence[Row]) -> str:
    """The two comparisons that PLAN.md announces as primary, and the same on the tuning sums."""
    lines = []
    for split in ("test", "tuning"):
        found = [paired(rows, f"{split}_accuracy", *names) for names in PRIMARY]
        corrected = holm([one.p for one in found])
        for (arm, other), one, p in zip(PRIMARY, found, corrected, strict=True):
            low, high = one.inner_interval
            lines.append(
                [
                    f"{arm} less {other}, {split} sums",
                    _points(one.spread),
                    f"[{100 * low:+.1f}, {100 * high:+.1f}]",
                    f"{one.p:.2g}",
                    f"{p:.2g}" if split == "test" else "",
                    f"{one.p_equivalent(MARGIN):.2g}",
                ]
            )
    headings = ["difference in right answers", "points [95% interval]", "[90% interval]"]
    headings += ["p", "p, Holm over 2", "p, equivalence within ± 3 points (TOST)"]
    return markdown([headings, *lines])


def _points(spread: Spread) -> str:
    return Spread(tuple(100 * value for value in spread.values)).interval("+.1f")


def arms_table(rows: Sequence[Row]) -> str:
    """A line for each arm: means over seeds and sample standard deviations."""
    columns = {
        "right answers": ("test_accuracy", ".1%"),
        "answer loss": ("test_loss", ".3f"),
        "KL from untrained": ("kl", ".3f"),
        "‖ΔΘ‖": ("norm", ".2f"),
        "cosine with full's": ("cosine", ".2f"),
        "ever kept": ("ever_kept", ".1%"),
        "L1 kept": ("l1_kept", ".1%"),
        "L2 kept": ("grad_norm_kept", ".1%"),
    }
    lines = [["arm", "learning rate", *columns]]
    base = next(row for row in rows if row["arm"] == "untrained")
    lines.append(
        ["untrained", "-", f"{base['test_accuracy']:.1%}", f"{base['test_loss']:.3f}", "0"]
        + ["-"] * (len(columns) - 3)
    )
    for arm in ARMS:
        rates = by_seed(rows, arm.name, "learning_rate")
        if rates:
            cells = [
                Spread(tuple(by_seed(rows, arm.name, column).values())).text(form)
                for column, form in columns.values()
            ]
            lines.append([arm.name, f"{next(iter(rates.values())):g}", *cells])
    return markdown(lines)


def secondary_table(rows: Sequence[Row]) -> str:
    """Each arm less full fine-tuning and less its control: mean, 95% interval, not corrected."""
    lines = [["difference", "right answers, points", "answer loss", "KL from untrained"]]
    from_full = [(arm.name, FULL.name) for arm in ARMS if arm != FULL]
    for arm, other in dict.fromkeys([*from_full, *PRIMARY, *CONTROLS]):
        if by_seed(rows, arm, "test_accuracy") and by_seed(rows, other, "test_accuracy"):
            found = {
                column: paired(rows, column, arm, other).spread
                for column in ("test_accuracy", "test_loss", "kl")
            }
            lines.append(
                [
                    f"{arm} less {other}",
                    _points(found["test_accuracy"]),
                    found["test_loss"].interval("+.3f"),
                    found["kl"].interval("+.3f"),
                ]
            )
    return markdown(lines)


def seeds_table(rows: Sequence[Row]) -> str:
    """Right answers of every counted run."""
    arms = [arm.name for arm in ARMS if by_seed(rows, arm.name, "test_accuracy")]
    seeds = sorted(by_seed(rows, FULL.name, "test_accuracy"))
    lines = [["right answers, seed", *map(str, seeds)]]
    for arm in arms:
        found = by_seed(rows, arm, "test_accuracy")
        lines.append([arm, *(f"{found[s]:.1%}" if s in found else "" for s in seeds)])
    return markdown(lines)


def tuning_losses(rows: Sequence[Row], arm: str) -> dict[float, list[float]]:
    """Tuning loss of an arm with each tuning seed, by learning rate."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["arm"] == arm and row["stage"] == "tuning":
            found.setdefault(row["learning_rate"], []).append(row["tuning_loss"])
    return dict(sorted(found.items()))


def tuning_means(rows: Sequence[Row], arm: str) -> dict[float, float]:
    """Mean tuning loss of an arm over the tuning seeds, by learning rate."""
    found = tuning_losses(rows, arm)
    return {lr: sum(losses) / len(losses) for lr, losses in found.items()}


def tuning_table(rows: Sequence[Row]) -> str:
    """Mean tuning loss for each arm and learning rate, and that with each seed."""
    rates = sorted({lr for arm in ARMS for lr in tuning_losses(rows, arm.name)})
    lines = [["tuning loss, learning rate", *(f"{lr:g}" for lr in rates)]]
    for arm in ARMS:
        means = tuning_means(rows, arm.name)
        if means:
            chosen = min(means, key=means.__getitem__)
            texts = {lr: f"**{m:.3f}**" if lr == chosen else f"{m:.3f}" for lr, m in means.items()}
            cells = {
                lr: f"{texts[lr]} ({', '.join(f'{loss:.3f}' for loss in losses)})"
                for lr, losses in tuning_losses(rows, arm.name).items()
            }
            lines.append([arm.name, *(cells.get(lr, "") for lr in rates)])
    return markdown(lines)


def tables(rows: Sequence[Row]) -> list[str]:
    """Everything that docs/study.md shows of the study, in Markdown."""
    return [
        primary_table(rows),
        arms_table(rows),
        secondary_table(rows),
        seeds_table(rows),
        tuning_table(rows),
    ]


def main() -> None:
    """Print the tables of the results in the repository."""
    rows = read(Path(__file__).parents[2] / "results" / "sums.csv")
    print("\n".join(tables(rows)))


if __name__ == "__main__":
    main()
