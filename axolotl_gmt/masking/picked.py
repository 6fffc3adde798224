"""The k-th largest score, picked among copies of the few scores that can be it.

On a CPU a copy of so few costs less than to count another digit of all.

Knows no parameters, no trainers and no other ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from axolotl_gmt.kernels.contract import Batch
from axolotl_gmt.kernels.dispatch import copy_between
from axolotl_gmt.kernels.dtypes import magnitude_patterns

# How many standard deviations the limits of uniform scores leave on either side.
_DEVIATIONS = 4


def picked_thresholds(batch: Batch, k: Tensor, low: Tensor, high: Tensor) -> list[int | None]:
    """The pattern of the k-th largest score of each row, if it lies within limits.

    Args:
        batch: The scores, in the memory of the host.
        k: int64 ``(rows,)``, from 1.
        low: int64 ``(rows,)``, patterns.
        high: int64 ``(rows,)``, patterns.

    Returns:
        A threshold for each row. None if it does not lie from low to below high, or if too many
        scores do.
    """
    above = torch.zeros_like(k)
    copies: list[list[Tensor | None]] = [[] for _ in range(len(k))]
    for copy, row in zip(copy_between(batch, low, high, above), batch.rows, strict=True):
        copies[row].append(copy)
    thresholds: list[int | None] = []
    for of_row, nth in zip(copies, (k - above).tolist(), strict=True):
        whole = [copy.numpy() for copy in of_row if copy is not None]
        if len(whole) < len(of_row) or not 1 <= nth <= sum(map(len, whole)):
            thresholds.append(None)
            continue
        row = np.concatenate(whole)
        row.partition(-nth)
        thresholds.append(int(row[-nth]))
    return thresholds


def uniform_limits(n: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two patterns, between which the k-th largest of n scores that are uniform most likely lies.

    The share of n such scores that are below it has the mean 1 - k/n and a known deviation.

    Args:
        n: int64 ``(rows,)``.
        k: int64 ``(rows,)``, from 1.
        dtype: The dtype of the scores.
    """
    n = n.clamp(min=1)
    below = 1 - k.double() / n
    margin = _DEVIATIONS * (below * (1 - below) / n).sqrt() + 2 / n
    low, high = (below - margin).clamp(0, 1), (below + margin).clamp(0, 1)
    return magnitude_patterns(low, dtype).long(), magnitude_patterns(high, dtype).long() + 1
