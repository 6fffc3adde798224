"""The passes in torch operations: the definition, which runs on every device for all scores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from axolotl_gmt.kernels.contract import Batch, chunk_size, most_copies
from axolotl_gmt.kernels.dtypes import FORMATS, Digit
from axolotl_gmt.kernels.scores import Magnitudes, Scores

# Entries at a time, where scores need no making. Large, since each chunk clears all bins.
_CHUNK = 1 << 20


def _chunks(scores: Scores, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Entries and the patterns of their scores, a chunk at a time."""
    is_read = isinstance(scores, Magnitudes)
    size = _CHUNK if is_read else chunk_size(scores.entries.device)
    for start in range(0, len(scores.entries), size):
        entries = scores.entries[start : start + size]
        yield entries, scores.patterns(start, start + len(entries), dtype)


def count_digits(batch: Batch, digit: Digit, prefixes: Tensor | None, counts: Tensor) -> None:
    """See :meth:`~.contract.Backend.count_digits`."""
    bins = 1 << digit.width
    for scores, row in batch.pairs():
        for _, patterns in _chunks(scores, batch.dtype):
            values = patterns >> digit.shift
            if prefixes is not None:
                matches = values >> digit.width == prefixes[row]
                values = torch.where(matches, values & (bins - 1), bins)
            if values.is_cpu:
                of_chunk = torch.bincount(values, minlength=bins + 1)
            else:  # bincount reads the largest value back to the host
                of_chunk = torch.zeros(bins + 1, dtype=torch.int64, device=values.device)
                of_chunk.scatter_add_(0, values.long(), torch.ones_like(values, dtype=torch.int64))
            counts[row] += of_chunk[:bins]


def copy_between(batch: Batch, low: Tensor, high: Tensor, above: Tensor) -> list[Tensor | None]:
    """See :meth:`~.contract.CPUBackend.copy_between`."""
    copies: list[Tensor | None] = []
    for scores, row in batch.pairs():
        copy, higher = torch.empty(0, dtype=FORMATS[batch.dtype].bits, device="cpu"), 0
        for _, patterns in _chunks(scores, batch.dtype):
            is_between = (patterns >= low[row]) & (patterns < high[row])
            copy = torch.cat([copy, patterns[is_between]])
            higher += int((patterns >= high[row]).sum())
            if len(copy) > most_copies(len(scores.entries)):
                copies.append(None)
                break
        else:
            copies.append(copy)
            above[row] += higher
    return copies


def mask_below_(batch: Batch, thresholds: Tensor, totals: Tensor) -> None:
    """See :meth:`~.contract.Backend.mask_below_`."""
    for (scores, row), total in zip(batch.pairs(), totals, strict=True):
        total[0] += scores.entries.numel()
        for entries, patterns in _chunks(scores, batch.dtype):
            before = _norms(entries)
            entries.masked_fill_(patterns < thresholds[row], 0)
            total[1] += entries.count_nonzero()
            (squares, magnitudes), (squares_after, magnitudes_after) = before, _norms(entries)
            total[2:] += torch.stack([squares, squares_after, magnitudes, magnitudes_after])


def _norms(entries: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of squares and that of magnitudes, in float64."""
    square, magnitudes = (
        torch.linalg.vector_norm(entries, order, dtype=torch.float64) for order in (2, 1)
    )
    return square.square(), magnitudes
