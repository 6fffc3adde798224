"""Which parameters are under the mask: those that the settings' patterns select."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from operator import itemgetter

from torch import Tensor

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.gradients.shard import StepGradients


class Selection:
    """The parameters that ``include`` and ``exclude`` select.

    Args:
        config: The settings.
    """

    def __init__(self, config: GMTConfig) -> None:
        self._config = config
        self._is_selected: dict[Tensor, bool] = {}

    def masked(self, gradients: StepGradients) -> list[tuple[str, Tensor]]:
        """Name and tensor of each selected parameter that the optimizer steps, sorted by name.

        So the order is the same on every rank, also where an optimizer was made of a set.
        """
        masked = []
        for names, parameter in gradients.parameters():
            if parameter not in self._is_selected:
                self._is_selected[parameter] = self._selects(names)
            if self._is_selected[parameter]:
                masked.append((names[0], parameter))
        return sorted(masked, key=itemgetter(0))

    def check(self, gradients: StepGradients) -> None:
        """Refuse patterns that match no parameter, or that leave none to mask.

        Raises:
            ValueError: Naming the setting, the pattern and the fix.
        """
        names = [name for of_one, _ in gradients.parameters() for name in of_one]
        for setting in ("include", "exclude"):
            for pattern in getattr(self._config, setting) or ():
                if not _matches_any([pattern], names):
                    raise ValueError(
                        f"{setting} (gmt_{setting} in YAML): the pattern {pattern!r} matches no "
                        f"trained parameter. There are {len(names)}, such as {names[0]} and "
                        f"{names[-1]}. Change the pattern or remove it."
                    )
        if not self.masked(gradients):
            raise ValueError(
                "include and exclude together leave no parameter to mask. Change the patterns."
            )

    def _selects(self, names: Sequence[str]) -> bool:
        include, exclude = self._config.include, self._config.exclude
        return (include is None or _matches_any(include, names)) and not _matches_any(
            exclude or (), names
        )


def _matches_any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names for pattern in patterns)
