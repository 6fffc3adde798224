"""Thresholds on a CPU in one pass, where counting takes one for each digit.

A sample tells two patterns between which the threshold lies. The pass copies the few scores there,
and the threshold is picked among the copies.

Knows no parameters, no trainers and no other ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from axolotl_gmt.kernels.contract import Batch
from axolotl_gmt.kernels.dispatch import copy_between
from axolotl_gmt.kernels.dtypes import FORMATS, magnitude_patterns
from axolotl_gmt.kernels.scores import Hashes

# A row of scores is sampled in so many runs of so many entries. Longer runs say less of the whole:
# neighbours in a matrix are alike.
_RUNS = 1024
_RUN = 8
# If a threshold lies farther from its estimate than so many standard deviations, its row is
# counted.
_DEVIATIONS = 4


def sampled_thresholds(batch: Batch, n: Tensor, k: Tensor) -> list[int | None]:
    """The pattern of the k-th largest score of each row, if it is near its estimate.

    Args:
        batch: The scores, in the memory of the host.
        n: int64 ``(rows,)``, how many scores each row has.
        k: int64 ``(rows,)``, from 1.

    Returns:
        A threshold for each row. None where it lies outside the limits.
    """
    low, high = _limits(batch, n, k)
    copies = _of_rows(batch, low, high + 1, above := torch.zeros_like(n))
    thresholds: list[int | None] = []
    for copy, nth in zip(copies, (k - above).tolist(), strict=True):
        if copy is None or not 1 <= nth <= len(copy):
            thresholds.append(None)
        else:
            copy.partition(-nth)
            thresholds.append(int(copy[-nth]))
    return thresholds


def _limits(batch: Batch, n: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Two patterns, between which the k-th largest of the n scores of a row most likely lies.

    Of m scores that are drawn at random, the share below the k-th largest of all n has the mean
    1 - k/n and a known deviation. Hashes are uniform, so their limits are known without looking.
    """

    def shares(m: Tensor) -> tuple[Tensor, Tensor]:
        below, m = 1 - k / n.clamp(min=1), m.clamp(min=1)
        margin = _DEVIATIONS * (below * (1 - below) / m).sqrt() + 2 / m
        return (below - margin).clamp(0, 1), (below + margin).clamp(0, 1)

    if all(isinstance(score, Hashes) for score in batch.scores):
        low, high = (magnitude_patterns(share, batch.dtype).long() for share in shares(n))
        return low, high
    form = FORMATS[batch.dtype]
    # Most matrices have lines of 2^a 3^b entries. A stride of 6 m + 1 shares no factor with these,
    # so the sample meets every column.
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
