# mypy: disable-error-code="untyped-decorator, import-untyped, attr-defined"
"""The passes over memory of the CPU, compiled by Numba.

Same results as those of :mod:`~.eager`, several times faster: a pass reads every entry once, as
an integer, and needs no scratch memory. The entries are shared among
``torch.get_num_threads()`` threads, and none of them holds the interpreter's lock. Scores other
than an entry's own magnitude are made for a block of entries that stays in the fastest cache.

Importing this module needs Numba. Machine code is made on first use, some tenths of a second for
each kind of scores, and kept on disk by Numba's cache, so that later processes start at once.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Condition, Lock
from typing import Any, ClassVar, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from axolotl_gmt.kernels.contract import Batch, Cache, most_copies
from axolotl_gmt.kernels.dtypes import COMPILED, FORMATS, Digit
from axolotl_gmt.kernels.scores import (
    EPSILON,
    Bits,
    Hashes,
    Inverses,
    Kind,
    Magnitudes,
    Products,
    Quotients,
    Scores,
    Weighted,
)

# Entries that a loop takes together; fewer cost more, with more the memory waits.
_BLOCK = 256
_SCORED = 512  # where scores are made
_RARE = 100  # Fewer copies than one in so many entries: most eights of entries have none.
_SHARES_A_THREAD = 4  # so that a thread which the system holds up does not hold up the others
_SMALLEST_SHARE = 1 << 16  # entries; a thread for fewer costs more than it saves

Patterns = NDArray[np.unsignedinteger[Any]]
Counts = NDArray[np.signedinteger[Any]]

# Sums may be reordered, so that they can be vectorised; nothing here lets a quotient be other than
# IEEE 754 says. Division by zero raises no error, for which each would have to be looked at.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz"},
}
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


def give_up_cache() -> Cache | None:
    """See :meth:`~.contract.CompiledBackend.give_up_cache`."""
    folder, *_ = [a_pass.give_up_cache() for a_pass in _Pass.every]
    return None if folder is None else Cache(folder, "numba_cpu.*", "NUMBA_CACHE_DIR")


def boundaries(itemsize: int) -> tuple[()]:
    """None but those that are always compared: no read goes beyond a tensor's end."""
    del itemsize
    return ()


def supports(kind: Kind) -> bool:
    """Whether there are passes for scores of that kind; no weights with float16."""
    if kind.scores is Magnitudes and kind.entries == kind.compared:
        return kind.entries in COMPILED
    entries = {torch.bfloat16, torch.float32} if kind.weights else COMPILED
    return (
        kind.compared == torch.float32
        and kind.scores in _SOURCES
        and kind.entries in entries
        and (kind.weights or kind.entries) in entries
    )


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
    patterns: Patterns, last: Any, low: Any, high: Any, flags: Patterns, into: Patterns, copied: Any
) -> tuple[Any, Any]:
    """Append to ``into[:copied]`` the patterns whose magnitude is from low to below high.

    What counts is known before anything is copied, from a loop that is vectorised. If it is little,
    eight entries of which none counts are passed over together. Else every pattern is written, and
    the next one over it if it does not count, so that no branch has to be guessed.

    Returns:
        How many there are now; and how many of these magnitudes are not below high.
    """
    narrow = patterns.dtype.type
    width = narrow(high - low)
    higher, inside = np.uint32(0), np.uint32(0)
    for index in range(patterns.size):
        magnitude = narrow(patterns[index] & last)
        higher += np.uint32(magnitude >= high)
        flags[index] = narrow(magnitude - low) < width
        inside += np.uint32(flags[index])
    done = patterns.size & -8 if inside * _RARE < patterns.size else 0
    eights = flags[:done].view(np.uint64)
    for eight in range(eights.size):
        if eights[eight] != 0:
            for lane in range(8):
                place = np.uintp(8 * eight + lane)  # Unsigned, so that no sign is looked at.
                into[copied] = patterns[place]
                copied += np.uintp(flags[place])
    patterns, flags = patterns[done:], flags[done : patterns.size]
    for index in range(patterns.size):
        into[copied] = patterns[index]
        copied += np.uintp(flags[index])
    return copied, higher


@_inner
def _from_float16(magnitude: Any) -> Any:
    """A float32, made by integer arithmetic: the exponent's bias is larger by 112."""
    no_leading_bit = magnitude < 0x0400
    bias = 112 + 112 * (magnitude >= 0x7C00) + no_leading_bit
    bits = np.uint32((magnitude << 13) + (bias << 23))
    return np.float32(bits.view(np.float32) - np.float32(no_leading_bit * 2.0**-14))


_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_INFINITY = np.uint32(FORMATS[torch.float32].infinity)
_ONE = np.uint32(0x3F800000)
_MAGNITUDE, _INVERSE, _PRODUCT, _QUOTIENT, _HASH, _BIT = map(np.uint8, range(6))
_SOURCES: dict[type[Scores], np.uint8] = {
    Magnitudes: _MAGNITUDE,
    Inverses: _INVERSE,
    Products: _PRODUCT,
    Quotients: _QUOTIENT,
    Hashes: _HASH,
    Bits: _BIT,
}
_EPSILON = np.float32(EPSILON)


@_inner
def _score(
    entries: Patterns, weights: Patterns, source: _Source, start: int, into: Patterns
) -> None:
    """Patterns of float32 scores of ``into.size`` entries from ``start`` on.

    Inverses, products, quotients and bits as their classes in :mod:`~.scores` say, hashes as
    :func:`~.scores.uniform` makes them, or the magnitudes of narrower entries. NaN, whose pattern
    lies above infinity's, counts as infinity.
    """
    what, entry_shift, weight_shift, last, infinity, key, position = source
    # Slices, since an index that is a sum could be negative, and then nothing is vectorised.
    entries = entries[start : start + into.size]
    if what in (_MAGNITUDE, _INVERSE):
        if entry_shift == 13:
            for index in range(into.size):
                value = np.float32(_from_float16(entries[index] & last))
                into[index] = min(value.view(np.uint32), _INFINITY)
        else:
            for index in range(into.size):
                pattern = np.uint32(np.uint32(entries[index] & last) << entry_shift)
                into[index] = min(pattern, _INFINITY)
        if what == _INVERSE:
            for index in range(into.size):
                pattern = into[index]
                # As an unsigned number, that before 0 is the largest.
                is_number = np.uint32(pattern - np.uint32(1)) < np.uint32(_INFINITY - 1)
                into[index] = np.uint32(_INFINITY - pattern) if is_number else pattern
    elif what == _PRODUCT:
        weights = weights[start : start + into.size]
        for index in range(into.size):
            entry = np.uint32(np.uint32(entries[index]) << entry_shift).view(np.float32)
            weight = np.uint32(np.uint32(weights[index]) << weight_shift).view(np.float32)
            pattern = np.float32(entry * weight).view(np.uint32) & np.uint32(0x7FFFFFFF)
            into[index] = min(pattern, _INFINITY)
    elif what == _QUOTIENT:
        weights = weights[start : start + into.size]
        for index in range(into.size):
            entry = np.uint32(np.uint32(entries[index]) << entry_shift).view(np.float32)
            weight = np.uint32(np.uint32(weights[index]) << weight_shift).view(np.float32)
            divisor = np.float32(abs(weight) + _EPSILON)
            pattern = np.float32(entry / divisor).view(np.uint32) & np.uint32(0x7FFFFFFF)
            into[index] = min(pattern, _INFINITY)
    else:
        position += np.uint64(start)
        if what == _BIT:
            for index in range(into.size):
                place = position + np.uint64(index)
                bit = (weights[place >> np.uint64(3)] >> np.uint8(place & np.uint64(7))) & 1
                into[index] = np.uint32(bit) * _ONE
        else:
            state = position * _FACTOR + key
            for index in range(into.size):
                x = (state ^ (state >> np.uint64(30))) * _FACTORS[0]
                x = (x ^ (x >> np.uint64(27))) * _FACTORS[1]
                # The last step, x ^ (x >> 31), leaves the upper 24 bits as they are.
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


_Sums = tuple[float, float, float, float]


@_inner
def _add(some: _Sums, more: _Sums) -> _Sums:
    return some[0] + more[0], some[1] + more[1], some[2] + more[2], some[3] + more[3]


@_inner
def _sums(
    patterns: Patterns, shift: Any, last: Any, scores: Patterns, last_score: Any, threshold: Any
) -> _Sums:
    """Of squares before and after masking a block, and of magnitudes, in float64.

    ``shift`` is how much wider than the entries' mantissa that of float32 is. All four come from
    one loop: the work is in making numbers of the patterns, and less in adding these.
    """
    narrow = scores.dtype.type
    squares = squares_after = 0.0
    magnitudes = magnitudes_after = 0.0
    for index in range(patterns.size):
        if shift == 13:
            value = np.float64(_from_float16(patterns[index] & last))
        else:
            bits = np.uint32(np.uint32(patterns[index] & last) << shift)
            value = np.float64(bits.view(np.float32))
        left = value if narrow(scores[index] & last_score) >= threshold else 0.0
        squares += value * value
        squares_after += left * left
        magnitudes += value
        magnitudes_after += left
    return squares, squares_after, magnitudes, magnitudes_after


@_inner
def _count_non_zero(patterns: Patterns, last: Any) -> Any:
    """Non-zero entries of a block, which is small enough to count in the width of an entry."""
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
) -> tuple[Any, int]:
    """Copy what has a magnitude from low to below high, if there is room for it and a block more.

    Returns:
        How many there are, -1 if they do not fit; and how many magnitudes are not below high.
    """
    flags = np.empty(_BLOCK, np.uint8)
    copied, higher = np.uintp(0), 0
    for start in range(0, patterns.size, _BLOCK):
        if copied + _BLOCK > into.size:
            return np.int64(-1), 0
        run = patterns[start : start + _BLOCK]
        copied, more = _copy_between(run, last, low, high, flags, into, copied)
        higher += more
    return np.int64(copied), higher


@_Pass
def _count_scores(
    entries: Patterns, weights: Patterns, source: _Source, shift: Any, last: Any, counts: Counts
) -> None:
    """:func:`_count_magnitudes` of scores."""
    block, digits = np.empty(_SCORED, np.uint32), np.empty(_SCORED, np.uint16)
    for start in range(0, entries.size, _SCORED):
        scores = block[: min(_SCORED, entries.size - start)]
        _score(entries, weights, source, start, scores)
        _count(scores, shift, last, counts, digits)


@_Pass
def _count_matching_scores(
    entries: Patterns, weights: Patterns, source: _Source, shift: Any, last: Any, above: Any,
    last_above: Any, prefix: Any, counts: Counts,
) -> None:  # fmt: skip
    """:func:`_count_matching_magnitudes` of scores."""
    block = np.empty(_SCORED, np.uint32)
    for start in range(0, entries.size, _SCORED):
        scores = block[: min(_SCORED, entries.size - start)]
        _score(entries, weights, source, start, scores)
        _count_matching(scores, shift, last, above, last_above, prefix, counts)


@_Pass
def _copy_scores(
    entries: Patterns, weights: Patterns, source: _Source, last: Any, low: Any, high: Any,
    into: Patterns,
) -> tuple[Any, int]:  # fmt: skip
    """:func:`_copy_magnitudes` of scores."""
    block, flags = np.empty(_SCORED, np.uint32), np.empty(_SCORED, np.uint8)
    copied, higher = np.uintp(0), 0
    for start in range(0, entries.size, _SCORED):
        if copied + _SCORED > into.size:
            return np.int64(-1), 0
        scores = block[: min(_SCORED, entries.size - start)]
        _score(entries, weights, source, start, scores)
        copied, more = _copy_between(scores, last, low, high, flags, into, copied)
        higher += more
    return np.int64(copied), higher


@_Pass
def _mask_magnitudes(
    patterns: Patterns, shift: Any, last: Any, threshold: Any
) -> tuple[int, _Sums]:
    """Zero what is below ``threshold``; how many non-zero entries are kept, and :func:`_sums`.

    Short loops over a block that stays in the fastest cache: LLVM vectorises them better than one
    loop that does it all. A product with the comparison stands for a branch; patterns are integers,
    so it is exact.
    """
    narrow = patterns.dtype.type
    kept = 0
    sums = 0.0, 0.0, 0.0, 0.0
    for start in range(0, patterns.size, _BLOCK):
        run = patterns[start : start + _BLOCK]
        sums = _add(sums, _sums(run, shift, last, run, last, threshold))
        for index in range(run.size):
            run[index] = narrow(run[index] * (narrow(run[index] & last) >= threshold))
        kept += _count_non_zero(run, last)
    return kept, sums


@_Pass
def _mask_scores(
    entries: Patterns, weights: Patterns, source: _Source, shift: Any, last: Any, threshold: Any
) -> tuple[int, _Sums]:
    """:func:`_mask_magnitudes` of scores."""
    narrow = entries.dtype.type
    block = np.empty(_SCORED, np.uint32)
    kept = 0
    sums = 0.0, 0.0, 0.0, 0.0
    for start in range(0, entries.size, _SCORED):
        run = entries[start : start + _SCORED]
        scores = block[: run.size]
        _score(entries, weights, source, start, scores)
        sums = _add(sums, _sums(run, shift, last, scores, np.uint32(0x7FFFFFFF), threshold))
        for index in range(run.size):
            run[index] = narrow(run[index] * (scores[index] >= threshold))
        kept += _count_non_zero(run, last)
    return kept, sums


# What scores are made of: what they are; the shift of an entry and of a weight; an entry's bits but
# for the sign; the pattern of infinity; the key and the first position of a hash.
_Source = tuple[np.uint8, np.uint32, np.uint32, Any, Any, np.uint64, np.uint64]


class _Piece(NamedTuple):
    """Neighbouring entries of one tensor.

    Attributes:
        tensor: Which of the pass's tensors.
        row: Its row.
        patterns: Bit patterns of the entries, a view of the tensor's memory.
        scored: What a pass needs to score them: patterns, those of weights, and their source;
            patterns alone where scores are the entries' own magnitudes.
    """

    tensor: int
    row: int
    patterns: Patterns
    scored: tuple[Any, ...]


def _patterns(tensor: Tensor) -> Patterns:
    unsigned = torch.uint16 if tensor.element_size() == 2 else torch.uint32
    patterns: Patterns = tensor.detach().view(unsigned).numpy()
    return patterns


_NO_WEIGHTS = np.empty(0, np.uint16)


def _pieces(batch: Batch) -> Callable[[int, int, int], _Piece]:
    """A function that makes the piece of a tensor between two of its entries."""
    kind = batch.scores[0].kind(batch.dtype)
    entry = FORMATS[kind.entries]
    shifts = np.uint32(entry.widening), np.uint32(FORMATS[kind.weights or kind.entries].widening)
    constants = *shifts, entry.unsigned(entry.magnitude_bits), entry.unsigned(entry.infinity)
    makes_scores = _makes_scores(batch)
    patterns = [_patterns(scores.entries) for scores in batch.scores]

    def piece(tensor: int, start: int, stop: int) -> _Piece:
        scores, row, of_piece = (
            batch.scores[tensor],
            batch.rows[tensor],
            patterns[tensor][start:stop],
        )
        if not makes_scores:
            return _Piece(tensor, row, of_piece, (of_piece,))
        weights, key, first = _NO_WEIGHTS, 0, 0
        if isinstance(scores, Weighted):
            weights = _patterns(scores.weights)[start:stop]
        elif isinstance(scores, Hashes):
            key, first = scores.key % 2**64, (scores.first + start) % 2**64
        elif isinstance(scores, Bits):
            weights, first = scores.bits.numpy(), start
        source = (_SOURCES[type(scores)], *constants, np.uint64(key), np.uint64(first))
        return _Piece(tensor, row, of_piece, (of_piece, weights, source))

    return piece


def _makes_scores(batch: Batch) -> bool:
    """Whether scores are something else than the entries' own magnitudes."""
    scores = batch.scores[0]
    return type(scores) is not Magnitudes or scores.entries.dtype != batch.dtype


def _shares(batch: Batch) -> list[list[_Piece]]:
    """All entries, in order, cut into equal shares, several for each thread."""
    piece = _pieces(batch)
    sizes = [scores.entries.numel() for scores in batch.scores]
    size = max(_SMALLEST_SHARE, -(-sum(sizes) // (torch.get_num_threads() * _SHARES_A_THREAD)))
    shares: list[list[_Piece]] = [[] for _ in range(-(-sum(sizes) // size))]
    done = 0
    for tensor, entries in enumerate(sizes):
        start = 0
        while start < entries:
            share = done // size
            stop = min(entries, start + (share + 1) * size - done)
            shares[share].append(piece(tensor, start, stop))
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
    return list(values.numpy().astype(FORMATS[dtype].unsigned))


def count_digits(batch: Batch, digit: Digit, prefixes: Tensor | None, counts: Tensor) -> None:
    """See :meth:`~.contract.Backend.count_digits`.

    Rows within one share are counted in place; the others, two for most shares, apart, and added
    when the share is done.
    """
    shares = [(share, {piece.row for piece in share}) for share in _shares(batch)]
    spans = Counter(row for _, rows in shares for row in rows)
    table: Counts = counts.numpy()
    form = FORMATS[batch.dtype]
    above = digit.shift + digit.width
    bits = form.unsigned(digit.shift), form.unsigned((1 << digit.width) - 1)
    bits_above = form.unsigned(above), form.unsigned(form.magnitude_bits >> above)
    of_rows = None if prefixes is None else _scalars(batch.dtype, prefixes)
    makes_scores = _makes_scores(batch)
    count_all = _count_scores if makes_scores else _count_magnitudes
    count_some = _count_matching_scores if makes_scores else _count_matching_magnitudes
    adding = Lock()

    def count(index: int) -> None:
        share, rows = shares[index]
        into = {row: table[row] if spans[row] == 1 else np.zeros_like(table[row]) for row in rows}
        for piece in share:
            if of_rows is None:
                count_all(*piece.scored, *bits, into[piece.row])
            else:
                prefix = of_rows[piece.row]
                count_some(*piece.scored, *bits, *bits_above, prefix, into[piece.row])
        with adding:
            for row in rows:
                if spans[row] > 1:
                    table[row] += into[row]

    _in_threads(count, len(shares))


def copy_between(batch: Batch, low: Tensor, high: Tensor, above: Tensor) -> list[Tensor | None]:
    """See :meth:`~.contract.CPUBackend.copy_between`."""
    shares = _shares(batch)
    form = FORMATS[batch.dtype]
    lows, highs = _scalars(batch.dtype, low), _scalars(batch.dtype, high)
    results: list[list[tuple[Patterns | None, int]]] = [[] for _ in shares]
    copy_pass = _copy_scores if _makes_scores(batch) else _copy_magnitudes

    def copy(index: int) -> None:
        most = [most_copies(piece.patterns.size) + _SCORED for piece in shares[index]]
        room = np.empty(max(most), form.unsigned)
        for piece, size in zip(shares[index], most, strict=True):
            limits = form.unsigned(form.magnitude_bits), lows[piece.row], highs[piece.row]
            copied, higher = copy_pass(*piece.scored, *limits, room[:size])
            part = None if copied < 0 else room[:copied] & limits[0]
            results[index].append((part, higher))

    _in_threads(copy, len(shares))
    parts: list[list[Patterns | None]] = [[] for _ in batch.scores]
    higher = [0] * len(parts)
    for share, of_share in zip(shares, results, strict=True):
        for piece, (part, more) in zip(share, of_share, strict=True):
            parts[piece.tensor].append(part)
            higher[piece.tensor] += more
    copies: list[Tensor | None] = []
    room_for_none = np.empty(0, form.unsigned)
    for of_tensor, row, more in zip(parts, batch.rows, higher, strict=True):
        whole = [part for part in of_tensor if part is not None]
        if len(whole) < len(of_tensor):
            copies.append(None)
            continue
        above.numpy()[row] += more
        joined = whole[0] if len(whole) == 1 else np.concatenate([room_for_none, *whole])
        copies.append(torch.from_numpy(joined).view(form.bits))
    return copies


def mask_below_(batch: Batch, thresholds: Tensor, totals: Tensor) -> None:
    """See :meth:`~.contract.Backend.mask_below_`."""
    shares = _shares(batch)
    entry = FORMATS[batch.scores[0].entries.dtype]
    of_rows = _scalars(batch.dtype, thresholds)
    of_entries = np.uint32(entry.widening), entry.unsigned(entry.magnitude_bits)
    mask_pass = _mask_scores if _makes_scores(batch) else _mask_magnitudes
    results: list[list[tuple[int, _Sums]]] = [[] for _ in shares]

    def mask(index: int) -> None:
        for piece in shares[index]:
            results[index].append(mask_pass(*piece.scored, *of_entries, of_rows[piece.row]))

    _in_threads(mask, len(shares))
    table: NDArray[np.float64] = totals.numpy()
    for share, of_share in zip(shares, results, strict=True):  # In order: the same sums each time.
        for piece, (kept, sums) in zip(share, of_share, strict=True):
            table[piece.tensor] += (piece.patterns.size, kept, *sums)
