"""The contract of a backend: what it is given, and the passes that it owes.

:mod:`~.eager` keeps it for all scores on every device, and so defines what a pass does.
:mod:`~.numba_cpu` and :mod:`~.triton_gpu` keep it for batches of one kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from axolotl_gmt.kernels.dtypes import Digit
from axolotl_gmt.kernels.scores import Kind, Scores

TOTALS = 6
"""How many numbers a mask says of a tensor."""


class Batch(NamedTuple):
    """Scores that are compared with each other; those that a pass takes are all on one device.

    Attributes:
        scores: Those of one tensor each.
        rows: The row of counts, thresholds or limits that the scores of each tensor belong to.
        dtype: The dtype in which they are compared: it holds all of them exactly, and patterns,
            digits and thresholds are those of this dtype.
    """

    scores: Sequence[Scores]
    rows: Sequence[int]
    dtype: torch.dtype

    def pairs(self) -> Iterator[tuple[Scores, int]]:
        """The scores of each tensor, and their row."""
        return zip(self.scores, self.rows, strict=True)

    def pick(self, indices: Sequence[int]) -> Batch:
        """Some of the tensors."""
        scores, rows = zip(*((self.scores[i], self.rows[i]) for i in indices), strict=True)
        return Batch(scores, rows, self.dtype)


class Backend(Protocol):
    """The passes, which read no value back from a device.

    A pass returns when its work is done, on a GPU when it is launched; it raises only when no
    thread goes on.
    """

    def count_digits(
        self, batch: Batch, digit: Digit, prefixes: Tensor | None, counts: Tensor
    ) -> None:
        """Add to ``counts`` how often each value of one digit occurs among the scores of each row.

        Args:
            batch: What is counted.
            digit: Which bits of the pattern.
            prefixes: int64 ``(rows,)``; only scores whose bits above the digit equal their row's
                prefix count. None, for the first digit: all do.
            counts: int32 or int64 ``(rows, 2 ** digit.width)``, contiguous, added to in place.
        """

    def mask_below_(self, batch: Batch, thresholds: Tensor, totals: Tensor) -> None:
        """Set to zero, in place, the entries whose score is below the threshold (Li et al., M).

        Args:
            batch: Whose entries are masked.
            thresholds: int64 ``(rows,)``, patterns.
            totals: float64 ``(tensors, TOTALS)``, added to in place: for each tensor its entries,
                those that are non-zero afterwards, the sum of squares before, and afterwards, the
                sum of magnitudes before, and afterwards.
        """


@runtime_checkable
class CPUBackend(Backend, Protocol):
    """What a backend for a CPU owes besides."""

    def copy_between(
        self, batch: Batch, low: Tensor, high: Tensor, above: Tensor
    ) -> list[Tensor | None]:
        """The patterns from ``low`` to below ``high``, and how many are not below ``high``.

        Args:
            batch: Where they are looked for.
            low: int64 ``(rows,)``, patterns.
            high: int64 ``(rows,)``, patterns.
            above: int64 ``(rows,)``, to which the number of scores from ``high`` on is added,
                except for tensors whose result is None.

        Returns:
            For each tensor its patterns, as :attr:`~.dtypes.Format.bits`, in order; None if there
            are more than about :func:`most_copies`.
        """


class Cache(NamedTuple):
    """Where compiled code is kept for later processes.

    Attributes:
        folder: Its path.
        files: A pattern of the names that its files have there.
        variable: The environment variable that names another folder.
    """

    folder: str
    files: str
    variable: str


class CompiledBackend(Backend, Protocol):
    """What a backend owes besides that is compiled, and compared with :mod:`~.eager` before use."""

    def supports(self, kind: Kind) -> bool:
        """Whether there are passes for batches of that kind."""

    def boundaries(self, itemsize: int) -> Iterable[tuple[int, int]]:
        """Where tensors lie whose ends a pass could get wrong; all of them are compared.

        Args:
            itemsize: Bytes of an entry.

        Returns:
            Pairs of integers: how many entries after an address that is a multiple of 16 bytes a
            tensor starts, and how many entries it has.
        """

    def give_up_cache(self) -> Cache | None:
        """Compile anew, and keep no code for later processes; where it was kept, if it was."""


def most_copies(entries: int) -> int:
    """How many of so many entries are worth a copy: all of a small tensor, else an eighth."""
    return max(1 << 14, entries >> 3)


def chunk_size(device: torch.device) -> int:
    """How many scored entries to work on at a time, which bounds the memory of what is in between.

    On a CPU few enough to stay in its cache, and for torch to use one thread: where another process
    holds a core, the barrier between threads costs many times the work.
    """
    return 1 << 15 if device.type == "cpu" else 1 << 22
