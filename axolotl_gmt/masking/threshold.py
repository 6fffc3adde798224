"""The k-th largest score of each group of entries, exact, found by counting bit patterns.

For non-negative floats the numeric order is the order of their bit patterns, so a histogram over
patterns and a sum over its bins find the threshold without sorting (Li et al. 2025, T_k). Wider
types are counted digit by digit, the upper 15 bits first. NaN patterns lie above that of infinity,
which makes every broken entry win. Nothing here reads a value back from a GPU. On a CPU, where
no ranks share a row, the scores that share the threshold's first digit are mostly few enough to
copy, and :mod:`~.picked` takes it from these.

Knows no parameters and no trainers, and of ranks only that rows of counts add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from axolotl_gmt.gradients.shard import ProcessGroups, Shard, sum_over_ranks
from axolotl_gmt.kernels.contract import Batch
from axolotl_gmt.kernels.dispatch import count_digits
from axolotl_gmt.kernels.dtypes import FORMATS, Digit, digits
from axolotl_gmt.kernels.scores import Hashes, Inverses, Magnitudes
from axolotl_gmt.masking.picked import picked_thresholds, uniform_limits


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the values of all ``dtypes`` exactly, so they can compete."""
    return reduce(torch.promote_types, dtypes)


def infinity_pattern(dtype: torch.dtype) -> int:
    """The bit pattern of infinity; patterns above it are NaN."""
    return FORMATS[dtype].infinity


def entries_to_keep(entries: Tensor, mask_ratio: float) -> Tensor:
    """k = max(1, n - round(mask_ratio * n)) of int64 ``n = entries``, elementwise."""
    return (entries - (entries.double() * mask_ratio).round().long()).clamp(min=1)


def find_thresholds(batch: Batch, rows: Rows, mask_ratio: float) -> Tensor:
    """T_k of each group: the k-th largest of its n scores, as a bit pattern.

    How large k is :func:`entries_to_keep` says. A threshold is at most infinity's pattern, so that
    neither NaN nor infinity can ever fall below it. Entries that lie on other ranks count too.

    Args:
        batch: The scores of all groups, in the order in which ``rows`` has their shards.
        rows: Which of them are counted together, and what makes them groups.
        mask_ratio: Fraction of a group's entries to mask, in [0, 1).

    Returns:
        int64 ``(rows,)`` on the first tensor's device, the same for all rows of a group; 0 for a
        group without entries.
    """
    # Ranks that share a row must all count: none knows whether the others could copy.
    if len(_digits(batch, rows)) == 1 or rows.are_shared() or not _may_read_back(batch):
        return _count(batch, rows, mask_ratio)
    n = torch.tensor(_entries(batch, len(rows)), device="cpu")
    k = entries_to_keep(n, mask_ratio)
    value: Tensor | None = None
    nth: Tensor | None = None
    if all(isinstance(score, Hashes) for score in batch.scores):
        low, high = uniform_limits(n, k, batch.dtype)
    else:
        first, infinity = digits(batch.dtype)[0], infinity_pattern(batch.dtype)
        value, nth = _count_digit(batch, rows, mask_ratio, first)
        # Of what is broken only infinity lies between limits. A threshold that is NaN lies above.
        low = (value << first.shift).clamp(max=infinity)
        high = (low + (1 << first.shift)).clamp(max=infinity + 1)
    thresholds = picked_thresholds(batch, k, low, high)
    missed = [index for index, row in enumerate(batch.rows) if thresholds[row] is None]
    if missed:
        counted = _count(batch.pick(missed), rows, mask_ratio, value, nth).tolist()
        both = zip(thresholds, counted, strict=True)
        thresholds = [of_count if known is None else known for known, of_count in both]
    return torch.tensor(thresholds, dtype=torch.int64, device="cpu")


def _may_read_back(batch: Batch) -> bool:
    """Whether scores are in host memory, where reading a value waits for nothing."""
    return all(score.entries.is_cpu for score in batch.scores)


def _entries(batch: Batch, rows: int) -> list[int]:
    """How many entries each row has."""
    entries = [0] * rows
    for score, row in batch.pairs():
        entries[row] += score.entries.numel()
    return entries


def _digits(batch: Batch, rows: Rows) -> list[Digit]:
    """The digits of the scores, from the top, but for those that are 0 in all of them.

    The bits by which magnitudes, or the reverse of them, are widened are 0, as of bf16 that is
    compared as fp32. Ranks that count together take all digits, for one may have another dtype.
    """
    every = digits(batch.dtype)
    are_widened = all(type(score) in (Magnitudes, Inverses) for score in batch.scores)
    if rows.are_shared() or not are_widened:
        return every
    of_entries = min(FORMATS[score.entries.dtype].widening for score in batch.scores)
    widened_by = of_entries - FORMATS[batch.dtype].widening
    return [digit for digit in every if digit.shift + digit.width > widened_by]


def _count(
    batch: Batch,
    rows: Rows,
    mask_ratio: float,
    prefixes: Tensor | None = None,
    k: Tensor | None = None,
) -> Tensor:
    """The threshold of each row, digit by digit, from the counts of all ranks and devices.

    Args:
        batch: The scores.
        rows: Which of them are counted together.
        mask_ratio: Fraction of a group's entries to mask.
        prefixes: The first digit, if it has been counted, int64 ``(rows,)``.
        k: Then that of the threshold among the scores with this digit, int64 ``(groups,)``.
    """
    needed = _digits(batch, rows)
    for digit in needed[0 if prefixes is None else 1 :]:
        value, k = _count_digit(batch, rows, mask_ratio, digit, prefixes, k)
        prefixes = value if prefixes is None else (prefixes << digit.width) | value
    assert prefixes is not None
    return (prefixes << needed[-1].shift).clamp(max=infinity_pattern(batch.dtype))


def _count_digit(
    batch: Batch,
    rows: Rows,
    mask_ratio: float,
    digit: Digit,
    prefixes: Tensor | None = None,
    k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A digit of each row's threshold, and the k of that score among those that share it.

    Args:
        batch: The scores.
        rows: Which of them are counted together.
        mask_ratio: Says k for the first digit.
        digit: Which one.
        prefixes: The digits above it, int64 ``(rows,)``.
        k: Of the score among those with these digits, int64 ``(groups,)``.
    """
    counts = _count_on_every_device(batch, len(rows), digit, prefixes)
    # Ranks exchange sums over 2^8 neighbouring bins, then the bins of the winning sum only.
    fine = counts.view(len(rows), -1, 256)
    coarse = rows.sum(_sum_neighbours(fine))
    upper, k = _take_bin(coarse, entries_to_keep(coarse.sum(-1), mask_ratio) if k is None else k)
    index = rows.spread(upper)[:, None, None].expand(-1, 1, 256)
    lower, k = _take_bin(rows.sum(fine.gather(1, index).squeeze(1).long()), k)
    return rows.spread((upper << 8) | lower), k


def _take_bin(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the k-th largest score, and the k of that score within the bin.

    Args:
        counts: int64 ``(groups, bins)``.
        k: int64 ``(groups,)``, from 1.
    """
    from_top = counts.flip(-1).cumsum(-1)
    above = from_top < k[:, None]
    position = above.sum(-1).clamp(max=counts.size(-1) - 1)
    nth = k - (from_top * above).amax(-1)
    return counts.size(-1) - 1 - position, nth


def _count_on_every_device(
    batch: Batch, rows: int, digit: Digit, prefixes: Tensor | None
) -> Tensor:
    """Counts of the digit ``(rows, bins)`` on the first tensor's device."""
    devices = [score.entries.device for score in batch.scores]
    # Half the memory to clear and sum, if no row has more entries than int32 holds.
    fits = max(_entries(batch, rows)) <= torch.iinfo(torch.int32).max
    dtype = torch.int32 if fits else torch.int64
    total = _no_counts(rows, 1 << digit.width, dtype, devices[0])
    for device in dict.fromkeys(devices):
        counts = total if device == devices[0] else torch.zeros_like(total, device=device)
        local = batch.pick([i for i, of_score in enumerate(devices) if of_score == device])
        count_digits(local, digit, None if prefixes is None else prefixes.to(device), counts)
        if device != devices[0]:
            total += counts.to(devices[0])
    return total


class Rows:
    """Rows of counts: one for each pair of a group of entries and the ranks that it is spread over.

    Entries that are spread over the same ranks are counted together and summed over these ranks
    once; a group whose tensors lie differently (sharded and not, on different meshes) has several
    rows. All ranks build the same rows in the same order.

    Args:
        groups: The shards of each group.
    """

    def __init__(self, groups: Sequence[Sequence[Shard]]) -> None:
        self._group: list[int] = []
        self._ranks: list[ProcessGroups] = []
        self.of_shard: list[int] = []
        for index, group in enumerate(groups):
            row_of: dict[ProcessGroups, int] = {}
            for shard in group:
                if shard.ranks not in row_of:
                    row_of[shard.ranks] = len(self._group)
                    self._group.append(index)
                    self._ranks.append(shard.ranks)
                self.of_shard.append(row_of[shard.ranks])
        self._groups = len(groups)

    def __len__(self) -> int:
        return len(self._group)

    def sum(self, counts: Tensor) -> Tensor:
        """Sum counts ``(rows, ...)`` over ranks and rows to ``(groups, ...)``."""
        for ranks in dict.fromkeys(self._ranks):
            rows = [row for row, held_by in enumerate(self._ranks) if held_by == ranks]
            if len(rows) == len(self):
                sum_over_ranks(counts, ranks)
            elif ranks:
                part = torch.stack([counts[row] for row in rows])
                sum_over_ranks(part, ranks)
                for row, total in zip(rows, part, strict=True):
                    counts[row] = total
        if self._one_row_a_group():
            return counts
        totals = counts.new_zeros(self._groups, *counts.shape[1:])
        for row, group in enumerate(self._group):
            totals[group] += counts[row]
        return totals

    def are_shared(self) -> bool:
        """Whether a row is spread over ranks."""
        return any(self._ranks)

    def spread(self, values: Tensor) -> Tensor:
        """Values of groups ``(groups, ...)`` as values of their rows ``(rows, ...)``."""
        if self._one_row_a_group():
            return values
        return torch.stack([values[group] for group in self._group])

    def _one_row_a_group(self) -> bool:
        return self._group == list(range(self._groups))


def _no_counts(rows: int, bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros ``(rows, bins)``.

    On a CPU neither this nor :func:`_sum_neighbours` uses torch's threads: the work is small, and
    where another process holds a core, as data loaders do, their barrier waits for milliseconds.
    """
    if device.type != "cpu":
        return torch.zeros(rows, bins, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros((rows, bins), np.int32 if dtype == torch.int32 else np.int64))


def _sum_neighbours(fine: Tensor) -> Tensor:
    """Sums of the last dimension: counts ``(rows, bins / 256, 256)`` to int64."""
    if not fine.is_cpu:
        return fine.sum(-1)
    # In the dtype of the counts, which holds the entries of a whole row; einsum is the fastest sum.
    return torch.from_numpy(np.einsum("rbk->rb", fine.numpy())).long()
