"""One optimizer step of Gradient-Mask Tuning, start to end, and its statistics.

Source: Li et al., "Enhancing Large Language Model Performance with Gradient-Based Parameter
Selection", AAAI 2025 (arXiv 2406.15330). The optimizer stays the user's own: a hook masks the
gradients in place just before each of its steps.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from axolotl_gmt import criteria
from axolotl_gmt.config import GMTConfig, Granularity
from axolotl_gmt.criteria import (
    DROP,
    KEEP,
    MAGNITUDE,
    Entries,
    Scorer,
    Verdict,
    checked,
)
from axolotl_gmt.gradients.plain import (
    Ranks,
    Rows,
    Shard,
    StepGradients,
    agree,
    plain_name,
    shape,
    step_gradients,
    sum_over_ranks,
)
from axolotl_gmt.kernels.contract import Batch
from axolotl_gmt.kernels.dispatch import mask_below_
from axolotl_gmt.kernels.scores import Given, Magnitudes, Scores
from axolotl_gmt.masking.threshold import common_dtype, find_thresholds, infinity_pattern
from axolotl_gmt.names import layer_name, module_name

# Groups whose thresholds are found together; bounds the memory of their histograms (16 MiB).
_GROUPS_AT_ONCE = 64

# By where shards lie: names, and totals of these or of all together (see mask_below_).
_Found = dict[tuple[torch.device, Ranks], list[tuple[list[str], Tensor]]]


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

    Attributes:
        step: The number of optimizer steps before the next one, which criteria that draw anew at
            each step draw by. Counts steps by itself; set it before each step where these are not
            the same: in a resumed run, or with several optimizers.

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
        self._scorers: dict[str, Scorer] = {}
        self._bad_scores: dict[torch.device, Tensor] = {}
        self._totals: list[tuple[list[str], Tensor]] = []
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
                be exact in this set-up, if another rank has other settings or parameters, or (also
                at a step) if the criterion breaks its contract.
            RuntimeError: (also at a step) Quoting the error of another rank.
        """
        gradients = step_gradients(optimizer, self._names)
        facts, failure = {}, None
        try:
            facts = self._prepare(gradients)
        except Exception as error:  # Whatever it is, other ranks must not wait for this one.
            failure = error
        agree(gradients.groups(), facts, failure)
        handle = self._handles.get(gradients.optimizer)
        if handle is not None and handle.id in (handle.hooks_dict_ref() or ()):
            raise ValueError(
                "This masker is already attached to this optimizer. Remove the first handle."
            )
        handle = gradients.before_step(lambda: self._begin_step(gradients))
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
        # The same order on every rank, also where an optimizer was made of a set.
        return sorted(masked, key=itemgetter(0))

    def _prepare(self, gradients: StepGradients) -> dict[str, str]:
        """Check that there is something to mask, and ask the criterion how.

        Returns:
            What ranks that share a gradient must have in common to choose one mask.
        """
        self._check_patterns(gradients)
        masked = self._masked(gradients)
        if not masked:
            raise ValueError(
                "include and exclude together leave no parameter to mask. Change the patterns."
            )
        self._find_scorers(masked)
        settings = {
            f"{setting} (gmt_{setting} in YAML)": repr(value)
            for setting, value in self.config.model_dump().items()
        }
        return settings | {
            name: f"{tuple(shape(parameter))} {parameter.dtype}, {gradients.layout(parameter)}"
            for name, parameter in masked
        }

    def _find_scorers(self, masked: Sequence[tuple[str, Tensor]]) -> None:
        """Ask the criterion how each parameter is scored, once, and again if there are new ones."""
        shapes = {name: shape(parameter) for name, parameter in masked}
        if shapes.keys() <= self._scorers.keys():
            return
        if self.config.mask_ratio == 0:  # Then no criterion masks anything.
            self._scorers |= dict.fromkeys(shapes, KEEP)
            return
        name = self.config.criterion
        scorers = criteria.find(name)(shapes, self.config.seed or 0)
        for parameter in shapes:
            scorer = scorers.get(parameter) if isinstance(scorers, Mapping) else None
            if not (isinstance(scorer, Verdict) or callable(scorer)):
                raise ValueError(
                    f"criterion (gmt_criterion in YAML): {name!r} does not say how {parameter} is "
                    f"scored, but {scorer!r}. It must return, for every name that it is given, "
                    "MAGNITUDE, KEEP, DROP or a function."
                )
        # What is known stays: a parameter that joins later must not change what is frozen.
        self._scorers = {**scorers, **self._scorers}

    def _begin_step(self, gradients: StepGradients) -> Callable[[], None]:
        """What masks the gradients of the step that begins, each time that they are made."""
        return partial(self._mask, gradients, self.step)

    @torch.no_grad()
    def _mask(self, gradients: StepGradients, step: int) -> None:
        """Mask, in place, the gradients that the next step uses."""
        masked = self._masked(gradients)
        self._find_scorers(masked)
        shards = self._shards_together(masked, gradients)
        found: _Found = defaultdict(list)
        self._mask_whole([shard for shard in shards if self._is_whole(shard)], found)
        is_first = not self._bad_scores
        for dtype, are_shared, groups in self._groups(
            [shard for shard in shards if not self._is_whole(shard)]
        ):
            batch: list[tuple[list[Shard], list[Scores]]] = []
            for group in groups:
                batch.append((group, [self._scores(shard, gradients, step) for shard in group]))
                # Made scores take as much memory as fp32 gradients do. Where ranks count together
                # it must not matter whether those of this one are made.
                is_made = any(
                    isinstance(scores, Given)
                    or (are_shared and self._scorers[shard.name] is not MAGNITUDE)
                    for shard, scores in zip(*batch[-1], strict=True)
                )
                if is_made or len(batch) == _GROUPS_AT_ONCE:
                    self._mask_groups(batch, dtype, found)
                    batch = []
            if batch:
                self._mask_groups(batch, dtype, found)
        if is_first:  # Later, when something is read from the device anyway.
            self._check_scores()
        self._totals = []
        for (_, ranks), parts in found.items():
            total = torch.cat([part for _, part in parts])
            if not self.config.log_modules:
                total = total.sum(0, keepdim=True)
            sum_over_ranks(total, ranks)
            self._totals.append(([name for names, _ in parts for name in names], total))
        self.step = step + 1  # However often a closure lets the step mask.

    def _shards_together(
        self, masked: Sequence[tuple[str, Tensor]], gradients: StepGradients
    ) -> list[Shard]:
        """:meth:`_shards`, and an error on all ranks if there is one on any.

        On a GPU at the first step only, since the host would have to wait for the device.
        """
        if gradients in self._agreed and any(not parameter.is_cpu for _, parameter in masked):
            return self._shards(masked, gradients)
        shards, failure = [], None
        try:
            shards = self._shards(masked, gradients)
        except Exception as error:  # Whatever it is, the others must not wait for this rank.
            failure = error
        agree(gradients.groups(), {}, failure)
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

    def _mask_groups(
        self,
        batch: Sequence[tuple[Sequence[Shard], Sequence[Scores]]],
        dtype: torch.dtype,
        found: _Found,
    ) -> None:
        """Mask groups of shards, each by its own threshold, and add what was found to ``found``."""
        rows = Rows([group for group, _ in batch])
        shards = [shard for group, _ in batch for shard in group]
        scores = [of_shard for _, of_group in batch for of_shard in of_group]
        thresholds = find_thresholds(scores, rows, self.config.mask_ratio, dtype)
        self._apply(shards, scores, rows.of_shard, dtype, thresholds, found)

    def _is_whole(self, shard: Shard) -> bool:
        return self._scorers[shard.name] in (KEEP, DROP)

    def _scores(self, shard: Shard, gradients: StepGradients, step: int) -> Scores:
        """The scores of the entries of ``shard``, in the dtype of :meth:`_score_dtype`."""
        scorer = self._scorers[shard.name]
        if scorer is MAGNITUDE:
            return Magnitudes(shard.entries)
        assert callable(scorer)
        entries = Entries(
            name=shard.name,
            gradient=shard.entries,
            step=step,
            read_weight=partial(gradients.weight, shard),
            positions=gradients.positions(shard),
            first_position=gradients.first_position(shard),
        )
        scores = scorer(entries)
        if isinstance(scores, Scores) and scores.entries is shard.entries:
            return scores
        given, bad = checked(scores, entries)
        self._bad_scores[bad.device] = bad | self._bad_scores.get(bad.device, False)
        return given

    def _score_dtype(self, shard: Shard) -> torch.dtype:
        return shard.entries.dtype if self._scorers[shard.name] is MAGNITUDE else torch.float32

    def _check_scores(self) -> None:
        if any(bad.item() for bad in self._bad_scores.values()):
            raise ValueError(
                f"criterion (gmt_criterion in YAML): {self.config.criterion!r} returned scores "
                "that are negative or NaN, so its masks mean nothing. Mend it or set another one."
            )

    def _mask_whole(self, shards: Sequence[Shard], found: _Found) -> None:
        """Keep or drop whole gradients; NaN and infinity survive here too."""
        alike: dict[tuple[torch.dtype, torch.device, int], list[Shard]] = defaultdict(list)
        for shard in shards:
            dtype = shard.entries.dtype
            threshold = infinity_pattern(dtype) if self._scorers[shard.name] is DROP else 0
            alike[dtype, shard.entries.device, threshold].append(shard)
        for (dtype, device, threshold), group in alike.items():
            thresholds = torch.full((1,), threshold, dtype=torch.int64, device=device)
            scores = [Magnitudes(shard.entries) for shard in group]
            self._apply(group, scores, [0] * len(group), dtype, thresholds, found)

    def _apply(
        self,
        shards: Sequence[Shard],
        scores: Sequence[Scores],
        rows: Sequence[int],
        dtype: torch.dtype,
        thresholds: Tensor,
        found: _Found,
    ) -> None:
        """Mask ``shards`` by thresholds of their rows, and add what was found to ``found``."""
        for key in dict.fromkeys((shard.entries.device, shard.ranks) for shard in shards):
            here = [i for i, s in enumerate(shards) if (s.entries.device, s.ranks) == key]
            totals = torch.zeros(len(here), 4, dtype=torch.float64, device=key[0])
            mask_below_(Batch(scores, rows, dtype).pick(here), thresholds, totals)
            if not self.config.log_modules:
                totals = totals.sum(0, keepdim=True)
            found[key].append(([shards[i].name for i in here], totals))

    def statistics(self) -> dict[str, float]:
        """What the last step kept, on all ranks; empty if there was none yet. Reads the device.

        Returns:
            ``kept_fraction``: non-zero entries that survived over all entries subject to masking.
            ``grad_norm_kept``: norm of the masked gradient over norm of the gradient, 1 if both
            are 0.
        """
        self._check_scores()
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
        in_model = dict.fromkeys(module_name(names[0]) for names in self._names.values())
        found = {module: _statistics(totals[module]) for module in in_model if module in totals}
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

    def _groups(self, shards: list[Shard]) -> Iterator[tuple[torch.dtype, bool, list[list[Shard]]]]:
        """Groups of shards whose thresholds may be found together.

        With their common dtype, and whether any of them is spread over ranks.
        """
        groups: dict[str, list[Shard]] = defaultdict(list)
        for shard in shards:
            groups[group_name(shard.name, self.config.granularity)].append(shard)
        alike: dict[tuple[torch.dtype, bool, torch.device], list[list[Shard]]] = defaultdict(list)
        for group in groups.values():
            dtype = common_dtype([self._score_dtype(shard) for shard in group])
            are_shared = any(shard.ranks for shard in group)
            alike[dtype, are_shared, group[0].entries.device].append(group)
        for (dtype, are_shared, _), alike_groups in alike.items():
            yield dtype, are_shared, alike_groups


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
