"""The k-th largest magnitude of groups of entries, exact, found by counting bit patterns.

For non-negative floats the numeric order is the order of their bit patterns, so a histogram over
patterns and a sum over its bins find the threshold without sorting (Li et al. 2025, T_k). Wider
types are counted digit by digit, the upper 15 bits first. NaN patterns lie above that of infinity,
which makes every broken entry win. Nothing here reads a value back from the device.

Knows tensors only: no parameters, trainers or ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

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


def digits(dtype: torch.dtype) -> list[tuple[int, int]]:
    """``(shift, width)`` in bits of the digits that a magnitude of ``dtype`` is counted by."""
    bounds = range(dtype.itemsize * 8, -1, -16)
    return [(low, min(high, dtype.itemsize * 8 - 1) - low) for high, low in pairwise(bounds)]


def count_digit(
    entries: Tensor,
    dtype: torch.dtype,
    shift: int,
    width: int,
    prefix: Tensor | None,
    counts: Tensor,
) -> None:
    """Add to ``counts`` how often each value of one digit occurs among ``entries``.

    Args:
        entries: Flat tensor of any supported dtype.
        dtype: The dtype whose patterns are counted (``entries`` are converted exactly).
        shift: Bits below the digit.
        width: Bits of the digit.
        prefix: int64 scalar; only entries whose bits above the digit equal it count. None: all.
        counts: int64 ``(2 ** width,)``, added to in place.
    """
    bins = 1 << width
    for chunk in entries.split(_CHUNK):
        patterns = magnitude_patterns(chunk, dtype)
        if prefix is None:
            digit = patterns >> shift
        else:
            digit = torch.where(
                patterns >> (shift + width) == prefix, (patterns >> shift) & (bins - 1), bins
            )
        if digit.is_cpu:
            found = torch.bincount(digit, minlength=bins + 1)
        else:  # bincount reads the largest digit back to the host
            found = torch.zeros(bins + 1, dtype=torch.int64, device=digit.device)
            found.scatter_add_(0, digit.long(), torch.ones_like(digit, dtype=torch.int64))
        counts += found[:bins]


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
    groups: Sequence[Sequence[Tensor]],
    mask_ratio: float,
    dtype: torch.dtype,
) -> Tensor:
    """T_k of each group: the magnitude of the k-th largest of its n entries, as a bit pattern.

    k = max(1, n - round(mask_ratio * n)). A threshold is at most infinity's pattern, so that
    neither NaN nor infinity can ever fall below it.

    Args:
        groups: For each group its flat tensors, all on one device.
        mask_ratio: Fraction of a group's entries to mask, in [0, 1).
        dtype: The dtype in which magnitudes are compared; holds every entry exactly.

    Returns:
        int64 ``(groups,)`` on the entries' device; 0 for a group without entries.
    """
    device = groups[0][0].device
    k: Tensor | None = None
    prefix: Tensor | None = None
    for shift, width in digits(dtype):
        counts = torch.zeros(len(groups), 1 << width, dtype=torch.int64, device=device)
        for index, tensors in enumerate(groups):
            for entries in tensors:
                above = None if prefix is None else prefix[index]
                count_digit(entries, dtype, shift, width, above, counts[index])
        if k is None:
            k = entries_to_keep(counts.sum(-1), mask_ratio)
        digit, k = _take_bin(counts, k)
        prefix = digit if prefix is None else (prefix << width) | digit
    assert prefix is not None
    return prefix.clamp(max=infinity_pattern(dtype))


def mask_below_(entries: Tensor, dtype: torch.dtype, threshold: Tensor, totals: Tensor) -> None:
    """Set to zero, in place, the entries whose magnitude is below ``threshold`` (Li et al., M).

    Args:
        entries: Flat tensor of any supported dtype.
        dtype: The dtype of the threshold's bit pattern.
        threshold: int64 scalar from :func:`find_thresholds`.
        totals: float64 ``(3,)``, added to in place: entries that are non-zero afterwards, sum of
            squares before, sum of squares afterwards.
    """
    for chunk in entries.split(_CHUNK):
        before = torch.linalg.vector_norm(chunk, dtype=torch.float64)
        chunk.masked_fill_(magnitude_patterns(chunk, dtype) < threshold, 0)
        after = torch.linalg.vector_norm(chunk, dtype=torch.float64)
        totals += torch.stack([chunk.count_nonzero().double(), before.square(), after.square()])
