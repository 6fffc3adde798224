"""How the criterion scores each parameter, and the scores of a shard at a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from axolotl_gmt import criteria
from axolotl_gmt.config import GMTConfig
from axolotl_gmt.criteria import DROP, KEEP, MAGNITUDE, SMALLEST, Entries, Scorer, Verdict
from axolotl_gmt.gradients.shard import Shard, StepGradients, shape
from axolotl_gmt.kernels.scores import Inverses, Magnitudes, Scores


class Scorers:
    """The answers of the criterion.

    Args:
        config: The settings.
    """

    def __init__(self, config: GMTConfig) -> None:
        self._config = config
        self._by_name: dict[str, Scorer] = {}
        self._bad: dict[torch.device, Tensor] = {}

    def ask(self, masked: Sequence[tuple[str, Tensor]]) -> None:
        """Ask how each parameter is scored, once, and again if there are new ones.

        Raises:
            ValueError: If the criterion does not say, or refuses these parameters.
        """
        shapes = {name: shape(parameter) for name, parameter in masked}
        if shapes.keys() <= self._by_name.keys():
            return
        if self._config.mask_ratio == 0:  # Then no criterion masks anything.
            self._by_name |= dict.fromkeys(shapes, KEEP)
            return
        name = self._config.criterion
        scorers = criteria.find(name)(shapes, self._config.seed or 0)
        for parameter in shapes:
            scorer = scorers.get(parameter) if isinstance(scorers, Mapping) else None
            if not (isinstance(scorer, Verdict) or callable(scorer)):
                raise ValueError(
                    f"criterion (gmt_criterion in YAML): {name!r} gives {scorer!r} for "
                    f"{parameter}. It must return, for every name that it is given, MAGNITUDE, "
                    "SMALLEST, KEEP, DROP or a function."
                )
        # What is known stays: a parameter that joins later must not change what is frozen.
        self._by_name = {**scorers, **self._by_name}

    def of_whole(self, shard: Shard) -> Verdict | None:
        """KEEP or DROP, if that is said of the whole gradient; None if its entries compete."""
        scorer = self._by_name[shard.name]
        return scorer if isinstance(scorer, Verdict) and scorer in (KEEP, DROP) else None

    def by_magnitude(self, shard: Shard) -> bool:
        """Whether the scores are made of the magnitudes of the entries alone."""
        return self._by_name[shard.name] in (MAGNITUDE, SMALLEST)

    def dtype(self, shard: Shard) -> torch.dtype:
        """The narrowest dtype in which :meth:`scores` can be compared."""
        match self._by_name[shard.name]:
            case Verdict.MAGNITUDE:
                return shard.entries.dtype
            case Verdict.SMALLEST:  # No fewer bits than those that compiled passes make.
                return torch.promote_types(shard.entries.dtype, torch.float32)
            case _:
                return torch.float32

    def scores(self, shard: Shard, gradients: StepGradients, step: int) -> Scores:
        """The scores of the entries of ``shard`` at a step.

        Raises:
            ValueError: If a function of the criterion returns what the contract does not allow.
        """
        scorer = self._by_name[shard.name]
        if scorer is MAGNITUDE:
            return Magnitudes(shard.entries)
        if scorer is SMALLEST:
            return Inverses(shard.entries)
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
        given, bad = criteria.checked(scores, entries)
        self._bad[bad.device] = bad | self._bad.get(bad.device, False)
        return given

    def check(self) -> None:
        """Read from the devices whether all scores so far kept the contract.

        Raises:
            ValueError: If one was negative or NaN.
        """
        if any(bad.item() for bad in self._bad.values()):
            raise ValueError(
                f"criterion (gmt_criterion in YAML): {self._config.criterion!r} returned scores "
                "that are negative or NaN, so its masks mean nothing. Mend it or set another one."
            )
