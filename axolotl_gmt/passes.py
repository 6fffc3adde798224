"""The passes over the gradients' memory: count bit patterns, and set to zero what lost.

The torch versions here say what a pass does and run everywhere. Where they can be had, compiled
versions with the same results take their place: :mod:`axolotl_gmt.kernels_cpu` (Numba) on a CPU
and :mod:`axolotl_gmt.kernels` (Triton) on a GPU. Nothing here but
:func:`keep_candidates` reads a value back from a device.

Knows flat tensors and rows of counts only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from axolotl_gmt.scores import Magnitudes

LOG = logging.getLogger(__name__)

_PATTERN_DTYPE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # entries of scratch memory a torch pass; small enough to stay in a CPU's cache

# Module of the compiled passes for a type of device, and what it needs.
_COMPILED = {
    "cpu": ("axolotl_gmt.kernels_cpu", "Numba"),
    "cuda": ("axolotl_gmt.kernels", "Triton"),
}
_broken: set[str] = set()


class Digit(NamedTuple):
    """Bits ``shift`` to ``shift + width`` of a pattern."""

    shift: int
    width: int


def magnitude_patterns(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Bit patterns of ``|entries|`` as ``dtype``: integers in the order of the magnitudes."""
    patterns = entries.to(dtype).view(_PATTERN_DTYPE[dtype.itemsize])
    return patterns & torch.iinfo(patterns.dtype).max


def chunk_size(device: torch.device) -> int:
    """How many scored entries to work on at a time, which bounds the memory of what is in between.

    On a CPU few enough to stay in its cache, and for torch to use one thread: where another process
    holds a core, the barrier between threads costs many times the work.
    """
    return 1 << 15 if device.type == "cpu" else 1 << 22


def no_counts(rows: int, bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros ``(rows, bins)``.

    On a CPU neither this nor :func:`sum_neighbours` uses torch's threads: the work is small, and
    where another process holds a core, as data loaders do, their barrier waits for milliseconds.
    """
    if device.type != "cpu":
        return torch.zeros(rows, bins, dtype=dtype, device=device)
    counts = torch.empty(rows, bins, dtype=dtype)
    counts.numpy().fill(0)
    return counts


def sum_neighbours(counts: Tensor) -> Tensor:
    """Sums of 256 neighbouring bins: counts ``(rows, bins)`` to int64 ``(rows, bins / 256)``."""
    fine = counts.view(len(counts), -1, 256)
    if not counts.is_cpu:
        return fine.sum(-1)
    # In the dtype of the counts, which holds the entries of a whole row; einsum is the fastest sum.
    return torch.from_numpy(np.einsum("rbk->rb", fine.numpy())).long()


def count_digits(
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    dtype: torch.dtype,
    digit: Digit,
    prefixes: Tensor | None,
    counts: Tensor,
) -> None:
    """Add to ``counts`` how often each value of one digit occurs among the entries of each row.

    Args:
        tensors: Flat tensors of any supported dtypes, all on the device of ``counts``.
        rows: The row that each tensor's entries are counted in.
        dtype: The dtype whose patterns are counted (entries are converted exactly).
        digit: Which bits of the pattern.
        prefixes: int64 ``(rows,)``; only entries whose bits above the digit equal that of their
            row count. None, for the upper digit: all do.
        counts: int32 or int64 ``(rows, 2 ** digit.width)``, contiguous, added to in place.
    """
    compiled, others = _split(tensors, dtype, counts.device)
    if compiled:
        picked = _pick(compiled, tensors, rows)
        try:
            _attempt(counts.device, "count_digits", *picked, dtype, digit, prefixes, counts)
        except _UnavailableError:
            others = range(len(tensors))
    for index in others:
        _count_by_torch(tensors[index], rows[index], dtype, digit, prefixes, counts)


def most_candidates(entries: int) -> int:
    """How many of ``entries`` are worth a copy: below 1% of the memory, but for small tensors."""
    return max(64, entries >> 7)


def keep_candidates(
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    dtype: torch.dtype,
    shift: int,
    prefixes: Tensor,
) -> list[Tensor]:
    """Copies of the entries that can still be the threshold, so that lower digits read only these.

    Takes one more read of all entries, and reads back how many there are: for the CPU alone.

    Args:
        tensors: Flat CPU tensors of any supported dtypes.
        rows: The row of ``prefixes`` that each tensor's entries are compared with.
        dtype: The dtype whose patterns are compared.
        shift: Entries are kept whose bits from here up, without the sign, are ``prefixes``.
        prefixes: int64 ``(rows,)``.

    Returns:
        For each tensor its entries that match, flat; the tensor itself if there are many.
    """
    kept = list(tensors)
    compiled, others = _split(tensors, dtype, prefixes.device)
    if compiled:
        picked = _pick(compiled, tensors, rows)
        try:
            copies = _attempt(prefixes.device, "keep_candidates", *picked, dtype, shift, prefixes)
        except _UnavailableError:
            others = range(len(tensors))
        else:
            for index, copy in zip(compiled, copies, strict=True):
                kept[index] = copy
    for index in others:
        kept[index] = _candidates_by_torch(tensors[index], dtype, shift, prefixes[rows[index]])
    return kept


def mask_below_(
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    dtype: torch.dtype,
    thresholds: Tensor,
    totals: Tensor,
) -> None:
    """Set to zero, in place, the entries whose magnitude is below the threshold (Li et al., M).

    Args:
        tensors: Flat tensors of any supported dtypes, all on the device of ``totals``.
        rows: The row of ``thresholds`` that each tensor is compared with.
        dtype: The dtype of the thresholds' bit patterns.
        thresholds: int64 ``(rows,)`` from :func:`~axolotl_gmt.threshold.find_thresholds`.
        totals: float64 ``(tensors, 4)``, added to in place: for each tensor its entries, those
            that are non-zero afterwards, the sum of squares before, and afterwards.
    """
    thresholds = thresholds.to(totals.device)
    compiled, others = _split(tensors, dtype, totals.device)
    if compiled:
        picked = _pick(compiled, tensors, rows)
        found = torch.zeros(len(compiled), 4, dtype=torch.float64, device=totals.device)
        try:
            _attempt(totals.device, "mask_below_", *picked, dtype, thresholds, found)
        except _UnavailableError:
            others = range(len(tensors))
        else:
            if others:
                for index, total in zip(compiled, found, strict=True):
                    totals[index] += total
            else:
                totals += found
    for index in others:
        _mask_by_torch_(tensors[index], dtype, thresholds[rows[index]], totals[index])


def mask_by_scores_(
    tensors: Sequence[Tensor],
    scores: Sequence[Tensor],
    rows: Sequence[int],
    dtype: torch.dtype,
    thresholds: Tensor,
    totals: Tensor,
) -> None:
    """Set to zero, in place, the entries whose score is below the threshold.

    Args:
        tensors: Flat tensors, all on the device of ``totals``.
        scores: Flat and non-negative, one score for each entry.
        rows: See :func:`mask_below_`, as for the other arguments.
        dtype: The dtype of the thresholds' bit patterns, in which scores are compared.
        thresholds: int64 ``(rows,)``.
        totals: float64 ``(tensors, 4)``, added to in place.
    """
    thresholds = thresholds.to(totals.device)
    no_threshold = torch.zeros(1, dtype=torch.int64, device=totals.device)
    chunk = chunk_size(totals.device)
    for index, (tensor, score, row) in enumerate(zip(tensors, scores, rows, strict=True)):
        before, after = torch.zeros(2, 1, 4, dtype=torch.float64, device=totals.device)
        mask_below_([tensor], [0], tensor.dtype, no_threshold, before)
        for entries, of_entries in zip(tensor.split(chunk), score.split(chunk), strict=True):
            entries.masked_fill_(magnitude_patterns(of_entries, dtype) < thresholds[row], 0)
        mask_below_([tensor], [0], tensor.dtype, no_threshold, after)
        totals[index] += torch.stack([before[0, 0], after[0, 1], before[0, 2], after[0, 3]])


def _count_by_torch(
    tensor: Tensor,
    row: int,
    dtype: torch.dtype,
    digit: Digit,
    prefixes: Tensor | None,
    counts: Tensor,
) -> None:
    bins = 1 << digit.width
    for chunk in tensor.split(_CHUNK):
        patterns = magnitude_patterns(chunk, dtype)
        values = patterns >> digit.shift
        if prefixes is not None:
            above = patterns >> (digit.shift + digit.width)
            values = torch.where(above == prefixes[row], values & (bins - 1), bins)
        if values.is_cpu:
            found = torch.bincount(values, minlength=bins + 1)
        else:  # bincount reads the largest value back to the host
            found = torch.zeros(bins + 1, dtype=torch.int64, device=values.device)
            found.scatter_add_(0, values.long(), torch.ones_like(values, dtype=torch.int64))
        counts[row] += found[:bins]


def _mask_by_torch_(tensor: Tensor, dtype: torch.dtype, threshold: Tensor, total: Tensor) -> None:
    total[0] += tensor.numel()
    for chunk in tensor.split(_CHUNK):
        before = torch.linalg.vector_norm(chunk, dtype=torch.float64)
        chunk.masked_fill_(magnitude_patterns(chunk, dtype) < threshold, 0)
        after = torch.linalg.vector_norm(chunk, dtype=torch.float64)
        total[1:] += torch.stack([chunk.count_nonzero(), before.square(), after.square()])


def _candidates_by_torch(tensor: Tensor, dtype: torch.dtype, shift: int, prefix: Tensor) -> Tensor:
    copies = [
        chunk[magnitude_patterns(chunk, dtype) >> shift == prefix] for chunk in tensor.split(_CHUNK)
    ]
    if sum(copy.numel() for copy in copies) > most_candidates(tensor.numel()):
        return tensor
    return torch.cat(copies)


class _UnavailableError(Exception):
    """A compiled pass failed, and none will be tried again on that type of device."""


def _split(
    tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[Sequence[int], Sequence[int]]:
    """Which tensors a compiled pass takes (those that need no conversion), and the others."""
    passes = None if device.type in _broken else _compiled_passes(device.type)
    if passes is None or dtype not in passes.DTYPES:
        return (), range(len(tensors))
    alike = [tensor.dtype == dtype for tensor in tensors]
    return (
        [index for index, same in enumerate(alike) if same],
        [index for index, same in enumerate(alike) if not same],
    )


def _pick(
    indices: Sequence[int], tensors: Sequence[Tensor], rows: Sequence[int]
) -> tuple[list[Tensor], list[int]]:
    return [tensors[index] for index in indices], [rows[index] for index in indices]


def _as_taken(passes: object, tensors: Sequence[Tensor]) -> Sequence[object]:
    """``tensors`` as compiled passes take them: those of a GPU take scores."""
    if getattr(passes, "TAKES_SCORES", False):
        return [Magnitudes(tensor) for tensor in tensors]
    return tensors


def _attempt(device: torch.device, name: str, tensors: Sequence[Tensor], *arguments: object) -> Any:
    """Run a compiled pass. If it fails, say so once and never try one on such a device again.

    Code fails to compile before any of it has run, so the torch version can start afresh.

    Raises:
        _UnavailableError: If it fails for another reason than a lack of memory.
    """
    try:
        passes = _compiled_passes(device.type)
        return getattr(passes, name)(_as_taken(passes, tensors), *arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _warn(device.type, error)
        _broken.add(device.type)
        raise _UnavailableError from error


@cache
def _compiled_passes(kind: str) -> ModuleType | None:
    """The module of compiled passes for a type of device; None, with a warning, if it fails."""
    if kind not in _COMPILED:
        return None
    try:
        passes = import_module(_COMPILED[kind][0])
        if kind != "cpu":  # CI, which has no GPU, cannot vouch for the one at hand.
            compare_with_torch(passes, torch.device(kind))
        return passes
    except Exception as error:  # A package that is broken raises anything as it is imported.
        _warn(kind, error)
        return None


@torch.no_grad()
def compare_with_torch(passes: ModuleType, device: torch.device) -> None:
    """Check on this very device that compiled passes do what the torch versions do.

    Raises:
        RuntimeError: Naming the pass and dtype that differ.
    """
    for dtype in sorted(passes.DTYPES, key=str):
        values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).to(dtype)
        values[::7] = 0
        values[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        values = values.to(device)
        tensors, rows = [values[:70_001], values[70_001:]], [1, 0]  # the second is not aligned
        some = magnitude_patterns(values[100:102], dtype).long()
        upper = Digit(dtype.itemsize * 8 - 16, 15)
        digits: list[tuple[Digit, Tensor | None]] = [(upper, None)]
        if upper.shift:
            digits.append((Digit(0, 16), some >> 16))
        for digit, prefixes in digits:
            found = torch.zeros(2, 1 << digit.width, dtype=torch.int64, device=device)
            expected = torch.zeros_like(found)
            taken = _as_taken(passes, tensors)
            passes.count_digits(taken, rows, dtype, digit, prefixes, found)
            for tensor, row in zip(tensors, rows, strict=True):
                _count_by_torch(tensor, row, dtype, digit, prefixes, expected)
            if not torch.equal(found, expected):
                raise RuntimeError(f"its count of {dtype} differs from torch's")
        masked = [tensor.clone() for tensor in tensors]
        totals = torch.zeros(2, 4, dtype=torch.float64, device=device)
        wanted = torch.zeros_like(totals)
        passes.mask_below_(_as_taken(passes, masked), rows, dtype, some, totals)
        for index, (tensor, row) in enumerate(zip(tensors, rows, strict=True)):
            _mask_by_torch_(tensor, dtype, some[row], wanted[index])
            pattern = _PATTERN_DTYPE[dtype.itemsize]
            if not torch.equal(masked[index].view(pattern), tensor.view(pattern)):
                raise RuntimeError(f"its mask of {dtype} differs from torch's")
        torch.testing.assert_close(totals, wanted, rtol=1e-4, atol=0, equal_nan=True)


def _warn(kind: str, error: Exception) -> None:
    LOG.warning(
        "GMT masks gradients on the %s with torch operations: same result, but slower, because "
        "%s cannot be used (%s: %s). Install or repair it to get the speed back.",
        kind,
        _COMPILED[kind][1],
        type(error).__name__,
        error,
    )
