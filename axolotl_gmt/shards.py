"""Where a gradient lives: the entries of it that are in this process, and who holds the rest.

The only module that knows how training is distributed. It hands out flat views of local entries
and sums over ranks; it knows nothing of masks, thresholds or trainers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

# What wrappers put into parameter names: DDP and DeepSpeed, torch.compile, FSDP1, activation
# checkpointing. Patterns and layer names must not depend on how a model is wrapped.
_WRAPPERS = re.compile(
    r"(^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.)"
)


def plain_name(name: str) -> str:
    """``name`` of a parameter as it is in the unwrapped model."""
    return _WRAPPERS.sub("", name)


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps, inside the wrappers that Accelerate puts around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


@dataclass(frozen=True)
class Shard:
    """The entries of one parameter's gradient that live in this process.

    Attributes:
        name: Parameter name in the unwrapped model.
        entries: Flat view of the gradient's memory, shape ``(entries,)``; writing to it writes
            to the gradient. The order of entries is that of memory.
    """

    name: str
    entries: Tensor


def _flat_view(tensor: Tensor) -> Tensor | None:
    """All entries of ``tensor`` in memory order without a copy, or None if they are not dense."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    dense = tensor.permute(order)
    return dense.view(-1) if dense.is_contiguous() else None


def local_shard(name: str, parameter: Tensor) -> Shard | None:
    """The shard of ``parameter``'s gradient in this process; None if it has no gradient.

    Raises:
        TypeError: For a gradient that cannot be masked exactly: sparse, or not bf16, fp16,
            fp32 or fp64.
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout != torch.strided:
        raise TypeError(
            f"The gradient of {name} is sparse ({gradient.layout}), which GMT cannot mask. Create "
            "the layer without sparse gradients (nn.Embedding(..., sparse=False)) or leave the "
            f"parameter out with exclude: ['{re.escape(name)}']."
        )
    if not (gradient.is_floating_point() and gradient.element_size() > 1):
        raise TypeError(
            f"The gradient of {name} is {gradient.dtype}; GMT masks bfloat16, float16, float32 "
            f"and float64. Leave the parameter out with exclude: ['{re.escape(name)}']."
        )
    entries = _flat_view(gradient)
    if entries is None:
        # Expanded or strided gradients cannot be edited entry by entry where they are.
        parameter.grad = gradient.contiguous()
        entries = parameter.grad.view(-1)
    return Shard(name, entries)
