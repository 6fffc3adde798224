"""How masks change over time, told with sets of entries."""

from __future__ import annotations

import math

from torch import Tensor

Kept = set[tuple[str, int]]


class MaskHistory:
    """Sees every masked gradient, and remembers which entries were not 0.

    Args:
        sizes: The number of entries of each tensor under the mask.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.now: Kept = set()
        self.ever: Kept = set()
        self.now_is_logged = False
        self.logged: Kept | None = None
        self.present: set[str] = set()

    def step(self, masked: dict[str, Tensor]) -> None:
        """Make a step with the masked gradients that there are."""
        if self.now_is_logged:
            self.logged = self.now
        self.now_is_logged = False
        self.now = {
            (name, position)
            for name, gradient in masked.items()
            for position, value in enumerate(gradient.flatten().tolist())
            if value != 0
        }
        self.ever |= self.now
        self.present = {name for name in masked if self.sizes[name]}

    def log(self, names: list[str]) -> dict[str, float]:
        """What is logged now of some of the tensors together."""
        self.now_is_logged = True
        if not self.present & {*names}:
            return {}

        def of_names(kept: Kept) -> Kept:
            return {entry for entry in kept if entry[0] in names}

        ever = len(of_names(self.ever)) / sum(self.sizes[name] for name in names)
        if self.logged is None:
            return {"ever_kept": ever}
        now, before = of_names(self.now), of_names(self.logged)
        if not now | before:
            return {"ever_kept": ever, "mask_overlap": 1.0, "mask_overlap_by_chance": 1.0}
        both = math.fsum(
            sum(entry[0] == name for entry in now) * sum(entry[0] == name for entry in before) / n
            for name, n in self.sizes.items()
            if name in names and n
        )
        return {
            "ever_kept": ever,
            "mask_overlap": len(now & before) / len(now | before),
            "mask_overlap_by_chance": both / (len(now) + len(before) - both),
        }
