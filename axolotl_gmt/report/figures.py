"""Pictures of what a training did, drawn on axes that the caller owns.

Knows matplotlib, and nothing of where the numbers come from.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from axolotl_gmt.report.log import Curve

_MISSING = "#e4e4e4"  # No shade of the colour map comes near this grey.
DPI = 160
_TICKS = 16  # More column labels than this run into each other.
_SEPARATED = 64  # Of more columns than this the lines between them would hide the cells.
# Beyond a factor of this, a linear axis shows nothing but the largest values.
_WIDE = 100
# Which ends of a colour bar are arrows, since there are values below or above its limits.
_EXTENDED = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}
_MARKED = 40  # Of more points than this, the line alone shows where they are.
MOST_POINTS = 2000  # More would fall on the same pixels of a chart.
LEAST_SPAN = 0.02  # Shares that differ by less than this are noise, which is not to fill an axis.
_POINTS_IN_MEAN = 60  # How many windows of a moving mean a long line is made of.


class LineStyle(NamedTuple):
    """How a run is drawn in every chart of a comparison."""

    colour: str
    dashes: tuple[float, ...]
    """Lengths of dashes and of the gaps between them, in line widths; empty for a solid line."""


_SOLID, _DASHED, _DOTTED = (), (5.0, 2.0), (1.2, 1.2)
STYLES = (
    LineStyle("#2a7fbf", _SOLID),
    LineStyle("#d55e00", _SOLID),
    LineStyle("#d29696", _SOLID),
    LineStyle("#9600ff", _SOLID),
    LineStyle("#784bc3", _DASHED),
    LineStyle("#c35a4b", _DASHED),
    LineStyle("#2da5b4", _DASHED),
    LineStyle("#69c34b", _DOTTED),
    LineStyle("#ff69f0", _DOTTED),
    LineStyle("#695a4b", _DOTTED),
)
"""Lines that the colour-blind tell apart, on white and on black.

No ten colours are far enough apart for that, so only lines of the same dashes need to be.
"""


def heat_map(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[int],
    limits: tuple[float, float],
    label: str | None = None,
    beside: Sequence[Axes] = (),
) -> None:
    """Draw fractions as a grid of colours with a colour bar in percent; the first row is on top.

    Cells that are NaN stay grey. The caller sets the title and the label of the horizontal axis.

    Args:
        axes: Where to draw.
        values: Of shape [rows, columns].
        rows: What each row is, such as a module's name.
        columns: What each column is, such as the number of a layer or of a step; ascending.
        limits: The values of the darkest and of the brightest colour.
        label: What the colours mean, written along the colour bar; None draws no bar.
        beside: Other axes that the colour bar is for as well.
    """
    low, high = limits
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["viridis"].with_extremes(bad=_MISSING),
        vmin=low,
        vmax=high,
    )
    every = -(-len(columns) // _TICKS)
    axes.set_xticks(range(0, len(columns), every), [str(number) for number in columns[::every]])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    if len(columns) <= _SEPARATED:
        axes.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
    axes.grid(which="minor", color=axes.get_facecolor(), linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if label is not None:
        bar = axes.figure.colorbar(
            image,
            ax=[axes, *beside],
            label=label,
            format=PercentFormatter(1),
            pad=0.02,
            extend=_EXTENDED[bool((values < low).any()), bool((values > high).any())],
        )
        bar.outline.set_visible(False)


class LayerMap(NamedTuple):
    """A fraction for each module of each layer, and for the modules outside any layer."""

    title: str
    label: str
    """What it is a fraction of, written along the colour bar."""
    values: np.ndarray
    """Of shape [module types, layers], NaN where there is none."""
    outside: np.ndarray
    """Of shape [modules outside any layer], NaN where there is none."""


def layer_maps(
    figure: Figure,
    maps: Sequence[LayerMap],
    modules: Sequence[str],
    layers: Sequence[int],
    outside: Sequence[str],
) -> None:
    """Draw ``maps`` one above the other, each as a heat map over the modules and the layers.

    The modules outside any layer follow below it as bars, with their values written on them.

    Args:
        figure: Where to draw, such as the one that :func:`render_figure` gives.
        maps: One or more, all about the same modules.
        modules: Names of the rows.
        layers: Numbers of the columns, in ascending order.
        outside: Names of the modules outside any layer; can be empty.
    """
    heights = [max(len(modules), 1), max(len(outside), 1)] * len(maps)
    axes = figure.subplots(2 * len(maps), 1, height_ratios=heights)
    for grid, bars, each in zip(axes[::2], axes[1::2], maps, strict=True):
        limits = _limits(each)
        heat_map(grid, each.values, modules, layers, limits, each.label, beside=[bars])
        grid.set_title(each.title, loc="left")
        grid.set_xlabel("layer")
        if not len(outside):
            bars.set_axis_off()
            continue
        heat_map(bars, each.outside[:, None], outside, [0], limits)
        bars.set_xticks([])
        for row, value in enumerate(each.outside):
            if np.isfinite(value):  # Written dark on the bright half of the colours.
                colour = "black" if value > sum(limits) / 2 else "white"
                style = {"ha": "center", "va": "center", "color": colour, "fontsize": "small"}
                bars.text(0, row, f"{value:.2%}", **style)


def _limits(each: LayerMap) -> tuple[float, float]:
    """What all but the extreme modules of the layers lie in, and a tenth of it wide at least."""
    within = each.values[np.isfinite(each.values)]
    low, high = np.quantile(within, [0.02, 0.98]) if within.size else (0.0, 0.0)
    return (min(low, 0.9 * high), high) if high else (0.0, 1.0)


def line_chart(
    axes: Axes,
    curves: Mapping[str, Curve],
    label: str,
    reference: tuple[str, float] | None = None,
    is_share: bool = False,
    smooth: bool = True,
) -> None:
    """Draw ``curves`` over the optimizer's steps.

    Args:
        axes: Where to draw.
        curves: One or more, by their labels. Of one with more than ``MOST_POINTS`` values only the
            extremes of neighbouring values are drawn.
        label: What the values are, written along the vertical axis.
        reference: Label and value of a dashed horizontal line.
        is_share: Whether the values are fractions of 1: the vertical axis is in percent then, ends
            at 100 % at the latest, and shows ``LEAST_SPAN`` at least, so that noise looks small.
        smooth: Whether long curves are drawn faint, with their moving mean on top.
    """
    for (name, curve), line in zip(curves.items(), STYLES, strict=False):
        window = mean_window(curve) if smooth else 1
        label_of_mean = f"{name}, moving mean of {window:,} logs"
        _draw_curve(axes, curve, line, window, name if window < 2 else label_of_mean)
    if reference is not None:
        text, value = reference
        dashed = axes.axhline(value, linewidth=1.2, linestyle=(0, (4, 3)), label=text)
        dashed.set(color=axes.yaxis.label.get_color(), zorder=1.5)  # Below the curves.
    _finish_chart(axes, label, is_share)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False)


def overlay(
    axes: Axes,
    curves: Sequence[tuple[LineStyle, Curve]],
    label: str,
    is_share: bool = False,
    smooth: bool = True,
) -> None:
    """Draw the same quantity of several runs over the optimizer's steps, without a legend.

    The vertical axis is logarithmic if a linear one would show the largest values alone, as it
    would beside a run that diverged; never that of shares or of curves that are not smoothed.

    Args:
        axes: Where to draw.
        curves: One or more, with the style of the run that each is of.
        label: What the values are, written along the vertical axis.
        is_share: As of :func:`line_chart`.
        smooth: As of :func:`line_chart`.
    """
    for line, curve in curves:
        _draw_curve(axes, curve, line, mean_window(curve) if smooth else 1)
    values = np.concatenate([curve.finite for _, curve in curves])
    if smooth and not is_share and 0 < _WIDE * values.min() < values.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter("{:g}".format))  # Not 10 with an exponent.
        axes.yaxis.set_minor_formatter(NullFormatter())
    _finish_chart(axes, label, is_share)


def _draw_curve(
    axes: Axes, curve: Curve, line: LineStyle, window: int, label: str | None = None
) -> None:
    """Draw a curve, or one faint line and its moving mean if there are many values."""
    shown = _extremes(curve.values)
    dashed = (0, line.dashes or None)
    axes.plot(
        curve.steps[shown],
        curve.values[shown],
        color=line.colour,
        linestyle=dashed if window < 2 else "-",
        linewidth=1.6 if window < 2 else 0.6,
        alpha=1 if window < 2 else 0.35,
        marker="o" if np.isfinite(curve.values).sum() <= _MARKED else None,
        markersize=3.5,
        label=label if window < 2 else None,
    )
    if window >= 2:
        axes.plot(
            curve.steps[shown],
            _moving_mean(curve.values, window, shown),
            color=line.colour,
            linestyle=dashed,
            linewidth=1.8,
            label=label,
        )


def _finish_chart(axes: Axes, label: str, is_share: bool) -> None:
    if is_share:
        low, high = at_least(LEAST_SPAN, *axes.get_ylim())
        axes.set_ylim(low, min(high, 1 + (high - low) / 50))  # Leaves room for the line itself.
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.6, alpha=0.4)


def mean_window(curve: Curve) -> int:
    """How many logged values the moving mean of a long curve is over; 0 or 1 of a short one."""
    return len(curve.steps) // _POINTS_IN_MEAN


def at_least(span: float, low: float, high: float) -> tuple[float, float]:
    """``low`` and ``high``, moved apart about their middle if they lie closer than ``span``."""
    middle, half = (low + high) / 2, max(high - low, span) / 2
    return middle - half, middle + half


def neighbours(points: int) -> int:
    """How many neighbouring points of a curve are drawn as two: the lowest and the highest."""
    return 2 * -(-points // MOST_POINTS)


def _extremes(values: np.ndarray) -> np.ndarray:
    """Ascending indices of the values to draw: all, or the extremes of runs of neighbours."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    length = neighbours(len(values))
    padded = np.append(values, np.full(-len(values) % length, np.nan)).reshape(-1, length)
    is_missing = np.isnan(padded)
    lowest = np.where(is_missing, np.inf, padded).argmin(axis=1)
    highest = np.where(is_missing, -np.inf, padded).argmax(axis=1)
    starts = np.arange(0, padded.size, length)
    return np.unique(np.concatenate([starts + lowest, starts + highest]))


def _moving_mean(values: np.ndarray, window: int, at: np.ndarray) -> np.ndarray:
    """Means of the finite values in windows around the indices ``at``; NaN if there is none."""
    starts = at - window // 2
    parts = (values[max(start, 0) : start + window] for start in starts)
    finite = (part[np.isfinite(part)] for part in parts)
    return np.array([part.mean() if part.size else np.nan for part in finite])


def render_figure(draw: Callable[[Figure], None], width: float, height: float) -> bytes:
    """A picture as the bytes of a PNG file, the same on every machine with this matplotlib.

    Neither the user's own style nor pyplot's figures are touched, so it is safe in a training.

    Args:
        draw: Draws on the empty figure that it is given; its layout is constrained.
        width: Inches, at ``DPI`` pixels each.
        height: Inches.
    """
    return _saved(draw, width, height, "#1c2024", "#ffffff", "png", {"Software": None})


def render_svg(draw: Callable[[Figure], None], width: float, height: float, name: str) -> str:
    """What stands inside the ``<svg>`` of a picture on a page, which has 72 units to the inch.

    It takes the page's colours, so that it does for a light and for a dark one: ``currentColor``
    for lines and text, ``var(--page)`` for the ground.

    Args:
        draw: As of :func:`render_figure`.
        width: Inches.
        height: Inches.
        name: Of no other picture on the page; ids are made of it.
    """
    text, page = "#010203", "#fdfeff"  # Nothing else has these colours.
    nothing = dict.fromkeys(("Format", "Type", "Creator", "Date"))
    # Text stays text: it is found, selected, and small.
    settings = {"svg.hashsalt": name, "svg.fonttype": "none"}
    file = _saved(draw, width, height, text, page, "svg", nothing, settings).decode()
    inner = file[file.index("<svg") : file.rindex("</svg>")].partition(">")[2]
    inner = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)  # They are the same in each picture.
    return inner.replace(text, "currentColor").replace(page, "var(--page)").strip()


def _saved(
    draw: Callable[[Figure], None],
    width: float,
    height: float,
    text: str,
    page: str,
    file_format: str,
    metadata: Mapping[str, str | None],
    settings: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """The file of a picture whose lines and text have one colour, on a ground of another."""
    colours = {f"{key}.color": text for key in ("text", "xtick", "ytick")}
    colours |= {f"axes.{key}": text for key in ("labelcolor", "edgecolor", "titlecolor")}
    colours |= {f"{key}.facecolor": page for key in ("figure", "axes")}
    with style.context(
        ["default", {"font.size": 10, "text.parse_math": False, **colours, **settings}]
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format=file_format, dpi=DPI, metadata=dict(metadata))
    return file.getvalue()
