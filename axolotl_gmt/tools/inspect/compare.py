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
from typing import Literal

import numpy as np

from axolotl_gmt.errors import UserError
from axolotl_gmt.names import layer_name, place
from axolotl_gmt.report.modules import module_type, natural_order, stack_labels, stack_name
from axolotl_gmt.tools.checkpoint import (
    FLOATS,
    Checkpoint,
    Stored,
    find_adapter,
    read_checkpoint,
)
from axolotl_gmt.tools.delta.file import is_delta
from axolotl_gmt.tools.delta.patched import PatchedModel, read_patched
from axolotl_gmt.tools.inspect.adapter import AdaptedModel, Adapter, adapt, read_adapter

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

    def by_module_and_layer(self) -> dict[tuple[str, int], Change]:
        """By module type and number of the layer, without what is outside the layers."""
        return self._sum_by(
            lambda name: (self._module(name), place(name).layer or 0),
            [name for name in self.tensors if layer_name(name)],
        )

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

    def _sum_by[Key](
        self, key: Callable[[str], Key], names: Iterable[str] | None = None
    ) -> dict[Key, Change]:
        sums: dict[Key, Change] = {}
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
    alone changes nothing. Where TUNED is an adapter, BASE is compared with what PEFT's merging
    makes of it in float32; where both are adapters, their own tensors are compared.

    Args:
        base: Folder or file of the model before tuning.
        tuned: The same after tuning, or an adapter or a delta of it.
        on_progress: Called with the number of entries compared since the last call, and of all.

    Raises:
        UserError: If one of them cannot be read, or there is nothing to compare.
    """
    before = _read(base)
    if isinstance(before, Checkpoint) and is_delta(tuned, before.tensors):
        return _compare(before, read_patched(base, tuned), "weights", on_progress)
    after = _read(tuned)
    if _files(before) == _files(after):
        raise UserError(f"{base} and {tuned} are the same files: name two checkpoints.")
    if isinstance(before, Checkpoint):
        if isinstance(after, Checkpoint):
            return _compare(before, after, "weights", on_progress)
        return _compare(before, adapt(before, after), "weights and an adapter", on_progress)
    if isinstance(after, Checkpoint):
        raise UserError(
            f"{base} is an adapter and {tuned} is not. Name the adapter's base model first."
        )
    return _compare(before.weights, after.weights, "matrices of two adapters", on_progress)


def _read(path: Path) -> Checkpoint | Adapter:
    adapter = find_adapter(path)
    return read_adapter(adapter) if adapter else read_checkpoint(path)


def _files(checkpoint: Checkpoint | Adapter) -> set[Path]:
    return {stored.file.resolve() for stored in checkpoint.tensors.values()}


def _compare(
    base: Checkpoint,
    tuned: Checkpoint | AdaptedModel | PatchedModel,
    compared: Compared,
    on_progress: Callable[[int, int], object] | None,
) -> Comparison:
    before, after = base.tensors, tuned.tensors
    shared = sorted(before.keys() & after.keys(), key=natural_order)
    if not shared:
        raise UserError(
            f"{base.path} and {tuned.path} have no tensor name in common, such as "
            f"{min(before)} and {min(after, key=natural_order)}."
        )
    same_shape = [name for name in shared if before[name].shape == after[name].shape]
    if not same_shape:
        name = shared[0]
        raise UserError(
            f"No tensor has the same shape in {base.path} and {tuned.path}: {name} is "
            f"{[*before[name].shape]} and {[*after[name].shape]}. Is one tuned from the other?"
        )
    total = sum(before[name].entries for name in same_shape)
    changes = dict.fromkeys(same_shape, Change())
    with (
        np.errstate(invalid="ignore", over="ignore"),  # NaN and infinity are counted instead.
        tuned.reader(same_shape) as read_tuned,
    ):
        for name in same_shape:
            for start, stop in _windows(before[name]):
                values = _converted(base.read(name, start, stop), before[name], after[name])
                part = _measure(values, read_tuned(name, start, stop) - values)
                changes[name] += part
                if on_progress is not None:
                    on_progress(part.entries, total)
    all_base, all_tuned = before.keys() | base.buffers, after.keys() | tuned.buffers
    dtypes = ((before[name].dtype, after[name].dtype) for name in same_shape)
    return Comparison(
        base=base.path,
        tuned=tuned.path,
        compared=compared,
        tensors=changes,
        only_in_base=sorted(all_base - all_tuned, key=natural_order),
        only_in_tuned=sorted(all_tuned - all_base, key=natural_order),
        reshaped={
            name: (before[name].shape, after[name].shape) for name in shared if name not in changes
        },
        not_weights=sorted((all_base & all_tuned).difference(shared), key=natural_order),
        converted=Counter(dtype for dtype in dtypes if dtype[0] != dtype[1]),
    )


def _windows(stored: Stored) -> Iterator[tuple[int, int]]:
    """First and last entry, exclusive, of the parts in which a tensor is read: whole rows."""
    columns = stored.shape[-1] if stored.shape else 1
    step = _WINDOW_ENTRIES - _WINDOW_ENTRIES % max(columns, 1) or _WINDOW_ENTRIES
    for start in range(0, stored.entries, step):
        yield start, min(start + step, stored.entries)


def _converted(values: np.ndarray, before: Stored, after: Stored) -> np.ndarray:
    """Rounded to the other dtype, ties to even; what is too large becomes infinite."""
    if before.dtype == after.dtype:
        return values
    return values.astype(FLOATS[after.dtype]).astype(after.computed)


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


def _first_few(names: list[str]) -> str:
    rest = f" and {len(names) - 5:,} more, which --json lists" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
