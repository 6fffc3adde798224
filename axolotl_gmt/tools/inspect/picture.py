"""A comparison drawn as a picture: heat maps over modules and layers.

Knows what was compared and how to draw; matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from axolotl_gmt.errors import UserError
from axolotl_gmt.report import figures
from axolotl_gmt.tools.inspect.compare import Change, Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Larger pictures take minutes, and cannot be read.
_ROWS, _COLUMNS, _OUTSIDE, _LETTERS = 64, 512, 32, 60


def draw_png(comparison: Comparison) -> bytes:
    """A PNG file with heat maps of the changed fraction and of the relative norm of the change.

    Of many modules, those with the most entries are drawn, and the picture says how many are not.

    Raises:
        UserError: If no tensor is in a layer.
    """
    cells, outside = comparison.by_module_and_layer(), comparison.outside_layers()
    if not cells:
        raise UserError(
            "No tensor that was compared is in a numbered layer, so there is no heat map to draw. "
            "Leave out --png."
        )
    in_layers: dict[str, Change] = {}
    for (module, _), change in cells.items():
        in_layers[module] = in_layers.get(module, Change()) + change
    modules, alone = _largest(in_layers, _ROWS), _largest(outside, _OUTSIDE)
    all_layers = sorted({layer for _, layer in cells})
    layers = all_layers[:_COLUMNS]
    left_out = {
        "smaller modules in layers": len(in_layers) - len(modules),
        "last layers": len(all_layers) - len(layers),
        "smaller modules outside layers": len(outside) - len(alone),
    }

    def layer_map(title: str, label: str, value: Callable[[Change], float]) -> figures.LayerMap:
        grid = np.full((len(modules), len(layers)), math.nan)
        for row, column in np.ndindex(grid.shape):
            if change := cells.get((modules[row], layers[column])):
                grid[row, column] = value(change)
        return figures.LayerMap(
            title, label, grid, np.array([value(outside[module]) for module in alone])
        )

    total, (base, tuned) = comparison.total, map(_shortened, comparison.labels)
    maps = (
        layer_map(
            f"Entries changed: {total.changed_fraction:.2%} in all",
            "of the module's entries",
            lambda change: change.changed_fraction,
        ),
        layer_map(
            f"Norm of the change: {_relative(total):.2%} of the norm of {base} in all",
            f"of the module's norm in {base}",
            _relative,
        ),
    )
    title = f"What tuning changed, from {base} to {tuned}"
    if any(left_out.values()):
        counts = [f"{count:,} {what}" for what, count in left_out.items() if count]
        title += f"\nNot drawn, but in the table: {', '.join(counts)}"

    def draw(figure: Figure) -> None:
        figure.suptitle(title, fontweight="bold")
        figures.layer_maps(
            figure, maps, [*map(_shortened, modules)], layers, [*map(_shortened, alone)]
        )

    height = len(maps) * (1.2 + 0.25 * (len(modules) + len(alone)))
    return figures.render_figure(draw, width=10, height=height)


def _largest(changes: dict[str, Change], count: int) -> list[str]:
    """The ``count`` names with the most entries, in the order that they came in."""
    kept = set(sorted(changes, key=lambda name: -changes[name].entries)[:count])
    return [name for name in changes if name in kept]


def _shortened(name: str) -> str:
    return name if len(name) <= _LETTERS else f"...{name[3 - _LETTERS :]}"


def _relative(change: Change) -> float:
    return math.nan if change.relative_norm is None else change.relative_norm
