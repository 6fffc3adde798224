"""One optimizer step of Gradient-Mask Tuning, start to end, and its statistics.

Source: Li et al., "Enhancing Large Language Model Performance with Gradient-Based Parameter
Selection", AAAI 2025 (arXiv 2406.15330). The optimizer stays the user's own: a hook masks the
gradients in place just before each of its steps.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from axolotl_gmt.config import GMTConfig, Granularity
from axolotl_gmt.shards import Shard, inner_optimizer, local_shard, plain_name
from axolotl_gmt.threshold import common_dtype, find_thresholds, mask_below_

# Groups whose thresholds are found together; bounds the memory of their histograms (16 MiB).
_GROUPS_AT_ONCE = 64

# The path to the first numbered module: model.layers.3 of model.layers.3.mlp.experts.5.w1.weight.
_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")


def group_name(parameter_name: str, granularity: Granularity) -> str:
    """The group in which the entries of a parameter compete for one threshold."""
    if granularity == "global":
        return "global"
    layer = _LAYER.match(parameter_name) if granularity == "layer" else None
    return layer.group() if layer else parameter_name


class GradientMasker:
    """Masks the gradients of named parameters before every step of an optimizer.

    Args:
        named_parameters: Names and parameters, such as ``model.named_parameters()``. A tensor that
            comes under several names (tied weights) is masked once; patterns may use any of them
            if they are all given (``remove_duplicate=False``).
        config: The settings; the defaults if None.

    Example:
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> masker = GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.5))
        >>> handle = masker.attach(optimizer)
        >>> model(torch.randn(4, 8)).sum().backward()
        >>> optimizer.step()
        >>> masker.statistics()["kept_fraction"]
        0.5
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        config: GMTConfig | None = None,
    ) -> None:
        self.config = config or GMTConfig()
        self._names: dict[Tensor, list[str]] = defaultdict(list)
        for name, parameter in named_parameters:
            self._names[parameter].append(plain_name(name))
        self._handles: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()
        self._entries = 0
        self._totals: list[Tensor] = []

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Mask gradients before every ``optimizer.step()`` until ``remove()`` of the handle.

        Args:
            optimizer: Any torch optimizer; of a wrapped one (Accelerate), the inner is hooked.

        Raises:
            ValueError: If the optimizer steps tensors that are not among the named parameters,
                if a pattern matches none of the parameters that it steps, if the patterns leave
                none to mask, or if this masker is already attached to the optimizer.
        """
        optimizer = inner_optimizer(optimizer)
        masked = self.masked_parameters(optimizer)
        self._check_patterns(optimizer)
        if not masked:
            raise ValueError(
                "include and exclude together leave no parameter to mask. Change the patterns."
            )
        handle = self._handles.get(optimizer)
        if handle is not None and handle.id in (handle.hooks_dict_ref() or ()):
            raise ValueError(
                "This masker is already attached to this optimizer. Remove the first handle."
            )
        self._handles[optimizer] = optimizer.register_step_pre_hook(self._before_step)
        return self._handles[optimizer]

    def masked_parameters(self, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
        """Name and tensor of each parameter of ``optimizer`` that is subject to masking.

        Raises:
            ValueError: If the optimizer steps a tensor that is not among the named parameters.
        """
        masked = []
        for parameter in _stepped(optimizer):
            names = self._names.get(parameter)
            if names is None:
                raise ValueError(
                    f"The optimizer steps a tensor of shape {tuple(parameter.shape)} that is not "
                    "among the named parameters, so it would be stepped unmasked. Give the masker "
                    "the named parameters of the model that the optimizer was made for."
                )
            if self._is_masked(names):
                masked.append((names[0], parameter))
        return masked

    @torch.no_grad()
    def mask_gradients(self, optimizer: Optimizer) -> None:
        """Mask, in place, the gradients that ``optimizer.step()`` would use now.

        Raises:
            TypeError: For a gradient that cannot be masked exactly, such as a sparse one.
        """
        shards = [
            shard
            for name, parameter in self.masked_parameters(optimizer)
            if (shard := local_shard(name, parameter)) is not None
        ]
        totals: dict[torch.device, Tensor] = {}
        for dtype, groups in self._batches(shards):
            entries = [[shard.entries for shard in group] for group in groups]
            thresholds = find_thresholds(entries, self.config.mask_ratio, dtype)
            for group, threshold in zip(groups, thresholds, strict=True):
                for shard in group:
                    device = shard.entries.device
                    if device not in totals:
                        totals[device] = torch.zeros(3, dtype=torch.float64, device=device)
                    mask_below_(shard.entries, dtype, threshold.to(device), totals[device])
        self._entries = sum(shard.entries.numel() for shard in shards)
        self._totals = list(totals.values())

    def statistics(self) -> dict[str, float]:
        """What the last step kept; empty before the first step. Reads from the device.

        Returns:
            ``kept_fraction``: non-zero entries that survived over all entries subject to masking.
            ``grad_norm_kept``: norm of the masked gradient over norm of the gradient, 1 if both
            are 0.
        """
        if not self._totals:
            return {}
        kept, before, after = torch.stack([total.cpu() for total in self._totals]).sum(0).tolist()
        return {
            "kept_fraction": kept / self._entries,
            "grad_norm_kept": 1.0 if before == 0 else math.sqrt(after / before),
        }

    def _is_masked(self, names: list[str]) -> bool:
        include, exclude = self.config.include, self.config.exclude
        included = include is None or _matches_any(include, names)
        return included and not (exclude is not None and _matches_any(exclude, names))

    def _check_patterns(self, optimizer: Optimizer) -> None:
        names = [name for parameter in _stepped(optimizer) for name in self._names[parameter]]
        for setting in ("include", "exclude"):
            for pattern in getattr(self.config, setting) or ():
                if not _matches_any([pattern], names):
                    raise ValueError(
                        f"{setting} (gmt_{setting} in YAML): the pattern {pattern!r} matches no "
                        f"trained parameter. There are {len(names)}, such as {names[0]} and "
                        f"{names[-1]}. Change the pattern or remove it."
                    )

    def _batches(self, shards: list[Shard]) -> Iterator[tuple[torch.dtype, list[list[Shard]]]]:
        """Groups of shards whose thresholds are found together, and their common dtype."""
        groups: dict[str, list[Shard]] = defaultdict(list)
        for shard in shards:
            groups[group_name(shard.name, self.config.granularity)].append(shard)
        alike: dict[tuple[torch.dtype, torch.device], list[list[Shard]]] = defaultdict(list)
        for group in groups.values():
            dtype = common_dtype([shard.entries.dtype for shard in group])
            alike[dtype, group[0].entries.device].append(group)
        for (dtype, _), batch in alike.items():
            for start in range(0, len(batch), _GROUPS_AT_ONCE):
                yield dtype, batch[start : start + _GROUPS_AT_ONCE]

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        _, *positional = args
        closure = positional[0] if positional else kwargs.get("closure")
        if closure is None:
            self.mask_gradients(optimizer)
            return None

        def closure_then_mask() -> Any:  # The closure makes the gradients, so masking follows it.
            with torch.enable_grad():
                loss = closure()
            self.mask_gradients(optimizer)
            return loss

        if positional:
            return (optimizer, closure_then_mask, *positional[1:]), kwargs
        return args, {**kwargs, "closure": closure_then_mask}


def _stepped(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _matches_any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names for pattern in patterns)
