"""Weights that keep still through a step, where their masked gradient is 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from axolotl_gmt.gradients.shard import StepGradients
from axolotl_gmt.kernels.bits import pack_nonzero, unpack
from axolotl_gmt.kernels.contract import chunk_size

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class HeldWeights:
    """What a step of the optimizer must not move.

    No optimizer can be told to leave an entry alone: momentum, weight decay and rounding move those
    whose gradient is 0 as well. So the weights are copied before they are stepped, and put back
    where the masked gradient was 0.

    Args:
        gradients: Those of the step.
        masked: The parameters under the mask.
    """

    def __init__(self, gradients: StepGradients, masked: Iterable[Tensor]) -> None:
        self._gradients = gradients
        self._masked = set(masked)
        self._moving: dict[Tensor, Tensor] = {}
        self._copies: dict[Tensor, Tensor] = {}

    def choose(self) -> None:
        """Note where the gradients, which have just been masked, are not 0."""
        self._moving = {}
        for parameter in self._masked:
            gradient = self._gradients.local_gradient(parameter)
            if gradient is not None:
                chunk = chunk_size(gradient.device)
                self._moving[parameter] = pack_nonzero(gradient.reshape(-1), chunk)

    def copy(self, parameters: Iterable[Tensor]) -> None:
        """Copy the weights of those of ``parameters`` that are under the mask."""
        for parameter in parameters:
            if parameter in self._masked:
                self._copies[parameter] = self._gradients.local_weight(parameter).clone()

    def put_back(self) -> None:
        """Put what was copied back, where the masked gradient is 0."""
        while self._copies:
            parameter, copy = self._copies.popitem()
            if parameter in self._moving:  # Else it has no gradient, and no optimizer moves it.
                weight = self._gradients.local_weight(parameter)
                bits = self._moving[parameter].to(weight.device)
                moves = unpack(bits, 0, weight.numel()).view(weight.shape)
                _put_back(weight, copy, moves)


def check_can_hold(optimizer: object) -> None:
    """Refuse an optimizer that steps other weights than those of the model.

    Raises:
        ValueError: Naming it.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # ZeRO steps an inner one.
    if callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"hold (gmt_hold in YAML): {type(optimizer).__name__} computes the weights for "
            "evaluation from others that it keeps, which cannot be held. Set hold: false, or use "
            "another optimizer, such as AdamW."
        )


def bytes_copied(gradients: StepGradients, masked: Sequence[Tensor]) -> int:
    """How much :meth:`HeldWeights.copy` takes in this process, at most at a time."""
    return max(
        sum(gradients.local_weight(parameter).nbytes for parameter in together)
        for together in gradients.stepped_together(masked)
    )


def _put_back(weight: Tensor, copy: Tensor, moves: Tensor) -> None:
    """Set ``weight``, in place, to ``copy`` where it does not move."""
    if not weight.is_cpu:
        torch.where(moves, weight, copy, out=weight)
        return
    # torch's where takes four times as long on a CPU, one entry at a time.
    integer = _INTEGERS[weight.itemsize]
    weight, copy = weight.view(integer), copy.view(integer)
    weight.bitwise_xor_(copy).mul_(moves).bitwise_xor_(copy)
