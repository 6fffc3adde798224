"""Compiling a backend, and comparing it on this device with :mod:`~.eager` before it is used."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from axolotl_gmt.kernels import eager
from axolotl_gmt.kernels.contract import TOTALS, Backend, Batch, CPUBackend
from axolotl_gmt.kernels.dtypes import FORMATS, Digit, digits
from axolotl_gmt.kernels.scores import Bits, Hashes, Inverses, Kind, Magnitudes, Scores, Weighted

LOG = logging.getLogger(__name__)

# Offset and size, in entries, of tensors that are compared: empty, tiny, and of several threads.
_LAYOUT = [(0, 3000), (3, 70_001), (1, 0), (2, 1), (1, 63), (0, 65)]


def compile_and_check(backend: Backend, device: torch.device, kind: Kind) -> None:
    """:func:`compare`; once more, without the machine code on disk, if that cannot be used.

    Raises:
        Exception: Whatever the last :func:`compare` raised.
    """
    try:
        compare(backend, device, kind)
    except Exception as error:
        # A full disk or a damaged file: what is compiled anew runs all the same.
        give_up_cache: Callable[[], str | None] = getattr(backend, "give_up_cache", lambda: None)
        folder = give_up_cache()
        if folder is None:
            raise
        compare(backend, device, kind)
        LOG.warning(
            "GMT compiles its passes anew in every run, which takes some seconds, because the "
            "machine code kept in %s cannot be used or written (%s: %s). Make room there, or "
            "delete that folder's numba_cpu.* files, or name another one by NUMBA_CACHE_DIR.",
            folder,
            type(error).__name__,
            error,
        )


@torch.no_grad()
def compare(backend: Backend, device: torch.device, kind: Kind) -> None:
    """Compile the passes for a kind of scores, and check on this device that they do as torch's.

    Raises:
        RuntimeError: Naming the pass that differs.
        Exception: Whatever a compiler raises that cannot be used.
    """
    name = f"{kind.scores.__name__} of {kind.entries} as {kind.compared}"
    for scores in _examples(backend, kind, device):
        batch = Batch(scores, [index % 2 for index in range(len(scores))], kind.compared)
        some = scores[0].patterns(96, 98, kind.compared).long()
        if kind.scores is not Bits:  # Their threshold is known.
            _compare_counts(backend, batch, some, name)
            if hasattr(backend, "copy_between"):
                _compare_copies(cast(CPUBackend, backend), batch, some, name)
        _compare_masks(backend, batch, some, name)


def _examples(backend: Backend, kind: Kind, device: torch.device) -> Iterator[list[Scores]]:
    """Scores of a kind at addresses and of sizes around those where a pass may go wrong."""
    layouts = [_LAYOUT]
    if hasattr(backend, "boundaries"):
        layouts.append(list(backend.boundaries(kind.entries.itemsize)))
    generator = torch.Generator("cpu").manual_seed(0)
    for layout in layouts:
        scores: list[Scores] = []
        for offset, size in layout:
            values, weights = torch.randn(2, offset + size, generator=generator, device="cpu")
            values[offset::7] = 0
            values[offset + 1 :: 9] *= 2.0**-20  # Below the normal numbers of float16.
            broken = torch.tensor([float("nan"), float("inf"), -float("inf")], device="cpu")
            values[offset : offset + 3] = broken[:size]
            entries = values.to(kind.entries).to(device)[offset:]
            if kind.weights and issubclass(kind.scores, Weighted):
                weights[offset::11] = 0
                scores.append(kind.scores(entries, weights.to(kind.weights).to(device)[offset:]))
            elif kind.scores is Hashes:
                scores.append(Hashes(entries, -0x123456789ABCDEF * (1 + offset), offset * size))
            elif kind.scores is Bits:
                bits = torch.randint(256, (-(-size // 8),), generator=generator, device="cpu")
                scores.append(Bits(entries, bits.to(device, torch.uint8)))
            elif kind.scores in (Inverses, Magnitudes):
                scores.append(kind.scores(entries))
            else:
                raise NotImplementedError(f"No examples of {kind.scores.__name__}.")
        yield scores


def _compare_counts(backend: Backend, batch: Batch, some: Tensor, name: str) -> None:
    upper, *lower = digits(batch.dtype)
    cases: list[tuple[Digit, Tensor | None]] = [(upper, None)]
    cases += [(digit, some >> (digit.shift + digit.width)) for digit in lower]
    for (digit, prefixes), dtype in itertools.product(cases, [torch.int32, torch.int64]):
        counts = torch.zeros(2, 1 << digit.width, dtype=dtype, device=some.device)
        expected = torch.zeros_like(counts)
        backend.count_digits(batch, digit, prefixes, counts)
        eager.count_digits(batch, digit, prefixes, expected)
        if not torch.equal(counts, expected):
            raise RuntimeError(f"its count of {name} differs from torch's")


def _compare_copies(backend: CPUBackend, batch: Batch, low: Tensor, name: str) -> None:
    high, above = low + (FORMATS[batch.dtype].infinity >> 11), torch.zeros_like(low)
    expected_above = torch.zeros_like(low)
    copies = backend.copy_between(batch, low, high, above)
    expected = eager.copy_between(batch, low, high, expected_above)
    for copy, other in zip(copies, expected, strict=True):
        if copy is None or other is None or not torch.equal(copy, other):
            raise RuntimeError(f"its copies of {name} differ from torch's")
    if not torch.equal(above, expected_above):
        raise RuntimeError(f"its count of high {name} differs from torch's")


def _compare_masks(backend: Backend, batch: Batch, thresholds: Tensor, name: str) -> None:
    clones = [replace(scores, entries=scores.entries.clone()) for scores in batch.scores]
    totals = torch.zeros(len(clones), TOTALS, dtype=torch.float64, device=thresholds.device)
    expected = torch.zeros_like(totals)
    backend.mask_below_(batch, thresholds, totals)
    eager.mask_below_(batch._replace(scores=clones), thresholds, expected)
    for scores, clone in zip(batch.scores, clones, strict=True):
        bits = FORMATS[clone.entries.dtype].bits
        if not torch.equal(scores.entries.view(bits), clone.entries.view(bits)):
            raise RuntimeError(f"its mask of {name} differs from torch's")
    torch.testing.assert_close(totals, expected, rtol=1e-4, atol=0, equal_nan=True)
