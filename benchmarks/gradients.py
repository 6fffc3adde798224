"""Gradients in the shapes of real models, and the ways to mask them that are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measuring import TRIAL
from torch import Tensor

from axolotl_gmt import GMTConfig, GradientMasker

Shape = tuple[int, ...]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Llama:
    """What decides the shapes of a Llama's parameters."""

    hidden: int
    intermediate: int
    layers: int
    keys_and_values: int
    vocabulary: int
    tied: bool

    def shapes(self) -> list[Shape]:
        """Shapes of all parameters, in the order of the model."""
        wide, inner, narrow = self.hidden, self.intermediate, self.keys_and_values
        attention = [(wide, wide), (narrow, wide), (narrow, wide), (wide, wide)]
        mlp = [(inner, wide), (inner, wide), (wide, inner)]
        layer: list[Shape] = [*attention, *mlp, (wide,), (wide,)]
        ends: list[Shape] = [(wide,)] if self.tied else [(wide,), (self.vocabulary, wide)]
        return [(self.vocabulary, wide), *(layer * self.layers), *ends]


MODELS = {
    TRIAL: Llama(64, 128, 2, 32, 512, tied=True),
    "SmolLM2-135M": Llama(576, 1536, 30, 192, 49152, tied=True),
    "Llama-1B": Llama(2048, 8192, 16, 512, 128256, tied=True),
    "Llama-7B": Llama(4096, 11008, 32, 4096, 32000, tied=False),
}


class NoStep(torch.optim.Optimizer):
    """An optimizer that does nothing, so that its step takes as long as the hooks on it."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


class Gradients:
    """Parameters with normally distributed gradients, of magnitudes that differ by tensor.

    Args:
        shapes: Shapes of the parameters.
        dtype: Of parameters and gradients.
        device: Where they are.
        restorable: Keep a second copy, from which :meth:`restore` undoes a masking.
    """

    def __init__(
        self, shapes: Sequence[Shape], dtype: torch.dtype, device: str, restorable: bool = True
    ) -> None:
        torch.manual_seed(0)
        self.parameters: list[Tensor] = []
        for index, shape in enumerate(shapes):
            parameter = torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)
            parameter.requires_grad_()
            parameter.grad = torch.empty_like(parameter).normal_(std=10.0 ** -(3 + index % 4))
            self.parameters.append(parameter)
        self._originals = [grad.clone() for grad in self.grads] if restorable else []

    @property
    def grads(self) -> list[Tensor]:
        """The gradients."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @property
    def entries(self) -> int:
        """How many entries all gradients have."""
        return sum(parameter.numel() for parameter in self.parameters)

    def restore(self) -> None:
        """Undo all maskings."""
        torch._foreach_copy_(self.grads, self._originals)


def mask_step_of(
    parameters: Sequence[Tensor], mask_ratio: float, criterion: str = "gradient", **settings: Any
) -> NoStep:
    """An optimizer whose step is GMT's mask step, with these settings, and nothing else."""
    optimizer = NoStep(parameters)
    # In layers, since the criterion half freezes half of each layer's matrices.
    names = [
        (f"layers.{index // 9}.block.tensor{index}.weight", tensor)
        for index, tensor in enumerate(parameters)
    ]
    config = GMTConfig(mask_ratio=mask_ratio, criterion=criterion, **settings)
    GradientMasker(names, config).attach(optimizer)
    return optimizer


def _mask_with(grads: Sequence[Tensor], threshold: Callable[[Tensor, int], Tensor], ratio: float):  # type: ignore[no-untyped-def]
    for grad in grads:
        magnitudes = grad.abs()
        k = max(1, grad.numel() - round(ratio * grad.numel()))
        grad.mul_(magnitudes >= threshold(magnitudes.view(-1), k))


def mask_by_topk(grads: Sequence[Tensor], mask_ratio: float) -> None:
    """What public implementations do, parameter by parameter."""
    _mask_with(grads, lambda values, k: values.topk(k).values[-1], mask_ratio)


def mask_by_unsorted_topk(grads: Sequence[Tensor], mask_ratio: float) -> None:
    """The same without the sort that it does not need."""
    _mask_with(grads, lambda values, k: values.topk(k, sorted=False).values.min(), mask_ratio)


def mask_by_kthvalue(grads: Sequence[Tensor], mask_ratio: float) -> None:
    """Selection without the values above."""
    _mask_with(grads, lambda values, k: values.kthvalue(len(values) - k + 1).values, mask_ratio)
