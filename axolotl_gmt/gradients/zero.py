"""The gradients of DeepSpeed ZeRO: each in a slice of a flat partition.

ZeRO steps its inner optimizer once for each parameter group (stages 1 and 2) or sub-group (stage
3), and makes each group's fp32 gradient only just before, so no hook on the inner optimizer sees
the whole gradient. DeepSpeed has no hook between the gradient norm and the first of these steps,
but calls its own ``unscale_and_clip_grads`` for each group there. That method is replaced on the
one optimizer instance: its first call of a step masks the gradients of all groups, before they
are unscaled and clipped (by one common factor, which keeps their order).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from axolotl_gmt.gradients.shard import Handles, ProcessGroups, Shard, Step, distinct_groups

# What is read of DeepSpeed's optimizers, none of it public.
_READ = {
    "DeepSpeedZeroOptimizer": (
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "real_dp_process_group",
        "gradient_accumulation_dtype",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "grad_position",
        "averaged_gradients",
    ),
}


class ZeroGradients:
    """The gradients that a ZeRO optimizer (stage 1, 2 or 3) steps with.

    Args:
        optimizer: DeepSpeed's ``DeepSpeedZeroOptimizer`` or ``DeepSpeedZeroOptimizer_Stage3``.
        names: The names of each parameter of the model.

    Raises:
        ValueError: If this is another optimizer of DeepSpeed's, or a version that keeps its
            gradients elsewhere.
    """

    def __init__(self, optimizer: Any, names: Mapping[Tensor, Sequence[str]]) -> None:
        self.optimizer = optimizer
        self._names = names
        # Not isinstance: what derives from these (ZenFlow, SuperOffload) steps elsewhere.
        kind = type(optimizer).__name__
        read = ("unscale_and_clip_grads", *_READ.get(kind, ("no known kind",)))
        if not all(hasattr(optimizer, name) for name in read):
            raise ValueError(
                f"GMT cannot mask under DeepSpeed's {kind}. Use ZeRO stage 1, 2 or 3 with its "
                "default data_types and a DeepSpeed that GMT is tested with (0.19)."
            )
        self._stage_3 = kind.endswith("Stage3")
        inner = type(optimizer.optimizer).__name__
        if "muon" in inner.lower():
            raise ValueError(
                f"GMT cannot mask under DeepSpeed with {inner}, which DeepSpeed applies to the "
                "gradients before their norm is taken. Use another optimizer, such as AdamW."
            )
        if getattr(optimizer, "round_robin_gradients", False):
            raise ValueError(
                "GMT cannot find a parameter's gradient with round_robin_gradients: true of the "
                "DeepSpeed config. Set false."
            )
        if getattr(optimizer, "swap_optimizer", False):
            raise ValueError(
                "GMT cannot mask under DeepSpeed with the optimizer offloaded to NVMe, since the "
                "gradients are never in memory together. Set offload_optimizer.device: cpu."
            )
        groups = optimizer.fp16_groups if self._stage_3 else optimizer.bit16_groups
        self._place = {
            parameter: (index, position)
            for index, group in enumerate(groups)
            for position, parameter in enumerate(group)
        }
        if any(_expert_ranks(parameter) > 1 for parameter in self._place):
            raise ValueError(
                "GMT cannot see the experts of other ranks under DeepSpeed's MoE with ep_size "
                "above 1, so layer and global would count each rank's own. Set ep_size=1, or "
                "shard the experts with FSDP2 or ZeRO-3."
            )
        if any(getattr(parameter, "tensor_model_parallel", False) for parameter in self._place):
            raise ValueError(
                "GMT cannot see the other shards of a tensor under DeepSpeed's tensor parallel. "
                "Use ZeRO-3 or FSDP2 alone, or tensor parallel without DeepSpeed."
            )

    def parameters(self) -> Iterator[tuple[Sequence[str], Tensor]]:
        """All names, and the tensor, of each parameter that ZeRO steps."""
        for parameter in self._place:
            yield self._names[parameter], parameter

    def process_groups(self) -> list[dist.ProcessGroup]:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.process_groups`."""
        return distinct_groups(map(self._ranks, self._place))

    def _ranks(self, parameter: Any) -> ProcessGroups:
        """Who holds the shards of ``parameter``'s gradient."""
        if self._stage_3:
            return _more_than_one(parameter.ds_process_group)
        index, _ = self._place[parameter]
        return _more_than_one(self.optimizer.real_dp_process_group[index])

    def layout(self, parameter: Any) -> str:
        """How ``parameter`` is sharded: its group, and its place there."""
        index, position = self._place[parameter]
        return f"parameter {position} of group {index}"

    def shard(self, name: str, parameter: Any) -> Shard:
        """The slice of this process's partitions that holds ``parameter``'s gradient.

        Padding, which ZeRO adds to make partitions equal, is no part of it.
        """
        entries = (self._stage_3_entries if self._stage_3 else self._stage_1_and_2_entries)(
            parameter
        )
        return Shard(name, parameter, entries, self._ranks(parameter))

    def _held(self, parameter: Any) -> int:
        """How many entries of ``parameter`` are in this process."""
        if self._stage_3:
            _, _, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            rank = dist.get_rank(parameter.ds_process_group)
            return int(max(0, min(padded, parameter.ds_numel - rank * padded)))
        mapping = parameter._hp_mapping
        return 0 if mapping is None else int(mapping.get_hp_fragment_address().numel)

    def weight(self, shard: Shard) -> Tensor:
        """The fp32 weights, which ZeRO steps, whose gradients are ``shard.entries``."""
        return self.local_weight(shard.parameter).to(shard.entries.device)

    def local_gradient(self, parameter: Any) -> Tensor:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.local_gradient`."""
        return self.shard("", parameter).entries

    def local_weight(self, parameter: Any) -> Tensor:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.local_weight`; in fp32."""
        partition, start = self._place_in_partition(parameter)
        return partition.detach().narrow(0, start, self._held(parameter))

    def stepped_together(self, parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        """See :meth:`~axolotl_gmt.gradients.shard.StepGradients.stepped_together`."""
        groups: dict[int, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            groups[self._place[parameter][0]].append(parameter)
        return list(groups.values())

    def positions(self, shard: Shard) -> Callable[[int, int], Tensor]:
        """A function that tells where ``shard.entries[start:stop]`` lie in the whole parameter."""
        first, device = self._first_position(shard.parameter), shard.entries.device
        return lambda start, stop: torch.arange(first + start, first + stop, device=device)

    def _place_in_partition(self, parameter: Any) -> tuple[Tensor, int]:
        """The fp32 partition that holds the local part of ``parameter``, and where it begins."""
        zero = self.optimizer
        index, _ = self._place[parameter]
        if self._stage_3:
            _, start, _ = zero.grad_position[zero.get_param_id(parameter)]
            return zero.fp32_partitioned_groups_flat[index], start
        mapping = parameter._hp_mapping
        start = 0 if mapping is None else mapping.get_hp_fragment_address().start
        return zero.single_partition_of_fp32_groups[index], start

    def _first_position(self, parameter: Any) -> int:
        """Where in ``parameter`` its local part begins."""
        if self._stage_3:
            _, _, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            return int(padded * dist.get_rank(parameter.ds_process_group))
        mapping = parameter._hp_mapping
        return 0 if mapping is None else int(mapping.lp_fragment_address.start)

    def _stage_1_and_2_entries(self, parameter: Any) -> Any:
        index, _ = self._place[parameter]
        partition = self.optimizer.single_partition_of_fp32_groups[index]
        mapping = parameter._hp_mapping
        if partition.grad is not None:  # This group is being stepped.
            if mapping is None:
                return partition.grad[:0]
            address = mapping.get_hp_fragment_address()
            return partition.grad.narrow(0, address.start, address.numel)
        if mapping is None:  # Empty, of the dtype that it has on the ranks which hold it.
            dtype = self.optimizer.gradient_accumulation_dtype
            return partition.new_empty(0, dtype=dtype)
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)

    def _stage_3_entries(self, parameter: Any) -> Any:
        zero = self.optimizer
        index, position = self._place[parameter]
        _, start, _ = zero.grad_position[zero.get_param_id(parameter)]
        held = self._held(parameter)
        partition = zero.fp32_partitioned_groups_flat[index]
        if partition.grad is not None:
            return partition.grad.narrow(0, start, held)
        return zero.averaged_gradients[index][position].view(-1)[:held]

    def first_position(self, shard: Shard) -> int:
        """The first of :meth:`positions`, of which each next one is one more."""
        return self._first_position(shard.parameter)

    def on_step(self, begin_step: Callable[[], Step], holds: bool) -> RemovableHandle:
        """Mask once a step, when the norm is known and nothing is unscaled yet.

        Weights are held through each of the steps of the inner optimizer, one group at a time.
        """
        step: Step | None = None

        def begin() -> None:
            nonlocal step
            step = begin_step()
            step.mask()

        hooks = _hooks_of(self.optimizer, self._stage_3)
        handle = RemovableHandle(hooks)
        hooks[handle.id] = begin
        if not holds:
            return handle

        def hold(inner: Any, *_: object) -> None:
            assert step is not None
            partitions = {id(part) for group in inner.param_groups for part in group["params"]}
            step.hold(p for p in self._place if id(self._place_in_partition(p)[0]) in partitions)

        def release(*_: object) -> None:
            assert step is not None
            step.release()

        inner = self.optimizer.optimizer
        return Handles(
            handle, inner.register_step_pre_hook(hold), inner.register_step_post_hook(release)
        )


def _hooks_of(optimizer: Any, stage_3: bool) -> OrderedDict[int, Callable[[], None]]:
    """What a replaced ``unscale_and_clip_grads`` calls first in each step; replaces it once."""
    original = optimizer.unscale_and_clip_grads
    if hasattr(original, "gmt_hooks"):
        found: OrderedDict[int, Callable[[], None]] = original.gmt_hooks
        return found
    hooks: OrderedDict[int, Callable[[], None]] = OrderedDict()

    def is_first_group(group: Any) -> bool:
        if stage_3:
            return bool(group == 0)
        return group[0] is optimizer.single_partition_of_fp32_groups[0].grad

    def unscale_and_clip_grads(group: Any, *args: Any, **kwargs: Any) -> None:
        if is_first_group(group):
            for hook in hooks.values():
                hook()
        original(group, *args, **kwargs)

    unscale_and_clip_grads.gmt_hooks = hooks  # type: ignore[attr-defined]
    optimizer.unscale_and_clip_grads = unscale_and_clip_grads
    return hooks


def _expert_ranks(parameter: Any) -> int:
    """Over how many ranks DeepSpeed's MoE spreads the experts that ``parameter`` is one of."""
    if getattr(parameter, "allreduce", True):  # Not an expert's, as DeepSpeed marks these.
        return 1
    from deepspeed.utils import groups

    return dist.get_world_size(groups._get_expert_parallel_group(parameter.group_name))


def _more_than_one(group: dist.ProcessGroup) -> ProcessGroups:
    return (group,) if dist.get_world_size(group) > 1 else ()
