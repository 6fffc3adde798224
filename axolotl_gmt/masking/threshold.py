"""The k-th largest magnitude of groups of entries, exact, found by counting bit patterns.

For non-negative floats the numeric order is the order of their bit patterns, so a histogram over
patterns and a sum over its bins find the threshold without sorting (Li et al. 2025, T_k). Wider
types are counted digit by digit, the upper 15 bits first. NaN patterns lie above that of infinity,
which makes every broken entry win. Nothing here reads a value back from a GPU.

On a CPU one pass does for wider types what two digits do: a sample tells between which patterns the
threshold lies, and of the few scores there, which the pass copies, it is known which one it is.

Knows no parameters and no trainers, and of ranks only that rows of counts add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from axolotl_gmt.gradients.shard import Ranks, Shard, sum_over_ranks
from axolotl_gmt.kernels.contract import Batch
from axolotl_gmt.kernels.dispatch import copy_between, count_digits
from axolotl_gmt.kernels.dtypes import FORMATS, Digit, digits, magnitude_patterns
from axolotl_gmt.kernels.scores import Hashes, Scores

# A row is sampled in so many runs of so many entries. Longer runs say less of the whole: the
# entries of one row of a matrix are alike.
_RUNS = 1024
_RUN = 8
# A threshold outside of so many standard deviations around its estimate costs a count.
_DEVIATIONS = 4


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the values of all ``dtypes`` exactly, so they can compete."""
    return reduce(torch.promote_types, dtypes)


def infinity_pattern(dtype: torch.dtype) -> int:
    """The bit pattern of infinity; patterns above it are NaN."""
    return FORMATS[dtype].infinity


def entries_to_keep(entries: Tensor, mask_ratio: float) -> Tensor:
    """k = max(1, n - round(mask_ratio * n)) of int64 ``n = entries``, elementwise."""
    return (entries - (entries.double() * mask_ratio).round().long()).clamp(min=1)


def find_thresholds(
    scores: Sequence[Scores], rows: Rows, mask_ratio: float, dtype: torch.dtype
) -> Tensor:
    """T_k of each group: the k-th largest of its n scores, as a bit pattern.

    k = max(1, n - round(mask_ratio * n)). A threshold is at most infinity's pattern, so that
    neither NaN nor infinity can ever fall below it. Entries that lie on other ranks count too.

    Args:
        scores: Those of the tensors of all groups, in the order in which ``rows`` has their shards.
        rows: Which of them are counted together, and what makes them groups.
        mask_ratio: Fraction of a group's entries to mask, in [0, 1).
        dtype: The dtype in which scores are compared; holds every score exactly.

    Returns:
        int64 ``(rows,)`` on the first tensor's device, the same for all rows of a group; 0 for a
        group without entries.
    """
    batch = Batch(scores, rows.of_shard, dtype)
    # One digit is as cheap as copies. Ranks must count together, whatever one of them could do.
    if len(digits(dtype)) == 1 or rows.are_shared() or not _may_read_back(scores):
        return _count(batch, rows, mask_ratio)
    thresholds = _copy(batch, len(rows), mask_ratio)
    missed = [index for index, row in enumerate(batch.rows) if thresholds[row] is None]
    if missed:
        counted = _count(batch.pick(missed), rows, mask_ratio).tolist()
        both = zip(thresholds, counted, strict=True)
        thresholds = [of_count if known is None else known for known, of_count in both]
    return torch.tensor(thresholds, dtype=torch.int64, device="cpu")


def _may_read_back(scores: Sequence[Scores]) -> bool:
    """Whether it costs no waiting to know how many scores are near the threshold."""
    return all(score.entries.is_cpu for score in scores)


def _copy(batch: Batch, rows: int, mask_ratio: float) -> list[int | None]:
    """The threshold of each row, on one rank; None where it is not where it most likely is."""
    n = torch.tensor(_entries(batch, rows), device="cpu")
    k = entries_to_keep(n, mask_ratio)
    low, high = _limits(batch, n, k)
    copies = _of_rows(batch, low, high + 1, above := torch.zeros_like(n))
    thresholds: list[int | None] = []
    for copy, rank in zip(copies, (k - above).tolist(), strict=True):
        if copy is None or not 1 <= rank <= len(copy):
            thresholds.append(None)
        else:
            copy.partition(-rank)
            thresholds.append(int(copy[-rank]))
    return thresholds


def _entries(batch: Batch, rows: int) -> list[int]:
    """How many entries each row has."""
    entries = [0] * rows
    for score, row in batch.pairs():
        entries[row] += score.entries.numel()
    return entries


def _limits(batch: Batch, n: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Two patterns, between which the k-th largest of the n scores of a row most likely lies.

    Of m scores that are drawn at random, the share below the k-th largest of all n has the mean
    1 - k/n and a known deviation. Uniform scores are such a draw, of which need not be looked at.
    """

    def shares(m: Tensor) -> tuple[Tensor, Tensor]:
        below, m = 1 - k / n.clamp(min=1), m.clamp(min=1)
        margin = _DEVIATIONS * (below * (1 - below) / m).sqrt() + 2 / m
        return (below - margin).clamp(0, 1), (below + margin).clamp(0, 1)

    if all(isinstance(score, Hashes) for score in batch.scores):
        low, high = (magnitude_patterns(share, batch.dtype).long() for share in shares(n))
        return low, high
    form = FORMATS[batch.dtype]
    # Rows of a matrix have a multiple of 6 entries or of a power of 2, and then not all columns
    # would be in the sample, if the stride had a factor in common with these.
    strides = (n // (6 * _RUNS)).clamp(min=_RUN // 6 + 1).mul(6).add(1).tolist()
    samples = batch._replace(scores=[s.sample(_RUN, strides[row]) for s, row in batch.pairs()])
    zeros = torch.zeros_like(n)
    drawn = _of_rows(samples, zeros, torch.full_like(n, form.magnitude_bits), zeros.clone())
    sizes = torch.tensor([0 if sample is None else len(sample) for sample in drawn], device="cpu")
    first, last = ((share * sizes).long().tolist() for share in shares(sizes))
    limits = [(0, form.infinity)] * len(drawn)
    for row, (sample, lower, upper) in enumerate(zip(drawn, first, last, strict=True)):
        if sample is not None and lower < upper < len(sample):
            sample.partition(upper)  # One at a time: two in one call take ten times as long.
            sample[:upper].partition(lower)
            limits[row] = int(sample[lower]), min(int(sample[upper]), form.infinity)
    low, high = torch.tensor(limits, device="cpu").T.contiguous()
    return low, high


def _of_rows(
    batch: Batch, low: Tensor, high: Tensor, above: Tensor
) -> list[NDArray[np.signedinteger[Any]] | None]:
    """What :func:`~axolotl_gmt.kernels.dispatch.copy_between` copies, row by row."""
    rows: list[list[Tensor | None]] = [[] for _ in range(len(low))]
    for copy, row in zip(copy_between(batch, low, high, above), batch.rows, strict=True):
        rows[row].append(copy)
    whole = [[copy for copy in copies if copy is not None] for copies in rows]
    return [
        None if len(some) < len(copies) else (torch.cat(some) if some[1:] else some[0]).numpy()
        for some, copies in zip(whole, rows, strict=True)
    ]


def _count(batch: Batch, rows: Rows, mask_ratio: float) -> Tensor:
    """The threshold of each row, digit by digit, from the counts of all ranks and devices."""
    k: Tensor | None = None
    prefixes: Tensor | None = None
    for digit in digits(batch.dtype):
        counts = _count_on_every_device(batch, len(rows), digit, prefixes)
        # Ranks exchange sums over 2^8 neighbouring bins, then the bins of the winning sum only.
        fine = counts.view(len(rows), -1, 256)
        coarse = rows.sum(_sum_neighbours(fine))
        if k is None:
            k = entries_to_keep(coarse.sum(-1), mask_ratio)
        upper, k = _take_bin(coarse, k)
        index = rows.spread(upper)[:, None, None].expand(-1, 1, 256)
        lower, k = _take_bin(rows.sum(fine.gather(1, index).squeeze(1).long()), k)
        value = rows.spread((upper << 8) | lower)
        prefixes = value if prefixes is None else (prefixes << digit.width) | value
    assert prefixes is not None
    return prefixes.clamp(max=infinity_pattern(batch.dtype))


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


def _count_on_every_device(
    batch: Batch, rows: int, digit: Digit, prefixes: Tensor | None
) -> Tensor:
    """Counts of the digit ``(rows, bins)`` on the first tensor's device."""
    devices = [score.entries.device for score in batch.scores]
    # Half the memory to clear and sum, if no row has more entries than it holds.
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
        self._ranks: list[Ranks] = []
        self.of_shard: list[int] = []
        for index, group in enumerate(groups):
            row_of: dict[Ranks, int] = {}
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
