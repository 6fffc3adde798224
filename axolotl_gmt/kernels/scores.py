"""How the entries of one flat tensor score: the classes of scores that the passes can read.

A score is made where a pass needs it, from what stands in its fields, and is kept nowhere but in
:class:`Given`. What counts is a score's bit pattern without the sign: an entry that is NaN or
infinite has one that is at least infinity's, so that it always survives.

Knows flat tensors only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_gmt.kernels.bits import unpack
from axolotl_gmt.kernels.dtypes import FORMATS, magnitude_patterns

EPSILON = 1e-8
"""What :class:`Quotients` add to the magnitude of a weight, as a float32."""


class Kind(NamedTuple):
    """What decides which code a pass over scores needs.

    Attributes:
        scores: The class of the scores.
        entries: The dtype of the entries.
        weights: That of the weights, if there are any.
        compared: The dtype whose patterns are compared.
    """

    scores: type[Scores]
    entries: torch.dtype
    weights: torch.dtype | None
    compared: torch.dtype


@dataclass(frozen=True)
class Scores:
    """Scores of the entries of one flat tensor.

    Attributes:
        entries: The gradient's entries, shape ``(entries,)``, which a mask sets to zero.
    """

    entries: Tensor

    def kind(self, compared: torch.dtype) -> Kind:
        """The kind of these scores where they are compared as that dtype."""
        weights = self.weights.dtype if isinstance(self, Weighted) else None
        return Kind(type(self), self.entries.dtype, weights, compared)

    def values(self, start: int, stop: int) -> Tensor:
        """The scores of the entries from ``start`` to ``stop``, whose signs do not count.

        Float32, but for :class:`Magnitudes`; none for :class:`Inverses`, which are patterns.
        """
        raise NotImplementedError

    def patterns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """What a pass compares: the scores as bit patterns of ``dtype``, without signs."""
        return magnitude_patterns(self.values(start, stop), dtype)

    def is_aligned(self) -> bool:
        """Whether every item that scores are made of lies at a multiple of its size."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors)


@dataclass(frozen=True)
class Magnitudes(Scores):
    """The magnitude of an entry, in the dtype of the entries."""

    def values(self, start: int, stop: int) -> Tensor:
        """See :meth:`Scores.values`."""
        return self.entries[start:stop]


@dataclass(frozen=True)
class Inverses(Scores):
    """The reversed order of the magnitudes: the smaller an entry, the larger its score.

    Compared is, in the patterns of the dtype that all scores have in common, that of infinity minus
    that of the magnitude. So the order is exact for every dtype, down to the denormals, and entries
    tie just where their magnitudes are equal. The pattern of an entry that is 0 is 0, below all
    others; that of one that is NaN or infinite is infinity's, above all others.
    """

    def patterns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :meth:`Scores.patterns`; ``dtype`` is float32 or float64."""
        infinity = FORMATS[dtype].infinity
        patterns = magnitude_patterns(self.entries[start:stop], dtype).clamp_(max=infinity)
        return torch.where(patterns > 0, infinity - patterns, 0).masked_fill_(
            patterns == infinity, infinity
        )


@dataclass(frozen=True)
class Weighted(Scores):
    """Scores that are made of an entry and its weight.

    Attributes:
        weights: Shape ``(entries,)``, any floating dtype, on the device of the entries.
    """

    weights: Tensor


@dataclass(frozen=True)
class Products(Weighted):
    """``|entry * weight|`` in float32; infinite where that is NaN, as infinity times 0 is."""

    def values(self, start: int, stop: int) -> Tensor:
        """See :meth:`Scores.values`."""
        products = self.entries[start:stop].float() * self.weights[start:stop].float()
        return products.abs_().nan_to_num_(nan=math.inf, posinf=math.inf)


@dataclass(frozen=True)
class Quotients(Weighted):
    """``|entry| / (|weight| + EPSILON)`` in float32; infinite where that is NaN.

    Both operations are rounded as IEEE 754 says. A quotient is NaN where the entry or the weight
    is, or where both are infinite, so an entry that is not finite has an infinite score.
    """

    def values(self, start: int, stop: int) -> Tensor:
        """See :meth:`Scores.values`."""
        quotients = self.entries[start:stop].float().abs()
        quotients /= self.weights[start:stop].float().abs() + EPSILON
        return quotients.nan_to_num_(nan=math.inf, posinf=math.inf)


@dataclass(frozen=True)
class Hashes(Scores):
    """Uniform in [0, 1), a hash of the entry's position; infinite where the entry is not finite.

    Attributes:
        key: Signed 64-bit number that makes one draw differ from another.
        first: The position of the first entry; each next entry's is one more.
    """

    key: int
    first: int

    def values(self, start: int, stop: int) -> Tensor:
        """See :meth:`Scores.values`."""
        entries = self.entries[start:stop]
        positions = torch.arange(self.first + start, self.first + stop, device=entries.device)
        return uniform(positions, self.key).masked_fill_(~entries.isfinite(), math.inf)


@dataclass(frozen=True)
class Bits(Scores):
    """1 where a bit is set and 0 where it is not; infinite where the entry is not finite.

    Attributes:
        bits: One for each entry, as :func:`~.bits.pack` makes them, on the device of the entries.
    """

    bits: Tensor

    def values(self, start: int, stop: int) -> Tensor:
        """See :meth:`Scores.values`; ``start`` is a multiple of 8."""
        flags = unpack(self.bits, start, stop).float()
        return flags.masked_fill_(~self.entries[start:stop].isfinite(), math.inf)


@dataclass(frozen=True)
class Given(Scores):
    """Scores that a criterion has made as a tensor.

    Attributes:
        scores: float32, shape ``(entries,)``, on the device of the entries, infinite where an
            entry is not finite.
    """

    scores: Tensor

    def values(self, start: int, stop: int) -> Tensor:
        """See :meth:`Scores.values`."""
        return self.scores[start:stop]


def uniform(positions: Tensor, key: int) -> Tensor:
    """Numbers in [0, 1) from int64 positions: splitmix64 of each, its upper 24 bits as a float32.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = positions * _signed(0x9E3779B97F4A7C15) + key  # int64 arithmetic wraps around
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 40).float() * 2.0**-24


def _signed(bits: int) -> int:
    return bits - (bits >> 63 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
