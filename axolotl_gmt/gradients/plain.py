"""Where a gradient lives: the entries of it that are in this process, and who holds the rest.

This module and :mod:`axolotl_gmt.gradients.zero` know how training is distributed.
They hand out flat views of local entries and sum over ranks; they know nothing of masks,
thresholds or trainers.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as DTensorShard
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

# What wrappers put into parameter names: DDP and DeepSpeed, torch.compile, activation
# checkpointing. Patterns and layer names must not depend on how a model is wrapped.
_WRAPPERS = re.compile(r"^module\.|(_orig_mod|_checkpoint_wrapped_module)\.")

# The process groups over which a tensor is sharded, one for each such dimension of its device
# mesh; empty for a tensor that is whole on every rank.
Ranks = tuple[dist.ProcessGroup, ...]


def plain_name(name: str) -> str:
    """``name`` of a parameter as it is in the unwrapped model.

    Raises:
        ValueError: For a parameter of FSDP1.
    """
    if "_fsdp_wrapped_module." in name or name.endswith("_flat_param"):
        raise ValueError(
            f"{name} belongs to FSDP1, whose flat parameters hide which entries are whose, so GMT "
            "cannot mask them exactly. Use FSDP2 (fsdp_version: 2)."
        )
    return _WRAPPERS.sub("", name)


def shape(parameter: Tensor) -> torch.Size:
    """Shape of a whole parameter, also where ZeRO-3 leaves an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class Shard:
    """The entries of one parameter's gradient that live in this process.

    Attributes:
        name: Parameter name in the unwrapped model.
        parameter: The parameter, as the optimizer has it.
        entries: Flat view of the gradient's memory, shape ``(local entries,)``; writing to it
            writes to the gradient. The order of entries is that of memory. Empty if there is no
            gradient here, so that all ranks hold the same list of shards.
        ranks: Who holds the other entries.
    """

    name: str
    parameter: Tensor
    entries: Tensor
    ranks: Ranks


class StepGradients:
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
            TypeError: For a gradient that cannot be masked exactly: sparse, not yet reduced, or
                not bf16, fp16, fp32 or fp64.
        """
        gradient = parameter.grad
        reference = parameter if gradient is None else gradient
        without = f"Or leave the parameter out with exclude: ['{re.escape(name)}']."
        if reference.layout != torch.strided:
            raise TypeError(
                f"The gradient of {name} is sparse ({reference.layout}), which GMT cannot mask. "
                "Create the layer without sparse gradients (nn.Embedding(..., sparse=False)). "
                f"{without}"
            )
        if not (reference.is_floating_point() and reference.element_size() > 1):
            raise TypeError(
                f"The gradient of {name} is {reference.dtype}; GMT masks bfloat16, float16, "
                f"float32 and float64. {without}"
            )
        if reference.device.type == "mps":
            raise TypeError(f"{name} lies on mps, which has no float64. Train on cuda or the CPU.")
        ranks = self.ranks(parameter)
        if ranks and gradient is not None:
            _check_like_parameter(name, parameter, gradient)
        elif isinstance(reference, DTensor):
            _check_reduced(name, reference)
        if gradient is None:  # Elsewhere there may be one, of the dtype that is known everywhere.
            empty = _local(reference).new_empty(0, dtype=_gradient_dtype(parameter))
            return Shard(name, parameter, empty, ranks)
        return Shard(name, parameter, _local_entries(parameter, gradient), ranks)

    def groups(self) -> list[dist.ProcessGroup]:
        """Each process group that holds shards, in an order that is the same on all ranks.

        These are the groups of all parameters, also of those that settings leave unmasked, since
        the settings themselves may differ between ranks.
        """
        groups = {group for parameter in self._stepped() for group in self.ranks(parameter)}
        by_name = sorted(groups, key=lambda group: group.group_name)
        one_each = {tuple(dist.get_process_group_ranks(group)): group for group in by_name}
        return [one_each[ranks] for ranks in sorted(one_each)]

    def _stepped(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def ranks(self, parameter: Tensor) -> Ranks:
        """Who holds the shards of ``parameter``'s gradient, whether or not there is one now."""
        return _sharded_over(parameter) if isinstance(parameter, DTensor) else ()

    def layout(self, parameter: Tensor) -> str:
        """How ``parameter`` is sharded, in words that are equal on all ranks that hold it."""
        if not isinstance(parameter, DTensor):
            return "whole"
        return f"{parameter.placements} on {tuple(parameter.device_mesh.shape)}"

    def weight(self, shard: Shard) -> Tensor:
        """The weights whose gradients are ``shard.entries``, in the same order: ``(entries,)``."""
        gradient = shard.parameter.grad
        if gradient is None:
            return shard.entries.to(shard.parameter.dtype)
        placements, of_weight = (
            getattr(tensor, "placements", ()) for tensor in (gradient, shard.parameter)
        )
        if placements != of_weight:
            raise TypeError(
                f"The gradient of {shard.name} is placed as {placements} and its weight as "
                f"{of_weight}, so they do not line up. Set a criterion that needs no weights, such "
                "as gradient."
            )
        weight = _local(shard.parameter.detach())
        return weight.permute(_memory_order(_local(gradient))).reshape(-1).contiguous()

    def positions(self, shard: Shard) -> Callable[[int, int], Tensor]:
        """A function that tells where ``shard.entries[start:stop]`` lie in the whole parameter.

        It returns indices into the flattened parameter: int64 ``(stop - start,)`` on the device of
        the entries.
        """
        gradient = shard.parameter.grad
        device = shard.entries.device
        whole = not isinstance(gradient, DTensor)
        if gradient is None or (whole and gradient.is_contiguous()):
            return lambda start, stop: torch.arange(start, stop, device=device)
        local = _local(gradient)
        here = cache(lambda dim: _indices_here(gradient, dim))

        def positions(start: int, stop: int) -> Tensor:
            flat = torch.arange(start, stop, device=device)
            found = torch.zeros_like(flat)
            # An entry's place in memory gives its local coordinates, and each coordinate, by a
            # look-up of which rows are here, that in the whole parameter.
            for dim, (size, stride) in enumerate(zip(local.shape, local.stride(), strict=True)):
                if len(flat) and gradient.size(dim) > 1:
                    coordinate = (flat // max(stride, 1)) % size
                    found += here(dim)[coordinate] * math.prod(gradient.shape[dim + 1 :])
            return found

        return positions

    def first_position(self, shard: Shard) -> int | None:
        """The first of :meth:`positions` if each next one is one more, else None."""
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
        mesh, here = gradient.device_mesh, gradient.device_mesh.get_coordinate()
        for placement, size, rank in zip(gradient.placements, mesh.shape, here or (), strict=True):
            if placement.is_replicate():
                continue
            if type(placement) is not DTensorShard or placement.dim % gradient.dim() != 0:
                return None
            chunk = -(-rows // size)
            start = min(chunk * rank, rows)
            first, rows = first + start, min(chunk, rows - start)
        return first * math.prod(gradient.shape[1:])

    def before_step(self, begin_step: Callable[[], Callable[[], None]]) -> RemovableHandle:
        """Call ``begin_step`` once a step, and what it returns when the gradients are complete.

        That is at once, or after each call of a closure, which makes them. A step within a step,
        as ``super().step()`` is where torch has hooked the parent's class too, begins none: what
        has been masked stays as it is, and gradients that are new are masked as part of the step.
        """
        step = _Step(self._stepped)

        def hook(
            optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            is_outermost = _steps_under_way(optimizer) <= 1
            if is_outermost:
                step.begin(torch.compiler.disable(begin_step()))
            _, *positional = args
            closure = positional[0] if positional else kwargs.get("closure")
            if closure is None:
                if is_outermost:  # Also without a gradient here: other ranks may have some.
                    step.mask()
                else:
                    step.mask_new_gradients()
                return None

            def closure_then_mask() -> Any:  # A closure makes the gradients, so masking follows it.
                masks = step.masks
                with torch.enable_grad():
                    loss = closure()
                if step.masks == masks:  # Else it is one that an outer step has wrapped.
                    step.mask()
                return loss

            if positional:
                return (optimizer, closure_then_mask, *positional[1:]), kwargs
            return args, {**kwargs, "closure": closure_then_mask}

        # A compiled step must not trace the masker: its Python would be compiled anew at each step.
        handle: RemovableHandle = self.optimizer.register_step_pre_hook(
            torch.compiler.disable(hook)
        )
        return handle


class _Step:
    """The optimizer step under way, which may hold others.

    Args:
        parameters: Gives what the optimizer steps.
    """

    def __init__(self, parameters: Callable[[], Iterator[Tensor]]) -> None:
        self._parameters = parameters
        self._mask: Callable[[], None] | None = None
        self._masked: list[ReferenceType[Tensor]] = []
        self.masks = 0

    def begin(self, mask: Callable[[], None]) -> None:
        """Mask by ``mask`` from now on; nothing is masked yet."""
        self._mask = mask
        self._masked = []

    def mask(self) -> None:
        """Mask the gradients as they are."""
        assert self._mask is not None
        self._mask()
        self.masks += 1
        self._masked = [ref(gradient) for gradient in self._gradients()]

    def mask_new_gradients(self) -> None:
        """Mask, unless all gradients are those that have been masked."""
        masked = {id(reference()) for reference in self._masked}
        if self._mask is not None and any(id(new) not in masked for new in self._gradients()):
            self.mask()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters() if p.grad is not None]


def _steps_under_way(optimizer: Optimizer) -> int:
    """How many calls of ``optimizer.step()`` that torch has hooked stand on this thread's stack.

    Asked of the stack and not of a counter, which an error in a step would leave wrong.
    """
    steps = 0
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == _HOOKED_STEP.co_name and code.co_filename == _HOOKED_STEP.co_filename:
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps


# The code around every step() in which torch calls the hooks; it calls its optimizer `self`.
_HOOKED_STEP = Optimizer.profile_hook_step(lambda: None).__code__


def step_gradients(optimizer: object, names: Mapping[Tensor, Sequence[str]]) -> StepGradients:
    """The gradients of ``optimizer``, which may be wrapped by Accelerate or made by DeepSpeed.

    Raises:
        ValueError: For a way to train in which GMT cannot be exact, with what to use instead.
        TypeError: For what is no torch optimizer.
    """
    given = optimizer
    while not (made_by_deepspeed := type(optimizer).__module__.startswith("deepspeed.")):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    if made_by_deepspeed:
        from axolotl_gmt.gradients.zero import ZeroGradients

        return ZeroGradients(optimizer, names)
    if not isinstance(optimizer, Optimizer):
        attributes = getattr(optimizer, "__dict__", {})
        inside = [name for name, value in attributes.items() if isinstance(value, Optimizer)]
        fix = (
            f"Attach to its optimizer, which is its attribute {inside[0]}."
            if inside
            else "Attach to the torch optimizer whose step() updates the model, or to Accelerate's "
            "or DeepSpeed's around one."
        )
        raise TypeError(f"{type(given).__name__} is no torch optimizer, so it has no hook. {fix}")
    return StepGradients(optimizer, names)


def _sharded_over(tensor: DTensor) -> Ranks:
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


def _check_like_parameter(name: str, parameter: Tensor, gradient: Tensor) -> None:
    """Refuse what a rank without this gradient could not know, and would not count with."""
    if isinstance(gradient, DTensor):
        _check_reduced(name, gradient)
    for what, got, expected in (
        ("mesh", getattr(gradient, "device_mesh", None), getattr(parameter, "device_mesh", None)),
        (
            "placements",
            getattr(gradient, "placements", None),
            getattr(parameter, "placements", None),
        ),
        ("dtype", gradient.dtype, _gradient_dtype(parameter)),
    ):
        if got != expected:
            fix = (
                "Set the parameter's grad_dtype, or cast the gradient"
                if what == "dtype"
                else "Redistribute the gradient"
            )
            raise TypeError(
                f"The gradient of {name} has another {what} than its sharded parameter: {got}, not "
                f"{expected}. {fix} before the optimizer's step."
            )


def agree(
    groups: Sequence[dist.ProcessGroup], facts: Mapping[str, str], error: Exception | None
) -> None:
    """Return on all ranks of ``groups`` if their facts are the same and none has an error.

    Ranks that disagree would each wait for collectives that the others never start, or add up
    counts of different tensors.

    Args:
        groups: The groups that this rank is in, in an order that all ranks share.
        facts: What must be the same, by what it is called in a message.
        error: What was raised in this process.

    Raises:
        Exception: ``error``, if there is one.
        RuntimeError: Quoting another rank's error.
        ValueError: Naming a rank whose facts differ, and the first that does.
    """
    problem: ValueError | RuntimeError | None = None
    if error is not None and groups:
        problem = RuntimeError(
            "Another rank cannot mask its gradients. "
            f"On rank {dist.get_rank()}: {type(error).__name__}: {error}"
        )
    # A mesh of several dimensions has a group for each. Going there and back carries what one
    # rank knows to all of the mesh, also to those that share no group with it.
    for group in (*groups, *reversed(groups)):
        problem = _problem_in(group, facts, problem)
    if error is not None:
        raise error
    if problem is not None:
        raise problem


def _problem_in(
    group: dist.ProcessGroup, facts: Mapping[str, str], problem: ValueError | RuntimeError | None
) -> ValueError | RuntimeError | None:
    """The problem that a rank of ``group`` knows of, or the difference between its ranks."""
    text = repr(sorted(facts.items())).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())
    # The largest digest is the smallest too if all are the same, so one small all-reduce is all
    # that ranks without a problem need.
    largest = torch.tensor([problem is not None, digest, -digest], device="cpu")
    _all_reduce(largest, group, dist.ReduceOp.MAX)
    has_problem, highest, negative_of_lowest = largest.tolist()
    if not has_problem and highest == -negative_of_lowest:
        return None
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (problem, dict(facts)), group=group)
    for known, _ in told:
        if isinstance(known, ValueError | RuntimeError):
            return known
    ranks = dist.get_process_group_ranks(group)
    return _difference(dict(zip(ranks, (of_rank for _, of_rank in told), strict=True)))


def _difference(facts: Mapping[int, Mapping[str, str]]) -> ValueError:
    """What to raise if the facts of ranks are not all the same."""
    first, *others = facts
    rank = next(other for other in others if facts[other] != facts[first])
    keys = (*facts[first], *facts[rank])
    what = next(key for key in keys if facts[first].get(key) != facts[rank].get(key))
    values = [facts[of].get(what, "absent") for of in (first, rank)]
    return ValueError(
        f"Ranks {first} and {rank} do not train alike, so that they would choose different masks: "
        f"{what} is {values[0]} on rank {first} and {values[1]} on rank {rank}. Give all ranks the "
        "same model and settings."
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _indices_here(tensor: Tensor, dim: int) -> Tensor:
    """Which indices along ``dim`` of the whole tensor are in this process: int64 ``(local size,)``.

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
    dense = tensor.permute(_memory_order(tensor))
    return dense.view(-1) if dense.is_contiguous() else None


def _memory_order(tensor: Tensor) -> list[int]:
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])


class Rows:
    """Rows of counts: one for each pair of a group of entries and the ranks that it is spread over.

    Entries that are spread over the same ranks are counted together and summed over these ranks
    once; a group whose tensors lie differently (sharded and not, on different meshes) has several
    rows. All ranks build the same rows in the same order.

    Args:
        groups: The shards of each group.
    """

    def __init__(self, groups: Sequence[Sequence[Shard]]) -> None:
        self._group: list[int] = []
        self._ranks: list[Ranks] = []
        self.of_shard: list[int] = []
        for index, group in enumerate(groups):
            found: dict[Ranks, int] = {}
            for shard in group:
                if shard.ranks not in found:
                    found[shard.ranks] = len(self._group)
                    self._group.append(index)
                    self._ranks.append(shard.ranks)
                self.of_shard.append(found[shard.ranks])
        self._groups = len(groups)

    def __len__(self) -> int:
        return len(self._group)

    def sum(self, counts: Tensor) -> Tensor:
        """Sum counts ``(rows, ...)`` over ranks and rows to ``(groups, ...)``."""
        for ranks in dict.fromkeys(self._ranks):
            rows = [row for row, held_by in enumerate(self._ranks) if held_by == ranks]
            if len(rows) == len(self):
                sum_over_ranks(counts, ranks)
            elif ranks:
                part = torch.stack([counts[row] for row in rows])
                sum_over_ranks(part, ranks)
                for row, total in zip(rows, part, strict=True):
                    counts[row] = total
        if self._one_row_a_group():
            return counts
        totals = counts.new_zeros(self._groups, *counts.shape[1:])
        for row, group in enumerate(self._group):
            totals[group] += counts[row]
        return totals

    def are_shared(self) -> bool:
        """Whether a row is spread over ranks."""
        return any(self._ranks)

    def spread(self, values: Tensor) -> Tensor:
        """Values of groups ``(groups, ...)`` as values of their rows ``(rows, ...)``."""
        if self._one_row_a_group():
            return values
        return torch.stack([values[group] for group in self._group])

    def _one_row_a_group(self) -> bool:
        return self._group == list(range(self._groups))


def sum_over_ranks(values: Tensor, ranks: Ranks) -> None:
    """Sum contiguous ``values``, in place, over all processes that hold a shard."""
    for group in ranks:
        _all_reduce(values, group, dist.ReduceOp.SUM)


def _all_reduce(values: Tensor, group: dist.ProcessGroup, operation: Any) -> None:
    if values.is_cpu and "cpu:" not in dist.get_backend_config(group):
        # Gradients that are offloaded to the CPU while the group has NCCL alone.
        on_device = values.to(torch.accelerator.current_accelerator())
        dist.all_reduce(on_device, op=operation, group=group)
        values.copy_(on_device)
    else:
        dist.all_reduce(values, op=operation, group=group)
