"""A shard, the entries of a gradient in this process, and what a source of shards owes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

# What wrappers put into parameter names: DDP and DeepSpeed, torch.compile, activation
# checkpointing. Patterns and layer names must not depend on how a model is wrapped.
_WRAPPERS = re.compile(r"^module\.|(_orig_mod|_checkpoint_wrapped_module)\.")

ProcessGroups = tuple[dist.ProcessGroup, ...]
"""Those over which a tensor is sharded, one for each such dimension of its device mesh; none if it
is whole on every rank."""


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
        ranks: The ranks that share the entries of the parameter with this one.
        is_absent: Whether there is no gradient here.
    """

    name: str
    parameter: Tensor
    entries: Tensor
    ranks: ProcessGroups
    is_absent: bool = False


class Step(Protocol):
    """One step of an optimizer; a source of gradients says how far it is."""

    def mask(self) -> None:
        """The gradients are complete. Called again if a closure makes them anew."""

    def hold(self, parameters: Iterable[Tensor]) -> None:
        """The weights of these parameters are about to be stepped."""

    def release(self) -> None:
        """They have been stepped."""


class StepGradients(Protocol):
    """The gradients that one optimizer steps with, and what their source owes.

    Attributes:
        optimizer: The optimizer whose steps are hooked, without Accelerate's wrappers.
    """

    optimizer: Any

    def parameters(self) -> Iterator[tuple[Sequence[str], Tensor]]:
        """All names, and the tensor, of each parameter that the optimizer steps.

        Raises:
            ValueError: If the optimizer steps a tensor that has no name.
        """

    def shard(self, name: str, parameter: Tensor) -> Shard:
        """The shard of ``parameter``'s gradient in this process.

        Raises:
            TypeError: For a gradient that cannot be masked exactly.
        """

    def process_groups(self) -> list[dist.ProcessGroup]:
        """Each process group that holds shards, in an order that is the same on all ranks.

        These are the groups of all parameters, also of those that settings leave unmasked, since
        the settings themselves may differ between ranks.
        """

    def layout(self, parameter: Tensor) -> str:
        """How ``parameter`` is sharded, in words that are equal on all ranks that hold it."""

    def weight(self, shard: Shard) -> Tensor:
        """The weights whose gradients are ``shard.entries``, in the same order: ``(entries,)``."""

    def positions(self, shard: Shard) -> Callable[[int, int], Tensor]:
        """A function that tells where ``shard.entries[start:stop]`` lie in the whole parameter.

        It returns indices into the flattened parameter: int64 ``(stop - start,)`` on the device of
        the entries.
        """

    def first_position(self, shard: Shard) -> int | None:
        """The first of :meth:`positions` if each next one is one more, else None."""

    def local_gradient(self, parameter: Tensor) -> Tensor | None:
        """The part of ``parameter``'s gradient in this process; None if there is no gradient."""

    def local_weight(self, parameter: Tensor) -> Tensor:
        """The part of ``parameter`` that the optimizer steps in this process.

        Shaped as :meth:`local_gradient`. Writing to it writes to the weights, wherever they are.
        """

    def stepped_together(self, parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        """``parameters`` in lists of those that are stepped at once."""

    def on_step(self, begin_step: Callable[[], Step], holds: bool) -> RemovableHandle:
        """Call ``begin_step`` once a step, and tell what it returns how far the step is.

        Args:
            begin_step: Called when a step begins.
            holds: Whether to tell of more than :meth:`Step.mask`.
        """


class Handles(RemovableHandle):
    """Handles of several hooks as one, which looks like the first.

    Args:
        first: Of the hook that masks.
        others: Those that go with it.
    """

    def __init__(self, first: RemovableHandle, *others: RemovableHandle) -> None:
        self.__setstate__(first.__getstate__())
        self._others = others

    def remove(self) -> None:
        """Remove all hooks."""
        super().remove()
        for handle in self._others:
            handle.remove()


def distinct_groups(ranks: Iterable[ProcessGroups]) -> list[dist.ProcessGroup]:
    """Each process group of ``ranks`` once, in an order that is the same on all ranks."""
    groups = {group for of_parameter in ranks for group in of_parameter}
    by_name = sorted(groups, key=lambda group: group.group_name)
    one_each = {tuple(dist.get_process_group_ranks(group)): group for group in by_name}
    return [one_each[members] for members in sorted(one_each)]


def sum_over_ranks(values: Tensor, ranks: ProcessGroups) -> None:
    """Sum contiguous ``values``, in place, over all processes that hold a shard."""
    for group in ranks:
        all_reduce(values, group, dist.ReduceOp.SUM)


def all_reduce(values: Tensor, group: dist.ProcessGroup, operation: Any) -> None:
    """Reduce contiguous ``values``, in place, over ``group``."""
    if values.is_cpu and "cpu:" not in dist.get_backend_config(group):
        # Gradients that are offloaded to the CPU while the group has NCCL alone.
        on_device = values.to(torch.accelerator.current_accelerator())
        dist.all_reduce(on_device, op=operation, group=group)
        values.copy_(on_device)
    else:
        dist.all_reduce(values, op=operation, group=group)
