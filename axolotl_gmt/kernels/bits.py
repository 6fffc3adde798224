"""Flags as bits, an eighth of a byte an entry. Knows flat tensors only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# Bytes, a multiple of 8; bounds the memory of the sums (32 MiB each).
_COUNTED_AT_ONCE = 1 << 25


def pack(
    flags: Callable[[int, int], Tensor], entries: int, chunk: int, device: torch.device
) -> Tensor:
    """One bit for each of so many flags, the first in the lowest bit of the first byte.

    Args:
        flags: ``flags(start, stop)`` gives a part of them: bool ``(stop - start,)`` on ``device``.
        entries: How many there are.
        chunk: How many to ask for at a time, a multiple of 8.
        device: Where the bits are wanted.

    Returns:
        uint8 ``(ceil(entries / 8),)``; bits beyond the last flag are 0.
    """
    bits = torch.empty(-(-entries // 8), dtype=torch.uint8, device=device)
    for start in range(0, entries, chunk):
        part = flags(start, min(start + chunk, entries))
        bits[start >> 3 : (start + chunk) >> 3] = _pack(part)
    return bits


def pack_nonzero(values: Tensor, chunk: int) -> Tensor:
    """:func:`pack` of where ``values`` ``(n,)`` are not 0, as NaN is not."""

    def flags(start: int, stop: int) -> Tensor:
        return values[start:stop].bool()  # A quarter of the time of != 0.

    return pack(flags, len(values), chunk, values.device)


def unpack(bits: Tensor, start: int, stop: int) -> Tensor:
    """The flags from ``start``, a multiple of 8, to ``stop``: bool ``(stop - start,)``."""
    part = bits[start >> 3 : (stop + 7) >> 3]
    if part.is_cpu:
        flags = np.unpackbits(part.numpy(), count=stop - start, bitorder="little")
        return torch.from_numpy(flags).view(torch.bool)
    return ((part[:, None] >> _shifts(part)) & 1).view(-1)[: stop - start].bool()


def count(bits: Tensor) -> Tensor:
    """How many of ``bits``, which lie contiguously, are 1: int64 ``()`` on their device."""
    if bits.is_cpu:
        words = len(bits) & -8
        parts = bits[:words].numpy().view(np.uint64), bits[words:].numpy()
        return torch.tensor(sum(int(np.bitwise_count(p).sum()) for p in parts), device="cpu")
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(_COUNTED_AT_ONCE):
        total += _ones(pad(part, (0, -len(part) % 8)).view(torch.int64)).sum()
    return total


def _ones(words: Tensor) -> Tensor:
    """How many bits of each int64 are 1: sums of neighbouring bits, of pairs, then of fours.

    Source: Warren, Hacker's Delight, 2nd edition, section 5-1. The shifts copy the sign, which the
    masks cut off; the last has no sign to copy.
    """
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101) >> 56


def _pack(flags: Tensor) -> Tensor:
    if flags.is_cpu:
        return torch.from_numpy(np.packbits(flags.numpy(), bitorder="little"))
    eights = pad(flags.view(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    return (eights << _shifts(flags)).sum(-1, dtype=torch.uint8)


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
