"""The k-th largest magnitude of groups of entries, exact, found by counting bit patterns.

For non-negative floats the numeric order is the order of their bit patterns, so a histogram over
patterns and a sum over its bins find the threshold without sorting (Li et al. 2025, T_k). Wider
types are counted digit by digit, the upper 15 bits first. NaN patterns lie above that of infinity,
which makes every broken entry win. Nothing here reads a value back from a GPU.

Knows no parameters and no trainers, and of ranks only that rows of counts add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from axolotl_gmt.gradients.shard import Ranks, Shard, sum_over_ranks
from axolotl_gmt.kernels.dispatch import (
    Digit,
    copies_candidates,
    count_digits,
    finds_between,
    keep_between,
    keep_candidates,
    magnitude_patterns,
    no_counts,
    sum_neighbours,
)
from axolotl_gmt.kernels.scores import Scores


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the values of all ``dtypes`` exactly, so they can compete."""
    return reduce(torch.promote_types, dtypes)


def infinity_pattern(dtype: torch.dtype) -> int:
    """The bit pattern of infinity; patterns above it are NaN."""
    return int(magnitude_patterns(torch.tensor(float("inf"), dtype=dtype, device="cpu"), dtype))


def digits(dtype: torch.dtype, lower_width: int) -> list[Digit]:
    """The digits, upper first, by which a magnitude of ``dtype`` is counted.

    The first takes the upper 16 bits but for the sign, the others ``lower_width`` bits each.
    """
    upper = dtype.itemsize * 8 - 16
    lower = range(upper - lower_width, -1, -lower_width)
    return [Digit(upper, 15), *(Digit(shift, lower_width) for shift in lower)]


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
    k: Tensor | None = None
    prefixes: Tensor | None = None
    # Where candidates are copied, those that match the first digit make further passes cheap.
    copies = all(copies_candidates(score.entries.device) for score in scores)
    # A rank cannot know whether all others could, so that scores spread over ranks are counted.
    if not rows.are_shared() and finds_between(scores, dtype):
        found = _uniform_thresholds(scores, rows, mask_ratio, dtype)
        if found is not None:
            return found
    for digit in digits(dtype, lower_width=8 if copies else 16):
        counts = _count_on_every_device(scores, rows, dtype, digit, prefixes)
        # Ranks exchange sums over 2^8 neighbouring bins, then the bins of the winning sum only.
        fine = counts.view(len(rows), -1, 256)
        coarse = rows.sum(sum_neighbours(counts))
        if k is None:
            k = entries_to_keep(coarse.sum(-1), mask_ratio)
        upper, k = _take_bin(coarse, k)
        index = rows.spread(upper)[:, None, None].expand(-1, 1, 256)
        lower, k = _take_bin(rows.sum(fine.gather(1, index).squeeze(1).long()), k)
        value = rows.spread((upper << 8) | lower)
        prefixes = value if prefixes is None else (prefixes << digit.width) | value
        if copies and digit.shift > 0:
            scores = keep_candidates(scores, rows.of_shard, dtype, digit.shift, prefixes)
    assert prefixes is not None
    return prefixes.clamp(max=infinity_pattern(dtype))


def _uniform_thresholds(
    scores: Sequence[Scores], rows: Rows, mask_ratio: float, dtype: torch.dtype
) -> Tensor | None:
    """:func:`find_thresholds` of uniform scores on one rank; None if one is not where it must be.

    Of n uniform scores the k-th largest lies within five standard deviations of 1 - k/n, but for
    six groups in 10^7. One pass copies the scores there and counts those above; the k-th largest
    is among the copies, and no pass has to make all scores again.
    """
    n = torch.zeros(len(rows), dtype=torch.int64, device="cpu")
    for score, row in zip(scores, rows.of_shard, strict=True):
        n[row] += score.entries.numel()
    k = entries_to_keep(n, mask_ratio)
    share = k.double() / n.clamp(min=1)
    deviation = (share * (1 - share) / n.clamp(min=1)).sqrt() + 1.0 / n.clamp(min=1)
    low, high = (
        magnitude_patterns((1 - share + side * deviation).clamp(0, 1), dtype).long()
        for side in (-5, 5)
    )
    above = torch.zeros_like(n)
    copies = keep_between(scores, rows.of_shard, dtype, low, high, above)
    between: list[list[Tensor]] = [[] for _ in range(len(rows))]
    for copy, row in zip(copies, rows.of_shard, strict=True):
        if copy is None:
            return None
        between[row].append(copy.entries)
    thresholds = []
    for parts, rank in zip(between, (k - above).tolist(), strict=True):
        patterns = magnitude_patterns(torch.cat(parts), dtype)
        if not 1 <= rank <= len(patterns):
            return None
        thresholds.append(patterns.kthvalue(len(patterns) - rank + 1).values)
    return torch.stack(thresholds).long()


def _counts_dtype(scores: Sequence[Scores], rows: Rows) -> torch.dtype:
    """Int32 if no row has more entries here than it holds: half the memory to clear and sum."""
    entries = [0] * len(rows)
    for score, row in zip(scores, rows.of_shard, strict=True):
        entries[row] += score.entries.numel()
    return torch.int32 if max(entries) <= torch.iinfo(torch.int32).max else torch.int64


def _count_on_every_device(
    scores: Sequence[Scores],
    rows: Rows,
    dtype: torch.dtype,
    digit: Digit,
    prefixes: Tensor | None,
) -> Tensor:
    devices = [score.entries.device for score in scores]
    counts_dtype = _counts_dtype(scores, rows)
    total = no_counts(len(rows), 1 << digit.width, counts_dtype, devices[0])
    for device in dict.fromkeys(devices):
        local = [index for index, of_score in enumerate(devices) if of_score == device]
        counts = total if device == devices[0] else torch.zeros_like(total, device=device)
        count_digits(
            [scores[index] for index in local],
            [rows.of_shard[index] for index in local],
            dtype,
            digit,
            None if prefixes is None else prefixes.to(device),
            counts,
        )
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
