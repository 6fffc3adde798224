"""One optimizer step of Gradient-Mask Tuning, start to end.

Source: Li et al., "Enhancing Large Language Model Performance with Gradient-Based Parameter
Selection", AAAI 2025 (arXiv 2406.15330). The optimizer stays the user's own: a hook masks the
gradients in place just before each of its steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from axolotl_gmt.config import GMTConfig, Granularity
from axolotl_gmt.criteria import DROP, KEEP, Verdict
from axolotl_gmt.gradients.agreement import agreement
from axolotl_gmt.gradients.of_optimizer import step_gradients
from axolotl_gmt.gradients.shard import Shard, StepGradients, plain_name, shape
from axolotl_gmt.kernels.contract import TOTALS, Batch
from axolotl_gmt.kernels.dispatch import mask_below_
from axolotl_gmt.kernels.scores import Given, Magnitudes, Scores
from axolotl_gmt.masking.hold import HeldWeights, bytes_copied, check_can_hold
from axolotl_gmt.masking.kept import KEPT, KeptMasks
from axolotl_gmt.masking.overlap import Overlap
from axolotl_gmt.masking.scorers import Scorers
from axolotl_gmt.masking.selection import Selection
from axolotl_gmt.masking.statistics import Statistics
from axolotl_gmt.masking.threshold import Rows, common_dtype, find_thresholds, infinity_pattern
from axolotl_gmt.names import layer_name

# Groups whose thresholds are found together; bounds the memory of their histograms (16 MiB).
_GROUPS_AT_ONCE = 64


def _pairs(named_parameters: object) -> Iterator[tuple[str, Tensor]]:
    """The names and parameters, or a ``TypeError`` that says what to write."""
    items = named_parameters if isinstance(named_parameters, Iterable) else [named_parameters]
    for item in items:
        if not (isinstance(item, Sequence) and len(item) == 2 and isinstance(item[0], str)):
            raise TypeError(
                "GradientMasker needs parameters with their names: model.named_parameters(), not "
                f"{'model' if isinstance(item, torch.nn.Module) else 'model.parameters()'}."
            )
        yield item[0], item[1]


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

    Raises:
        TypeError: If what should be pairs of names and parameters, or a GMTConfig, is not.

    Attributes:
        holds: Whether weights are held, as ``hold`` says and a mask ratio of 0 forbids.
        step: Steps made so far; criteria that draw anew each step draw by it. It counts by itself.
            Set it before each step where it would count wrongly: in a resumed run, or with several
            optimizers.

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
        if not isinstance(config, GMTConfig | None):
            raise TypeError(
                f"{config!r} is no GMTConfig. Write GradientMasker(model.named_parameters(), "
                "GMTConfig(mask_ratio=0.5))."
            )
        self.config = config or GMTConfig()
        self._names: dict[Tensor, list[str]] = defaultdict(list)
        for name, parameter in _pairs(named_parameters):
            self._names[parameter].append(plain_name(name))
        self._selection = Selection(self.config)
        self._scorers = Scorers(self.config)
        self._statistics: Statistics | None = None
        self._overlap = Overlap() if self.config.log_overlap else None
        # A mask ratio of 0 masks nothing, so there is nothing to hold or to keep.
        masks = self.config.mask_ratio > 0
        self.holds = masks and self.config.hold
        self._kept = KeptMasks(self.config) if masks and self.config.mask_interval != 1 else None
        self._handles: WeakKeyDictionary[object, RemovableHandle] = WeakKeyDictionary()
        self._agreed: WeakSet[StepGradients] = WeakSet()
        self.step = 0

    def attach(self, optimizer: object) -> RemovableHandle:
        """Mask gradients before every ``optimizer.step()`` until ``remove()`` of the handle.

        Ranks that share shards compare settings and parameters here, so all of them must call it.

        Args:
            optimizer: Any torch optimizer, or Accelerate's or DeepSpeed's around one.

        Raises:
            TypeError: If it is no torch optimizer; (at a step) for a gradient that cannot be
                masked exactly, such as a sparse one, unless the mask ratio is 0.
            ValueError: If the optimizer steps tensors that are not among the named parameters,
                if a pattern matches none of the parameters that it steps, if the patterns leave
                none to mask, if this masker is already attached to the optimizer, if GMT cannot
                be exact in this set-up or hold the optimizer's weights, if another rank has other
                settings or parameters, or (also at a step) if the criterion breaks its contract.
            RuntimeError: (also at a step) Quoting the error of another rank.
        """
        gradients = step_gradients(optimizer, self._names)
        with agreement(gradients.process_groups()) as facts:
            facts |= self._prepare(gradients)
        handle = self._handles.get(gradients.optimizer)
        if handle is not None and handle.id in (handle.hooks_dict_ref() or ()):
            raise ValueError(
                "This masker is already attached to this optimizer. Remove the first handle."
            )
        handle = gradients.on_step(lambda: _Step(self, gradients), self.holds)
        self._handles[gradients.optimizer] = handle
        return handle

    def masked_parameters(self, optimizer: object) -> list[tuple[str, Tensor]]:
        """Name and tensor of each parameter of ``optimizer`` that is subject to masking.

        Raises:
            ValueError: If the optimizer steps a tensor that is not among the named parameters.
        """
        return self._selection.masked(step_gradients(optimizer, self._names))

    def statistics(self) -> dict[str, float]:
        """What the last step kept, on all ranks; empty if there was none yet. Reads the device.

        Returns:
            ``kept_fraction``: non-zero entries that survived over all entries subject to masking.
            ``grad_norm_kept``: norm of the masked gradient over norm of the gradient, 1 if both
            are 0.
            ``l1_kept``: the same of their L1 norms, the sums of the magnitudes.
            With ``log_overlap`` also ``mask_overlap``: of the entries kept now or at the step at
            which this was last called before, the share kept at both (Jaccard);
            ``mask_overlap_by_chance``: what random masks that keep as much of each tensor would
            have; and ``ever_kept``: entries kept at one step of this masker at least, over all.
            The first two are 1 if nothing was kept at either step, and absent if there was no step
            before. Ranks that share a tensor must call this, or :meth:`module_statistics`, at the
            same steps; else the first two are absent too. None of them waits for another.
        """
        self._scorers.check()
        if self._overlap is not None:
            self._overlap.read()
        return self._statistics.overall() if self._statistics else {}

    def module_statistics(self) -> dict[str, dict[str, float]]:
        """What :meth:`statistics` says, for each module, with ``log_modules``; else empty.

        Returns:
            For each module that owns masked parameters, such as ``model.layers.3.mlp.down_proj``,
            its statistics; a module whose gradients were all absent is left out.
        """
        if not (self.config.log_modules and self._statistics):
            return {}
        if self._overlap is not None:
            self._overlap.read()
        return self._statistics.of_modules(names[0] for names in self._names.values())

    def extra_bytes(self, optimizer: object) -> int:
        """Bytes of ``hold``'s copy, a mask that stays and ``log_overlap``, in this process.

        Raises:
            ValueError: If the optimizer steps a tensor that is not among the named parameters.
        """
        gradients = step_gradients(optimizer, self._names)
        masked = [parameter for _, parameter in self._selection.masked(gradients)]
        entries = sum(gradients.local_weight(parameter).numel() for parameter in masked)
        copied = bytes_copied(gradients, masked) if self.holds else 0
        # Held weights need a bit too, which tells where a gradient is 0.
        bits = self.holds + (self._kept is not None) + 3 * self.config.log_overlap
        return copied + bits * entries // 8

    def state_dict(self) -> dict[str, Any]:
        """What a run must take over to go on with the same masks.

        Returns:
            ``step``, and with a ``mask_interval`` other than 1 by parameter name ``masks``, the
            bits of its local entries, uint8 ``(ceil(entries / 8),)`` (see
            :func:`~axolotl_gmt.kernels.bits.pack`), and ``layouts``, how it is sharded; and
            ``made_at``, a step of the interval that the masks are of.
        """
        return {"step": self.step} | (self._kept.state_dict() if self._kept is not None else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another masker was, in the same set-up, when :meth:`state_dict` was called.

        Raises:
            ValueError: If masks are missing that the next step would go on with, or do not fit.
        """
        self.step = state["step"]
        if self._kept is not None and self.goes_on_with_masks():
            if state.get("made_at") is None:
                raise ValueError(
                    f"Step {self.step} goes on with masks that earlier steps have made, but there "
                    "are none in the state. Save it with the mask_interval that it is loaded with."
                )
            self._kept.load_state_dict(state)

    @property
    def keeps_masks(self) -> bool:
        """Whether masks stay for several steps, so that :meth:`state_dict` has some."""
        return self._kept is not None

    def goes_on_with_masks(self) -> bool:
        """Whether the next step, as ``step`` counts, goes on with masks of the steps before."""
        return self._kept is not None and self._kept.is_under_way(self.step)

    def _prepare(self, gradients: StepGradients) -> dict[str, str]:
        """Check that there is something to mask, and ask the criterion how.

        Returns:
            What ranks that share a gradient must have in common to choose one mask.
        """
        self._selection.check(gradients)
        if self.holds:
            check_can_hold(gradients.optimizer)
        masked = self._selection.masked(gradients)
        self._scorers.ask(masked)
        settings = {
            f"{setting} (gmt_{setting} in YAML)": repr(value)
            for setting, value in self.config.model_dump().items()
        }
        layouts = {
            name: f"{tuple(shape(parameter))} {parameter.dtype}, {gradients.layout(parameter)}"
            for name, parameter in masked
        }
        if self._kept is not None:
            self._kept.check_layouts(layouts)
        return settings | layouts

    @torch.no_grad()
    def _mask(self, gradients: StepGradients, step: int) -> None:
        """Mask, in place, the gradients that this step uses."""
        masked = self._selection.masked(gradients)
        self._scorers.ask(masked)
        shards = self._shards_together(masked, gradients)
        if self._overlap is not None:
            self._overlap.begin_step(step, gradients)
        statistics = Statistics(self.config.log_modules, self._overlap)
        if step < self.config.warmup_steps:
            self._mask_whole(shards, statistics, KEEP)
        else:
            for verdict in (KEEP, DROP):
                whole = [s for s in shards if self._scorers.of_whole(s) is verdict]
                self._mask_whole(whole, statistics, verdict)
            competing = [s for s in shards if self._scorers.of_whole(s) is None]
            self._mask_competing(competing, gradients, step, statistics)
        if self._statistics is None:  # Later statistics() checks, which reads the device anyway.
            self._scorers.check()
        statistics.sum_over_ranks()
        self._statistics = statistics
        self.step = step + 1  # Set, not incremented: a closure may mask one step several times.

    def _mask_competing(
        self, shards: Sequence[Shard], gradients: StepGradients, step: int, statistics: Statistics
    ) -> None:
        """Mask by the masks that stay, and by new ones where there are none."""
        kept = self._kept
        if kept is not None:
            kept.begin_step(step)
            known = [shard for shard in shards if kept.has(shard)]
            shards = [shard for shard in shards if not kept.has(shard)]
            _apply_one(
                known, [kept.scores(shard) for shard in known], KEPT, torch.float32, statistics
            )
        for dtype, groups in self._batches(shards, gradients, step):
            rows = Rows([group for group, _ in groups])
            of_batch = [shard for group, _ in groups for shard in group]
            scores = [of_shard for _, of_group in groups for of_shard in of_group]
            batch = Batch(scores, rows.of_shard, dtype)
            thresholds = find_thresholds(batch, rows, self.config.mask_ratio)
            if kept is not None:
                kept.keep(of_batch, batch, thresholds)
            _apply(of_batch, batch, thresholds, statistics)

    def _shards_together(
        self, masked: Sequence[tuple[str, Tensor]], gradients: StepGradients
    ) -> list[Shard]:
        """:meth:`_shards`, and an error on all ranks if there is one on any.

        On a GPU at the first step only, since the host would have to wait for the device.
        """
        if gradients in self._agreed and any(not parameter.is_cpu for _, parameter in masked):
            return self._shards(masked, gradients)
        with agreement(gradients.process_groups()) as facts:
            shards = self._shards(masked, gradients)
            if self._kept is not None:  # Else a rank may lack a gradient that others have.
                facts |= {
                    f"the gradient of {shard.name}": "absent" if shard.is_absent else "present"
                    for shard in shards
                    if shard.ranks
                }
        self._agreed.add(gradients)
        return shards

    def _shards(
        self, masked: Sequence[tuple[str, Tensor]], gradients: StepGradients
    ) -> list[Shard]:
        """The shards of the masked parameters' gradients.

        Raises:
            TypeError: For a gradient that cannot be masked exactly. A mask ratio of 0 masks
                nothing, so there such a gradient is left alone.
        """
        shards = []
        for name, parameter in masked:
            try:
                shards.append(gradients.shard(name, parameter))
            except TypeError:
                if self.config.mask_ratio > 0:
                    raise
        return shards

    def _mask_whole(
        self, shards: Sequence[Shard], statistics: Statistics, verdict: Verdict
    ) -> None:
        """Keep or drop whole gradients; NaN and infinity survive here too."""
        alike: dict[torch.dtype, list[Shard]] = defaultdict(list)
        for shard in shards:
            alike[shard.entries.dtype].append(shard)
        for dtype, group in alike.items():
            threshold = 0 if verdict is KEEP else infinity_pattern(dtype)
            scores = [Magnitudes(shard.entries) for shard in group]
            _apply_one(group, scores, threshold, dtype, statistics)

    def _batches(
        self, shards: Sequence[Shard], gradients: StepGradients, step: int
    ) -> Iterator[tuple[torch.dtype, list[tuple[list[Shard], list[Scores]]]]]:
        """Batches of groups whose thresholds are found together.

        Yields:
            The dtype, and each group with its scores.
        """
        groups: dict[str, list[Shard]] = defaultdict(list)
        for shard in shards:
            groups[group_name(shard.name, self.config.granularity)].append(shard)
        alike: dict[tuple[torch.dtype, bool, torch.device], list[list[Shard]]] = defaultdict(list)
        for group in groups.values():
            dtype = common_dtype([self._scorers.dtype(shard) for shard in group])
            are_shared = any(shard.ranks for shard in group)
            alike[dtype, are_shared, group[0].entries.device].append(group)
        for (dtype, are_shared, _), alike_groups in alike.items():
            batch: list[tuple[list[Shard], list[Scores]]] = []
            for group in alike_groups:
                scores = [self._scorers.scores(shard, gradients, step) for shard in group]
                batch.append((group, scores))
                # Scores in memory take as much as fp32 gradients do, so such a group ends its
                # batch. Where ranks count together they must form the same batches, and one rank
                # may have a tensor of scores where another has none.
                is_given = any(isinstance(of_shard, Given) for of_shard in scores) or (
                    are_shared and not all(map(self._scorers.by_magnitude, group))
                )
                if is_given or len(batch) == _GROUPS_AT_ONCE:
                    yield dtype, batch
                    batch = []
            if batch:
                yield dtype, batch


class _Step:
    """One step of an optimizer, see :class:`~axolotl_gmt.gradients.shard.Step`."""

    def __init__(self, masker: GradientMasker, gradients: StepGradients) -> None:
        self._masker = masker
        self._gradients = gradients
        self._step = masker.step
        self._held: HeldWeights | None = None
        if masker.holds and self._step >= masker.config.warmup_steps:
            masked = masker._selection.masked(gradients)
            self._held = HeldWeights(gradients, [parameter for _, parameter in masked])

    def mask(self) -> None:
        self._masker._mask(self._gradients, self._step)
        if self._held is not None:
            self._held.choose()

    def hold(self, parameters: Iterable[Tensor]) -> None:
        if self._held is not None:
            self._held.copy(parameters)

    def release(self) -> None:
        if self._held is not None:
            self._held.put_back()


def _apply_one(
    shards: Sequence[Shard],
    scores: Sequence[Scores],
    threshold: int,
    dtype: torch.dtype,
    statistics: Statistics,
) -> None:
    """:func:`_apply` with one known threshold."""
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, shard in enumerate(shards):
        by_device[shard.entries.device].append(index)
    for device, indices in by_device.items():
        thresholds = torch.full((1,), threshold, dtype=torch.int64, device=device)
        batch = Batch([scores[index] for index in indices], [0] * len(indices), dtype)
        _apply([shards[index] for index in indices], batch, thresholds, statistics)


def _apply(
    shards: Sequence[Shard], batch: Batch, thresholds: Tensor, statistics: Statistics
) -> None:
    """Mask ``shards`` by thresholds of their rows, and add what was kept to ``statistics``."""
    for key in dict.fromkeys((shard.entries.device, shard.ranks) for shard in shards):
        alike = [i for i, s in enumerate(shards) if (s.entries.device, s.ranks) == key]
        totals = torch.zeros(len(alike), TOTALS, dtype=torch.float64, device=key[0])
        mask_below_(batch.pick(alike), thresholds, totals)
        statistics.add([shards[i] for i in alike], totals)
