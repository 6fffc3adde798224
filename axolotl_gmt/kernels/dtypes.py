"""What the passes must know of a floating dtype: its bit patterns, and the digits they have."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Format(NamedTuple):
    """The bit patterns of a floating dtype.

    Attributes:
        bits: The signed integers of the same width.
        unsigned: The unsigned ones, of NumPy.
        magnitude_bits: All bits but the sign's, which is the largest pattern without a sign.
        infinity: The pattern of infinity; the patterns above it are those of NaN.
        first_shift: How many bits follow after the first digit, the 15 bits after the sign.
        widening: How many bits longer float32's mantissa is; negative for float64.
    """

    bits: torch.dtype
    unsigned: type[np.unsignedinteger[Any]]
    magnitude_bits: int
    infinity: int
    first_shift: int
    widening: int


FORMATS = {
    torch.bfloat16: Format(torch.int16, np.uint16, 0x7FFF, 0x7F80, 0, 16),
    torch.float16: Format(torch.int16, np.uint16, 0x7FFF, 0x7C00, 0, 13),
    torch.float32: Format(torch.int32, np.uint32, 0x7FFFFFFF, 0x7F800000, 16, 0),
    torch.float64: Format(torch.int64, np.uint64, 2**63 - 1, 0x7FF0000000000000, 48, -29),
}

COMPILED = frozenset({torch.bfloat16, torch.float16, torch.float32})
"""The dtypes of entries that compiled passes can take."""


class Digit(NamedTuple):
    """Bits ``shift`` to ``shift + width`` of a pattern."""

    shift: int
    width: int


def digits(dtype: torch.dtype) -> list[Digit]:
    """The digits of the patterns of ``dtype``, from the top: one of 15 bits, the rest of 16."""
    first = FORMATS[dtype].first_shift
    return [Digit(first, 15), *(Digit(shift, 16) for shift in range(first - 16, -1, -16))]


def magnitude_patterns(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bit patterns of ``|values|`` as ``dtype``: integers in the same order.

    Where the dtype changes, NaN has the pattern of infinity: its bits are not kept by all devices.
    """
    patterns = values.to(dtype).view(FORMATS[dtype].bits) & FORMATS[dtype].magnitude_bits
    return patterns if values.dtype == dtype else patterns.clamp_(max=FORMATS[dtype].infinity)
