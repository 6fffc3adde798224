"""The passes of :mod:`axolotl_gmt.passes` over memory of the CPU, compiled by Numba.

Same results as the torch versions there, several times faster: a pass reads every entry once, as
an integer, and needs no scratch memory. The entries are shared among
``torch.get_num_threads()`` threads, and none of them holds the interpreter's lock.

Importing this module needs Numba. Machine code is made on first use, some tenths of a second for
each dtype, and kept on disk by Numba's cache, so that later processes start at once.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Any, NamedTuple, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from axolotl_gmt.passes import Digit, most_candidates

DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})

_SIGNED = {2: torch.int16, 4: torch.int32}
_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}
_RUN = 64  # entries that are looked at together for a match
_SHARES_A_THREAD = 4  # so that a thread which the system holds up does not hold up the others
_SMALLEST_SHARE = 1 << 16  # entries; a thread for fewer costs more than it saves

Patterns = NDArray[np.unsignedinteger[Any]]
Counts = NDArray[np.signedinteger[Any]]


def _compiled[Function: Callable[..., Any]](function: Function) -> Function:
    """Compile on first call. Sums may be reordered, so that they can be vectorised."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # Neither the package's folder nor the user's cache folder is writable.
        return cast(Function, numba.njit(**options)(function))


@_compiled
def _count(patterns: Patterns, shift: Any, last: Any, counts: Counts) -> None:
    """Add to ``counts`` how often each value of the digit ``(pattern >> shift) & last`` occurs."""
    for index in range(patterns.size):
        counts[(patterns[index] >> shift) & last] += 1


@_compiled
def _count_matching(
    patterns: Patterns, shift: Any, last: Any, above: Any, last_above: Any, prefix: Any,
    counts: Counts,
) -> None:  # fmt: skip
    """The same, only where ``(pattern >> above) & last_above`` is ``prefix``."""
    for index in range(patterns.size):
        if (patterns[index] >> above) & last_above == prefix:
            counts[(patterns[index] >> shift) & last] += 1


@_compiled
def _copy_matching(
    patterns: Patterns, above: Any, last_above: Any, prefix: Any, into: Patterns
) -> int:
    """Copy the patterns whose bits ``above`` are ``prefix``; how many, -1 if they do not fit.

    Few entries match: a vectorised look at each run finds those that are worth a slow one.
    """
    copied = 0
    for start in range(0, patterns.size, _RUN):
        run = patterns[start : start + _RUN]
        found = False
        for index in range(run.size):
            found |= (run[index] >> above) & last_above == prefix
        if found:
            for index in range(run.size):
                if (run[index] >> above) & last_above == prefix:
                    if copied == into.size:
                        return -1
                    into[copied] = run[index]
                    copied += 1
    return copied


def _mask_below_of(dtype: torch.dtype) -> Callable[[Patterns, Any, Any], tuple[int, float, float]]:
    """The mask pass over patterns of ``dtype``, which is a constant of the compiled code.

    Written without branches, products in their place, or LLVM does not vectorise it. A product
    with False is 0 for every entry that is masked: NaN and infinity never are.
    """
    is_float32 = dtype == torch.float32
    is_bfloat16 = dtype == torch.bfloat16

    @_compiled
    def mask_below(patterns: Patterns, last: Any, threshold: Any) -> tuple[int, float, float]:
        """Zero what is below ``threshold``; the non-zero kept, sums of squares before, after."""
        kept = 0
        before = 0.0
        after = 0.0
        for index in range(patterns.size):
            pattern = patterns[index]
            magnitude = pattern & last
            keep = magnitude >= threshold
            if is_float32:
                value = np.float64(np.uint32(magnitude).view(np.float32))
            elif is_bfloat16:
                value = np.float64(np.uint32(magnitude << 16).view(np.float32))
            else:  # The fields of a float32, whose exponent's bias is larger by 112.
                no_leading_bit = magnitude < 0x0400
                bias = 112 + 112 * (magnitude >= 0x7C00) + no_leading_bit
                bits = np.uint32((magnitude << 13) + (bias << 23))
                value = np.float64(bits.view(np.float32)) - no_leading_bit * 2.0**-14
            before += value * value
            after += value * value * keep
            kept += keep & (magnitude != 0)
            patterns[index] = pattern * keep
        return kept, before, after

    return mask_below


_MASK_BELOW = {dtype: _mask_below_of(dtype) for dtype in DTYPES}


class _Piece(NamedTuple):
    """Neighbouring entries of one tensor.

    Attributes:
        tensor: Which of the pass's tensors.
        patterns: Bit patterns, a view of the tensor's memory.
    """

    tensor: int
    patterns: Patterns


def _shares(tensors: Sequence[Tensor]) -> list[list[_Piece]]:
    """All entries, in order, cut into equal shares, several for each thread."""
    entries = sum(tensor.numel() for tensor in tensors)
    wanted = torch.get_num_threads() * _SHARES_A_THREAD
    size = max(_SMALLEST_SHARE, -(-entries // wanted))
    shares: list[list[_Piece]] = [[] for _ in range(-(-entries // size))]
    done = 0
    for index, tensor in enumerate(tensors):
        unsigned = torch.uint16 if tensor.element_size() == 2 else torch.uint32
        patterns = tensor.detach().view(unsigned).numpy()
        start = 0
        while start < patterns.size:
            share = done // size
            stop = min(patterns.size, start + (share + 1) * size - done)
            shares[share].append(_Piece(index, patterns[start:stop]))
            done += stop - start
            start = stop
    return shares


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that wait for work; ``process`` is its id, for threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"axolotl_gmt-{process}")


def _in_threads(work: Callable[[int], None], shares: int) -> None:
    """``work(share)`` for each share; whichever thread is free, this one too, takes the next."""
    waiting = deque(range(shares))

    def take_turns() -> None:
        while waiting:
            try:
                share = waiting.popleft()
            except IndexError:  # Another thread was faster.
                return
            work(share)

    others = min(torch.get_num_threads(), shares) - 1
    running = [_pool(others, os.getpid()).submit(take_turns) for _ in range(others)]
    take_turns()
    for thread in running:
        thread.result()


def _scalars(dtype: torch.dtype, values: Tensor) -> list[np.unsignedinteger[Any]]:
    """``values`` as integers of the width of ``dtype``, which keeps the compiled loops narrow."""
    return list(values.numpy().astype(_UNSIGNED[dtype.itemsize]))


def _bits_from(
    dtype: torch.dtype, shift: int
) -> tuple[np.unsignedinteger[Any], np.unsignedinteger[Any]]:
    """``shift``, and the mask of the bits from there up to the sign, after the shift."""
    unsigned = _UNSIGNED[dtype.itemsize]
    return unsigned(shift), unsigned(torch.iinfo(_SIGNED[dtype.itemsize]).max >> shift)


def count_digits(
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    dtype: torch.dtype,
    digit: Digit,
    prefixes: Tensor | None,
    counts: Tensor,
) -> None:
    """:func:`axolotl_gmt.passes.count_digits` for CPU tensors that all are ``dtype``.

    A row that lies within one share is counted where it belongs. The others, two for most shares,
    are counted apart and added when the share is done.
    """
    shares = [(share, {rows[piece.tensor] for piece in share}) for share in _shares(tensors)]
    spans = Counter(row for _, here in shares for row in here)
    table: Counts = counts.numpy()
    unsigned = _UNSIGNED[dtype.itemsize]
    shift, last = unsigned(digit.shift), unsigned((1 << digit.width) - 1)
    above, last_above = _bits_from(dtype, digit.shift + digit.width)
    wanted = None if prefixes is None else _scalars(dtype, prefixes)
    adding = Lock()

    def count(index: int) -> None:
        share, here = shares[index]
        into = {row: table[row] if spans[row] == 1 else np.zeros_like(table[row]) for row in here}
        for tensor, patterns in share:
            row = rows[tensor]
            if wanted is None:
                _count(patterns, shift, last, into[row])
            else:
                _count_matching(patterns, shift, last, above, last_above, wanted[row], into[row])
        with adding:
            for row in here:
                if spans[row] > 1:
                    table[row] += into[row]

    _in_threads(count, len(shares))


def keep_candidates(
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    dtype: torch.dtype,
    shift: int,
    prefixes: Tensor,
) -> list[Tensor]:
    """:func:`axolotl_gmt.passes.keep_candidates` for CPU tensors that all are ``dtype``."""
    shares = _shares(tensors)
    above, last_above = _bits_from(dtype, shift)
    wanted = _scalars(dtype, prefixes)
    found: list[list[Patterns | None]] = [[] for _ in shares]

    def copy(index: int) -> None:
        largest = max(piece.patterns.size for piece in shares[index])
        room = np.empty(most_candidates(largest), _UNSIGNED[dtype.itemsize])
        for tensor, patterns in shares[index]:
            into = room[: most_candidates(patterns.size)]
            copied = _copy_matching(patterns, above, last_above, wanted[rows[tensor]], into)
            found[index].append(None if copied < 0 else into[:copied].copy())

    _in_threads(copy, len(shares))
    candidates: list[list[Patterns | None]] = [[] for _ in tensors]
    for share, results in zip(shares, found, strict=True):
        for piece, result in zip(share, results, strict=True):
            candidates[piece.tensor].append(result)
    return [_joined(tensor, parts) for tensor, parts in zip(tensors, candidates, strict=True)]


def _joined(tensor: Tensor, parts: Sequence[Patterns | None]) -> Tensor:
    """The candidates of ``tensor``, or itself if a part of it has too many."""
    there = [part for part in parts if part is not None]
    if not parts or len(there) < len(parts):
        return tensor
    return torch.from_numpy(np.concatenate(there)).view(tensor.dtype)


def mask_below_(
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    dtype: torch.dtype,
    thresholds: Tensor,
    totals: Tensor,
) -> None:
    """:func:`axolotl_gmt.passes.mask_below_` for CPU tensors that all are ``dtype``."""
    shares = _shares(tensors)
    _, last = _bits_from(dtype, 0)
    wanted = _scalars(dtype, thresholds)
    found: list[list[tuple[int, float, float]]] = [[] for _ in shares]

    def mask(index: int) -> None:
        for tensor, patterns in shares[index]:
            found[index].append(_MASK_BELOW[dtype](patterns, last, wanted[rows[tensor]]))

    _in_threads(mask, len(shares))
    table: NDArray[np.float64] = totals.numpy()
    for share, results in zip(shares, found, strict=True):  # In order: the same sums every time.
        for piece, result in zip(share, results, strict=True):
            table[piece.tensor] += (piece.patterns.size, *result)
