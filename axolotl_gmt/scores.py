"""What entries compete by: their score, and where it comes from.

A backend makes the scores while it counts and again while it masks, so none lies in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Magnitudes:
    """An entry's score is its magnitude, in its own dtype."""

    entries: Tensor


@dataclass(frozen=True)
class Products:
    """An entry's score is the magnitude of its product with its weight, in float32."""

    entries: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Hashes:
    """An entry's score is a hash of its position, uniform in [0, 1), in float32.

    Attributes:
        entries: Flat; where one is NaN or infinite, its score is infinite.
        key: What is hashed besides the position, 64 bits with a sign.
        first: Position of the first entry.
    """

    entries: Tensor
    key: int
    first: int


Scores = Magnitudes | Products | Hashes
