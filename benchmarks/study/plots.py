"""The study's pictures from its CSV: ``python -m benchmarks.study.plots CSV DIR``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from axolotl_gmt.files import whole
from benchmarks.study.tables import Row, Setting, Spread, numbers, read_csv, settings_of

# Okabe and Ito's colours, which also differ for colour-blind readers.
COLOURS = {
    "gmt": "#0072B2",
    "random": "#E69F00",
    "full": "#333333",
    "full_bf16": "#56B4E9",
    "half": "#009E73",
    "lora": "#CC79A7",
    "gradient_weight": "#D55E00",
    "base": "#999999",
}
MARKERS = {
    "gmt": "o",
    "random": "s",
    "full": "D",
    "full_bf16": "d",
    "half": "^",
    "lora": "v",
    "gradient_weight": "P",
    "base": "X",
}
NAMES = {
    "gmt": "GMT",
    "random": "random mask",
    "full": "full fine-tuning",
    "full_bf16": "full, weights in bf16",
    "half": "half of the matrices",
    "lora": "LoRA",
    "gradient_weight": "|g · w|",
    "base": "before training",
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw every picture for which there are rows; returns their files."""
    sft, dpo = settings_of(rows, "sft"), settings_of(rows, "dpo")
    figures: dict[str, Figure] = {}
    if any(setting.final for setting in sft.values()):
        figures["ratio"] = draw_ratio(sft)
        figures["forgetting"] = draw_forgetting(sft)
        figures["tuning"] = draw_tuning(sft, dpo)
    if any(setting.final for setting in dpo.values()):
        figures["dpo"] = draw_dpo(dpo)
    files = []
    for name, figure in figures.items():
        file = folder / f"study-{name}.png"
        with whole(file) as part:
            figure.savefig(part, dpi=130)
        files.append(file)
        plt.close(figure)
    return files


def draw_ratio(settings: Mapping[str, Setting]) -> Figure:
    """Answer loss, its difference from plain fine-tuning's, accuracy and prose loss by ratio."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.4), layout="constrained", sharex=True)
    plain = settings.get("full")
    panels: list[tuple[Axes, str, str, Callable[[Setting], Spread]]] = [
        (
            axes[0, 0],
            "Answer loss on held-out problems",
            "nats per token, lower is better",
            lambda setting: setting.spread("test_loss"),
        ),
        (
            axes[0, 1],
            "The same less full fine-tuning's, seed by seed",
            "nats per token, lower is better",
            lambda setting: setting.difference("test_loss", plain or setting),
        ),
        (
            axes[1, 0],
            "Held-out problems answered right",
            "",
            lambda setting: setting.spread("test_accuracy"),
        ),
        (
            axes[1, 1],
            "Loss on prose outside the task",
            "nats per token, lower is better",
            lambda setting: setting.spread("prose_loss"),
        ),
    ]
    for panel, title, unit, spread in panels:
        # Before training the answer loss is so far from all others that it would flatten them.
        shown = [s for label, s in settings.items() if label != "base" or panel not in axes[0]]
        _draw_over_ratio(panel, [s for s in shown if s.final], spread)
        panel.set_title(title, fontsize=11)
        panel.set_ylabel(unit)
    for panel in axes[1]:
        panel.set_xlabel("fraction of gradient entries that is masked")
    axes[1, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[1, 0].set_ylim(bottom=0)
    handles, labels = axes[1, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw_over_ratio(
    axes: Axes, settings: Sequence[Setting], spread_of: Callable[[Setting], Spread]
) -> None:
    """Methods with a ratio as points with error bars, the others as lines."""
    shift = {"gmt": -0.008, "random": 0.008, "gradient_weight": 0.024}
    for name, offset in shift.items():
        found = [setting for setting in settings if setting.method.name == name]
        spreads = [spread_of(setting) for setting in found]
        if found:
            axes.errorbar(
                [(setting.method.ratio or 0.0) + offset for setting in found],
                [spread.mean for spread in spreads],
                [spread.deviation for spread in spreads],
                color=COLOURS[name],
                marker=MARKERS[name],
                capsize=3,
                label=NAMES[name],
            )
    # At the right edge their spread, which as bands would cover each other.
    lines = {
        "full": ("-", 1.03),
        "half": ("--", 1.06),
        "lora": ("-.", 1.09),
        "full_bf16": ((0, (1, 3)), 1.11),
        "base": (":", None),
    }
    for setting in settings:
        name = setting.method.name
        spread = spread_of(setting)
        if name not in lines or not spread.values:
            continue
        style, edge = lines[name]
        axes.axhline(spread.mean, ls=style, lw=1.4, color=COLOURS[name], label=NAMES[name])
        if edge is not None:
            axes.errorbar(
                edge,
                spread.mean,
                spread.deviation,
                color=COLOURS[name],
                marker=MARKERS[name],
                ms=5,
                capsize=3,
            )
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.spines[["top", "right"]].set_visible(False)


def draw_forgetting(settings: Mapping[str, Setting]) -> Figure:
    """Prose loss against answer loss: small points are seeds, large ones their means."""
    figure, axes = plt.subplots(figsize=(6.8, 4.8), layout="constrained")
    base = settings.get("base")
    for label, setting in settings.items():
        if not setting.final or label == "base":
            continue
        name = setting.method.name
        losses, prose = setting.spread("test_loss"), setting.spread("prose_loss")
        strength = 0.35 + 0.65 * (setting.method.ratio or 1.0)
        axes.scatter(
            losses.values,
            prose.values,
            s=22,
            alpha=0.6 * strength,
            color=COLOURS[name],
            marker=MARKERS[name],
            lw=0,
        )
        axes.scatter(
            losses.mean,
            prose.mean,
            s=70,
            color=COLOURS[name],
            marker=MARKERS[name],
            alpha=strength,
            edgecolor="white",
            label=_named(setting),
        )
    if base is not None and base.final:
        axes.axhline(
            base.spread("prose_loss").mean, ls=":", color=COLOURS["base"], label=NAMES["base"]
        )
    axes.set_xlabel("answer loss on held-out problems, nats per token")
    axes.set_ylabel("loss on prose, nats per token")
    axes.set_title("Task learned (left) against prose forgotten (up)", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _named(setting: Setting) -> str:
    name, ratio = NAMES[setting.method.name], setting.method.ratio
    return name if ratio is None else f"{name} {ratio:g}"


def draw_tuning(sft: Mapping[str, Setting], dpo: Mapping[str, Setting]) -> Figure:
    """Validation loss against learning rate, the chosen one ringed."""
    tasks = [task for task in (sft, dpo) if task]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(5.6 * len(tasks), 4.4), layout="constrained", squeeze=False
    )
    titles = ("SFT: answer loss on validation problems", "DPO: loss on validation pairs")
    for panel, settings, title in zip(axes[0], tasks, titles, strict=False):
        for setting in settings.values():
            if setting.method.name != "base":
                _draw_tuned(panel, setting)
        panel.set_xscale("log")
        rates = sorted(
            {rate for s in settings.values() for rate in numbers(s.rows, "learning_rate")}
        )
        if len(rates) <= 6:  # More would cover each other.
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
            panel.minorticks_off()
        panel.set_xlabel("learning rate")
        panel.set_ylabel("nats per token" if settings is sft else "nats per pair")
        panel.set_title(title, fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside center right", frameon=False, fontsize=9)
    return figure


def _draw_tuned(axes: Axes, setting: Setting) -> None:
    # Of the seed that went over all of them.
    seeds = sorted(numbers(setting.rows, "seed"))
    seed = max(seeds, key=seeds.count, default=0.0)
    points = sorted(
        (rate, loss)
        for row in setting.rows
        if row["seed"] == seed
        for rate, loss in zip(
            numbers([row], "learning_rate"), numbers([row], "validation_loss"), strict=False
        )
    )
    if not points:
        return
    name = setting.method.name
    ratio = setting.method.ratio
    # The more is masked, the shorter the dashes.
    dashes = "-" if ratio is None else (0, (1 + 9 * (1 - ratio), 1.5))
    axes.plot(
        *zip(*points, strict=True),
        color=COLOURS[name],
        marker=MARKERS[name],
        ms=5,
        ls=dashes,
        label=_named(setting),
    )
    for point in points:
        if point[0] == setting.learning_rate:
            axes.scatter(*point, s=110, facecolor="none", edgecolor=COLOURS[name], zorder=3)


def draw_dpo(settings: Mapping[str, Setting]) -> Figure:
    """Preference accuracy and DPO loss: a point for each seed, and mean and deviation."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    titles = {
        "test_accuracy": "Held-out preferences right",
        "test_loss": "DPO loss on held-out pairs, nats",
    }
    # Before DPO every margin is 0, so no pair is right.
    untrained = {"test_accuracy": 0.5, "test_loss": 0.6931472}
    names = {"test_accuracy": "coin flips", "test_loss": "before DPO"}
    found = [setting for setting in settings.values() if setting.final]
    for panel, (column, title) in zip(axes, titles.items(), strict=True):
        for place, setting in enumerate(found):
            spread, colour = setting.spread(column), COLOURS[setting.method.name]
            panel.errorbar(
                spread.mean,
                place,
                xerr=spread.deviation,
                color=colour,
                marker=MARKERS[setting.method.name],
                ms=8,
                capsize=4,
            )
            heights = [place + 0.22] * len(spread.values)
            panel.scatter(spread.values, heights, color=colour, s=16, alpha=0.6, lw=0)
        panel.axvline(untrained[column], color="#999999", ls=":", label=names[column])
        panel.set_yticks(range(len(found)), [_named(setting) for setting in found])
        panel.set_ylim(len(found) - 0.5, -0.5)
        panel.set_xlabel(title)
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def main() -> None:
    """Draw the pictures of a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, help="a study.csv")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    options = parser.parse_args()
    for file in draw(read_csv(options.csv), options.folder):
        print(file)


if __name__ == "__main__":
    main()
