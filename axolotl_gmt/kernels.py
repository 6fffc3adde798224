# mypy: disable-error-code="untyped-decorator, import-untyped, attr-defined"
"""The passes of :mod:`axolotl_gmt.passes` over memory of a GPU, as Triton kernels.

Same results as the torch versions there; only sums of squares may differ in their last digits, for
they are taken in float32 within a block of 2^12 entries and in float64 beyond. One launch takes
all tensors of a call: a table of addresses, copied from pinned memory without waiting, tells each
program which 2^16 entries are its own. No value comes back to the host. Positions have 64 bits.

What bounds them, for n entries of b bytes:

- Masking reads n b bytes and writes as many, in aligned vectors of 16 bytes but for the first and
  last block of a tensor, with some twenty instructions an entry.
- Counting reads n b bytes, and adds 1 to a bin for every entry. Additions to global memory happen
  in the L2 cache, at a fraction of the rate at which 16-bit entries arrive, and concentrate on a
  few hundred bins. So a program counts in shared memory: from Triton 3.8 on, ``tl.histogram`` is
  one shared atomic increment an entry, in which the hardware unites equal values of a warp. All
  2^15 bins would leave room for one program on a multiprocessor and cost as much to clear and read
  as a block to count. But the magnitudes of one tensor span few octaves: a window of 2^12 bins
  holds 32 octaves of bf16 and fp32, one of 2^14 holds 16 of fp16. A first, small launch places
  each tensor's window a little above the largest of 2^12 sampled entries. What lies outside is
  then as rare as it was in the sample, and is added to global memory entry by entry; the number of
  zeros, which may lie outside and not be rare, is that of all entries less the others. A program
  adds its window to global memory once, without the empty bins.
- The lower digit of fp32 costs one more read. About one entry in 300 matches the upper digit.
  Values of 0 are summed in registers there: exact zeros, and all entries of a gradient that once
  was bf16, would otherwise meet in one bin.

Older versions of Triton make ``tl.histogram`` of votes, at a cost that grows with the bins; with
them every entry is added to global memory. That bounds their counting, not the bandwidth.

Extra memory: 32 bytes a tensor for the table and 4 for the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from axolotl_gmt.passes import Digit

DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})

_VALUE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_PATTERN = {2: tl.int16, 4: tl.int32}
_LAST = {2: 0x7FFF, 4: 0x7FFFFFFF}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
_WINDOW = {torch.bfloat16: 1 << 12, torch.float16: 1 << 14, torch.float32: 1 << 12}

_ALIGNMENT = 16  # bytes: the table counts a tensor's programs, and kernels find them, by it alone
_SPAN = 1 << 16  # entries a program
_COUNT_BLOCK = 1 << 14
_MASK_BLOCK = 1 << 12
_SAMPLE = 1 << 12

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_HISTOGRAM_IS_FAST = _VERSION >= (3, 8)


@triton.jit
def _tensor_of(table: tl.tensor, tensors: tl.tensor, program: tl.tensor) -> tl.tensor:
    """The tensor whose entries a program takes: the last one whose first program it is past."""
    low = 0
    high = tensors
    while high - low > 1:
        middle = (low + high) // 2
        is_past = tl.load(table + 4 * middle + 3) <= program
        low = tl.where(is_past, middle, low)
        high = tl.where(is_past, high, middle)
    return low


@triton.jit
def _place(
    table: tl.tensor, tensor: tl.tensor, program: tl.tensor, pointee: tl.constexpr,
    itemsize: tl.constexpr, alignment: tl.constexpr, span: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where a program's entries are.

    Returns:
        Pointer to the program's span of memory, aligned as :func:`_table` reserves programs; from
        there, in entries, the positions of the tensor's first entry within the span and of the end
        of them, never before it, both int32.
    """
    address = tl.load(table + 4 * tensor)
    before = (address % alignment) // itemsize
    start = (program - tl.load(table + 4 * tensor + 3)) * span
    first = tl.maximum(before - start, 0).to(tl.int32)
    end = tl.minimum(before + tl.load(table + 4 * tensor + 1) - start, span).to(tl.int32)
    pointer = (address + (start - before) * itemsize).to(tl.pointer_type(pointee))
    return pointer, first, tl.maximum(first, end)


@triton.jit
def _place_windows(
    table: tl.tensor, windows: tl.tensor, pattern: tl.constexpr, last: tl.constexpr,
    infinity: tl.constexpr, shift: tl.constexpr, bins: tl.constexpr, window: tl.constexpr,
    sample: tl.constexpr,
) -> None:  # fmt: skip
    """The first bin of each tensor's window; an eighth of it is above the largest of a sample."""
    tensor = tl.program_id(0)
    pointer = tl.load(table + 4 * tensor).to(tl.pointer_type(pattern))
    entries = tl.load(table + 4 * tensor + 1)
    lanes = tl.arange(0, sample) * tl.maximum(entries // sample, 1)
    magnitudes = tl.load(pointer + lanes, mask=lanes < entries, other=0).to(tl.int32) & last
    largest = tl.max(tl.where(magnitudes < infinity, magnitudes, 0)) >> shift
    low = tl.minimum(tl.maximum(largest + 1 + window // 8 - window, 0), bins - window)
    tl.store(windows + tensor, low)


@triton.jit(do_not_specialize=["tensors"])
def _count_upper(
    table: tl.tensor, windows: tl.tensor, counts: tl.tensor, tensors: tl.tensor,
    itemsize: tl.constexpr, shift: tl.constexpr, bins: tl.constexpr, window: tl.constexpr,
    shared: tl.constexpr, alignment: tl.constexpr, span: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Count the upper digit of every entry, most of them in shared memory.

    Memory is read in words of 32 bits, one a thread at a time. Wider reads would give a thread
    neighbouring entries, which Triton moves to other threads before it adds to global memory.
    """
    program = tl.program_id(0)
    tensor = _tensor_of(table, tensors, program)
    pointer, first, end = _place(table, tensor, program, tl.int32, itemsize, alignment, span)
    pointer = tl.multiple_of(pointer, 4)
    counts += tl.load(table + 4 * tensor + 2) * bins
    low = tl.load(windows + tensor)
    entries_a_word: tl.constexpr = 4 // itemsize
    in_window = tl.zeros([window], dtype=tl.int32)
    not_zero = 0
    for position in range(0, end, block):
        lanes = position // entries_a_word + tl.arange(0, block // entries_a_word)
        if (position >= first) & (position + block <= end):
            words = tl.load(pointer + lanes)
        else:
            there = (lanes >= first // entries_a_word) & (lanes * entries_a_word < end)
            words = tl.load(pointer + lanes, mask=there, other=0)
            if entries_a_word == 2:  # The words at both ends may hold another tensor's entry.
                words = tl.where(lanes * 2 < first, words & -65536, words)
                words = tl.where(lanes * 2 + 1 == end, words & 65535, words)
        rare = words != words
        for part in tl.static_range(entries_a_word):
            values = (words >> (shift + 16 * part)) & (bins - 1)
            common = values < 0
            if shared:
                moved = (values - low).to(tl.uint32, bitcast=True)
                common = moved < window
                in_window += tl.histogram(moved.to(tl.int32, bitcast=True), window, mask=common)
            rare = rare | ((values > 0) & (common == 0))
        if tl.max(rare.to(tl.int32)) > 0:
            for part in tl.static_range(entries_a_word):
                values = (words >> (shift + 16 * part)) & (bins - 1)
                others = values > 0
                if shared:
                    others = others & ((values < low) | (values >= low + window))
                not_zero += tl.sum(others.to(tl.int32))
                tl.atomic_add(counts + values, 1, mask=others, sem="relaxed")
    if shared:
        bin_of = low + tl.arange(0, window)
        in_window = tl.where(bin_of > 0, in_window, 0)
        not_zero += tl.sum(in_window)
        tl.atomic_add(counts + bin_of, in_window, mask=in_window > 0, sem="relaxed")
    tl.atomic_add(counts, end - first - not_zero, sem="relaxed")


@triton.jit(do_not_specialize=["tensors"])
def _count_lower(
    table: tl.tensor, prefixes: tl.tensor, counts: tl.tensor, tensors: tl.tensor,
    shift: tl.constexpr, width: tl.constexpr, alignment: tl.constexpr, span: tl.constexpr,
    block: tl.constexpr,
) -> None:  # fmt: skip
    """Count a digit of the few fp32 entries whose bits above it are those of the row's prefix."""
    program = tl.program_id(0)
    tensor = _tensor_of(table, tensors, program)
    pointer, first, end = _place(table, tensor, program, tl.int32, 4, alignment, span)
    pointer = tl.multiple_of(pointer, 4)
    row = tl.load(table + 4 * tensor + 2)
    prefix = tl.load(prefixes + row).to(tl.int32)
    counts += row << width
    zeros = 0
    for position in range(0, end, block):
        lanes = position + tl.arange(0, block)
        there = (lanes >= first) & (lanes < end)
        magnitudes = tl.load(pointer + lanes, mask=there, other=0) & 0x7FFFFFFF
        matches = there & ((magnitudes >> (shift + width)) == prefix)
        values = (magnitudes >> shift) & ((1 << width) - 1)
        zeros += tl.sum((matches & (values == 0)).to(tl.int32))
        tl.atomic_add(counts + values, 1, mask=matches & (values > 0), sem="relaxed")
    tl.atomic_add(counts, zeros, mask=zeros > 0, sem="relaxed")


@triton.jit
def _masked(
    patterns: tl.tensor, threshold: tl.tensor, pattern: tl.constexpr, value: tl.constexpr,
    last: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A block after masking; its non-zero entries then, and sums of squares before and then."""
    magnitudes = patterns.to(tl.int32) & last
    keep = magnitudes >= threshold
    values = magnitudes.to(pattern).to(value, bitcast=True).to(tl.float32)
    squares = values * values
    kept = tl.sum((keep & (magnitudes > 0)).to(tl.int32))
    after = tl.sum(tl.where(keep, squares, 0.0))
    return tl.where(keep, patterns, 0).to(pattern), kept, tl.sum(squares), after


@triton.jit(do_not_specialize=["tensors"])
def _mask_below(
    table: tl.tensor, thresholds: tl.tensor, totals: tl.tensor, tensors: tl.tensor,
    pattern: tl.constexpr, value: tl.constexpr, itemsize: tl.constexpr, last: tl.constexpr,
    alignment: tl.constexpr, span: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Set to zero what lies below the row's threshold, and add up the statistics."""
    program = tl.program_id(0)
    tensor = _tensor_of(table, tensors, program)
    pointer, first, end = _place(table, tensor, program, pattern, itemsize, alignment, span)
    pointer = tl.multiple_of(pointer, alignment)
    threshold = tl.load(thresholds + tl.load(table + 4 * tensor + 2)).to(tl.int32)
    kept = 0
    before = tl.zeros([], dtype=tl.float64)
    after = tl.zeros([], dtype=tl.float64)
    for position in range(0, end, block):
        lanes = position + tl.arange(0, block)
        if (position >= first) & (position + block <= end):
            patterns = tl.load(pointer + lanes)
            result, kept_here, before_here, after_here = _masked(
                patterns, threshold, pattern, value, last
            )
            tl.store(pointer + lanes, result)
        else:
            there = (lanes >= first) & (lanes < end)
            patterns = tl.load(pointer + lanes, mask=there, other=0)
            result, kept_here, before_here, after_here = _masked(
                patterns, threshold, pattern, value, last
            )
            tl.store(pointer + lanes, result, mask=there)
        kept += kept_here
        before += before_here.to(tl.float64)
        after += after_here.to(tl.float64)
    totals += 4 * tensor
    tl.atomic_add(totals, (end - first).to(tl.float64), sem="relaxed")
    tl.atomic_add(totals + 1, kept.to(tl.float64), sem="relaxed")
    tl.atomic_add(totals + 2, before, sem="relaxed")
    tl.atomic_add(totals + 3, after, sem="relaxed")


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


def _table(tensors: Sequence[Tensor], rows: Sequence[int], device: torch.device) -> tuple[Any, int]:
    """Address, entries, row and first program of each tensor, int64 ``(tensors, 4)``.

    Also the number of programs. A pinned buffer is handed out again only after the copy from it
    is over, which PyTorch's allocator sees to.
    """
    table: list[list[int]] = []
    programs = 0
    for tensor, row in zip(tensors, rows, strict=True):
        address, entries = tensor.data_ptr(), tensor.numel()
        table.append([address, entries, row, programs])
        unaligned = address % _ALIGNMENT // tensor.element_size()
        programs += triton.cdiv(unaligned + entries, _SPAN) if entries else 0
    is_gpu = device.type != "cpu"
    host = torch.tensor(table, dtype=torch.int64, pin_memory=is_gpu)
    return host.to(device, non_blocking=True), programs


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on ``device``; the CPU is that of Triton's interpreter."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def count_digits(
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    dtype: torch.dtype,
    digit: Digit,
    prefixes: Tensor | None,
    counts: Tensor,
) -> None:
    """:func:`axolotl_gmt.passes.count_digits` for GPU tensors that all are ``dtype``."""
    device = counts.device
    table, programs = _table(tensors, rows, device)
    if programs == 0:
        return
    launch = {
        "alignment": _ALIGNMENT,
        "span": _SPAN,
        "block": _COUNT_BLOCK,
        "num_warps": 16,
    }
    with _on(device):
        if prefixes is not None:
            bits = {"shift": digit.shift, "width": digit.width}
            _count_lower[(programs,)](table, prefixes, counts, len(tensors), **bits, **launch)
            return
        bins = {
            "shift": digit.shift,
            "bins": 1 << digit.width,
            "window": min(_WINDOW[dtype], 1 << digit.width),
        }
        windows = torch.empty(len(tensors), dtype=torch.int32, device=device)
        _place_windows[(len(tensors),)](
            table,
            windows,
            **bins,
            pattern=_PATTERN[dtype.itemsize],
            last=_LAST[dtype.itemsize],
            infinity=_INFINITY[dtype],
            sample=_SAMPLE,
        )
        _count_upper[(programs,)](
            table,
            windows,
            counts,
            len(tensors),
            **bins,
            **launch,
            itemsize=dtype.itemsize,
            shared=_HISTOGRAM_IS_FAST,
        )


def mask_below_(
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    dtype: torch.dtype,
    thresholds: Tensor,
    totals: Tensor,
) -> None:
    """:func:`axolotl_gmt.passes.mask_below_` for GPU tensors that all are ``dtype``."""
    table, programs = _table(tensors, rows, totals.device)
    if programs == 0:
        return
    with _on(totals.device):
        _mask_below[(programs,)](
            table,
            thresholds,
            totals,
            len(tensors),
            pattern=_PATTERN[dtype.itemsize],
            value=_VALUE[dtype],
            itemsize=dtype.itemsize,
            last=_LAST[dtype.itemsize],
            alignment=_ALIGNMENT,
            span=_SPAN,
            block=_MASK_BLOCK,
            num_warps=8,
        )
