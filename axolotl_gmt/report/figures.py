"""Pictures of what a training did, drawn on axes that the caller owns.

Knows matplotlib and arrays of numbers, nothing of where these come from.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import Formatter

_MISSING = "#e4e4e4"  # No shade of the colour map comes near this grey.
DPI = 160
_TICKS = 16  # More column labels than this run into each other.
_SEPARATED = 64  # Of more columns than this the lines between them would hide the cells.
_COLOURS = ("#2a7fbf", "#d55e00")  # Told apart by the colour-blind, on white and on black.
_MARKED = 40  # Of more points than this, the line alone shows where they are.
_POINTS_IN_MEAN = 60  # How many windows of a moving mean a long line is made of.


def heat_map(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[int],
    label: str | None,
    unit: Formatter | None = None,
    limits: tuple[float, float] | None = None,
    beside: Sequence[Axes] = (),
) -> None:
    """Draw ``values`` as a grid of colours with a colour bar; the first row is on top.

    Cells that are NaN stay grey. The caller sets the title and the label of the horizontal axis.

    Args:
        axes: Where to draw.
        values: Floats of shape [rows, columns].
        rows: What each row is, such as a module's name.
        columns: What each column is, such as the number of a layer or of a step, in ascending
            order.
        label: What the colours mean, written along the colour bar; None draws no bar.
        unit: How the colour bar writes its numbers, such as ``PercentFormatter(1)``.
        limits: The values of the darkest and of the brightest colour; by default the smallest and
            the largest in ``values``.
        beside: Other axes that the colour bar is for as well.
    """
    import numpy as np
    from matplotlib import colormaps

    low, high = limits if limits is not None else (None, None)
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["viridis"].with_extremes(bad=_MISSING),
        vmin=low,
        vmax=high,
    )
    axes.set_yticks(range(len(rows)), rows)
    every = -(-len(columns) // _TICKS)
    axes.set_xticks(range(0, len(columns), every), [str(number) for number in columns[::every]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    if len(columns) <= _SEPARATED:
        axes.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
    axes.grid(which="minor", color=axes.get_facecolor(), linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    if label is not None:
        bar = axes.figure.colorbar(
            image,
            ax=[axes, *beside],
            label=label,
            format=unit,
            pad=0.02,
            extend=_ends(values, image),
        )
        bar.outline.set_visible(False)


def _ends(values: np.ndarray, image: AxesImage) -> str:
    """Which ends of the colour bar have values beyond them; they are drawn as arrows."""
    import numpy as np

    within = values[np.isfinite(values)]
    low, high = image.get_clim()
    below, above = bool((within < low).any()), bool((within > high).any())
    return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]


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
    from matplotlib.ticker import PercentFormatter

    heights = [max(len(modules), 1), max(len(outside), 1)] * len(maps)
    axes = figure.subplots(2 * len(maps), 1, height_ratios=heights)
    for grid, bars, each in zip(axes[::2], axes[1::2], maps, strict=True):
        limits = _limits(each)
        if len(outside):
            heat_map(bars, each.outside[:, None], outside, [0], None, limits=limits)
            _write_values(bars, each, limits)
            bars.set_xticks([])
        else:
            bars.set_axis_off()
        unit = PercentFormatter(1)
        heat_map(grid, each.values, modules, layers, each.label, unit, limits, beside=[bars])
        grid.set_title(each.title, loc="left")
        grid.set_xlabel("layer")


def _limits(each: LayerMap) -> tuple[float, float]:
    """What all but the extreme modules of the layers lie in, and a tenth of it wide at least."""
    import numpy as np

    within = each.values[np.isfinite(each.values)]
    low, high = np.quantile(within, [0.02, 0.98]) if within.size else (0.0, 0.0)
    return (min(low, 0.9 * high), high) if high else (0.0, 1.0)


def _write_values(axes: Axes, each: LayerMap, limits: tuple[float, float]) -> None:
    """Write each bar's value in its middle, dark on the bright half of the colours."""
    import numpy as np

    for row, value in enumerate(each.outside):
        if not np.isfinite(value):
            continue
        colour = "black" if value > sum(limits) / 2 else "white"
        text = f"{value:.2%}"
        axes.text(0, row, text, ha="center", va="center", color=colour, fontsize="small")


class Curve(NamedTuple):
    """A line of a chart: values, of shape [steps], with NaN where there is none."""

    label: str
    steps: Sequence[int]
    values: np.ndarray


class Reference(NamedTuple):
    """A value that a chart's lines are to be held against, drawn dashed."""

    label: str
    value: float


def line_chart(
    axes: Axes,
    curves: Sequence[Curve],
    label: str,
    reference: Reference | None = None,
    unit: Formatter | None = None,
    least_span: float = 0.0,
    most: float | None = None,
    smooth: bool = True,
) -> None:
    """Draw ``curves`` over the optimizer's steps.

    Args:
        axes: Where to draw.
        curves: One or more.
        label: What the values are, written along the vertical axis.
        reference: A dashed horizontal line.
        unit: How the vertical axis writes its numbers, such as ``PercentFormatter(1)``.
        least_span: How much the vertical axis shows at least, so that noise looks small.
        most: What no value can exceed; the vertical axis ends there at the latest.
        smooth: Whether long curves are drawn faint, with their moving mean on top.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    for curve, colour in zip(curves, _COLOURS, strict=False):
        window = len(curve.steps) // _POINTS_IN_MEAN if smooth else 1
        few = np.isfinite(curve.values).sum() <= _MARKED
        axes.plot(
            curve.steps,
            curve.values,
            color=colour,
            linewidth=1.6 if window < 2 else 0.6,
            alpha=1 if window < 2 else 0.35,
            marker="o" if few else None,
            markersize=3.5,
            label=curve.label if window < 2 else None,
        )
        if window >= 2:
            mean = _moving_mean(curve.values, window)
            label_of_mean = f"{curve.label}, moving mean of {window} logs"
            axes.plot(curve.steps, mean, color=colour, linewidth=1.8, label=label_of_mean)
    if reference is not None:
        text = axes.yaxis.label.get_color()
        axes.axhline(
            reference.value,
            color=text,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            label=reference.label,
            zorder=1.5,  # Below the curves.
        )
    low, high = axes.get_ylim()
    if high - low < least_span:
        middle = (low + high) / 2
        low, high = middle - least_span / 2, middle + least_span / 2
    if most is not None:
        high = min(high, most + (high - low) / 50)  # Leaves room for the line itself.
    axes.set_ylim(low, high)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if unit is not None:
        axes.yaxis.set_major_formatter(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.6, alpha=0.4)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False)


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values in a centred window; shorter at the ends, NaN if all are NaN."""
    import numpy as np

    finite = np.isfinite(values)
    ones = np.ones(window)
    total = np.convolve(np.where(finite, values, 0.0), ones, mode="same")
    count = np.convolve(finite.astype(float), ones, mode="same")
    mean: np.ndarray = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)
    return mean


def render_png(
    draw: Callable[[Axes], None], width: float, height: float, dark: bool = False
) -> bytes:
    """A picture of one pair of axes, as :func:`render_figure` makes it."""
    return render_figure(lambda figure: draw(figure.subplots()), width, height, dark)


def render_figure(
    draw: Callable[[Figure], None], width: float, height: float, dark: bool = False
) -> bytes:
    """A picture as the bytes of a PNG file, the same on every machine with this matplotlib.

    Neither the user's own style nor pyplot's figures are touched, so it is safe in a training.

    Args:
        draw: Draws on the empty figure that it is given; its layout is constrained.
        width: Inches, at ``DPI`` pixels each.
        height: Inches.
        dark: Whether it is for a dark page.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    text, page = ("#e6e8eb", "#15181c") if dark else ("#1c2024", "#ffffff")
    colours = {f"{key}.color": text for key in ("text", "xtick", "ytick")}
    colours |= {f"axes.{key}": text for key in ("labelcolor", "edgecolor", "titlecolor")}
    colours |= {f"{key}.facecolor": page for key in ("figure", "axes")}
    settings = {"font.size": 10, "text.parse_math": False, **colours}
    with style.context(["default", settings]):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()
