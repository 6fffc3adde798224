"""What tuning changed: two checkpoints compared entry by entry, in a few tens of megabytes.

Knows tensors by name, nothing of how a model was trained.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from axolotl_gmt.names import layer_name, place
from axolotl_gmt.report.modules import module_type, natural_order, stack_labels, stack_name
from axolotl_gmt.tools.inspect.checkpoint import (
    Adapter,
    Checkpoint,
    CheckpointError,
    Stored,
    read_checkpoint,
    round_to,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# 1 MB in float32: a comparison holds a few arrays of this size, and they fit into a CPU's cache.
_WINDOW_ENTRIES = 1 << 18


@dataclass(frozen=True)
class Change:
    """How the entries of some tensors changed; two of them add up to one over all their entries.

    Entries whose base or change is NaN or infinite count as ``non_finite``; they are neither among
    the changed ones nor in the norms.
    """

    entries: int = 0
    changed: int = 0
    non_finite: int = 0
    square_change: float = 0.0
    square_base: float = 0.0

    def __add__(self, other: Change) -> Change:
        return Change(
            self.entries + other.entries,
            self.changed + other.changed,
            self.non_finite + other.non_finite,
            self.square_change + other.square_change,
            self.square_base + other.square_base,
        )

    @property
    def changed_fraction(self) -> float:
        """Changed entries over all entries."""
        return self.changed / self.entries if self.entries else 0.0

    @property
    def norm(self) -> float:
        """Euclidean (Frobenius) norm of the change; infinite if its square leaves float64."""
        return math.sqrt(self.square_change)

    @property
    def relative_norm(self) -> float | None:
        """Norm of the change over the norm of the base; None where the base is all zeros.

        None as well where one of them is infinite.
        """
        if not self.square_base or math.isinf(self.square_base + self.square_change):
            return None
        return self.norm / math.sqrt(self.square_base)

    def as_dict(self) -> dict[str, int | float | None]:
        """The figures that a reader wants, under their names in JSON."""
        change, base = self.norm, math.sqrt(self.square_base)
        return {
            "entries": self.entries,
            "changed": self.changed,
            "changed_fraction": self.changed_fraction,
            "change_norm": change if math.isfinite(change) else None,
            "base_norm": base if math.isfinite(base) else None,
            "relative_change_norm": self.relative_norm,
            "non_finite": self.non_finite,
        }


Compared = Literal["weights", "weights and an adapter", "matrices of two adapters"]


class Grid(NamedTuple):
    """Changes by module type (rows) and layer (columns), as heat maps want them.

    Arrays are of shape [rows, columns], NaN where a layer has no such module.
    """

    rows: list[str]
    columns: list[int]
    changed_fraction: np.ndarray
    relative_norm: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """What tuning changed in each tensor, and which tensors could not be compared."""

    base: Path
    tuned: Path
    compared: Compared
    tensors: dict[str, Change]
    """By name, in natural order: layer 10 after layer 9."""
    only_in_base: list[str] = field(default_factory=list)
    only_in_tuned: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Tensors of another shape on each side, such as a resized embedding: (base's, tuned's)."""
    not_weights: list[str] = field(default_factory=list)
    """Integer and boolean tensors on both sides, such as position ids."""
    converted: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many tensors had another dtype: keys are (base's, tuned's)."""

    @property
    def total(self) -> Change:
        """Over all tensors that were compared."""
        return sum(self.tensors.values(), Change())

    @property
    def non_finite(self) -> list[str]:
        """Tensors with NaN or infinite entries."""
        return [name for name, change in self.tensors.items() if change.non_finite]

    def by_module(self) -> dict[str, Change]:
        """By module type, over all layers: q_proj of every layer is one."""
        return self._sum_by(self._module)

    def by_layer(self) -> dict[str, Change]:
        """By decoder layer; tensors outside any are left out."""
        inside = [name for name in self.tensors if layer_name(name)]
        layers = self._sum_by(self._layer, inside)
        return dict(sorted(layers.items(), key=lambda item: natural_order(item[0])))

    def grid(self) -> Grid | None:
        """By module type and layer, without what is outside the layers; None if all is outside."""
        cells: dict[tuple[str, int], Change] = {}
        for name, change in self.tensors.items():
            layer = place(name).layer
            if layer is not None:
                key = self._module(name), layer
                cells[key] = cells.get(key, Change()) + change
        return _grid(cells) if cells else None

    def outside_layers(self) -> dict[str, Change]:
        """By module, of what is in no layer: embeddings, the final norm, the head."""
        return self._sum_by(self._module, [name for name in self.tensors if not layer_name(name)])

    def remarks(self) -> list[str]:
        """What a reader must know about the figures, in sentences."""
        base, tuned = self.base, self.tuned
        remarks = [
            f"{count} tensors are {before} in {base} and {after} in {tuned}: those of {base} were "
            f"converted to {after} first, so that rounding alone does not count as a change."
            for (before, after), count in self.converted.items()
        ]
        if self.compared == "matrices of two adapters":
            remarks.append("Both are adapters: these are their own matrices, not the weights.")
        reshaped = [
            f"{name} ({'x'.join(map(str, before))}, then {'x'.join(map(str, after))})"
            for name, (before, after) in self.reshaped.items()
        ]
        lists = {
            f"Only in {base}": self.only_in_base,
            f"Only in {tuned}": self.only_in_tuned,
            "Not compared, as the shapes differ": reshaped,
            "Not compared, as they are not floating-point": self.not_weights,
            "With NaN or infinite entries, which are neither changed nor in a norm": [
                f"{name} ({self.tensors[name].non_finite:,})" for name in self.non_finite
            ],
        }
        return remarks + [f"{what}: {_first_few(names)}." for what, names in lists.items() if names]

    def as_dict(self) -> dict[str, object]:
        """All that was found, as JSON has it."""
        return {
            "base": str(self.base),
            "tuned": str(self.tuned),
            "compared": self.compared,
            "total": self.total.as_dict(),
            "modules": {name: change.as_dict() for name, change in self.by_module().items()},
            "layers": {name: change.as_dict() for name, change in self.by_layer().items()},
            "tensors": {name: change.as_dict() for name, change in self.tensors.items()},
            "only_in_base": self.only_in_base,
            "only_in_tuned": self.only_in_tuned,
            "reshaped": {
                name: {"base": before, "tuned": after}
                for name, (before, after) in self.reshaped.items()
            },
            "not_weights": self.not_weights,
            "converted": [
                {"base": before, "tuned": after, "tensors": count}
                for (before, after), count in self.converted.items()
            ],
        }

    def _sum_by(
        self, key: Callable[[str], str], names: Iterable[str] | None = None
    ) -> dict[str, Change]:
        sums: dict[str, Change] = {}
        for name in self.tensors if names is None else names:
            sums[key(name)] = sums.get(key(name), Change()) + self.tensors[name]
        return sums

    @property
    def labels(self) -> tuple[str, str]:
        """The ends of the two paths, long enough to tell them apart."""
        base, tuned = self.base.resolve(), self.tuned.resolve()
        length = 2 if base.is_file() or tuned.is_file() else 1
        while base.parts[-length:] == tuned.parts[-length:]:
            length += 1
        return "/".join(base.parts[-length:]), "/".join(tuned.parts[-length:])

    @cached_property
    def _stack_labels(self) -> dict[str, str]:
        return stack_labels(self.tensors)

    def _module(self, name: str) -> str:
        return module_type(name, self._stack_labels)

    def _layer(self, name: str) -> str:
        stack, layer = self._stack_labels[stack_name(name)], str(place(name).layer)
        return f"{stack}.{layer}" if stack else layer


def compare(
    base: Path,
    tuned: Path,
    on_progress: Callable[[int, int], object] | None = None,
) -> Comparison:
    """Compare the tensors that two checkpoints share.

    BASE is first converted to TUNED's dtype, as a trainer would have loaded it, so that rounding
    alone changes nothing. Where TUNED is a LoRA adapter, the change of a weight is scale * B @ A
    in float32; where both are adapters, their own matrices are compared.

    Args:
        base: Folder or file of the model before tuning.
        tuned: The same after tuning, or an adapter of it.
        on_progress: Called with the number of entries compared since the last call, and of all.

    Raises:
        CheckpointError: If one of them cannot be read, or there is nothing to compare.
    """
    before, after = read_checkpoint(base), read_checkpoint(tuned)
    if _files(before) == _files(after):
        raise CheckpointError(f"{base} and {tuned} are the same files: name two checkpoints.")
    if not isinstance(after, Adapter):
        if isinstance(before, Adapter):
            raise CheckpointError(
                f"{base} is an adapter and {tuned} is not. Name the adapter's base model first."
            )
        return _compare(_Pair(before, after), "weights", on_progress)
    if isinstance(before, Adapter):
        pair = _Pair(before.matrices, after.matrices)
        return _compare(pair, "matrices of two adapters", on_progress)
    return _compare(_AdapterPair(before, after), "weights and an adapter", on_progress)


def _files(checkpoint: Checkpoint | Adapter) -> set[Path]:
    weights = checkpoint.matrices if isinstance(checkpoint, Adapter) else checkpoint
    return {stored.file.resolve() for stored in weights.tensors.values()}


class _Pair:
    """Two checkpoints of whole tensors."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base, self.tuned = base, tuned
        self.path = tuned.path

    def names(self) -> Iterable[str]:
        """The tensors of TUNED."""
        return self.tuned.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of TUNED's tensors."""
        return self.tuned.tensors[name].shape

    def dtype(self, name: str) -> str:
        """The one that both sides are compared in."""
        return self.tuned.tensors[name].dtype

    def buffers(self) -> frozenset[str]:
        """TUNED's tensors that are no weights."""
        return self.tuned.buffers

    def parts(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of BASE and of the change, both in float32, or float64 if TUNED is; they make up all."""
        stored = self.base.tensors[name]
        for start, stop in _windows(stored):
            base, tuned = self.base.rows(name, start, stop), self.tuned.rows(name, start, stop)
            if stored.dtype != self.dtype(name):
                base = round_to(base, self.dtype(name))
            yield base, tuned - base


class _AdapterPair(_Pair):
    """A model and a LoRA adapter: what the adapter does not name is unchanged."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        super().__init__(base, adapter.matrices)
        self.adapter = adapter
        matrices = {matrix for lora in adapter.loras.values() for matrix in (lora.a, lora.b)}
        self._whole = adapter.matrices.tensors.keys() - matrices
        if missing := [name for name in adapter.loras if name not in base.tensors]:
            raise CheckpointError(
                f"{adapter.path} changes {missing[0]}, which {base.path} does not have. Is it the "
                "adapter's base model? If it is, merge the adapter with axolotl merge-lora and "
                "name the merged model instead."
            )
        for name in adapter.loras.keys() - self._whole:
            if adapter.shape(name) != base.tensors[name].shape:
                raise CheckpointError(
                    f"{adapter.path} changes {name} as a weight of shape "
                    f"{list(adapter.shape(name))}, and in {base.path} it has "
                    f"{list(base.tensors[name].shape)}. Is it the adapter's base model?"
                )

    def names(self) -> Iterable[str]:
        return self.base.tensors.keys() | self._whole

    def shape(self, name: str) -> tuple[int, ...]:
        return (self.tuned if name in self._whole else self.base).tensors[name].shape

    def dtype(self, name: str) -> str:
        return (self.tuned if name in self._whole else self.base).tensors[name].dtype

    def buffers(self) -> frozenset[str]:
        return self.base.buffers

    def parts(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        parts = super().parts(name) if name in self._whole else self._unchanged(name)
        if name not in self.adapter.loras:
            yield from parts
            return
        left, right, scale = self.adapter.factors(name)
        row = 0
        for base, change in parts:
            rows = left[row : row + len(base)]
            row += len(base)
            yield base, change + rows @ right * np.float32(scale)

    def _unchanged(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, stop in _windows(self.base.tensors[name]):
            base = self.base.rows(name, start, stop)
            yield base, np.zeros_like(base)


def _compare(
    pair: _Pair, compared: Compared, on_progress: Callable[[int, int], object] | None
) -> Comparison:
    stored, tuned = pair.base.tensors, sorted(pair.names(), key=natural_order)
    shared = [name for name in tuned if name in stored]
    if not shared:
        raise CheckpointError(
            f"{pair.base.path} and {pair.path} have no tensor name in common, such as "
            f"{min(stored)} and {tuned[0]}."
        )
    same_shape = [name for name in shared if pair.shape(name) == stored[name].shape]
    if not same_shape:
        name = shared[0]
        raise CheckpointError(
            f"No tensor has the same shape in {pair.base.path} and {pair.path}: {name} is "
            f"{list(stored[name].shape)} and {list(pair.shape(name))}. Is one tuned from the other?"
        )
    total = sum(stored[name].entries for name in same_shape)
    changes: dict[str, Change] = {}
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are counted instead.
        for name in same_shape:
            changes[name] = Change()
            for base, change in pair.parts(name):
                part = _measure(base, change)
                changes[name] += part
                if on_progress is not None:
                    on_progress(part.entries, total)
    all_base, all_tuned = stored.keys() | pair.base.buffers, pair.buffers().union(tuned)
    dtypes = ((stored[name].dtype, pair.dtype(name)) for name in same_shape)
    return Comparison(
        base=pair.base.path,
        tuned=pair.path,
        compared=compared,
        tensors=changes,
        only_in_base=sorted(all_base - all_tuned, key=natural_order),
        only_in_tuned=sorted(all_tuned - all_base, key=natural_order),
        reshaped={
            name: (stored[name].shape, pair.shape(name)) for name in shared if name not in changes
        },
        not_weights=sorted((all_base & all_tuned).difference(shared), key=natural_order),
        converted=Counter(dtype for dtype in dtypes if dtype[0] != dtype[1]),
    )


def _windows(stored: Stored) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of the parts in which a tensor is read."""
    if not stored.entries:
        return
    rows, step = stored.entries // stored.columns, max(1, _WINDOW_ENTRIES // stored.columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _measure(base: np.ndarray, change: np.ndarray) -> Change:
    """Count and sum; both of the same shape."""
    finite = np.isfinite(base) & np.isfinite(change)
    if not finite.all():
        base, change = base[finite], change[finite]
    return Change(
        entries=finite.size,
        changed=int(np.count_nonzero(change)),
        non_finite=finite.size - change.size,
        square_change=_square_sum(change),
        square_base=_square_sum(base),
    )


def _square_sum(values: np.ndarray) -> float:
    """In float64: squares of small changes leave the range of float32."""
    return float(np.square(values, dtype=np.float64).sum())


def _grid(cells: dict[tuple[str, int], Change]) -> Grid:
    rows = list(dict.fromkeys(module for module, _ in cells))
    columns = sorted({layer for _, layer in cells})
    changed, relative = (np.full((len(rows), len(columns)), np.nan) for _ in range(2))
    for (module, layer), change in cells.items():
        cell = rows.index(module), columns.index(layer)
        changed[cell] = change.changed_fraction
        relative[cell] = _relative(change)
    return Grid(rows, columns, changed, relative)


def _first_few(names: list[str]) -> str:
    rest = f" and {len(names) - 5:,} more, which --json lists" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def _relative(change: Change) -> float:
    return math.nan if change.relative_norm is None else change.relative_norm


def draw_png(comparison: Comparison) -> bytes:
    """A PNG file with heat maps of the changed fraction and of the relative norm of the change.

    Raises:
        CheckpointError: If no tensor is in a layer.
    """
    from axolotl_gmt.report import figures

    grid, outside = comparison.grid(), comparison.outside_layers()
    if grid is None:
        raise CheckpointError(
            "No tensor that was compared is in a numbered layer, so there is no heat map to draw. "
            "Leave out --png."
        )
    total, (base, tuned) = comparison.total, comparison.labels
    changed = figures.LayerMap(
        f"Entries changed: {total.changed_fraction:.2%} in all",
        "of the module's entries",
        grid.changed_fraction,
        np.array([change.changed_fraction for change in outside.values()]),
    )
    norm = figures.LayerMap(
        f"Norm of the change: {_relative(total):.2%} of the norm of {base} in all",
        f"of the module's norm in {base}",
        grid.relative_norm,
        np.array([_relative(change) for change in outside.values()]),
    )
    maps = (changed, norm)

    def draw(figure: Figure) -> None:
        figure.suptitle(f"What tuning changed, from {base} to {tuned}", fontweight="bold")
        figures.layer_maps(figure, maps, grid.rows, grid.columns, list(outside))

    rows = len(grid.rows) + len(outside)
    return figures.render_figure(draw, width=10, height=len(maps) * (1.2 + 0.25 * rows))
