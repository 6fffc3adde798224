"""Compiling a backend, and comparing it on this device with :mod:`~.eager` before it is used."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from axolotl_gmt.kernels import eager
from axolotl_gmt.kernels.contract import TOTALS, Backend, Batch, CompiledBackend, CPUBackend
from axolotl_gmt.kernels.dtypes import FORMATS, Digit, digits
from axolotl_gmt.kernels.scores import Bits, Hashes, Inverses, Kind, Magnitudes, Scores, Weighted

LOG = logging.getLogger(__name__)

# Offset and size, in entries, of tensors that are compared: empty, tiny, and of several threads.
_LAYOUT = [(0, 3000), (3, 70_001), (1, 0), (2, 1), (1, 63), (0, 65)]


class SelfCheckError(RuntimeError):
    """A compiled pass that does not do as torch's; its message names the pass and nothing else."""


def compile_and_check(backend: CompiledBackend, device: torch.device, kind: Kind) -> None:
    """Run :func:`compare`; if it fails, once more without the machine code on disk.

    Raises:
        Exception: Whatever the last :func:`compare` raised.
    """
    try:
        compare(backend, device, kind)
    except Exception as error:
        # A full disk or a damaged file: what is compiled anew runs all the same.
        cache = backend.give_up_cache()
        if cache is None:
            raise
        compare(backend, device, kind)
        LOG.warning(
            "GMT compiles its passes anew in every run, which takes some seconds, because the "
            "machine code kept in %s cannot be used or written (%s: %s). Make room there, or "
            "delete that folder's %s files, or name another one by %s.",
            cache.folder,
            type(error).__name__,
            error,
            cache.files,
            cache.variable,
        )


@torch.no_grad()
def compare(backend: CompiledBackend, device: torch.device, kind: Kind) -> None:
    """Compile the passes for a kind of scores, and check on this device that they do as torch's.

    Raises:
        SelfCheckError: Naming the pass that differs.
        Exception: Whatever a compiler raises that cannot be used.
    """
    name = f"{kind.scores.__name__} of {kind.entries} as {kind.compared}"
    copies = isinstance(backend, CPUBackend)
    for scores in _examples(backend, kind, device):
        batch = Batch(scores, [index % 2 for index in range(len(scores))], kind.compared)
        clones = [replace(one, entries=one.entries.clone()) for one in scores]
        thresholds = scores[0].patterns(96, 98, kind.compared).long()
        results = _results(backend, batch, thresholds, copies)
        of_torch = _results(cast(Backend, eager), batch._replace(scores=clones), thresholds, copies)
        for (differs, result), (_, expected) in zip(results, of_torch, strict=True):
            if not _are_alike(result, expected):
                raise SelfCheckError(f"its {differs.format(name)} from torch's")


def _examples(backend: CompiledBackend, kind: Kind, device: torch.device) -> Iterator[list[Scores]]:
    """Scores of a kind at addresses and of sizes around those where a pass may go wrong."""
    generator = torch.Generator("cpu").manual_seed(0)
    for layout in filter(None, (_LAYOUT, list(backend.boundaries(kind.entries.itemsize)))):
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


def _results(
    backend: Backend, batch: Batch, thresholds: Tensor, copies: bool
) -> Iterator[tuple[str, Tensor | None]]:
    """What each pass makes of the batch, and what to call it if it differs; masks the batch."""
    new = partial(torch.zeros, device=thresholds.device)
    if not isinstance(batch.scores[0], Bits):  # Their threshold is known, so nobody counts them.
        upper, *lower = digits(batch.dtype)
        cases: list[tuple[Digit, Tensor | None]] = [(upper, None)]
        cases += [(digit, thresholds >> (digit.shift + digit.width)) for digit in lower]
        for (digit, prefixes), dtype in itertools.product(cases, [torch.int32, torch.int64]):
            counts = new(2, 1 << digit.width, dtype=dtype)
            backend.count_digits(batch, digit, prefixes, counts)
            yield "count of {} differs", counts
        if copies:
            for bits in (11, 15):  # Limits that have many scores between them, and few.
                high = thresholds + (FORMATS[batch.dtype].infinity >> bits)
                above = torch.zeros_like(thresholds)
                for copy in cast(CPUBackend, backend).copy_between(batch, thresholds, high, above):
                    yield "copies of {} differ", copy
                yield "count of high {} differs", above
    totals = new(len(batch.scores), TOTALS, dtype=torch.float64)
    backend.mask_below_(batch, thresholds, totals)
    for scores in batch.scores:
        yield "mask of {} differs", scores.entries.view(FORMATS[scores.entries.dtype].bits)
    yield "totals of {} differ", totals


def _are_alike(result: Tensor | None, expected: Tensor | None) -> bool:
    """Whether results are equal, sums up to rounding; not if one is missing."""
    if result is None or expected is None:
        return False
    if result.is_floating_point():
        return torch.allclose(result, expected, rtol=1e-4, atol=0, equal_nan=True)
    return torch.equal(result, expected)
