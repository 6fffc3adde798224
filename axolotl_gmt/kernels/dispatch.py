"""The passes over the gradients' memory: count bit patterns, and set to zero what lost.

The torch versions here say what a pass does and run everywhere. Where they can be had, compiled
versions with the same results take their place: :mod:`~.numba_cpu` (Numba) on a CPU
and :mod:`~.triton_gpu` (Triton) on a GPU. A compiled version is compiled, and compared with
torch's on small tensors, before it touches a gradient. If that fails torch's are used, with one
warning; an error in a pass that is under way ends the step, since a part of it has been done.

Nothing here but :func:`keep_candidates` and :func:`keep_between` reads a value back from a device.

Knows flat tensors, their scores and rows of counts only.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from axolotl_gmt.kernels.scores import Hashes, Kind, Magnitudes, Products, Scores

LOG = logging.getLogger(__name__)

_PATTERN_DTYPE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # entries of scratch memory a torch pass; small enough to stay in a CPU's cache

# Module of the compiled passes for a type of device, and what it needs.
_COMPILED = {
    "cpu": ("axolotl_gmt.kernels.numba_cpu", "Numba"),
    "cuda": ("axolotl_gmt.kernels.triton_gpu", "Triton"),
}


class Digit(NamedTuple):
    """Bits ``shift`` to ``shift + width`` of a pattern."""

    shift: int
    width: int


class Backend(Protocol):
    """What a module of compiled passes owes: the passes below, for scores that all are alike.

    All scores of a call are of one :class:`~.scores.Kind`, and ``dtype`` is theirs
    (:attr:`~.scores.Scores.dtype`). A pass ends when all its work is done or, with an
    error, when none of it goes on.
    """

    DTYPES: frozenset[torch.dtype]

    def supports(self, kind: Kind) -> bool:
        """Whether there are passes for scores of that kind."""

    def count_digits(
        self,
        scores: Sequence[Any],
        rows: Sequence[int],
        dtype: torch.dtype,
        digit: Digit,
        prefixes: Tensor | None,
        counts: Tensor,
    ) -> None:
        """See :func:`count_digits`."""

    def mask_below_(
        self,
        scores: Sequence[Any],
        rows: Sequence[int],
        dtype: torch.dtype,
        thresholds: Tensor,
        totals: Tensor,
    ) -> None:
        """See :func:`mask_below_`."""


class CPUBackend(Backend, Protocol):
    """What the passes for a CPU owe beyond."""

    def keep_candidates(
        self,
        scores: Sequence[Any],
        rows: Sequence[int],
        dtype: torch.dtype,
        shift: int,
        prefixes: Tensor,
    ) -> list[Scores]:
        """See :func:`keep_candidates`."""

    def keep_between(
        self,
        scores: Sequence[Any],
        rows: Sequence[int],
        low: Tensor,
        high: Tensor,
        above: Tensor,
    ) -> list[Scores | None]:
        """See :func:`keep_between`."""

    def give_up_cache(self) -> str | None:
        """Keep no machine code on disk any more; the folder where it was, None if nowhere."""


def magnitude_patterns(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Bit patterns of ``|entries|`` as ``dtype``: integers in the order of the magnitudes."""
    patterns = entries.to(dtype).view(_PATTERN_DTYPE[dtype.itemsize])
    return patterns & torch.iinfo(patterns.dtype).max


def chunk_size(device: torch.device) -> int:
    """How many scored entries to work on at a time, which bounds the memory of what is in between.

    On a CPU few enough to stay in its cache, and for torch to use one thread: where another process
    holds a core, the barrier between threads costs many times the work.
    """
    return 1 << 15 if device.type == "cpu" else 1 << 22


def no_counts(rows: int, bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros ``(rows, bins)``.

    On a CPU neither this nor :func:`sum_neighbours` uses torch's threads: the work is small, and
    where another process holds a core, as data loaders do, their barrier waits for milliseconds.
    """
    if device.type != "cpu":
        return torch.zeros(rows, bins, dtype=dtype, device=device)
    counts = torch.empty(rows, bins, dtype=dtype, device="cpu")
    counts.numpy().fill(0)
    return counts


def sum_neighbours(counts: Tensor) -> Tensor:
    """Sums of 256 neighbouring bins: counts ``(rows, bins)`` to int64 ``(rows, bins / 256)``."""
    fine = counts.view(len(counts), -1, 256)
    if not counts.is_cpu:
        return fine.sum(-1)
    # In the dtype of the counts, which holds the entries of a whole row; einsum is the fastest sum.
    return torch.from_numpy(np.einsum("rbk->rb", fine.numpy())).long()


def copies_candidates(device: torch.device) -> bool:
    """Whether entries that can still be the threshold are copied, so that lower digits are cheap.

    On a GPU nobody knows how many there are without waiting for it.
    """
    return device.type == "cpu"


def count_digits(
    scores: Sequence[Scores],
    rows: Sequence[int],
    dtype: torch.dtype,
    digit: Digit,
    prefixes: Tensor | None,
    counts: Tensor,
) -> None:
    """Add to ``counts`` how often each value of one digit occurs among the scores of each row.

    Args:
        scores: Scores of any kinds, of entries that are all on the device of ``counts``.
        rows: The row that the scores of each tensor are counted in.
        dtype: The dtype whose patterns are counted (scores are converted exactly).
        digit: Which bits of the pattern.
        prefixes: int64 ``(rows,)``; only entries whose bits above the digit equal that of their
            row count. None, for the upper digit: all do.
        counts: int32 or int64 ``(rows, 2 ** digit.width)``, contiguous, added to in place.
    """
    for part in _parts(scores, rows, dtype, counts.device):
        if part.backend is None:
            for score, row in zip(part.scores, part.rows, strict=True):
                _count_by_torch(score, row, dtype, digit, prefixes, counts)
        elif part.dtype == dtype:
            part.backend.count_digits(part.scores, part.rows, dtype, digit, prefixes, counts)
        elif prefixes is None:  # bfloat16 is the upper half of float32.
            own = Digit(digit.shift - 16, digit.width)
            part.backend.count_digits(part.scores, part.rows, part.dtype, own, None, counts)
        else:  # The lower half of these is 0, so that all that match lie in the first bin.
            own_prefixes = _upper_half(prefixes, digit.shift + digit.width)
            matches = no_counts(len(counts), 1, counts.dtype, counts.device)
            part.backend.count_digits(
                part.scores, part.rows, part.dtype, Digit(0, 0), own_prefixes, matches
            )
            counts[:, :1] += matches


def most_candidates(entries: int) -> int:
    """How many of ``entries`` are worth a copy: below 1% of the memory, but for small tensors."""
    return max(64, entries >> 7)


def keep_candidates(
    scores: Sequence[Scores],
    rows: Sequence[int],
    dtype: torch.dtype,
    shift: int,
    prefixes: Tensor,
) -> list[Scores]:
    """The scores that can still be the threshold, copied, so that lower digits read only these.

    Takes one more read of all entries, and reads back how many there are: for the CPU alone.

    Args:
        scores: Scores of any kinds, of entries on the CPU.
        rows: The row of ``prefixes`` that the scores of each tensor are compared with.
        dtype: The dtype whose patterns are compared.
        shift: Scores are kept whose bits from here up, without the sign, are ``prefixes``.
        prefixes: int64 ``(rows,)``.

    Returns:
        For each tensor its scores that match; all of them, as they were given, if there are many.
    """
    kept = list(scores)
    for part in _parts(scores, rows, dtype, prefixes.device):
        if part.backend is None:
            copies: list[Scores] = [
                _candidates_by_torch(score, dtype, shift, prefixes[row])
                for score, row in zip(part.scores, part.rows, strict=True)
            ]
        else:
            backend = cast(CPUBackend, part.backend)
            own_shift, own_prefixes = shift, prefixes
            if part.dtype != dtype:
                own_shift, own_prefixes = max(shift - 16, 0), _upper_half(prefixes, shift)
            copies = backend.keep_candidates(
                part.scores, part.rows, part.dtype, own_shift, own_prefixes
            )
        for index, copy in zip(part.indices, copies, strict=True):
            kept[index] = copy
    return kept


def finds_between(scores: Sequence[Scores], dtype: torch.dtype) -> bool:
    """Whether :func:`keep_between` can take these scores: hashes, for which there is a pass."""
    cpu = torch.device("cpu")
    return (
        copies_candidates(cpu)
        and all(isinstance(score, Hashes) and score.entries.is_cpu for score in scores)
        and all(part.backend for part in _parts(scores, range(len(scores)), dtype, cpu))
    )


def keep_between(
    scores: Sequence[Scores],
    rows: Sequence[int],
    dtype: torch.dtype,
    low: Tensor,
    high: Tensor,
    above: Tensor,
) -> list[Scores | None]:
    """Copies of the scores from ``low`` to below ``high``, and how many are higher; on the CPU.

    Args:
        scores: Scores that :func:`finds_between` accepts.
        rows: The row of each tensor.
        dtype: The dtype of the patterns.
        low: int64 ``(rows,)``, patterns.
        high: int64 ``(rows,)``, patterns.
        above: int64 ``(rows,)``, to which the number of scores of at least ``high`` is added.

    Returns:
        For each tensor its scores between, or None if they are too many to be worth a copy.
    """
    kept: list[Scores | None] = [None] * len(scores)
    for part in _parts(scores, rows, dtype, torch.device("cpu")):
        backend = cast(CPUBackend, part.backend)
        copies = backend.keep_between(part.scores, part.rows, low, high, above)
        for index, copy in zip(part.indices, copies, strict=True):
            kept[index] = copy
    return kept


def mask_below_(
    scores: Sequence[Scores],
    rows: Sequence[int],
    dtype: torch.dtype,
    thresholds: Tensor,
    totals: Tensor,
) -> None:
    """Set to zero, in place, the entries whose score is below the threshold (Li et al., M).

    Args:
        scores: Scores of any kinds, of entries that are all on the device of ``totals``.
        rows: The row of ``thresholds`` that the scores of each tensor are compared with.
        dtype: The dtype of the thresholds' bit patterns.
        thresholds: int64 ``(rows,)`` from :func:`~axolotl_gmt.masking.threshold.find_thresholds`.
        totals: float64 ``(tensors, 4)``, added to in place: for each tensor its entries, those
            that are non-zero afterwards, the sum of squares before, and afterwards.
    """
    thresholds = thresholds.to(totals.device)
    for part in _parts(scores, rows, dtype, totals.device):
        if part.backend is None:
            for index, score, row in zip(part.indices, part.scores, part.rows, strict=True):
                _mask_by_torch_(score, dtype, thresholds[row], totals[index])
            continue
        # A bfloat16 entry is at least a float32 threshold if its pattern is at least the next one.
        own = thresholds if part.dtype == dtype else (thresholds + 0xFFFF) >> 16
        if len(part.indices) == len(scores):
            part.backend.mask_below_(part.scores, part.rows, part.dtype, own, totals)
        else:
            found = torch.zeros(len(part.indices), 4, dtype=torch.float64, device=totals.device)
            part.backend.mask_below_(part.scores, part.rows, part.dtype, own, found)
            for index, total in zip(part.indices, found, strict=True):
                totals[index] += total


def _upper_half(prefixes: Tensor, shift: int) -> Tensor:
    """The upper 16 bits of float32 patterns whose bits from ``shift`` up are ``prefixes``.

    For ``shift`` from 16 on all that is asked are the prefixes themselves. Below, what no bfloat16
    has, a bit of the lower half, makes a prefix that matches nothing.
    """
    rest = 16 - shift
    if rest <= 0:
        return prefixes
    return torch.where(prefixes & ((1 << rest) - 1) == 0, prefixes >> rest, 0x8000)


def _chunks(scores: Scores) -> Iterator[tuple[Tensor, Tensor]]:
    """Entries and their scores, a chunk at a time."""
    size = _CHUNK if isinstance(scores, Magnitudes) else chunk_size(scores.entries.device)
    for start in range(0, len(scores.entries), size):
        stop = min(start + size, len(scores.entries))
        yield scores.entries[start:stop], scores.values(start, stop)


def _count_by_torch(
    scores: Scores,
    row: int,
    dtype: torch.dtype,
    digit: Digit,
    prefixes: Tensor | None,
    counts: Tensor,
) -> None:
    bins = 1 << digit.width
    for _, chunk in _chunks(scores):
        patterns = magnitude_patterns(chunk, dtype)
        values = patterns >> digit.shift
        if prefixes is not None:
            above = patterns >> (digit.shift + digit.width)
            values = torch.where(above == prefixes[row], values & (bins - 1), bins)
        if values.is_cpu:
            found = torch.bincount(values, minlength=bins + 1)
        else:  # bincount reads the largest value back to the host
            found = torch.zeros(bins + 1, dtype=torch.int64, device=values.device)
            found.scatter_add_(0, values.long(), torch.ones_like(values, dtype=torch.int64))
        counts[row] += found[:bins]


def _mask_by_torch_(scores: Scores, dtype: torch.dtype, threshold: Tensor, total: Tensor) -> None:
    total[0] += scores.entries.numel()
    for entries, chunk in _chunks(scores):
        before = torch.linalg.vector_norm(entries, dtype=torch.float64)
        entries.masked_fill_(magnitude_patterns(chunk, dtype) < threshold, 0)
        after = torch.linalg.vector_norm(entries, dtype=torch.float64)
        total[1:] += torch.stack([entries.count_nonzero(), before.square(), after.square()])


def _candidates_by_torch(scores: Scores, dtype: torch.dtype, shift: int, prefix: Tensor) -> Scores:
    most = most_candidates(scores.entries.numel())
    copies = [scores.values(0, 0)]
    for _, chunk in _chunks(scores):
        copies.append(chunk[magnitude_patterns(chunk, dtype) >> shift == prefix])
        if sum(copy.numel() for copy in copies) > most:
            return scores
    return Magnitudes(torch.cat(copies))


class _Part(NamedTuple):
    """Those scores of a call that one backend takes together; None stands for torch."""

    backend: Backend | None
    dtype: torch.dtype
    indices: Sequence[int]
    scores: Sequence[Scores]
    rows: Sequence[int]


def _parts(
    scores: Sequence[Scores], rows: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterator[_Part]:
    alike: dict[tuple[Kind, bool], list[int]] = defaultdict(list)
    for index, score in enumerate(scores):
        alike[score.kind, score.is_aligned].append(index)
    for (kind, is_aligned), indices in alike.items():
        picked = [scores[index] for index in indices]
        own = picked[0].dtype
        fits = own == dtype or (own, dtype) == (torch.bfloat16, torch.float32)
        fits = fits and is_aligned  # Nothing was compiled or compared for other memory.
        backend = _backend(device.type, kind) if fits else None
        yield _Part(backend, own, indices, picked, [rows[index] for index in indices])


@cache
def _module(device: str) -> Backend | None:
    """The module of compiled passes for a type of device; None, with a warning, if it fails."""
    if device not in _COMPILED:
        return None
    try:
        return cast(Backend, import_module(_COMPILED[device][0]))
    except Exception as error:  # A package that is broken raises anything as it is imported.
        _warn(device, error)
        return None


@cache
def _backend(device: str, kind: Kind) -> Backend | None:
    """The compiled passes for a kind of scores, compiled and compared with torch's; or None."""
    module = _module(device)
    if module is None or device in _failed or not module.supports(kind):
        return None
    try:
        try:
            compare_with_torch(module, torch.device(device), kind)
        except Exception as error:
            # A full disk or a damaged file: what is compiled anew runs all the same.
            folder = module.give_up_cache() if hasattr(module, "give_up_cache") else None
            if folder is None:
                raise
            compare_with_torch(module, torch.device(device), kind)
            LOG.warning(
                "GMT compiles its passes anew in every run, which takes some seconds, because the "
                "machine code kept in %s cannot be used or written (%s: %s). Make room there, or "
                "delete that folder's kernels_cpu.* files, or name another one by NUMBA_CACHE_DIR.",
                folder,
                type(error).__name__,
                error,
            )
    except Exception as error:
        _failed.add(device)
        _warn(device, error)
        return None
    return module


_failed: set[str] = set()


def forget_backends() -> None:
    """Look for compiled passes again, for instance after an installation."""
    _failed.clear()
    _module.cache_clear()
    _backend.cache_clear()


# Offset and size, in entries, of tensors that are compared: empty, tiny, and of several threads.
_LAYOUT = [(0, 3000), (3, 70_001), (1, 0), (2, 1), (1, 63), (0, 65)]


@torch.no_grad()
def compare_with_torch(module: Backend, device: torch.device, kind: Kind) -> None:
    """Compile the passes for a kind of scores, and check on this device that they do as torch's.

    Raises:
        RuntimeError: Naming the pass that differs.
        Exception: Whatever a compiler raises that cannot be used.
    """
    for scores in _examples(module, kind, device):
        _compare(module, scores, device)


def _examples(module: Backend, kind: Kind, device: torch.device) -> Iterator[list[Scores]]:
    """Scores of a kind at addresses and of sizes around those where a pass may go wrong."""
    layouts = [_LAYOUT]
    if hasattr(module, "boundaries"):
        layouts.append(list(module.boundaries(kind.entries.itemsize)))
    generator = torch.Generator("cpu").manual_seed(0)
    for layout in layouts:
        scores = []
        for offset, size in layout:
            values, weights = torch.randn(2, offset + size, generator=generator, device="cpu")
            values[offset::7] = 0
            broken = torch.tensor([float("nan"), float("inf"), -float("inf")], device="cpu")
            values[offset : offset + 3] = broken[:size]
            entries = values.to(kind.entries).to(device)[offset:]
            if kind.scores is Products:
                of_weights = weights.to(cast(torch.dtype, kind.weights)).to(device)[offset:]
                scores.append(cast(Scores, Products(entries, of_weights)))
            elif kind.scores is Hashes:
                scores.append(Hashes(entries, -0x123456789ABCDEF * (1 + offset), offset * size))
            else:
                scores.append(Magnitudes(entries))
        yield scores


def _compare(module: Backend, scores: list[Scores], device: torch.device) -> None:
    dtype, what = scores[0].dtype, f"{scores[0].kind.scores.__name__} of {scores[0].kind.entries}"
    rows = [index % 2 for index in range(len(scores))]
    some = magnitude_patterns(scores[0].values(100, 102), dtype).long()
    upper = Digit(dtype.itemsize * 8 - 16, 15)
    lower: list[tuple[Digit, Tensor | None]] = [(Digit(0, 0), some)]
    if upper.shift:
        width = 8 if copies_candidates(device) else 16
        lower = [(Digit(16 - width, width), some >> 16)]
    for (digit, prefixes), counts_dtype in itertools.product(
        [(upper, None), *lower], [torch.int32, torch.int64]
    ):
        counted = torch.zeros(2, 1 << digit.width, dtype=counts_dtype, device=device)
        expected = torch.zeros_like(counted)
        module.count_digits(scores, rows, dtype, digit, prefixes, counted)
        for score, row in zip(scores, rows, strict=True):
            _count_by_torch(score, row, dtype, digit, prefixes, expected)
        if not torch.equal(counted, expected):
            raise RuntimeError(f"its count of {what} differs from torch's")
    if copies_candidates(device):
        _compare_copies(cast(CPUBackend, module), scores, rows, some, what)
    totals = torch.zeros(len(scores), 4, dtype=torch.float64, device=device)
    expected = torch.zeros_like(totals)
    by_torch = [
        type(score)(**{**vars(score), "entries": score.entries.clone()}) for score in scores
    ]
    module.mask_below_(scores, rows, dtype, some, totals)
    for score, copy, row, total in zip(scores, by_torch, rows, expected, strict=True):
        _mask_by_torch_(copy, dtype, some[row], total)
        pattern = _PATTERN_DTYPE[copy.entries.itemsize]
        if not torch.equal(score.entries.view(pattern), copy.entries.view(pattern)):
            raise RuntimeError(f"its mask of {what} differs from torch's")
    torch.testing.assert_close(totals, expected, rtol=1e-4, atol=0, equal_nan=True)


def _compare_copies(
    module: CPUBackend, scores: list[Scores], rows: list[int], some: Tensor, what: str
) -> None:
    dtype = scores[0].dtype
    shift = dtype.itemsize * 8 - 16
    copies = module.keep_candidates(scores, rows, dtype, shift, some >> shift)
    for score, copy, row in zip(scores, copies, rows, strict=True):
        values = _candidates_by_torch(score, dtype, shift, some[row] >> shift)
        one, other = (
            magnitude_patterns(found.values(0, len(found.entries)), dtype)
            for found in (copy, values)
        )
        if not torch.equal(one, other):
            raise RuntimeError(f"its candidates of {what} differ from torch's")
    if not isinstance(scores[0], Hashes):
        return
    low, high, above = some, some + 20_000, torch.zeros(2, dtype=torch.int64, device="cpu")
    higher = torch.zeros_like(above)
    between = module.keep_between(scores, rows, low, high, above)
    for score, row, found in zip(scores, rows, between, strict=True):
        patterns = magnitude_patterns(score.values(0, len(score.entries)), dtype)
        higher[row] += (patterns >= high[row]).sum()
        expected = patterns[(patterns >= low[row]) & (patterns < high[row])]
        if found is not None and not torch.equal(found.entries.view(torch.int32), expected):
            raise RuntimeError(f"its choice of {what} differs from torch's")
    if not torch.equal(above, higher):
        raise RuntimeError(f"its count of high {what} differs from torch's")


def _warn(device: str, error: Exception) -> None:
    LOG.warning(
        "GMT masks gradients on the %s with torch operations: same result, but slower, because "
        "%s cannot be used (%s: %s). Install or repair it to get the speed back.",
        device,
        _COMPILED[device][1],
        type(error).__name__,
        error,
    )
