"""The gradients of a torch optimizer: plain tensors, and DTensors of FSDP2 and tensor parallel."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as DTensorShard
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from axolotl_gmt.gradients.optimizer_step import hook_steps
from axolotl_gmt.gradients.shard import ProcessGroups, Shard, Step, distinct_groups


class PlainGradients:
    """The gradients that a torch optimizer steps with.

    Args:
        optimizer: The optimizer itself, without Accelerate's wrappers.
        names: The names of each parameter of the model.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[Tensor, Sequence[str]]) -> None:
        self.optimizer: Any = optimizer
        self._names = names

    def parameters(self) -> Iterator[tuple[Sequence[str], Tensor]]:
        """All names, and the tensor, of each parameter that the optimizer steps.

        Raises:
            ValueError: If the optimizer steps a tensor that has no name.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in self._names:
                    raise ValueError(
                        f"The optimizer steps a tensor of shape {tuple(parameter.shape)} that is "
                        "not among the named parameters, so it would be stepped unmasked. Give the "
                        "masker the named parameters of the model that the optimizer was made for."
                    )
                yield self._names[parameter], parameter

    def shard(self, name: str, parameter: Tensor) -> Shard:
        """The shard of ``parameter``'s gradient in this process.

        Raises:
            TypeError: For a gradient that cannot be masked exactly: sparse, not yet reduced, laid
                out otherwise than its parameter, or not bf16, fp16, fp32 or fp64.
        """
        gradient = parameter.grad
        reference = parameter if gradient is None else gradient
        if reference.layout != torch.strided:
            raise TypeError(
                f"The gradient of {name} is sparse ({reference.layout}), which GMT cannot mask. "
                "Create the layer without sparse gradients (nn.Embedding(..., sparse=False)). "
                f"{_without(name)}"
            )
        if not (reference.is_floating_point() and reference.element_size() > 1):
            raise TypeError(
                f"The gradient of {name} is {reference.dtype}; GMT masks bfloat16, float16, "
                f"float32 and float64. {_without(name)}"
            )
        if reference.device.type == "mps":
            raise TypeError(f"{name} lies on mps, which has no float64. Train on cuda or the CPU.")
        ranks = self._ranks(parameter)
        if isinstance(reference, DTensor):
            _check_reduced(name, reference)
        if gradient is not None:
            _check_like_parameter(name, parameter, gradient)
        else:  # Other ranks may have one; its dtype must be known here too.
            empty = _local(reference).new_empty(0, dtype=_gradient_dtype(parameter))
            return Shard(name, parameter, empty, ranks, is_absent=True)
        return Shard(name, parameter, _local_entries(parameter, gradient), ranks)

    def process_groups(self) -> list[dist.ProcessGroup]:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.process_groups`."""
        return distinct_groups(map(self._ranks, self._stepped()))

    def _stepped(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def _ranks(self, parameter: Tensor) -> ProcessGroups:
        """Who holds the shards of ``parameter``'s gradient, whether or not there is one now."""
        return _sharded_over(parameter) if isinstance(parameter, DTensor) else ()

    def layout(self, parameter: Tensor) -> str:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.layout`."""
        if not isinstance(parameter, DTensor):
            return "whole"
        return f"{parameter.placements} on {tuple(parameter.device_mesh.shape)}"

    def weight(self, shard: Shard) -> Tensor:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.weight`."""
        gradient = shard.parameter.grad
        if gradient is None:
            return shard.entries.to(shard.parameter.dtype)
        weight = _local(shard.parameter.detach())
        return weight.permute(_memory_order(_local(gradient))).reshape(-1).contiguous()

    def positions(self, shard: Shard) -> Callable[[int, int], Tensor]:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.positions`."""
        first, device = self.first_position(shard), shard.entries.device
        if first is not None:
            return lambda start, stop: torch.arange(first + start, first + stop, device=device)
        gradient = shard.parameter.grad
        assert gradient is not None
        local = _local(gradient)
        indices = cache(lambda dim: _local_indices(gradient, dim))

        def positions(start: int, stop: int) -> Tensor:
            address = torch.arange(start, stop, device=device)
            position = torch.zeros_like(address)
            # Its address in memory gives an entry's local coordinates, and a look-up of the local
            # indices gives for each of them the coordinate in the whole parameter.
            for dim, (size, stride) in enumerate(zip(local.shape, local.stride(), strict=True)):
                if len(address) and gradient.size(dim) > 1:
                    coordinate = (address // max(stride, 1)) % size
                    position += indices(dim)[coordinate] * math.prod(gradient.shape[dim + 1 :])
            return position

        return positions

    def first_position(self, shard: Shard) -> int | None:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.first_position`."""
        gradient = shard.parameter.grad
        if gradient is None:
            return 0
        if not _local(gradient).is_contiguous():
            return None
        if not isinstance(gradient, DTensor) or not gradient.dim():
            return 0
        # Calculated, since a look at a tensor would wait for its device. DTensor shards as
        # torch.chunk does, one dimension of the mesh after the other.
        first, rows = 0, gradient.size(0)
        mesh, ranks = gradient.device_mesh, gradient.device_mesh.get_coordinate() or ()
        for placement, size, rank in zip(gradient.placements, mesh.shape, ranks, strict=True):
            if placement.is_replicate():
                continue
            if type(placement) is not DTensorShard or placement.dim % gradient.dim() != 0:
                return None
            chunk = -(-rows // size)
            start = min(chunk * rank, rows)
            first, rows = first + start, min(chunk, rows - start)
        return first * math.prod(gradient.shape[1:])

    def local_gradient(self, parameter: Tensor) -> Tensor | None:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.local_gradient`."""
        return None if parameter.grad is None else _local(parameter.grad)

    def local_weight(self, parameter: Tensor) -> Tensor:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.local_weight`."""
        return _local(parameter.detach())

    def stepped_together(self, parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.stepped_together`."""
        return [list(parameters)]

    def on_step(self, begin_step: Callable[[], Step], holds: bool) -> RemovableHandle:
        """See :func:`~axolotl_gmt.gradients.optimizer_step.hook_steps`."""
        return hook_steps(self.optimizer, self._stepped, begin_step, holds)


def _without(name: str) -> str:
    return f"Or leave the parameter out with exclude: ['{re.escape(name)}']."


def _sharded_over(tensor: DTensor) -> ProcessGroups:
    mesh = tensor.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def _gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype that ``parameter``'s gradient has on every rank where there is one."""
    dtype: torch.dtype | None = getattr(parameter, "grad_dtype", None)  # New in torch 2.9.
    return dtype or parameter.dtype


def _check_reduced(name: str, gradient: DTensor) -> None:
    if any(placement.is_partial() for placement in gradient.placements):
        raise TypeError(
            f"The gradient of {name} is not yet summed over ranks (placements "
            f"{gradient.placements}). Redistribute it before the optimizer's step."
        )


def _distribution(tensor: Tensor) -> tuple[DeviceMesh | None, tuple[Placement, ...]]:
    """The mesh of a DTensor, and its placements over several ranks; None and () in one process."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
        return None, ()
    sizes = tensor.device_mesh.shape
    placements = zip(tensor.placements, sizes, strict=True)
    return tensor.device_mesh, tuple(placement for placement, size in placements if size > 1)


def _check_like_parameter(name: str, parameter: Tensor, gradient: Tensor) -> None:
    """Refuse a gradient laid out otherwise than its parameter, by which a rank without one goes."""
    mesh, placements = _distribution(gradient)
    expected_mesh, expected_placements = _distribution(parameter)
    if mesh is None and expected_mesh is None:
        return
    cast = "Set the parameter's grad_dtype, or cast the gradient"
    for what, got, expected, fix in (
        ("mesh", mesh, expected_mesh, "Redistribute the gradient"),
        ("placements", placements, expected_placements, "Redistribute the gradient"),
        ("dtype", gradient.dtype, _gradient_dtype(parameter), cast),
    ):
        if got != expected:
            raise TypeError(
                f"The gradient of {name} has another {what} than its parameter: {got}, not "
                f"{expected}. {fix} before the optimizer's step."
            )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_indices(tensor: Tensor, dim: int) -> Tensor:
    """The indices along ``dim`` of the whole tensor in this process: int64 ``(local size,)``.

    A vector of all indices is sharded over the mesh as the tensor is, which sends nothing and holds
    for every kind of placement.
    """
    shape = [1] * tensor.dim()
    shape[dim] = tensor.size(dim)
    indices = torch.arange(tensor.size(dim), device=_local(tensor).device).view(shape)
    if not isinstance(tensor, DTensor):
        return indices.flatten()
    mesh = tensor.device_mesh
    placements = [
        placement
        if not placement.is_replicate() and placement.dim % tensor.dim() == dim  # type: ignore[attr-defined]
        else Replicate()
        for placement in tensor.placements
    ]
    return distribute_tensor(indices, mesh, placements, src_data_rank=None).to_local().flatten()


def _local_entries(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Flat view of the local part of ``gradient``, made dense first if its layout is not."""
    local = _local(gradient)
    entries = None if local.is_neg() else _flat_view(local)
    if entries is not None:
        return entries
    # Expanded, strided or lazily negated gradients cannot be edited entry by entry where they are.
    local = local.contiguous().resolve_neg()
    parameter.grad = (
        DTensor.from_local(
            local,
            gradient.device_mesh,
            gradient.placements,
            run_check=False,
            shape=gradient.shape,
            stride=gradient.stride(),
        )
        if isinstance(gradient, DTensor)
        else local
    )
    return local.view(-1)


def _flat_view(tensor: Tensor) -> Tensor | None:
    """All entries of ``tensor`` in memory order without a copy, or None if they are not dense."""
    dense = tensor if tensor.is_contiguous() else tensor.permute(_memory_order(tensor))
    return dense.view(-1) if dense.is_contiguous() else None


def _memory_order(tensor: Tensor) -> list[int]:
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
