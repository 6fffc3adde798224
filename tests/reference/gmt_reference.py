"""Gradient-Mask Tuning as slowly and plainly as it can be written: sort everything."""

from __future__ import annotations

import hashlib

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


def masked_by_scores(
    gradients: list[Tensor], scores: list[Tensor], mask_ratio: float
) -> list[Tensor]:
    """``gradients`` with every entry set to zero whose score is not among the k largest.

    An entry whose gradient is not finite has an infinite score.
    """
    scores = [
        score.masked_fill(~gradient.isfinite(), float("inf"))
        for score, gradient in zip(scores, gradients, strict=True)
    ]
    keeps = keep_masks(scores, mask_ratio)
    return [
        torch.where(keep, gradient, torch.zeros_like(gradient))
        for keep, gradient in zip(keeps, gradients, strict=True)
    ]


def random_scores(name: str, shape: torch.Size, seed: int, step: int) -> Tensor:
    """The scores of the criterion ``random``, one Python integer after the other."""
    digest = hashlib.blake2b(repr((seed, step, name)).encode(), digest_size=8).digest()
    key = int.from_bytes(digest)
    scores = []
    for position in range(shape.numel()):
        x = (position * 0x9E3779B97F4A7C15 + key) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        x = x ^ (x >> 31)
        scores.append((x >> 40) / 2**24)
    return torch.tensor(scores, dtype=torch.float32).view(shape)
