"""Draw ``docs/performance.png`` from the results: what masking costs, and how it grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
BLUE, GREY = "#1f6fb2", "#9aa4ad"


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a result on the CPU."""
    rows = json.loads((HERE / "results" / f"{name}.json").read_text())["rows"]
    return [row for row in rows if row["device"] == "cpu"]


def draw_mask_step(axes: Axes, dtype: str) -> None:
    """Bars of time, the mask step's in blue, on a logarithmic axis."""
    rows = sorted(
        (row for row in rows_of("mask_step") if row["dtype"] == dtype),
        key=lambda row: -row["median ms"],
    )
    names = [row["what"] for row in rows]
    times = [row["median ms"] for row in rows]
    bars = axes.barh(names, times, color=[BLUE if "GMT" in name else GREY for name in names])
    axes.bar_label(bars, [f"{time:,.0f}" for time in times], padding=3)
    axes.set_xscale("log")
    axes.set_xlim(10, max(times) * 4)
    axes.set_xlabel("ms, log scale")
    axes.set_title(f"{dtype} gradients of SmolLM2-135M")
    axes.spines[["top", "right"]].set_visible(False)


def draw_growth(axes: Axes, series: str, key: str, label: str) -> None:
    """Time against size, and the straight line through the largest."""
    rows = [row for row in rows_of("growth") if row["series"] == series]
    sizes = [row[key] for row in rows]
    times = [row["median ms"] for row in rows]
    axes.plot(sizes, times, "o-", color=BLUE, label="GMT mask step")
    if series == "entries":
        line = [times[-1] * size / sizes[-1] for size in sizes]
        axes.plot(sizes, line, "--", color=GREY, label="proportional to the entries")
        axes.set_yscale("log")
    else:
        axes.axhline(times[0] * 1.2, ls="--", color=GREY, label="10 tensors + 20%")
        axes.set_ylim(0, max(*times, times[0] * 1.2) * 1.15)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("ms")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw and write the picture."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
    draw_mask_step(axes[0, 0], "bf16")
    draw_mask_step(axes[0, 1], "fp32")
    draw_growth(axes[1, 0], "entries", "million entries", "million bf16 entries, in 100 tensors")
    largest = max(row["million entries"] for row in rows_of("growth"))
    draw_growth(
        axes[1, 1], "tensors", "tensors", f"tensors, with {largest:,} M bf16 entries in all"
    )
    figure.savefig(HERE.parent / "docs" / "performance.png", dpi=110)


if __name__ == "__main__":
    main()
