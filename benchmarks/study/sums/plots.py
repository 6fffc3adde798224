"""The pictures of the study on sums."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from axolotl_gmt.files import whole
from benchmarks.study.sums.analysis import MARGIN, Row, by_seed, paired, tuning_means
from benchmarks.study.sums.design import ARMS, FULL

# Okabe and Ito's colours, which also differ for colour-blind readers.
_COLOURS = dict(
    zip(
        (arm.name for arm in ARMS),
        ("#333333", "#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#CC79A7", "#009E73", "#999999"),
        strict=True,
    )
)


def draw(rows: Sequence[Row], curves: Path, folder: Path) -> None:
    """Write ``sums-differences.png``, ``sums-curves.png`` and ``sums-tuning.png``."""
    figures = {"tuning": _tuning(rows)}
    if len(by_seed(rows, FULL.name, "test_accuracy")) > 1:
        figures |= {"differences": _differences(rows), "curves": _curves(curves)}
    for name, figure in figures.items():
        with whole(folder / f"sums-{name}.png") as part:
            figure.savefig(part, dpi=120)
        plt.close(figure)


def _differences(rows: Sequence[Row]) -> Figure:
    """Right answers of each arm less full fine-tuning's, on tuning and on test sums."""
    arms = [
        arm.name
        for arm in ARMS
        if arm != FULL and len(paired(rows, "test_accuracy", arm.name, FULL.name).values) > 1
    ]
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.4 + 0.42 * len(arms)), sharex=True, sharey=True, layout="constrained"
    )
    for axis, split, title in zip(
        axes, ("tuning", "test"), ("500 tuning sums", "1,000 test sums"), strict=True
    ):
        axis.axvspan(-100 * MARGIN, 100 * MARGIN, color="#eeeeee", zorder=0)
        axis.axvline(0, color="#333333", lw=1)
        for place, arm in enumerate(arms):
            spread = paired(rows, f"{split}_accuracy", arm, FULL.name).spread
            values = 100 * np.array(spread.values)
            axis.plot(values, [place + 0.2] * len(values), ".", color=_COLOURS[arm], alpha=0.5)
            axis.errorbar(
                100 * spread.mean,
                place,
                xerr=100 * spread.half_width,
                fmt="o",
                color=_COLOURS[arm],
                capsize=3,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("points of right answers less full fine-tuning's")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    return figure


def _curves(file: Path) -> Figure:
    """Training loss of each arm's counted runs, mean over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if int(row["seed"]) < 100:
                of_arm = found.setdefault(row["arm"], {})
                of_arm.setdefault(row["seed"], []).append(float(row["loss"]))
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for arm in ARMS:
        if arm.name in found:
            mean = np.array(list(found[arm.name].values())).mean(0)
            steps = range(1, len(mean) + 1)
            axis.plot(steps, mean, color=_COLOURS[arm.name], label=arm.name)
    axis.set_yscale("log")
    for of_ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        of_ticks("{x:g}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("step")
    axis.set_ylabel("training loss, mean over seeds")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _tuning(rows: Sequence[Row]) -> Figure:
    """Tuning loss over learning rates, zoomed to where the decisions are made."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    lowest = []
    for arm in ARMS:
        means = tuning_means(rows, arm.name)
        if means:
            axis.plot(
                list(means), list(means.values()), "o-", color=_COLOURS[arm.name], label=arm.name
            )
            chosen = min(means, key=means.__getitem__)
            axis.plot(chosen, means[chosen], "o", ms=11, mfc="none", color=_COLOURS[arm.name])
            lowest.append(means[chosen])
    if lowest:
        axis.set_ylim(0.8 * min(lowest), 2.5 * max(lowest))
    axis.set_xscale("log", base=2)
    axis.set_xlabel("learning rate (a circle: chosen)")
    axis.set_ylabel("loss on the tuning sums, mean of two seeds")
    ticks = sorted({lr for arm in ARMS for lr in tuning_means(rows, arm.name)})
    axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axis.legend(frameon=False, fontsize=8, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
