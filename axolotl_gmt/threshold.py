"""The k-th largest magnitude of groups of entries, exact, found by counting bit patterns.

For non-negative floats the numeric order is the order of their bit patterns, so a histogram over
patterns and a sum over its bins find the threshold without sorting (Li et al. 2025, T_k). Wider
types are counted digit by digit, the upper 15 bits first. NaN patterns lie above that of infinity,
which makes every broken entry win. Nothing here reads a value back from the device.

Knows tensors only: no parameters, no trainers, and of ranks only that rows of counts add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_gmt.shards import Rows

_PATTERN_DTYPE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # entries of scratch memory a pass; small enough to stay in a CPU's cache


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the values of all ``dtypes`` exactly, so they can compete."""
    return reduce(torch.promote_types, dtypes)


def magnitude_patterns(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Bit patterns of ``|entries|`` as ``dtype``: integers in the order of the magnitudes."""
    patterns = entries.to(dtype).view(_PATTERN_DTYPE[dtype.itemsize])
    return patterns & torch.iinfo(patterns.dtype).max


def infinity_pattern(dtype: torch.dtype) -> int:
    """The bit pattern of infinity; patterns above it are NaN."""
    infinity = torch.tensor(float("inf"), dtype=dtype)
    return int(infinity.view(_PATTERN_DTYPE[dtype.itemsize]))


class Digit(NamedTuple):
    """Bits ``shift`` to ``shift + width`` of a pattern."""

    shift: int
    width: int


def digits(dtype: torch.dtype) -> list[Digit]:
    """The digits, upper first, by which a magnitude of ``dtype`` is counted.

    Each has 16 bits but the first, which lacks the sign's.
    """
    bits = dtype.itemsize * 8
    return [Digit(shift, 15 if shift == bits - 16 else 16) for shift in range(bits - 16, -1, -16)]


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
            row count. None: all do.
        counts: int64 ``(rows, 2 ** digit.width)``, added to in place.
    """
    bins = 1 << digit.width
    for tensor, row in zip(tensors, rows, strict=True):
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


def _take_bin(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the k-th largest entry, and its rank k within that bin.

    Args:
        counts: int64 ``(groups, bins)``.
        k: int64 ``(groups,)``, from 1.
    """
    from_top = counts.flip(-1).cumsum(-1)
    above = from_top < k[:, None]
    position = above.sum(-1).clamp(max=counts.size(-1) - 1)
    rank = k - (from_top * above).amax(-1)
    return counts.size(-1) - 1 - position, rank


def entries_to_keep(entries: Tensor, mask_ratio: float) -> Tensor:
    """k = max(1, n - round(mask_ratio * n)) of int64 ``n = entries``, elementwise."""
    return (entries - (entries.double() * mask_ratio).round().long()).clamp(min=1)


def find_thresholds(
    tensors: Sequence[Tensor], rows: Rows, mask_ratio: float, dtype: torch.dtype
) -> Tensor:
    """T_k of each group: the magnitude of the k-th largest of its n entries, as a bit pattern.

    k = max(1, n - round(mask_ratio * n)). A threshold is at most infinity's pattern, so that
    neither NaN nor infinity can ever fall below it. Entries that lie on other ranks count too.

    Args:
        tensors: The flat tensors of all groups, in the order in which ``rows`` has their shards.
        rows: Which of them are counted together, and what makes them groups.
        mask_ratio: Fraction of a group's entries to mask, in [0, 1).
        dtype: The dtype in which magnitudes are compared; holds every entry exactly.

    Returns:
        int64 ``(rows,)`` on the first tensor's device, the same for all rows of a group; 0 for a
        group without entries.
    """
    k: Tensor | None = None
    prefixes: Tensor | None = None
    for digit in digits(dtype):
        counts = _count_on_every_device(tensors, rows, dtype, digit, prefixes)
        # Ranks exchange sums over 2^8 neighbouring bins, then the bins of the winning sum only.
        fine = counts.view(len(rows), -1, 256)
        coarse = rows.sum(fine.sum(-1))
        if k is None:
            k = entries_to_keep(coarse.sum(-1), mask_ratio)
        upper, k = _take_bin(coarse, k)
        index = rows.spread(upper)[:, None, None].expand(-1, 1, 256)
        lower, k = _take_bin(rows.sum(fine.gather(1, index).squeeze(1)), k)
        value = rows.spread((upper << 8) | lower)
        prefixes = value if prefixes is None else (prefixes << digit.width) | value
    assert prefixes is not None
    return prefixes.clamp(max=infinity_pattern(dtype))


def _count_on_every_device(
    tensors: Sequence[Tensor],
    rows: Rows,
    dtype: torch.dtype,
    digit: Digit,
    prefixes: Tensor | None,
) -> Tensor:
    home = tensors[0].device
    total = torch.zeros(len(rows), 1 << digit.width, dtype=torch.int64, device=home)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        here = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        counts = total if device == home else torch.zeros_like(total, device=device)
        count_digits(
            [tensors[index] for index in here],
            [rows.of_shard[index] for index in here],
            dtype,
            digit,
            None if prefixes is None else prefixes.to(device),
            counts,
        )
        if device != home:
            total += counts.to(home)
    return total


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
        thresholds: int64 ``(rows,)`` from :func:`find_thresholds`.
        totals: float64 ``(tensors, 4)``, added to in place: for each tensor its entries, those
            that are non-zero afterwards, the sum of squares before, and afterwards.
    """
    thresholds = thresholds.to(totals.device)
    for tensor, row, total in zip(tensors, rows, totals, strict=True):
        total[0] += tensor.numel()
        for chunk in tensor.split(_CHUNK):
            before = torch.linalg.vector_norm(chunk, dtype=torch.float64)
            chunk.masked_fill_(magnitude_patterns(chunk, dtype) < thresholds[row], 0)
            after = torch.linalg.vector_norm(chunk, dtype=torch.float64)
            total[1:] += torch.stack([chunk.count_nonzero(), before.square(), after.square()])
