"""A model and a delta of it, seen as one checkpoint of tuned weights that nobody has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from axolotl_gmt.tools.checkpoint import (
    FLOATS,
    Checkpoint,
    Reader,
    Stored,
    checkpoint_of,
    read_tensors,
)
from axolotl_gmt.tools.delta.apply import check
from axolotl_gmt.tools.delta.file import Delta, read_delta


@dataclass(frozen=True)
class PatchedModel:
    """A base and a delta of it, as a checkpoint's tensors are read."""

    base: Mapping[str, Stored]
    delta: Delta

    @property
    def path(self) -> Path:
        """The delta's file."""
        return self.delta.path

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """The weights. One that changed in part has the dtype and the shape of the base's."""
        return self._parts.tensors

    @property
    def buffers(self) -> frozenset[str]:
        """The tensors that are no weights."""
        return self._parts.buffers

    @cached_property
    def _parts(self) -> Checkpoint:
        stored = {name: self.delta.stored(name, self.base) for name in self.delta.tuned}
        return checkpoint_of(self.path, stored)

    def reader(self, _: Sequence[str]) -> AbstractContextManager[Reader]:
        """What reads the entries of tensors."""
        return nullcontext(self.read)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """The entries from ``start`` to ``stop``, exclusive, as Checkpoint.read has them."""
        values = self._parts.read(name, start, stop)
        if name not in self.delta.indices:
            return values
        positions, bits = self.delta.changes(name, start, stop)
        patched = values.copy()  # What safetensors reads may be read-only.
        patched[positions] = bits.view(FLOATS[self.tensors[name].dtype])
        return patched


def read_patched(base: Path, delta: Path) -> PatchedModel:
    """Read a delta of a base, and check it and the base against the hashes in it.

    Raises:
        UserError: If one of them cannot be read, or they do not belong together.
    """
    tensors = read_tensors(base)
    change = read_delta(delta, tensors)
    check(tensors, change)
    return PatchedModel(tensors, change)
