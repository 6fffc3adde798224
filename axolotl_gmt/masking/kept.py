"""Masks that stay for several steps, as bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.gradients.shard import Shard
from axolotl_gmt.kernels.bits import pack
from axolotl_gmt.kernels.contract import Batch, chunk_size
from axolotl_gmt.kernels.scores import Bits, Scores

# The threshold that masks by bits: the pattern of 1, the score of what stays.
KEPT = 0x3F800000


class KeptMasks:
    """The masks of the interval of steps that is under way.

    An interval begins at ``warmup_steps`` and every ``mask_interval`` steps after. A tensor's mask
    is made at the first step of an interval at which it has a gradient.

    Args:
        config: The settings.
    """

    def __init__(self, config: GMTConfig) -> None:
        self._config = config
        self._bits: dict[str, Tensor] = {}
        self._made_at: int | None = None
        self._layouts: dict[str, str] = {}
        self._loaded_layouts: dict[str, str] = {}

    def begin_step(self, step: int) -> None:
        """Forget masks of another interval than the one that ``step`` is in."""
        if self._made_at is None or self._interval(step) != self._interval(self._made_at):
            self._bits = {}
            self._made_at = step

    def _interval(self, step: int) -> int:
        every = self._config.mask_interval
        return 0 if every == "once" else (step - self._config.warmup_steps) // every

    def has(self, shard: Shard) -> bool:
        """Whether the mask of a shard is made, for the gradient that it has now."""
        return not shard.is_absent and shard.name in self._bits

    def scores(self, shard: Shard) -> Bits:
        """Scores that mask as before, with :data:`KEPT` as threshold.

        The mask moves to the device of the gradient once, if it was loaded elsewhere.
        """
        bits = self._bits[shard.name].to(shard.entries.device)
        self._bits[shard.name] = bits
        return Bits(shard.entries, bits)

    def keep(self, shards: Sequence[Shard], batch: Batch, thresholds: Tensor) -> None:
        """Keep the masks of ``shards``, before they are applied."""
        for shard, (scores, row) in zip(shards, batch.pairs(), strict=True):
            if not shard.is_absent:
                threshold = thresholds[row].to(shard.entries.device)
                self._bits[shard.name] = _survivors(scores, threshold, batch.dtype)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`~axolotl_gmt.masking.masker.GradientMasker.state_dict`."""
        return {"made_at": self._made_at, "layouts": self._layouts, "masks": dict(self._bits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: If a parameter that has a mask lies otherwise now.
        """
        self._made_at = state["made_at"]
        self._bits = dict(state["masks"])
        self._loaded_layouts = dict(state["layouts"])
        self.check_layouts({})

    def check_layouts(self, layouts: Mapping[str, str]) -> None:
        """Note how parameters lie in this process, and whether their masks fit.

        Raises:
            ValueError: If a parameter that has a mask lies otherwise than when it was made.
        """
        self._layouts |= layouts
        for name, layout in self._layouts.items():
            loaded = self._loaded_layouts.get(name, layout)
            if loaded != layout:
                raise ValueError(
                    f"The mask of {name} was made when it was {loaded}, but now it is {layout}. "
                    "Resume with the model, the number of processes and the sharding that the "
                    "checkpoint was saved with."
                )

    def is_under_way(self, step: int) -> bool:
        """Whether a run that takes up at ``step`` goes on with masks of the steps before."""
        since = step - self._config.warmup_steps
        every = self._config.mask_interval
        return since > 0 and (every == "once" or since % every > 0)


def _survivors(scores: Scores, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of the entries whose score is not below ``threshold``, int64 of shape ``()``."""
    entries, device = len(scores.entries), scores.entries.device
    return pack(
        lambda start, stop: scores.patterns(start, stop, dtype) >= threshold,
        entries,
        chunk_size(device),
        device,
    )
