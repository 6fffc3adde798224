# mypy: disable-error-code="untyped-decorator, import-untyped, attr-defined"
"""The passes of :mod:`~.dispatch` over memory of the CPU, compiled by Numba.

Same results as the torch versions there, several times faster: a pass reads every entry once, as
an integer, and needs no scratch memory. The entries are shared among
``torch.get_num_threads()`` threads, and none of them holds the interpreter's lock. Scores other
than magnitudes are made for a block of entries that stays in the fastest cache.

Importing this module needs Numba. Machine code is made on first use, some tenths of a second for
each kind of scores, and kept on disk by Numba's cache, so that later processes start at once.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Condition, Lock
from typing import Any, ClassVar, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from axolotl_gmt.kernels.dispatch import Digit, most_candidates
from axolotl_gmt.kernels.scores import Hashes, Kind, Magnitudes, Products, Scores

DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})

_SIGNED = {2: torch.int16, 4: torch.int32}
_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}
_RUN = 32  # entries that are looked at together for a match
_BLOCK = 256  # entries that a loop takes together; fewer cost more, with more the memory waits
_SHARES_A_THREAD = 4  # so that a thread which the system holds up does not hold up the others
_SMALLEST_SHARE = 1 << 16  # entries; a thread for fewer costs more than it saves

Patterns = NDArray[np.unsignedinteger[Any]]
Counts = NDArray[np.signedinteger[Any]]

# Sums may be reordered, so that they can be vectorised.
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
_inner = numba.njit(**_OPTIONS)  # For what only compiled code calls.


class _Pass:
    """A function that is compiled at its first call, by Numba, for the types of that call."""

    every: ClassVar[list[_Pass]] = []

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        try:
            self._compiled = numba.njit(cache=True, **_OPTIONS)(function)
        except RuntimeError:  # Neither the package's folder nor the user's can be written.
            self._compiled = numba.njit(**_OPTIONS)(function)
        self.every.append(self)

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled(*arguments)

    def give_up_cache(self) -> str | None:
        """Compile anew, and keep nothing on disk; where the code was kept, None if nowhere."""
        folder: str | None = self._compiled.stats.cache_path
        self._compiled = numba.njit(**_OPTIONS)(self._function)
        return folder


def give_up_cache() -> str | None:
    """:meth:`axolotl_gmt.kernels.dispatch.CPUBackend.give_up_cache`."""
    folders = [a_pass.give_up_cache() for a_pass in _Pass.every]
    return folders[0]


def supports(kind: Kind) -> bool:
    """Whether there are passes for scores of that kind; not for products with float16."""
    if kind.scores is Products:
        return {kind.entries, kind.weights} <= {torch.bfloat16, torch.float32}
    return kind.scores in (Magnitudes, Hashes) and kind.entries in DTYPES


@_inner
def _count(patterns: Patterns, shift: Any, last: Any, counts: Counts, digits: Patterns) -> None:
    # Digits first, a block at a time: that loop is vectorised, and brings in what comes next from
    # memory faster than the other, whose every turn waits for a bin.
    for start in range(0, patterns.size, digits.size):
        run = patterns[start : start + digits.size]
        for index in range(run.size):
            digits[index] = (run[index] >> shift) & last
        for index in range(run.size):
            counts[digits[index]] += 1


@_inner
def _count_matching(
    patterns: Patterns, shift: Any, last: Any, above: Any, last_above: Any, prefix: Any,
    counts: Counts,
) -> None:  # fmt: skip
    for index in range(patterns.size):
        if (patterns[index] >> above) & last_above == prefix:
            counts[(patterns[index] >> shift) & last] += 1


@_inner
def _copy_between(
    patterns: Patterns, last: Any, low: Any, high: Any, into: Patterns, copied: int
) -> tuple[int, int]:
    """Append to ``into[:copied]`` the magnitudes from low to below high.

    Few do: a vectorised look at each run finds those that are worth a slow one.

    Returns:
        How many there are now, -1 if they do not fit; and how many magnitudes are not below high.
    """
    narrow = patterns.dtype.type
    higher = 0
    for start in range(0, patterns.size, _RUN):
        run = patterns[start : start + _RUN]
        from_low, from_high = narrow(0), narrow(0)  # As narrow as the entries, for more at once.
        for index in range(run.size):
            magnitude = narrow(run[index] & last)
            from_low = narrow(from_low + (magnitude >= low))
            from_high = narrow(from_high + (magnitude >= high))
        higher += int(from_high)
        if from_low != from_high and copied >= 0:
            for index in range(run.size):
                magnitude = narrow(run[index] & last)
                if (magnitude >= low) & (magnitude < high):
                    if copied == into.size:
                        copied = -1
                        break
                    into[copied] = magnitude
                    copied += 1
    return copied, higher


_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_INFINITY = np.uint32(0x7F800000)


@_inner
def _score(
    entries: Patterns, weights: Patterns, source: _Source, start: int, into: Patterns
) -> None:
    """Patterns of float32 scores of ``into.size`` entries from ``start`` on.

    Products if there are weights, as :class:`~.scores.Products` says, whose NaN lies
    above infinity; else hashes, as :func:`~.scores.uniform` makes them.
    """
    entry_shift, weight_shift, last, infinity, key, position = source
    # Slices, since an index that is a sum could be negative, and then nothing is vectorised.
    entries = entries[start : start + into.size]
    if weights.size:
        weights = weights[start : start + into.size]
        for index in range(into.size):
            entry = np.uint32(np.uint32(entries[index]) << entry_shift).view(np.float32)
            weight = np.uint32(np.uint32(weights[index]) << weight_shift).view(np.float32)
            pattern = np.float32(entry * weight).view(np.uint32) & np.uint32(0x7FFFFFFF)
            into[index] = min(pattern, _INFINITY)
    else:
        state = (position + np.uint64(start)) * _FACTOR + key
        for index in range(into.size):
            x = (state ^ (state >> np.uint64(30))) * _FACTORS[0]
            x = (x ^ (x >> np.uint64(27))) * _FACTORS[1]
            x = x ^ (x >> np.uint64(31))
            upper = np.float32(np.int32(x >> np.uint64(40)))
            into[index] = np.float32(upper * np.float32(2.0**-24)).view(np.uint32)
            state += _FACTOR
        is_broken = False
        for index in range(into.size):
            is_broken |= (entries[index] & last) >= infinity
        if is_broken:
            for index in range(into.size):
                if (entries[index] & last) >= infinity:
                    into[index] = _INFINITY


@_inner
def _sum_of_squares(patterns: Patterns, shift: Any, last: Any) -> float:
    """In float64; ``shift`` is how much wider than the entries' mantissa that of float32 is."""
    total = 0.0
    if shift == 13:  # float16, whose exponent's bias is smaller by 112.
        for index in range(patterns.size):
            magnitude = patterns[index] & last
            no_leading_bit = magnitude < 0x0400
            bias = 112 + 112 * (magnitude >= 0x7C00) + no_leading_bit
            bits = np.uint32((magnitude << 13) + (bias << 23))
            value = np.float64(bits.view(np.float32)) - no_leading_bit * 2.0**-14
            total += value * value
    else:
        for index in range(patterns.size):
            bits = np.uint32(np.uint32(patterns[index] & last) << shift)
            value = np.float64(bits.view(np.float32))
            total += value * value
    return total


@_inner
def _count_non_zero(patterns: Patterns, last: Any) -> Any:
    """Of a block, which is small enough to count in the width of an entry."""
    narrow = patterns.dtype.type
    count = narrow(0)
    for index in range(patterns.size):
        count = narrow(count + (narrow(patterns[index] & last) != 0))
    return count


@_Pass
def _count_magnitudes(patterns: Patterns, shift: Any, last: Any, counts: Counts) -> None:
    """Add to ``counts`` how often each value of the digit ``(pattern >> shift) & last`` occurs."""
    _count(patterns, shift, last, counts, np.empty(_BLOCK, np.uint16))


@_Pass
def _count_matching_magnitudes(
    patterns: Patterns, shift: Any, last: Any, above: Any, last_above: Any, prefix: Any,
    counts: Counts,
) -> None:  # fmt: skip
    """The same, only where ``(pattern >> above) & last_above`` is ``prefix``."""
    _count_matching(patterns, shift, last, above, last_above, prefix, counts)


@_Pass
def _copy_magnitudes(
    patterns: Patterns, last: Any, low: Any, high: Any, into: Patterns
) -> tuple[int, int]:
    """Copy the magnitudes from low to below high; how many, and how many lie above these."""
    copied, higher = _copy_between(patterns, last, low, high, into, 0)
    return copied, higher


@_Pass
def _count_scores(
    entries: Patterns, weights: Patterns, source: _Source, shift: Any, last: Any, counts: Counts
) -> None:
    """:func:`_count_magnitudes` of scores."""
    block, digits = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint16)
    for start in range(0, entries.size, _BLOCK):
        scores = block[: min(_BLOCK, entries.size - start)]
        _score(entries, weights, source, start, scores)
        _count(scores, shift, last, counts, digits)


@_Pass
def _count_matching_scores(
    entries: Patterns, weights: Patterns, source: _Source, shift: Any, last: Any, above: Any,
    last_above: Any, prefix: Any, counts: Counts,
) -> None:  # fmt: skip
    """:func:`_count_matching_magnitudes` of scores."""
    block = np.empty(_BLOCK, np.uint32)
    for start in range(0, entries.size, _BLOCK):
        scores = block[: min(_BLOCK, entries.size - start)]
        _score(entries, weights, source, start, scores)
        _count_matching(scores, shift, last, above, last_above, prefix, counts)


@_Pass
def _copy_scores(
    entries: Patterns, weights: Patterns, source: _Source, last: Any, low: Any, high: Any,
    into: Patterns,
) -> tuple[int, int]:  # fmt: skip
    """:func:`_copy_magnitudes` of scores."""
    block = np.empty(_BLOCK, np.uint32)
    copied = higher = 0
    for start in range(0, entries.size, _BLOCK):
        scores = block[: min(_BLOCK, entries.size - start)]
        _score(entries, weights, source, start, scores)
        copied, more = _copy_between(scores, last, low, high, into, copied)
        higher += more
    return copied, higher


@_Pass
def _mask_magnitudes(
    patterns: Patterns, shift: Any, last: Any, threshold: Any
) -> tuple[int, float, float]:
    """Zero what is below ``threshold``; the non-zero kept, sums of squares before, after.

    One short loop for each of these over a block that stays in the fastest cache: LLVM vectorises
    them better than one loop that does it all. Products stand in the place of branches; a product
    with False is 0 for every entry that is masked: NaN and infinity never are.
    """
    narrow = patterns.dtype.type
    kept = 0
    before = 0.0
    after = 0.0
    for start in range(0, patterns.size, _BLOCK):
        run = patterns[start : start + _BLOCK]
        before += _sum_of_squares(run, shift, last)
        for index in range(run.size):
            run[index] = narrow(run[index] * (narrow(run[index] & last) >= threshold))
        after += _sum_of_squares(run, shift, last)
        kept += _count_non_zero(run, last)
    return kept, before, after


@_Pass
def _mask_scores(
    entries: Patterns, weights: Patterns, source: _Source, shift: Any, last: Any, threshold: Any
) -> tuple[int, float, float]:
    """:func:`_mask_magnitudes` of scores."""
    narrow = entries.dtype.type
    block = np.empty(_BLOCK, np.uint32)
    kept = 0
    before = 0.0
    after = 0.0
    for start in range(0, entries.size, _BLOCK):
        run = entries[start : start + _BLOCK]
        scores = block[: run.size]
        _score(entries, weights, source, start, scores)
        before += _sum_of_squares(run, shift, last)
        for index in range(run.size):
            run[index] = narrow(run[index] * (scores[index] >= threshold))
        after += _sum_of_squares(run, shift, last)
        kept += _count_non_zero(run, last)
    return kept, before, after


# How much wider the mantissa of float32 is.
_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}

# What scores are made of: the shift of an entry and of a weight; an entry's bits but for the sign;
# the pattern of infinity; the key and the first position of a hash.
_Source = tuple[np.uint32, np.uint32, Any, Any, np.uint64, np.uint64]


class _Piece(NamedTuple):
    """Neighbouring entries of one tensor.

    Attributes:
        tensor: Which of the pass's tensors.
        patterns: Bit patterns of the entries, a view of the tensor's memory.
        scored: What a pass needs to score them: patterns, those of weights, and their source;
            patterns alone where scores are magnitudes.
    """

    tensor: int
    patterns: Patterns
    scored: tuple[Any, ...]


def _patterns(tensor: Tensor) -> Patterns:
    unsigned = torch.uint16 if tensor.element_size() == 2 else torch.uint32
    patterns: Patterns = tensor.detach().view(unsigned).numpy()
    return patterns


def _piece(index: int, scores: Scores, start: int, stop: int) -> _Piece:
    patterns = _patterns(scores.entries)[start:stop]
    if isinstance(scores, Magnitudes):
        return _Piece(index, patterns, (patterns,))
    dtype = scores.entries.dtype
    unsigned = _UNSIGNED[dtype.itemsize]
    infinity = torch.tensor(float("inf"), dtype=dtype, device="cpu").view(_SIGNED[dtype.itemsize])
    weights, weight_shift, key, first = np.empty(0, np.uint16), 0, 0, 0
    if isinstance(scores, Products):
        weights, weight_shift = _patterns(scores.weights)[start:stop], _SHIFT[scores.weights.dtype]
    elif isinstance(scores, Hashes):
        key, first = scores.key, scores.first + start
    source = (
        np.uint32(_SHIFT[dtype]),
        np.uint32(weight_shift),
        unsigned(torch.iinfo(_SIGNED[dtype.itemsize]).max),
        unsigned(int(infinity)),
        np.uint64(key % 2**64),
        np.uint64(first % 2**64),
    )
    return _Piece(index, patterns, (patterns, weights, source))


def _shares(scores: Sequence[Scores]) -> list[list[_Piece]]:
    """All entries, in order, cut into equal shares, several for each thread."""
    sizes = [score.entries.numel() for score in scores]
    size = max(_SMALLEST_SHARE, -(-sum(sizes) // (torch.get_num_threads() * _SHARES_A_THREAD)))
    shares: list[list[_Piece]] = [[] for _ in range(-(-sum(sizes) // size))]
    done = 0
    for index, (score, entries) in enumerate(zip(scores, sizes, strict=True)):
        start = 0
        while start < entries:
            share = done // size
            stop = min(entries, start + (share + 1) * size - done)
            shares[share].append(_piece(index, score, start, stop))
            done += stop - start
            start = stop
    return shares


@lru_cache(maxsize=1)
def _pool(threads: int, process: int, flushes: bool) -> ThreadPoolExecutor:
    """Threads that wait for work.

    Args:
        threads: How many.
        process: Its id, for threads do not survive a fork.
        flushes: Whether this thread makes denormal products 0 (``torch.set_flush_denormal``),
            which a thread takes over from the one that starts it. All must make the same scores.
    """
    del flushes
    return ThreadPoolExecutor(threads, thread_name_prefix=f"axolotl_gmt-{process}")


def _flushes_denormals() -> bool:
    return not torch.tensor(2.0**-126, device="cpu").mul_(0.5).item()


class _Turns:
    """Shares of one pass, which threads take in turns.

    Args:
        work: Called once for each share.
        shares: How many there are.
    """

    def __init__(self, work: Callable[[int], None], shares: int) -> None:
        self._work = work
        self._waiting = deque(range(shares))
        self._running: set[int] = set()
        self._changed = Condition()
        self.error: BaseException | None = None

    def take(self) -> None:
        """Work on shares until none waits, or one has failed."""
        share = -1
        while True:
            try:
                with self._changed:
                    if not self._waiting:
                        return
                    share = self._waiting.popleft()
                    self._running.add(share)
                self._work(share)
            except BaseException as error:
                self.give_up(error)
            finally:
                with self._changed:
                    self._running.discard(share)
                    self._changed.notify_all()

    def give_up(self, error: BaseException) -> None:
        """Leave the shares that wait."""
        self._waiting.clear()
        self.error = self.error or error

    def wait(self) -> None:
        """Return when no thread works on a share any more."""
        with self._changed:
            while self._running:
                self._changed.wait()


def _in_threads(work: Callable[[int], None], shares: int) -> None:
    """``work(share)`` for each share; whichever thread is free, this one too, takes the next.

    When this returns or raises, no thread works any more, and none that was slow to start begins.
    If some threads cannot be started the others do it all.

    Raises:
        BaseException: The first that ``work`` raised, or an interrupt; shares not begun by then
            are left.
    """
    turns = _Turns(work, shares)
    threads = torch.get_num_threads() - 1
    is_over = False
    while not is_over:
        try:
            if threads and shares > 1:
                pool = _pool(threads, os.getpid(), _flushes_denormals())
                for _ in range(min(threads, shares - 1)):
                    pool.submit(turns.take)
            turns.take()
            turns.wait()
            is_over = True
        except RuntimeError:  # The system gives no more threads.
            threads = 0
        except BaseException as interrupt:  # While this thread waited: the others still write.
            threads = 0
            turns.give_up(interrupt)
    if turns.error is not None:
        raise turns.error


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
    scores: Sequence[Scores],
    rows: Sequence[int],
    dtype: torch.dtype,
    digit: Digit,
    prefixes: Tensor | None,
    counts: Tensor,
) -> None:
    """:func:`~.dispatch.count_digits` for scores of one kind on the CPU.

    A row that lies within one share is counted where it belongs. The others, two for most shares,
    are counted apart and added when the share is done.
    """
    shares = [(share, {rows[piece.tensor] for piece in share}) for share in _shares(scores)]
    spans = Counter(row for _, here in shares for row in here)
    table: Counts = counts.numpy()
    unsigned = _UNSIGNED[dtype.itemsize]
    bits = unsigned(digit.shift), unsigned((1 << digit.width) - 1)
    above = _bits_from(dtype, digit.shift + digit.width)
    of_rows = None if prefixes is None else _scalars(dtype, prefixes)
    are_magnitudes = isinstance(scores[0], Magnitudes)
    count_all = _count_magnitudes if are_magnitudes else _count_scores
    count_some = _count_matching_magnitudes if are_magnitudes else _count_matching_scores
    adding = Lock()

    def count(index: int) -> None:
        share, here = shares[index]
        into = {row: table[row] if spans[row] == 1 else np.zeros_like(table[row]) for row in here}
        for piece in share:
            row = rows[piece.tensor]
            if of_rows is None:
                count_all(*piece.scored, *bits, into[row])
            else:
                count_some(*piece.scored, *bits, *above, of_rows[row], into[row])
        with adding:
            for row in here:
                if spans[row] > 1:
                    table[row] += into[row]

    _in_threads(count, len(shares))


def keep_candidates(
    scores: Sequence[Scores],
    rows: Sequence[int],
    dtype: torch.dtype,
    shift: int,
    prefixes: Tensor,
) -> list[Scores]:
    """:func:`~.dispatch.keep_candidates` for scores of one kind on the CPU."""
    low, high = prefixes << shift, (prefixes + 1) << shift
    copies, _ = _copies(scores, rows, dtype, low, high, most_candidates)
    return [score if copy is None else copy for score, copy in zip(scores, copies, strict=True)]


def keep_between(
    scores: Sequence[Scores],
    rows: Sequence[int],
    low: Tensor,
    high: Tensor,
    above: Tensor,
) -> list[Scores | None]:
    """:func:`~.dispatch.keep_between` for scores of one kind on the CPU, not magnitudes."""
    copies, higher = _copies(scores, rows, torch.float32, low, high, _most_between)
    for row, count in zip(rows, higher, strict=True):
        above[row] += count
    return copies


def _most_between(entries: int) -> int:
    return max(4096, entries >> 4)  # All of a small tensor, where there is little to save.


def _copies(
    scores: Sequence[Scores],
    rows: Sequence[int],
    dtype: torch.dtype,
    low: Tensor,
    high: Tensor,
    most: Callable[[int], int],
) -> tuple[list[Scores | None], list[int]]:
    """Scores whose patterns are from low to below high, at ``most`` so many of so many entries.

    Returns:
        For each tensor the copies, None where they are many; and how many are not below high.
    """
    shares = _shares(scores)
    _, last = _bits_from(dtype, 0)
    lows, highs = _scalars(dtype, low), _scalars(dtype, high)
    found: list[list[tuple[Patterns | None, int]]] = [[] for _ in shares]
    copy_pass = _copy_magnitudes if isinstance(scores[0], Magnitudes) else _copy_scores

    def copy(index: int) -> None:
        largest = max(piece.patterns.size for piece in shares[index])
        room = np.empty(most(largest), _UNSIGNED[dtype.itemsize])
        for piece in shares[index]:
            into = room[: most(piece.patterns.size)]
            limits = lows[rows[piece.tensor]], highs[rows[piece.tensor]]
            copied, higher = copy_pass(*piece.scored, last, *limits, into)
            found[index].append((None if copied < 0 else into[:copied].copy(), higher))

    _in_threads(copy, len(shares))
    parts: list[list[Patterns | None]] = [[] for _ in scores]
    above = [0] * len(scores)
    for share, results in zip(shares, found, strict=True):
        for piece, (part, higher) in zip(share, results, strict=True):
            parts[piece.tensor].append(part)
            above[piece.tensor] += higher
    return [_joined(of_tensor, dtype) for of_tensor in parts], above


def _joined(parts: Sequence[Patterns | None], dtype: torch.dtype) -> Scores | None:
    """The candidates of a tensor, None if a part of it has too many."""
    there = [part for part in parts if part is not None]
    if len(there) < len(parts):
        return None
    patterns = np.concatenate([np.empty(0, _UNSIGNED[dtype.itemsize]), *there])
    return Magnitudes(torch.from_numpy(patterns).view(dtype))


def mask_below_(
    scores: Sequence[Scores],
    rows: Sequence[int],
    dtype: torch.dtype,
    thresholds: Tensor,
    totals: Tensor,
) -> None:
    """:func:`~.dispatch.mask_below_` for scores of one kind on the CPU."""
    shares = _shares(scores)
    entries_dtype = scores[0].entries.dtype
    _, last = _bits_from(entries_dtype, 0)
    of_rows = _scalars(dtype, thresholds)
    of_entries = np.uint32(_SHIFT[entries_dtype]), last
    mask_pass = _mask_magnitudes if isinstance(scores[0], Magnitudes) else _mask_scores
    found: list[list[tuple[int, float, float]]] = [[] for _ in shares]

    def mask(index: int) -> None:
        for piece in shares[index]:
            found[index].append(mask_pass(*piece.scored, *of_entries, of_rows[rows[piece.tensor]]))

    _in_threads(mask, len(shares))
    table: NDArray[np.float64] = totals.numpy()
    for share, results in zip(shares, found, strict=True):  # In order: the same sums every time.
        for piece, result in zip(share, results, strict=True):
            table[piece.tensor] += (piece.patterns.size, *result)
