"""Which backend takes a pass: a compiled one where it can be had, else torch operations.

:mod:`~.numba_cpu` (Numba) works on a CPU and :mod:`~.triton_gpu` (Triton) on a GPU. A compiled
backend is compiled, and compared with :mod:`~.eager` on small tensors, before it touches a
gradient. If that fails torch operations take its place, with one warning; an error in a pass that
is under way ends the step, since a part of it has been done.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import cast

import torch
from torch import Tensor

from axolotl_gmt.kernels import eager
from axolotl_gmt.kernels.contract import Backend, Batch, CompiledBackend, CPUBackend
from axolotl_gmt.kernels.dtypes import Digit
from axolotl_gmt.kernels.scores import Kind

LOG = logging.getLogger(__name__)

# Module of the compiled passes for a type of device, and what it needs.
_COMPILED = {
    "cpu": ("axolotl_gmt.kernels.numba_cpu", "Numba"),
    "cuda": ("axolotl_gmt.kernels.triton_gpu", "Triton"),
}
# What failed: the passes of a device for a kind of scores, or all of them (None).
_failed: dict[tuple[str, Kind | None], Exception] = {}


def count_digits(batch: Batch, digit: Digit, prefixes: Tensor | None, counts: Tensor) -> None:
    """See :meth:`~.contract.Backend.count_digits`; of scores of any kinds."""
    for backend, part, _ in _parts(batch, counts.device):
        backend.count_digits(part, digit, prefixes, counts)


def copy_between(batch: Batch, low: Tensor, high: Tensor, above: Tensor) -> list[Tensor | None]:
    """See :meth:`~.contract.CPUBackend.copy_between`; of scores of any kinds."""
    copies: list[Tensor | None] = [None] * len(batch.scores)
    for backend, part, indices in _parts(batch, above.device):
        of_part = cast(CPUBackend, backend).copy_between(part, low, high, above)
        for index, copy in zip(indices, of_part, strict=True):
            copies[index] = copy
    return copies


def mask_below_(batch: Batch, thresholds: Tensor, totals: Tensor) -> None:
    """See :meth:`~.contract.Backend.mask_below_`; of scores of any kinds."""
    thresholds = thresholds.to(totals.device)
    for backend, part, indices in _parts(batch, totals.device):
        if len(indices) == len(totals):
            backend.mask_below_(part, thresholds, totals)
        else:
            of_part = torch.zeros_like(totals[: len(indices)])
            backend.mask_below_(part, thresholds, of_part)
            for index, total in zip(indices, of_part, strict=True):
                totals[index] += total


def passes(device: str, kind: Kind) -> tuple[str, Exception | None]:
    """Whose passes take scores of a kind on a type of device; compiles and checks them first.

    Returns:
        ``Numba``, ``Triton`` or ``torch``, and the error for which compiled passes are not used, if
        there was one.
    """
    if _backend(device, kind) is eager:
        return "torch", _failed.get((device, kind)) or _failed.get((device, None))
    return _COMPILED[device][1], None


def _parts(batch: Batch, device: torch.device) -> Iterator[tuple[Backend, Batch, Sequence[int]]]:
    """What one backend takes together: scores of one kind and alignment, with their indices."""
    alike: dict[tuple[Kind, bool], list[int]] = defaultdict(list)
    for index, scores in enumerate(batch.scores):
        alike[scores.kind(batch.dtype), scores.is_aligned()].append(index)
    for (kind, is_aligned), indices in alike.items():
        # Nothing was compiled or compared for memory that is not aligned.
        backend = _backend(device.type, kind) if is_aligned else cast(Backend, eager)
        yield backend, batch.pick(indices), indices


@cache
def _compiled(device: str) -> CompiledBackend | None:
    """The module of compiled passes for a type of device; None, with a warning, if it fails."""
    if device not in _COMPILED:
        return None
    try:
        return cast(CompiledBackend, import_module(_COMPILED[device][0]))
    except Exception as error:  # A package that is broken raises anything as it is imported.
        _note(device, None, error)
        return None


@cache
def _backend(device: str, kind: Kind) -> Backend:
    """The compiled passes for a kind of scores, if they do as torch's do; else torch operations."""
    compiled = _compiled(device)
    if compiled is None or (device, None) in _failed or not compiled.supports(kind):
        return cast(Backend, eager)
    from axolotl_gmt.kernels.self_check import compile_and_check

    try:
        compile_and_check(compiled, torch.device(device), kind)
    except Exception as error:
        _note(device, kind, error)
        return cast(Backend, eager)
    return compiled


def forget_backends() -> None:
    """Look for compiled passes again. Tests call it, since they change which there are."""
    _failed.clear()
    _compiled.cache_clear()
    _backend.cache_clear()


def _note(device: str, kind: Kind | None, error: Exception) -> None:
    """Remember that passes cannot be used, and warn unless others of the device could not be."""
    is_first = device not in {of_device for of_device, _ in _failed}
    _failed[device, kind] = error
    if is_first:
        _warn(device, error)


def _warn(device: str, error: Exception) -> None:
    LOG.warning(
        "GMT masks gradients on the %s with torch operations: same result, but slower, because "
        "%s cannot be used (%s: %s). Install or repair it to get the speed back.",
        device,
        _COMPILED[device][1],
        type(error).__name__,
        error,
    )
