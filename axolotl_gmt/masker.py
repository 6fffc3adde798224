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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from axolotl_gmt.config import GMTConfig, Granularity
from axolotl_gmt.names import layer_name, module_name
from axolotl_gmt.shards import (
    Ranks,
    Rows,
    Shard,
    StepGradients,
    plain_name,
    step_gradients,
    sum_over_ranks,
)
from axolotl_gmt.threshold import common_dtype, find_thresholds, mask_below_

# Groups whose thresholds are found together; bounds the memory of their histograms (16 MiB).
_GROUPS_AT_ONCE = 64


def group_name(parameter_name: str, granularity: Granularity) -> str:
    """The group in which the entries of a parameter compete for one threshold."""
    if granularity == "global":
        return "global"
    layer = layer_name(parameter_name) if granularity == "layer" else None
    return layer or parameter_name


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
        self._handles: WeakKeyDictionary[object, RemovableHandle] = WeakKeyDictionary()
        self._selected: dict[Tensor, bool] = {}
        self._totals: list[tuple[list[str], Tensor]] = []

    def attach(self, optimizer: object) -> RemovableHandle:
        """Mask gradients before every ``optimizer.step()`` until ``remove()`` of the handle.

        Args:
            optimizer: Any torch optimizer, or Accelerate's or DeepSpeed's around one.

        Raises:
            ValueError: If the optimizer steps tensors that are not among the named parameters,
                if a pattern matches none of the parameters that it steps, if the patterns leave
                none to mask, if this masker is already attached to the optimizer, or if GMT cannot
                be exact in this set-up.
            TypeError: (at a step) For a gradient that cannot be masked exactly, such as a sparse
                one.
        """
        gradients = step_gradients(optimizer, self._names)
        self._check_patterns(gradients)
        if not self._masked(gradients):
            raise ValueError(
                "include and exclude together leave no parameter to mask. Change the patterns."
            )
        handle = self._handles.get(gradients.optimizer)
        if handle is not None and handle.id in (handle.hooks_dict_ref() or ()):
            raise ValueError(
                "This masker is already attached to this optimizer. Remove the first handle."
            )
        handle = gradients.before_step(lambda: self._mask(gradients))
        self._handles[gradients.optimizer] = handle
        return handle

    def masked_parameters(self, optimizer: object) -> list[tuple[str, Tensor]]:
        """Name and tensor of each parameter of ``optimizer`` that is subject to masking.

        Raises:
            ValueError: If the optimizer steps a tensor that is not among the named parameters.
        """
        return self._masked(step_gradients(optimizer, self._names))

    def _masked(self, gradients: StepGradients) -> list[tuple[str, Tensor]]:
        include, exclude = self.config.include, self.config.exclude
        masked = []
        for names, parameter in gradients.parameters():
            if parameter not in self._selected:
                self._selected[parameter] = (include is None or _matches_any(include, names)) and (
                    exclude is None or not _matches_any(exclude, names)
                )
            if self._selected[parameter]:
                masked.append((names[0], parameter))
        return masked

    @torch.no_grad()
    def _mask(self, gradients: StepGradients) -> None:
        """Mask, in place, the gradients that the next step uses."""
        shards = [gradients.shard(*named) for named in self._masked(gradients)]
        names: dict[tuple[torch.device, Ranks], list[str]] = defaultdict(list)
        totals: dict[tuple[torch.device, Ranks], list[Tensor]] = defaultdict(list)
        for dtype, groups in self._batches(shards):
            batch = [shard for group in groups for shard in group]
            rows = Rows(groups)
            entries = [shard.entries for shard in batch]
            thresholds = find_thresholds(entries, rows, self.config.mask_ratio, dtype)
            for key in dict.fromkeys((shard.entries.device, shard.ranks) for shard in batch):
                here = [i for i, s in enumerate(batch) if (s.entries.device, s.ranks) == key]
                found = torch.zeros(len(here), 4, dtype=torch.float64, device=key[0])
                mask_below_(
                    [entries[i] for i in here],
                    [rows.of_shard[i] for i in here],
                    dtype,
                    thresholds,
                    found,
                )
                names[key] += [batch[i].name for i in here]
                totals[key].append(found if self.config.log_modules else found.sum(0, keepdim=True))
        self._totals = []
        for key, parts in totals.items():
            total = torch.cat(parts)
            if not self.config.log_modules:
                total = total.sum(0, keepdim=True)
            sum_over_ranks(total, key[1])
            self._totals.append((names[key], total))

    def statistics(self) -> dict[str, float]:
        """What the last step kept, on all ranks; empty if there was none yet. Reads the device.

        Returns:
            ``kept_fraction``: non-zero entries that survived over all entries subject to masking.
            ``grad_norm_kept``: norm of the masked gradient over norm of the gradient, 1 if both
            are 0.
        """
        total = torch.zeros(4, dtype=torch.float64)
        for _, part in self._totals:
            total += part.cpu().sum(0)
        return _statistics(total)

    def module_statistics(self) -> dict[str, dict[str, float]]:
        """What :meth:`statistics` says, for each module, with ``log_modules``; else empty.

        Returns:
            For each module that owns masked parameters, such as ``model.layers.3.mlp.down_proj``,
            its statistics; a module whose gradients were all absent is left out.
        """
        if not self.config.log_modules:
            return {}
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
        for names, part in self._totals:
            for name, total in zip(names, part.cpu(), strict=True):
                totals[module_name(name)] += total
        found = {module: _statistics(total) for module, total in totals.items()}
        return {module: statistics for module, statistics in found.items() if statistics}

    def _check_patterns(self, gradients: StepGradients) -> None:
        names = [name for names, _ in gradients.parameters() for name in names]
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


def _statistics(total: Tensor) -> dict[str, float]:
    entries, kept, before, after = total.tolist()
    if entries == 0:
        return {}
    return {
        "kept_fraction": kept / entries,
        "grad_norm_kept": 1.0 if before == 0 else math.sqrt(after / before),
    }


def _matches_any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names for pattern in patterns)
