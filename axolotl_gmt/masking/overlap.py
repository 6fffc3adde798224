"""How the mask changes over time: its overlap with an earlier one, and what was ever kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from axolotl_gmt.gradients.shard import Shard, StepGradients, shape
from axolotl_gmt.kernels.bits import count, pack_nonzero
from axolotl_gmt.kernels.contract import chunk_size

COUNTS = 7
"""How many numbers a step says of a tensor beside :data:`~axolotl_gmt.kernels.contract.TOTALS`."""


class Overlap:
    """Which entries were kept, as bits: at any step so far, at this one, and when it was last read.

    An entry is kept where the masked gradient is not 0. The masks of a step are compared with those
    of the step at which the statistics were last read before, which is the previous logged step
    under a trainer. Each rank holds the bits of its own shards, and counts add up over ranks.
    """

    def __init__(self) -> None:
        self._entries: dict[str, int] = {}
        # A tensor that is missing here has kept nothing.
        self._ever: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._step = 0
        self._step_before = 0  # From 1; 0 if the statistics have not been read yet.
        self._gradients: StepGradients | None = None

    def begin_step(self, step: int, gradients: StepGradients) -> None:
        """The masks of ``step`` come next, which mask ``gradients``."""
        self._step = step + 1
        self._gradients = gradients

    def read(self) -> None:
        """The statistics of the step just made are read, so later steps are compared with it.

        What is read is counted already, so that reading twice is reading once.
        """
        self._before = dict(self._now)
        self._step_before = self._step

    def count(self, shards: Sequence[Shard]) -> Tensor:
        """Note what ``shards``, which lie on one device and have just been masked, have kept.

        Nothing is read from a GPU.

        Returns:
            float64 ``(shards, COUNTS)``, which adds up over ranks: the entries that are kept now,
            those before, those both times, those at any step so far; and 1, the step before (from
            1; 0 if there is none) and its square, which tell whether ranks compare with one step.
        """
        device = shards[0].entries.device
        counts = torch.ones(len(shards), COUNTS, dtype=torch.float64, device=device)
        for row, shard in zip(counts, shards, strict=True):
            self._entries[shard.name] = shape(shard.parameter).numel()
            row[:4] = self._count(shard)
        counts[:, 5] = self._step_before
        counts[:, 6] = self._step_before**2
        return counts

    def _count(self, shard: Shard) -> Tensor:
        """The first four of :meth:`count`, int64 ``(4,)``."""
        assert self._gradients is not None
        name, device = shard.name, shard.entries.device
        gradient = self._gradients.local_gradient(shard.parameter)
        if shard.is_absent or gradient is None:
            self._now.pop(name, None)
            nothing = torch.empty(0, dtype=torch.uint8, device=device)
            before, ever = (bits.get(name, nothing) for bits in (self._before, self._ever))
            now = torch.zeros_like(before)
        else:
            # In the order of the tensor, not of memory, which need not be the same at each step.
            now = pack_nonzero(gradient.reshape(-1), chunk_size(gradient.device))
            before = self._before.get(name, torch.zeros_like(now))
            ever = self._ever[name].bitwise_or_(now) if name in self._ever else now.clone()
            self._now[name], self._ever[name] = now, ever
        return torch.stack([count(bits) for bits in (now, before, now & before, ever)])

    def statistics(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """What the counts of some tensors say, see :meth:`.masker.GradientMasker.statistics`.

        Args:
            tensors: Names, and float64 ``(COUNTS,)`` on a CPU, summed over ranks.
        """
        both = union = ever = entries = 0
        by_chance: list[float] = []
        is_known = True
        for name, row in tensors:
            now, before, of_both, of_ever, ranks, steps, squares = map(int, row.tolist())
            # The variance is 0: all ranks compare with the same step.
            is_known &= steps > 0 and ranks * squares == steps**2
            both, union, ever = both + of_both, union + now + before - of_both, ever + of_ever
            entries += self._entries[name]
            by_chance.append(now * before / max(self._entries[name], 1))
        statistics = {"ever_kept": ever / entries}
        if is_known:
            expected = math.fsum(by_chance)
            expected_union = both + union - expected
            statistics["mask_overlap"] = both / union if union else 1.0
            statistics["mask_overlap_by_chance"] = expected / expected_union if union else 1.0
        return statistics
