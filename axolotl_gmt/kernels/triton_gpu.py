# mypy: disable-error-code="untyped-decorator, import-untyped, attr-defined"
"""The passes over memory of a GPU, as Triton kernels.

Same results as those of :mod:`~.eager`; only sums of squares and magnitudes may differ in their
last digits, for up to 2^7 of them are added in float32, and these in float64. One launch takes all
tensors of a call: a table of addresses, copied from pinned memory without waiting, tells each
program which entries are its own. No value comes back to the host. Positions have 64 bits.

Scores are made where they are needed, while counting and again while masking, and never stored:
magnitudes are the entries' own patterns and inverses the difference from infinity's, products and
quotients read the weights too, hashes are arithmetic.

What bounds the kernels, for n entries of b bytes (``python -m benchmarks.kernel_budget`` reads the
instructions from the machine code):

- Masking reads n b bytes and writes as many, in aligned vectors of 16 bytes but for the first and
  last block of a tensor.
- Counting reads n b bytes in such vectors, and adds 1 to a bin for every entry. Additions to global
  memory happen in the L2 cache, at a fraction of the rate at which 16-bit entries arrive, and
  concentrate on a few hundred bins. So a program counts in shared memory: from Triton 3.8 on,
  ``tl.histogram`` is one shared atomic increment an entry, in which the hardware unites equal
  values of a warp. All 2^15 bins would leave room for one program on a multiprocessor and cost as
  much to clear and read as the entries to count. But the magnitudes of neighbours span few octaves:
  a window of 2^12 bins holds 32 octaves of bf16 and fp32, one of 2^14 holds 16 of fp16. A program
  places its window a little above the largest of 2^9 of its entries. If some lie outside, it reads
  its entries again, most likely from a cache; the zeros among these are what remains when all
  others are counted, and the few others are added to global memory one by one. A program adds its
  window to global memory once, without the empty bins.
- A lower digit costs one more read. About one entry in 300 matches the upper digit. Values of 0
  are summed in registers there: exact zeros, and all entries of a gradient that once was bf16,
  would otherwise meet in one bin.
- A hash takes more instructions than a 16-bit entry takes time to arrive. A quotient that is
  rounded as IEEE 754 says takes as many as two such numbers do.

Older versions of Triton, and all for AMD, make ``tl.histogram`` of votes, at a cost that grows with
the bins; there every entry is added to global memory. That bounds counting, not the bandwidth.

Extra memory: 56 bytes a tensor for the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from axolotl_gmt.kernels.contract import Batch
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

_VALUE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

_SOURCES: dict[type[Scores], str] = {
    Magnitudes: "magnitude",
    Inverses: "inverse",
    Products: "product",
    Quotients: "quotient",
    Hashes: "hash",
    Bits: "bit",
}

_EPSILON = tl.constexpr(EPSILON)

_ALIGNMENT = 16  # bytes: the table counts a tensor's programs, and kernels find them, by it alone


class _Size(NamedTuple):
    """How much of a tensor a program takes: ``span`` entries, ``block`` of them at a time."""

    span: int
    block: int
    warps: int

    def constants(self) -> dict[str, int]:
        return {"span": self.span, "block": self.block}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps}


# The upper digit: entries a program, by the dtype of the scores, and bins that it holds.
_BLOCK = {torch.bfloat16: 1 << 15, torch.float16: 1 << 15, torch.float32: 1 << 14}
_WINDOW = {torch.bfloat16: 1 << 12, torch.float16: 1 << 14, torch.float32: 1 << 12}
_SAMPLE = 1 << 9
_RARE_BLOCK = 1 << 12
_LOWER = _Size(1 << 16, 1 << 12, 8)
_MASK = _Size(1 << 16, 1 << 12, 8)

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_HISTOGRAM_IS_FAST = _VERSION >= (3, 8) and torch.version.hip is None

# Rows of the table: what a kernel is told of each tensor.
_ADDRESS, _ENTRIES, _ROW, _PROGRAM, _WEIGHTS, _KEY, _POSITION = map(tl.constexpr, range(7))


@triton.jit
def _tensor_of(table: tl.tensor, tensors: tl.tensor, program: tl.tensor) -> tl.tensor:
    """The tensor whose entries a program takes: the last whose first program is not after it."""
    low = 0
    high = tensors
    while high - low > 1:
        middle = (low + high) // 2
        is_past = tl.load(table + _PROGRAM * tensors + middle) <= program
        low = tl.where(is_past, middle, low)
        high = tl.where(is_past, high, middle)
    return low


@triton.jit
def _place(
    table: tl.tensor, tensors: tl.tensor, entry: tl.constexpr, weight: tl.constexpr,
    score: tl.constexpr, aligned: tl.constexpr, alignment: tl.constexpr, span: tl.constexpr,
    wide: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where this program's entries are.

    Returns:
        The tensor's index. Pointer to the program's span of memory, aligned as :func:`_table`
        reserves programs, to patterns. From there, in entries, the positions of the tensor's first
        entry within the span and of the end of them, never before it, both int32. What the score
        needs at the start of the span: a pointer to weights, the address of a bit, or the hash's
        first state.
    """
    program = tl.program_id(0)
    tensor = _tensor_of(table, tensors, program)
    itemsize: tl.constexpr = entry.primitive_bitwidth // 8
    pattern: tl.constexpr = tl.int16 if itemsize == 2 else tl.int32
    table += tensor
    address = tl.load(table + _ADDRESS * tensors)
    before = (address % alignment) // itemsize
    start = (program - tl.load(table + _PROGRAM * tensors)) * span - before
    first = tl.maximum(-start, 0).to(tl.int32)
    end = tl.minimum(tl.load(table + _ENTRIES * tensors) - start, span).to(tl.int32)
    pointer = (address + start * itemsize).to(tl.pointer_type(pattern))
    pointer = tl.multiple_of(pointer, alignment if wide else itemsize)
    if score == "product" or score == "quotient":
        bytes_a_weight: tl.constexpr = weight.primitive_bitwidth // 8
        weights = tl.load(table + _WEIGHTS * tensors) + start * bytes_a_weight
        source = weights.to(tl.pointer_type(weight))
        source = tl.multiple_of(source, alignment if wide and aligned else bytes_a_weight)
    elif score == "hash":
        position = tl.load(table + _POSITION * tensors) + start
        state = position.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
        source = state + tl.load(table + _KEY * tensors).to(tl.uint64, bitcast=True)
    elif score == "bit":  # The address of a bit: eight times that of its byte, and its place there.
        source = tl.load(table + _WEIGHTS * tensors) * 8 + start
    else:
        source = 0
    return tensor, pointer, first, tl.maximum(first, end), source


@triton.jit
def _load(pointer: tl.tensor, lanes: tl.tensor, there: tl.tensor) -> tl.tensor:
    """Entries, 0 where they are not ``there``; None: all are."""
    if there is None:
        entries = tl.load(pointer + lanes)
    else:
        entries = tl.load(pointer + lanes, mask=there, other=0)
    return entries


@triton.jit
def _value(magnitudes: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Magnitudes as float32, from their patterns as int32."""
    if dtype == tl.float32:
        values = magnitudes.to(tl.float32, bitcast=True)
    elif dtype == tl.bfloat16:
        values = (magnitudes << 16).to(tl.float32, bitcast=True)
    else:
        values = magnitudes.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return values


@triton.jit
def _score(
    magnitudes: tl.tensor, source: tl.tensor, lanes: tl.tensor, there: tl.tensor,
    entry: tl.constexpr, infinity: tl.constexpr, score: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The patterns, int32, of the scores of entries whose patterns are ``magnitudes``."""
    if score == "magnitude":
        patterns = magnitudes
    elif score == "widened":
        patterns = tl.minimum(_value(magnitudes, entry).to(tl.int32, bitcast=True), 0x7F800000)
    elif score == "inverse":
        patterns = tl.minimum(_value(magnitudes, entry).to(tl.int32, bitcast=True), 0x7F800000)
        is_number = (patterns > 0) & (patterns < 0x7F800000)
        patterns = tl.where(is_number, 0x7F800000 - patterns, patterns)
    elif score == "quotient":
        divisors = tl.abs(_load(source, lanes, there).to(tl.float32)) + _EPSILON
        quotients = tl.div_rn(_value(magnitudes, entry), divisors)  # "/" would be an approximation.
        patterns = tl.minimum(quotients.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)
    elif score == "product":
        products = _value(magnitudes, entry) * _load(source, lanes, there).to(tl.float32)
        # The pattern of NaN is above that of infinity, which it counts as.
        patterns = tl.minimum(products.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)
    elif score == "bit":
        bits = source + lanes
        flags = (_load((bits >> 3).to(tl.pointer_type(tl.uint8)), 0, there) >> (bits & 7)) & 1
        patterns = tl.where(magnitudes < infinity, flags.to(tl.int32) * 0x3F800000, 0x7F800000)
    else:
        x = source + lanes.to(tl.uint64) * 0x9E3779B97F4A7C15
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        # The last step of splitmix64, x ^ (x >> 31), leaves the upper 24 bits as they are.
        uniform = (x >> 40).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        patterns = tl.where(magnitudes < infinity, uniform.to(tl.int32, bitcast=True), 0x7F800000)
    return patterns


@triton.jit
def _scores(
    pointer: tl.tensor, source: tl.tensor, lanes: tl.tensor, there: tl.tensor,
    entry: tl.constexpr, last: tl.constexpr, infinity: tl.constexpr, score: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The patterns, int32, of the scores of the entries in ``lanes``; any where not ``there``."""
    magnitudes = _load(pointer, lanes, there).to(tl.int32) & last
    return _score(magnitudes, source, lanes, there, entry, infinity, score)


@triton.jit
def _upper_words(
    pointer: tl.tensor, source: tl.tensor, first: tl.tensor, end: tl.tensor,
    entry: tl.constexpr, last: tl.constexpr, infinity: tl.constexpr, score: tl.constexpr,
    alignment: tl.constexpr, block: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The scores of a block, without signs, in words of 32 bits; 0 where there is no entry.

    An upper digit is the upper half of a word. Where scores are patterns of 16 bits, a word holds
    two, the second in its lower half.
    """
    if score == "magnitude":
        parts: tl.constexpr = 32 // entry.primitive_bitwidth
        entries_a_vector: tl.constexpr = alignment // 4 * parts
        lanes = tl.arange(0, block // parts)
        # Whole vectors, or the reads at a tensor's ends would be of single words. An aligned vector
        # that holds an entry of the tensor lies in memory that may be read.
        vectors = lanes // (alignment // 4)
        some_there = (vectors >= first // entries_a_vector) & (vectors * entries_a_vector < end)
        words = tl.load(pointer.to(tl.pointer_type(tl.int32)) + lanes, mask=some_there, other=0)
        if (first > 0) | (end < block):
            lower = lanes * parts
            upper = lower + parts - 1
            words = tl.where((upper >= first) & (upper < end), words, words & 0xFFFF)
            words = tl.where((lower >= first) & (lower < end), words, words & -65536)
            if parts == 1:
                words = tl.where((lower >= first) & (lower < end), words, 0)
        words = words & (0x7FFF7FFF if parts == 2 else 0x7FFFFFFF)
    else:
        lanes = tl.arange(0, block)
        if (first == 0) & (end == block):
            words = _scores(pointer, source, lanes, None, entry, last, infinity, score)
        else:
            there = (lanes >= first) & (lanes < end)
            words = _scores(pointer, source, lanes, there, entry, last, infinity, score)
            words = tl.where(there, words, 0)
    return words


@triton.jit
def _window_start(
    pointer: tl.tensor, source: tl.tensor, first: tl.tensor, end: tl.tensor,
    entry: tl.constexpr, last: tl.constexpr, infinity: tl.constexpr, score: tl.constexpr,
    shift: tl.constexpr, window: tl.constexpr, sample: tl.constexpr, block: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The first bin of a window; an eighth of it is above the largest finite one of a sample."""
    lanes = tl.arange(0, sample) * (block // sample)
    there = (lanes >= first) & (lanes < end)
    patterns = _scores(pointer, source, lanes, there, entry, last, infinity, score)
    infinite: tl.constexpr = infinity if score == "magnitude" else 0x7F800000
    largest = tl.max(tl.where(there & (patterns < infinite), patterns, 0)) >> shift
    low = tl.maximum(largest + window // 8 - (window - 2), 1)
    return tl.minimum(low, (1 << 15) - (window - 1))


@triton.jit(do_not_specialize=["tensors"])
def _count_upper(
    table: tl.tensor, counts: tl.tensor, tensors: tl.tensor,
    entry: tl.constexpr, weight: tl.constexpr, last: tl.constexpr, infinity: tl.constexpr,
    score: tl.constexpr, aligned: tl.constexpr, alignment: tl.constexpr,
    window: tl.constexpr, sample: tl.constexpr, shared: tl.constexpr, block: tl.constexpr,
    rare_block: tl.constexpr,
) -> None:  # fmt: skip
    """Count the upper digit of every score, most of them in shared memory."""
    tensor, pointer, first, end, source = _place(
        table, tensors, entry, weight, score, aligned, alignment, block, True
    )
    counts += tl.load(table + _ROW * tensors + tensor) << 15
    two_a_word: tl.constexpr = score == "magnitude" and entry.primitive_bitwidth == 16
    shift: tl.constexpr = 0 if two_a_word else 16
    low = 1 << 15
    not_zero = 0
    if shared:
        low = _window_start(
            pointer, source, first, end, entry, last, infinity, score, shift, window, sample, block
        )
        words = _upper_words(
            pointer, source, first, end, entry, last, infinity, score, alignment, block
        )
        # Bins below the window become large as unsigned numbers. All that lie outside meet in the
        # last bin; that no index can be larger spares the compiler a branch for each entry.
        bins = (words - (low << 16)).to(tl.uint32, bitcast=True)
        bins = (tl.minimum(bins, (window << 16) - 1) >> 16).to(tl.int32, bitcast=True)
        if two_a_word:
            lower_bins = ((words & 0xFFFF) - low).to(tl.uint32, bitcast=True)
            lower_bins = tl.minimum(lower_bins, window - 1).to(tl.int32, bitcast=True)
            bins = tl.reshape(tl.join(bins, lower_bins), [block])
        in_window = tl.histogram(bins, window)
        bin_of = tl.arange(0, window)
        in_window = tl.where(bin_of < window - 1, in_window, 0)
        not_zero = tl.sum(in_window)
        tl.atomic_add(counts + low + bin_of, in_window, mask=in_window > 0, sem="relaxed")
    if not_zero < end - first:
        for position in range(0, end, rare_block):
            lanes = position + tl.arange(0, rare_block)
            there = (lanes >= first) & (lanes < end)
            values = _scores(pointer, source, lanes, there, entry, last, infinity, score) >> shift
            are_rare = there & (values > 0) & ((values < low) | (values > low + (window - 2)))
            rare = tl.sum(are_rare.to(tl.int32))
            if rare > 0:
                not_zero += rare
                tl.atomic_add(counts + values, 1, mask=are_rare, sem="relaxed")
    tl.atomic_add(counts, end - first - not_zero, sem="relaxed")


@triton.jit(do_not_specialize=["tensors"])
def _count_lower(
    table: tl.tensor, prefixes: tl.tensor, counts: tl.tensor, tensors: tl.tensor,
    entry: tl.constexpr, weight: tl.constexpr, last: tl.constexpr, infinity: tl.constexpr,
    score: tl.constexpr, aligned: tl.constexpr, alignment: tl.constexpr,
    shift: tl.constexpr, width: tl.constexpr, span: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Count a digit of the few entries whose bits above it are those of the row's prefix."""
    tensor, pointer, first, end, source = _place(
        table, tensors, entry, weight, score, aligned, alignment, span, False
    )
    row = tl.load(table + _ROW * tensors + tensor)
    above: tl.constexpr = shift + width
    prefix = tl.load(prefixes + row).to(tl.int32) << above
    counts += row << width
    zeros = tl.zeros([block], dtype=tl.int32)
    for position in range(0, end, block):
        lanes = position + tl.arange(0, block)
        if (position >= first) & (position + block <= end):
            patterns = _scores(pointer, source, lanes, None, entry, last, infinity, score)
        else:
            there = (lanes >= first) & (lanes < end)
            patterns = _scores(pointer, source, lanes, there, entry, last, infinity, score)
            patterns = tl.where(there, patterns, -1)
        # As unsigned numbers, patterns below the prefix are large: one comparison tells a match.
        digits = (patterns - prefix).to(tl.uint32, bitcast=True)
        zeros += (digits < (1 << shift)).to(tl.int32)
        if width > 0:
            not_zero = digits - (1 << shift) < (1 << above) - (1 << shift)
            tl.atomic_add(counts + (digits >> shift), 1, mask=not_zero, sem="relaxed")
    tl.atomic_add(counts, tl.sum(zeros), sem="relaxed")


@triton.jit
def _sums(values: tl.tensor, entry: tl.constexpr) -> tl.tensor:
    """Sums of the neighbours that a thread reads together, so that no threads exchange any."""
    vector: tl.constexpr = 128 // entry.primitive_bitwidth
    return tl.sum(tl.reshape(values, [values.shape[0] // vector, vector]), axis=1)


@triton.jit
def _masked(
    patterns: tl.tensor, source: tl.tensor, lanes: tl.tensor, there: tl.tensor,
    threshold: tl.tensor, entry: tl.constexpr, last: tl.constexpr, infinity: tl.constexpr,
    score: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A block after masking; of each vector the non-zero entries then, and its sums.

    These are of squares before and after masking, and of magnitudes before and after.
    """
    magnitudes = patterns.to(tl.int32) & last
    keep = _score(magnitudes, source, lanes, there, entry, infinity, score) >= threshold
    values = _value(magnitudes, entry)
    values_after = tl.where(keep, values, 0.0)
    kept = _sums((keep & (magnitudes > 0)).to(tl.int32), entry)
    squares, squares_after = (
        _sums(values * values, entry),
        _sums(values_after * values_after, entry),
    )
    result = tl.where(keep, patterns, 0).to(patterns.dtype)
    return result, kept, squares, squares_after, _sums(values, entry), _sums(values_after, entry)


@triton.jit(do_not_specialize=["tensors"])
def _mask_below(
    table: tl.tensor, thresholds: tl.tensor, totals: tl.tensor, tensors: tl.tensor,
    entry: tl.constexpr, weight: tl.constexpr, last: tl.constexpr, infinity: tl.constexpr,
    score: tl.constexpr, aligned: tl.constexpr, alignment: tl.constexpr,
    span: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Set to zero what lies below the row's threshold, and add up the statistics."""
    tensor, pointer, first, end, source = _place(
        table, tensors, entry, weight, score, aligned, alignment, span, True
    )
    threshold = tl.load(thresholds + tl.load(table + _ROW * tensors + tensor)).to(tl.int32)
    vectors: tl.constexpr = block * entry.primitive_bitwidth // 128
    kept = tl.zeros([vectors], dtype=tl.int32)
    squares = tl.zeros([vectors], dtype=tl.float32)
    squares_after = tl.zeros([vectors], dtype=tl.float32)
    values = tl.zeros([vectors], dtype=tl.float32)
    values_after = tl.zeros([vectors], dtype=tl.float32)
    for position in range(0, end, block):
        lanes = position + tl.arange(0, block)
        if (position >= first) & (position + block <= end):
            patterns = tl.load(pointer + lanes)
            result, kept_here, squares_here, squares_left, values_here, values_left = _masked(
                patterns, source, lanes, None, threshold, entry, last, infinity, score
            )
            tl.store(pointer + lanes, result)
        else:
            there = (lanes >= first) & (lanes < end)
            patterns = tl.load(pointer + lanes, mask=there, other=0)
            result, kept_here, squares_here, squares_left, values_here, values_left = _masked(
                patterns, source, lanes, there, threshold, entry, last, infinity, score
            )
            tl.store(pointer + lanes, result, mask=there)
        kept += kept_here
        squares += squares_here
        squares_after += squares_left
        values += values_here
        values_after += values_left
    totals += 6 * tensor
    tl.atomic_add(totals, (end - first).to(tl.float64), sem="relaxed")
    tl.atomic_add(totals + 1, tl.sum(kept).to(tl.float64), sem="relaxed")
    tl.atomic_add(totals + 2, tl.sum(squares.to(tl.float64)), sem="relaxed")
    tl.atomic_add(totals + 3, tl.sum(squares_after.to(tl.float64)), sem="relaxed")
    tl.atomic_add(totals + 4, tl.sum(values.to(tl.float64)), sem="relaxed")
    tl.atomic_add(totals + 5, tl.sum(values_after.to(tl.float64)), sem="relaxed")


class Variant(NamedTuple):
    """What the tensors of a launch have in common, for which its kernel is specialised.

    Attributes:
        score: Where scores come from: "magnitude", "widened" (as float32), "inverse", "product",
            "quotient", "hash" or "bit".
        entry: The entries' dtype.
        weight: The weights' dtype for products and quotients, else that of the entries.
        aligned: Whether weights can be read as the entries are, 16 bytes at a time.
    """

    score: str
    entry: torch.dtype
    weight: torch.dtype
    aligned: bool

    def constants(self) -> dict[str, Any]:
        """What all kernels are specialised for."""
        return {
            "entry": _VALUE[self.entry],
            "weight": _VALUE[self.weight],
            "last": FORMATS[self.entry].magnitude_bits,
            "infinity": FORMATS[self.entry].infinity,
            "score": self.score,
            "aligned": self.aligned,
            "alignment": _ALIGNMENT,
        }

    def dtype(self) -> torch.dtype:
        """The dtype of the scores."""
        return self.entry if self.score == "magnitude" else torch.float32


class Launch(NamedTuple):
    """A kernel, and how it is compiled and started.

    Attributes:
        kernel: Made by ``triton.jit``.
        constants: What it is specialised for.
        span: Entries a program.
        options: Of the compiler.
    """

    kernel: Any
    constants: dict[str, Any]
    span: int
    options: dict[str, int]

    def run(self, programs: int, *arguments: object) -> None:
        """Start that many programs."""
        self.kernel[(programs,)](*arguments, **self.constants, **self.options)


def count_launch(variant: Variant, digit: Digit, has_prefixes: bool) -> Launch:
    """How a digit is counted; with prefixes, only in entries whose bits above it are these.

    Without them the digit is the upper one, the first 15 bits after the sign.
    """
    if has_prefixes:
        constants = {"shift": digit.shift, "width": digit.width}
        size = _LOWER
        return Launch(
            _count_lower,
            variant.constants() | constants | size.constants(),
            size.span,
            size.options(),
        )
    assert digit == Digit(FORMATS[variant.dtype()].first_shift, 15)
    block = _BLOCK[variant.dtype()]
    if variant.score == "quotient":  # A division branches, and what is live then must fit.
        block //= 2
    constants = {
        "window": _WINDOW[variant.dtype()],
        "sample": min(_SAMPLE, block),
        "shared": _HISTOGRAM_IS_FAST,
        "block": block,
        "rare_block": min(_RARE_BLOCK, block),
    }
    options = {"num_warps": 8}
    if variant.score != "magnitude" and torch.version.hip is None:
        options["maxnreg"] = 128  # so that two programs share a multiprocessor, as they do there
    return Launch(_count_upper, variant.constants() | constants, block, options)


def mask_launch(variant: Variant) -> Launch:
    """How entries are masked."""
    return Launch(_mask_below, variant.constants() | _MASK.constants(), _MASK.span, _MASK.options())


def supports(kind: Kind) -> bool:
    """Whether there are kernels for scores of that kind; not for those that are given."""
    dtypes = {kind.entries, kind.weights or kind.entries}
    widens = kind.compared == torch.float32
    is_whole = kind.scores is Magnitudes and kind.entries == kind.compared
    return kind.scores in _SOURCES and dtypes <= COMPILED and (widens or is_whole)


def give_up_cache() -> None:
    """None: what Triton keeps on disk is left to Triton."""


def boundaries(itemsize: int) -> Iterator[tuple[int, int]]:
    """:func:`boundary_layouts` for the span of every kernel."""
    of_quotients = _BLOCK[torch.float32] // 2
    for span in sorted({_LOWER.span, _MASK.span, *_BLOCK.values(), of_quotients}):
        yield from boundary_layouts(itemsize, span)


def boundary_layouts(itemsize: int, span: int) -> Iterator[tuple[int, int]]:
    """Where a tensor may lie that ends close to the end of a program's span.

    A program that is told of more entries than a tensor has, or of fewer, is wrong only where the
    tensor's end lies within 16 bytes of the end of a span, so a random layout hardly ever shows it.

    Args:
        itemsize: Bytes of an entry.
        span: Entries of a program.

    Yields:
        Pairs of integers: how many entries after an address that is a multiple of 16 bytes the
        tensor starts, and how many entries it has.
    """
    entries_a_vector = _ALIGNMENT // itemsize
    for offset in range(entries_a_vector):
        for programs in (1, 2):
            for missing in range(-2, entries_a_vector + 2):
                yield offset, span * programs - missing


def _variant(batch: Batch) -> Variant:
    """What the scores of ``batch``, of one class and of the same dtypes, have in common."""
    scores = batch.scores[0]
    source, entry = _SOURCES[type(scores)], scores.entries.dtype
    if isinstance(scores, Weighted):
        aligned = all(
            isinstance(score, Weighted) and _is_aligned(score.entries, score.weights)
            for score in batch.scores
        )
        return Variant(source, entry, scores.weights.dtype, aligned)
    if isinstance(scores, Magnitudes) and entry != batch.dtype:
        source = "widened"
    return Variant(source, entry, entry, True)


def _is_aligned(entries: Tensor, weights: Tensor) -> bool:
    """Whether the weight of an entry at a multiple of 16 bytes is at a multiple of 16 bytes."""
    unaligned = entries.data_ptr() % _ALIGNMENT // entries.element_size()
    return (weights.data_ptr() - unaligned * weights.element_size()) % _ALIGNMENT == 0


def _table(batch: Batch, span: int, device: torch.device) -> tuple[Tensor, int]:
    """What kernels are told of each tensor, int64 ``(7, tensors)``, and the number of programs.

    The rows of the table are the tensor's address, entries and row, its first program, the address
    of its weights or bits, the key and the first position of its hashes. A pinned buffer is handed
    out again only after the copy from it is over, which PyTorch's allocator sees to.
    """
    table: list[tuple[int, ...]] = []
    programs = 0
    for score, row in batch.pairs():
        address, entries = score.entries.data_ptr(), score.entries.numel()
        weights = 0
        if isinstance(score, Weighted | Bits):
            weights = (score.weights if isinstance(score, Weighted) else score.bits).data_ptr()
        key, position = (score.key, score.first) if isinstance(score, Hashes) else (0, 0)
        table.append((address, entries, row, programs, weights, key, position))
        unaligned = address % _ALIGNMENT // score.entries.element_size()
        programs += triton.cdiv(unaligned + entries, span) if entries else 0
    is_gpu = device.type != "cpu"
    columns = list(zip(*table, strict=True))
    host = torch.tensor(columns, dtype=torch.int64, pin_memory=is_gpu)
    return host.to(device, non_blocking=True), programs


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on ``device``; the CPU is that of Triton's interpreter."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def count_digits(batch: Batch, digit: Digit, prefixes: Tensor | None, counts: Tensor) -> None:
    """See :meth:`~.contract.Backend.count_digits`."""
    launch = count_launch(_variant(batch), digit, prefixes is not None)
    _run(launch, batch, *(() if prefixes is None else (prefixes,)), counts)


def mask_below_(batch: Batch, thresholds: Tensor, totals: Tensor) -> None:
    """See :meth:`~.contract.Backend.mask_below_`."""
    _run(mask_launch(_variant(batch)), batch, thresholds, totals)


def _run(launch: Launch, batch: Batch, *tensors: Tensor) -> None:
    device = tensors[0].device
    table, programs = _table(batch, launch.span, device)
    if programs:
        with _on(device):
            launch.run(programs, table, *tensors, len(batch.scores))
