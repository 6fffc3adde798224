"""Gradient-Mask Tuning as slowly and plainly as it can be written: sort everything."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_masks(gradients: list[Tensor], mask_ratio: float) -> list[Tensor]:
    """Which entries survive when all of ``gradients`` compete for one threshold.

    Li et al. 2025: an entry stays where its magnitude is at least T_k, the k-th largest. NaN
    counts as infinite.
    """
    magnitudes = [gradient.abs().double() for gradient in gradients]
    magnitudes = [
        magnitude.masked_fill(magnitude.isnan(), float("inf")) for magnitude in magnitudes
    ]
    ordered = torch.cat([m.flatten() for m in magnitudes]).sort(descending=True).values
    n = len(ordered)
    k = max(1, n - round(mask_ratio * n))
    if n == 0:
        return [magnitude.bool() for magnitude in magnitudes]
    threshold = ordered[k - 1]
    return [magnitude >= threshold for magnitude in magnitudes]


def masked(gradients: list[Tensor], mask_ratio: float) -> list[Tensor]:
    """``gradients`` with every entry that does not survive set to zero."""
    keeps = keep_masks(gradients, mask_ratio)
    return [
        torch.where(keep, gradient, torch.zeros_like(gradient))
        for keep, gradient in zip(keeps, gradients, strict=True)
    ]
