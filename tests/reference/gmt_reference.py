"""Gradient-Mask Tuning as slowly and plainly as it can be written: sort everything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
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
    return _keep_largest(magnitudes, mask_ratio)


def _keep_largest(scores: list[Tensor], mask_ratio: float) -> list[Tensor]:
    """Where the scores, which are not NaN, are at least the k-th largest of all of them."""
    ordered = torch.cat([score.flatten() for score in scores]).sort(descending=True).values
    n = len(ordered)
    k = max(1, n - round(mask_ratio * n))
    if n == 0:
        return [score.bool() for score in scores]
    threshold = ordered[k - 1]
    return [score >= threshold for score in scores]


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


def masked_but_smallest(gradients: list[Tensor], mask_ratio: float) -> list[Tensor]:
    """``gradients`` with all set to zero but the k smallest magnitudes, and what ties with these.

    An entry that is 0 is the last to stay, one that is not finite the first.
    """
    scores = []
    for gradient in gradients:
        score = -gradient.abs().double()
        score = score.masked_fill(gradient == 0, -float("inf"))
        scores.append(score.masked_fill(~gradient.isfinite(), float("inf")))
    return [
        torch.where(keep, gradient, torch.zeros_like(gradient))
        for keep, gradient in zip(_keep_largest(scores, mask_ratio), gradients, strict=True)
    ]


def product_scores(gradient: Tensor, weight: Tensor) -> Tensor:
    """The scores of the criterion ``gradient_weight``; infinite where they would be NaN."""
    product = (gradient.float() * weight.float()).abs()
    return product.masked_fill(product.isnan(), float("inf"))


def relative_scores(gradient: Tensor, weight: Tensor) -> Tensor:
    """The scores of the criterion ``relative``, by NumPy; infinite where they would be NaN."""
    with np.errstate(all="ignore"):
        divisor = np.abs(weight.float().numpy()) + np.float32(1e-8)
        quotient = torch.from_numpy(np.abs(gradient.float().numpy()) / divisor)
    assert quotient.dtype == torch.float32
    return quotient.masked_fill(quotient.isnan(), float("inf"))


def masked_by(
    criterion: str,
    gradients: dict[str, Tensor],
    weights: dict[str, Tensor],
    mask_ratio: float,
    seed: int,
    step: int,
) -> dict[str, Tensor]:
    """The gradients of one group, by name, as a built-in criterion other than ``half`` masks them.

    ``weights`` are those of the same names, where the criterion reads them.
    """
    compete = list(gradients.values())
    if criterion == "gradient":
        survivors = masked(compete, mask_ratio)
    elif criterion == "smallest":
        survivors = masked_but_smallest(compete, mask_ratio)
    else:
        of_name = {
            "random": lambda name: random_scores(name, gradients[name].shape, seed, step),
            "fixed_random": lambda name: fixed_random_scores(name, gradients[name].shape, seed),
            "gradient_weight": lambda name: product_scores(gradients[name], weights[name]),
            "relative": lambda name: relative_scores(gradients[name], weights[name]),
        }[criterion]
        survivors = masked_by_scores(compete, [of_name(name) for name in gradients], mask_ratio)
    return dict(zip(gradients, survivors, strict=True))


def random_scores(name: str, shape: torch.Size, seed: int, step: int) -> Tensor:
    """The scores of the criterion ``random``, one Python integer after the other."""
    return _hashes(repr((seed, step, name)), shape)


def fixed_random_scores(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The scores of the criterion ``fixed_random``."""
    return _hashes(repr((seed, name)), shape)


def _hashes(drawn_by: str, shape: torch.Size) -> Tensor:
    digest = hashlib.blake2b(drawn_by.encode(), digest_size=8).digest()
    key = int.from_bytes(digest)
    scores = []
    for position in range(shape.numel()):
        x = (position * 0x9E3779B97F4A7C15 + key) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        x = x ^ (x >> 31)
        scores.append((x >> 40) / 2**24)
    return torch.tensor(scores, dtype=torch.float32).view(shape)


class SparseTraining:
    """Masks that stay and weights that hold still, on whole tensors.

    Args:
        weights: By name; copied.
        groups: The names that compete for one threshold.
        optimizer: Makes the optimizer of a list of parameters.
        mask_ratio, mask_interval, warmup_steps, hold: See :class:`~axolotl_gmt.GMTConfig`.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        groups: list[list[str]],
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        mask_ratio: float,
        mask_interval: int | str,
        warmup_steps: int,
        hold: bool,
    ) -> None:
        self.weights = {name: torch.nn.Parameter(w.clone()) for name, w in weights.items()}
        self.groups = groups
        self.optimizer = optimizer(list(self.weights.values()))
        self.mask_ratio = mask_ratio
        self.mask_interval = mask_interval
        self.warmup_steps = warmup_steps
        self.hold = hold
        self.masks: dict[str, Tensor] = {}
        self.steps = 0

    def step(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Step with the gradients, those that there are, and return them masked."""
        since = self.steps - self.warmup_steps
        self.steps += 1
        if since < 0:
            masked = gradients
        else:
            if self.mask_interval != "once" and since % int(self.mask_interval) == 0:
                self.masks = {}
            for group in self.groups:
                new = [name for name in group if name in gradients and name not in self.masks]
                keeps = (
                    keep_masks([gradients[name] for name in new], self.mask_ratio) if new else []
                )
                self.masks |= dict(zip(new, keeps, strict=True))
            masked = {
                name: torch.where(self.masks[name] | ~gradient.isfinite(), gradient, 0)
                for name, gradient in gradients.items()
            }
        for name, weight in self.weights.items():
            weight.grad = masked[name].to(weight.dtype) if name in masked else None
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimizer.step()
        if self.hold and since >= 0 and self.mask_ratio > 0:
            with torch.no_grad():
                for name, gradient in masked.items():
                    weight = self.weights[name]
                    weight.copy_(torch.where(gradient == 0, before[name], weight))
        return masked
