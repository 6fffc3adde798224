"""What a step kept: sums over tensors and ranks, read from the device only when asked for."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from axolotl_gmt.gradients.shard import ProcessGroups, Shard, sum_over_ranks
from axolotl_gmt.kernels.contract import TOTALS
from axolotl_gmt.masking.overlap import Overlap
from axolotl_gmt.names import module_name


class Statistics:
    """What one step kept.

    Args:
        by_tensor: Whether the totals of each tensor are kept apart, for statistics of modules.
        overlap: Counts what each tensor has kept before and now, if that is wanted; keeps totals
            apart as well.
    """

    def __init__(self, by_tensor: bool, overlap: Overlap | None = None) -> None:
        self._by_tensor = by_tensor or overlap is not None
        self._overlap = overlap
        self._local: dict[tuple[torch.device, ProcessGroups], list[tuple[list[str], Tensor]]] = (
            defaultdict(list)
        )
        self._totals: list[tuple[list[str], Tensor]] = []

    def add(self, shards: Sequence[Shard], totals: Tensor) -> None:
        """Add what a pass made of ``shards``, which share a device and ranks.

        Args:
            shards: The shards that were masked.
            totals: float64 ``(shards, TOTALS)``, see
                :meth:`~axolotl_gmt.kernels.contract.Backend.mask_below_`.
        """
        if self._overlap is not None:  # As more columns, they are summed over ranks with these.
            totals = torch.cat([totals, self._overlap.count(shards)], 1)
        if not self._by_tensor:
            totals = totals.sum(0, keepdim=True)
        key = (totals.device, shards[0].ranks)
        self._local[key].append(([shard.name for shard in shards], totals))

    def sum_over_ranks(self) -> None:
        """Sum over the ranks that hold the shards, once all are added."""
        for (_, ranks), parts in self._local.items():
            total = torch.cat([part for _, part in parts])
            if not self._by_tensor:
                total = total.sum(0, keepdim=True)
            sum_over_ranks(total, ranks)
            self._totals.append(([name for names, _ in parts for name in names], total))
        self._local.clear()

    def overall(self) -> dict[str, float]:
        """The statistics of all tensors; empty if there were none."""
        total = torch.zeros(TOTALS, dtype=torch.float64, device="cpu")
        counts: list[tuple[str, Tensor]] = []
        for tensors, part in self._totals:
            rows = part.cpu()
            total += rows[:, :TOTALS].sum(0)
            if self._overlap is not None:
                counts += zip(tensors, rows[:, TOTALS:], strict=True)
        return self._of(total, counts)

    def of_modules(self, names: Iterable[str]) -> dict[str, dict[str, float]]:
        """The statistics of each module that has any.

        Args:
            names: Names of all parameters, in the order in which their modules are wanted.
        """
        totals: dict[str, Tensor] = defaultdict(
            lambda: torch.zeros(TOTALS, dtype=torch.float64, device="cpu")
        )
        counts: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
        for tensors, part in self._totals:
            for name, row in zip(tensors, part.cpu(), strict=True):
                totals[module_name(name)] += row[:TOTALS]
                counts[module_name(name)].append((name, row[TOTALS:]))
        modules = [module for module in dict.fromkeys(map(module_name, names)) if module in totals]
        statistics = {module: self._of(totals[module], counts[module]) for module in modules}
        return {module: numbers for module, numbers in statistics.items() if numbers}

    def _of(self, total: Tensor, counts: Sequence[tuple[str, Tensor]]) -> dict[str, float]:
        """What the totals, and the counts of each tensor, say; empty if there are no entries."""
        statistics = _statistics(total)
        if statistics and self._overlap is not None:
            statistics |= self._overlap.statistics(counts)
        return statistics


def _statistics(total: Tensor) -> dict[str, float]:
    entries, kept, squares, squares_kept, magnitudes, magnitudes_kept = total.tolist()
    if entries == 0:
        return {}
    return {
        "kept_fraction": kept / entries,
        "grad_norm_kept": 1.0 if squares == 0 else math.sqrt(squares_kept / squares),
        "l1_kept": 1.0 if magnitudes == 0 else magnitudes_kept / magnitudes,
    }
