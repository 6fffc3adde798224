# mypy: disable-error-code="import-untyped"
"""Checks of compiled passes against the torch versions, on any device.

Tests run them where Triton interprets its kernels; on a machine with a GPU
``python -m tests.kernels.kernel_checks`` runs them all there.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from axolotl_gmt.kernels import eager
from axolotl_gmt.kernels.contract import TOTALS, Batch
from axolotl_gmt.kernels.dtypes import FORMATS, Digit, magnitude_patterns
from axolotl_gmt.kernels.scores import (
    Bits,
    Hashes,
    Inverses,
    Magnitudes,
    Products,
    Quotients,
    Scores,
    uniform,
)
from tests.reference.gmt_reference import relative_scores

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BITS = {2: torch.int16, 4: torch.int32}

# Entries of each tensor, and of the gap before it, which decides its alignment.
LAYOUTS = {
    "one": [(0, 1)],
    "ragged": [(1, 5), (0, 1), (3, 0), (2, 17), (7, 4096), (1, 4095), (5, 33000)],
    "aligned": [(0, 16384), (0, 65536), (0, 4096)],
    "many programs": [(3, 70001), (0, 200000), (1, 65535)],
    "many tensors": [(index % 5, (37 * index) % 101) for index in range(24)],
}


def _patterns(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bit patterns: every kind of NaN, infinities, denormals, both zeros."""
    info = torch.iinfo(BITS[dtype.itemsize])
    drawn = torch.randint(info.min, info.max + 1, (size,), generator=generator, dtype=torch.int64)
    drawn = drawn.to(BITS[dtype.itemsize])
    drawn[::11] = 0
    drawn[::13] = info.min
    return drawn.view(dtype)


def _finite_patterns(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any patterns but those whose squares leave float32's range."""
    entries = _patterns(size, dtype, generator)
    return torch.where(entries.float().abs() < 1e15, entries, 1)


def _normal(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return (torch.randn(size, generator=generator) * 1e-3).to(dtype)


def _ties(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randint(-2, 3, (size,), generator=generator).to(dtype)


def _sparse(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Zeros, and a few entries that a sample is likely to miss, far apart in magnitude."""
    entries = torch.zeros(size, dtype=dtype)
    entries[1::97] = _patterns(len(entries[1::97]), dtype, generator)
    return entries


def _mostly_zeros(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    entries = torch.zeros(size, dtype=dtype)
    entries[1::3] = _normal(len(entries[1::3]), dtype, generator)
    return entries


def _bf16_once(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _normal(size, torch.bfloat16, generator).to(dtype)


CONTENTS: dict[str, Callable[[int, torch.dtype, torch.Generator], Tensor]] = {
    "any patterns": _patterns,
    "normal": _normal,
    "ties": _ties,
    "sparse": _sparse,
    "bf16 once": _bf16_once,
}


def _laid_out(layout: str, content: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Any]:
    """Memory, and a function that cuts the tensors of a layout from any memory like it."""
    places = []
    used = 0
    for gap, entries in LAYOUTS[layout]:
        places.append((used + gap, used + gap + entries))
        used += gap + entries
    generator = torch.Generator().manual_seed(len(layout) + len(content))
    memory = CONTENTS[content](used + 8, dtype, generator).to(device)
    return memory, lambda memory: [memory[start:end] for start, end in places]


def check_counts(module: Any, device: str, name: str, layout: str, content: str) -> None:
    """Counts of both digits are those of the torch version; tables have either width in turns."""
    dtype = DTYPES[name]
    memory, cut = _laid_out(layout, content, dtype, device)
    tensors = cut(memory)
    rows = [index * 7 % 3 for index in range(len(tensors))]
    upper = Digit(FORMATS[dtype].first_shift, 15)
    passed: list[tuple[Digit, Tensor | None]] = [(upper, None)]
    if dtype == torch.float32:
        values = magnitude_patterns(memory, dtype) >> 16
        some = torch.stack([values.mode().values, values[1], values.max()]).long()
        passed.append((Digit(0, 16), some))
    width = [torch.int32, torch.int64][list(CONTENTS).index(content) % 2]
    for digit, prefixes in passed:
        expected = torch.ones(3, 1 << digit.width, dtype=width, device=device)
        got = expected.clone()
        batch = Batch([Magnitudes(tensor) for tensor in tensors], rows, dtype)
        eager.count_digits(batch, digit, prefixes, expected)
        module.count_digits(batch, digit, prefixes, got)
        assert torch.equal(got, expected), (digit, width, (got != expected).nonzero()[:5])


def check_masks(module: Any, device: str, name: str, layout: str, content: str) -> None:
    """Masked entries are those of the torch version, bit for bit, and nothing else changes."""
    dtype = DTYPES[name]
    memory, cut = _laid_out(layout, content, dtype, device)
    magnitudes = magnitude_patterns(memory, dtype).long()
    infinity = FORMATS[dtype].infinity
    median = magnitudes.median().clamp(max=infinity)
    thresholds = torch.stack([median, torch.zeros_like(median), magnitudes[1].clamp(max=infinity)])
    expected, got = memory.clone(), memory.clone()
    rows = [index * 5 % 3 for index in range(len(cut(memory)))]
    totals = torch.zeros(len(rows), TOTALS, dtype=torch.float64, device=device)
    wanted = totals.clone()
    for backend, of, into in ((eager, expected, wanted), (module, got, totals)):
        batch = Batch([Magnitudes(tensor) for tensor in cut(of)], rows, dtype)
        backend.mask_below_(batch, thresholds, into)
    assert torch.equal(got.view(BITS[dtype.itemsize]), expected.view(BITS[dtype.itemsize]))
    assert torch.equal(totals[:, :2], wanted[:, :2])
    if content != "any patterns" and content != "sparse":  # Squares there leave float32's range.
        assert torch.allclose(totals, wanted, rtol=1e-5)
    assert torch.equal(totals.isnan(), wanted.isnan())


def check_triton(device: str, name: str, layout: str) -> None:
    """Triton's kernels with every content; on the CPU only where they are interpreted."""
    from axolotl_gmt.kernels import triton_gpu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of squares that overflow.
        for content in CONTENTS:
            if (name, content) != ("bf16", "bf16 once"):  # That is "normal".
                check_counts(triton_gpu, device, name, layout, content)
                check_masks(triton_gpu, device, name, layout, content)


def check_old_triton(device: str, name: str, layout: str) -> None:
    """Counts as before Triton 3.8, where every entry is added to global memory."""
    from axolotl_gmt.kernels import triton_gpu

    with mock.patch.object(triton_gpu, "_HISTOGRAM_IS_FAST", False):
        for content in CONTENTS:
            check_counts(triton_gpu, device, name, layout, content)


def _score_by_torch(score: Scores) -> Tensor:
    """Scores in memory, slowly: what a kernel makes as it goes."""
    match score:
        case Magnitudes(entries):
            return entries
        case Inverses(entries):
            values = entries.float().abs()
            bits = (0x7F800000 - values.view(torch.int32)).view(torch.float32)
            return torch.where(values == 0, 0, bits).masked_fill(~values.isfinite(), torch.inf)
        case Products(entries, weights):
            products = entries.float() * weights.float()
            return products.masked_fill(products.isnan(), torch.inf)
        case Quotients(entries, weights):
            return relative_scores(entries.cpu(), weights.cpu()).to(entries.device)
        case Hashes(entries, key, first):
            positions = first + torch.arange(len(entries), device=entries.device)
            return uniform(positions, key).masked_fill(~entries.isfinite(), torch.inf)
        case Bits(entries, bits):
            flags = [bits[index // 8] >> (index % 8) & 1 for index in range(len(entries))]
            ones = torch.tensor(flags, dtype=torch.float32, device=entries.device)
            return ones.masked_fill(~entries.isfinite(), torch.inf)
        case _:
            raise TypeError(score)


def _scored(
    name: str, entries: Sequence[Tensor], weight: torch.dtype, weights_lie_apart: int
) -> list[Scores]:
    """Scores of ``entries``; weights start as many entries later within 16 bytes as is said."""
    generator = torch.Generator().manual_seed(len(entries))
    scores: list[Scores] = []
    for index, tensor in enumerate(entries):
        if name == "magnitude":
            scores.append(Magnitudes(tensor))
        elif name == "inverse":
            scores.append(Inverses(tensor))
        elif name in ("product", "quotient"):
            offset = tensor.data_ptr() % 16 // tensor.element_size() + weights_lie_apart
            size = offset + len(tensor)
            memory = (
                _normal(size, weight, generator) if index % 2 else _ties(size, weight, generator)
            )
            memory[offset::11] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])[index % 4]
            of_weights = Products if name == "product" else Quotients
            scores.append(of_weights(tensor, memory.to(tensor.device)[offset:]))
        elif name == "bit":
            bits = torch.randint(256, (-(-len(tensor) // 8),), generator=generator)
            scores.append(Bits(tensor, bits.to(tensor.device, torch.uint8)))
        else:
            key = int(torch.randint(-(2**63), 2**63 - 1, (), generator=generator))
            scores.append(Hashes(tensor, key, (1 << 40) * (index % 3) + 7 * index))
    return scores


def check_scores(
    module: Any, scores: Sequence[Scores], rows: Sequence[int], digits: Sequence[Digit]
) -> None:
    """Counts and masks are those that the scores, made by torch, give.

    Args:
        module: Passes that take scores.
        scores: Of one class and of the same dtypes.
        rows: The row of each.
        digits: Which to count besides the upper one, where the bits above match.
    """
    by_torch = [_score_by_torch(score) for score in scores]
    dtype, device = by_torch[0].dtype, by_torch[0].device
    patterns = [magnitude_patterns(score, dtype).long() for score in by_torch]
    infinity = FORMATS[dtype].infinity
    of_rows = [
        torch.cat([pattern for pattern, other in zip(patterns, rows, strict=True) if other == row])
        for row in range(max(rows) + 1)
    ]
    some = torch.stack([pattern.median() for pattern in of_rows]).clamp(max=infinity)
    upper = Digit(FORMATS[dtype].first_shift, 15)
    for digit in (upper, *digits):
        prefixes = None if digit == upper else some >> (digit.shift + digit.width)
        got = torch.zeros(len(of_rows), 1 << digit.width, dtype=torch.int32, device=device)
        module.count_digits(Batch(scores, rows, dtype), digit, prefixes, got)
        for row, pattern in enumerate(of_rows):
            if prefixes is not None:
                pattern = pattern[pattern >> (digit.shift + digit.width) == prefixes[row]]
            values = (pattern >> digit.shift) & ((1 << digit.width) - 1)
            difference = got[row] - values.bincount(minlength=1 << digit.width)
            lie = [
                (score.entries.data_ptr() % 16, len(score.entries))
                for score, other in zip(scores, rows, strict=True)
                if other == row
            ]
            wrong = difference.nonzero().flatten()[:5]
            assert not difference.any(), (digit, lie, wrong, difference[wrong])
    memory = [score.entries.clone() for score in scores]
    totals = torch.zeros(len(scores), TOTALS, dtype=torch.float64, device=device)
    expected_totals = totals.clone()
    for index, (score, pattern, row) in enumerate(zip(scores, patterns, rows, strict=True)):
        kept = score.entries.masked_fill(pattern < some[row], 0)
        total = [len(kept), kept.count_nonzero()]
        total += [of.double().square().sum() for of in (score.entries, kept)]
        total += [of.double().abs().sum() for of in (score.entries, kept)]
        expected_totals[index] = torch.stack([torch.as_tensor(number).cpu() for number in total])
        memory[index] = kept
    module.mask_below_(
        Batch(scores, rows, dtype), some, totals
    )  # In place, where alignment is drawn.
    for score, kept in zip(scores, memory, strict=True):
        bits = BITS[kept.itemsize]
        assert torch.equal(score.entries.view(bits), kept.view(bits)), score.entries.data_ptr() % 16
    assert torch.equal(totals[:, :2], expected_totals[:, :2])
    torch.testing.assert_close(totals, expected_totals, rtol=1e-5, atol=0, equal_nan=True)


def check_boundaries(
    device: str, score: str, entry: str, weight: str = "bf16", weights_lie_apart: int = 0
) -> None:
    """Every entry is taken once, wherever a tensor lies and ends.

    Programs are small, so that there are many of them and a window that does not hold all scores.
    Memory around a tensor must stay as it is.
    """
    from axolotl_gmt.kernels import triton_gpu

    dtype = DTYPES[entry]
    span = 1 << 7
    size = triton_gpu._Size(span, span // 2, 4)
    layouts = list(triton_gpu.boundary_layouts(dtype.itemsize, span))
    if device == "cpu":  # Slow: every offset with every end, of one program and of two in turns.
        layouts = [
            (offset, entries)
            for offset, entries in layouts
            if (offset + entries + (2 * entries > 3 * span)) % 2 == 0
        ]
    generator = torch.Generator().manual_seed(span)
    contents = [_finite_patterns, _ties, _mostly_zeros]
    memory = [
        contents[index % 3](offset + entries + 32, dtype, generator).to(device)
        for index, (offset, entries) in enumerate(layouts)
    ]
    before = [tensor.clone() for tensor in memory]
    assert all(tensor.data_ptr() % 16 == 0 for tensor in memory)
    tensors = [
        tensor[offset : offset + entries]
        for tensor, (offset, entries) in zip(memory, layouts, strict=True)
    ]
    scores = _scored(score, tensors, DTYPES[weight], weights_lie_apart)
    of_every_dtype = dict.fromkeys(DTYPES.values())
    with mock.patch.multiple(
        triton_gpu,
        _BLOCK=of_every_dtype | dict.fromkeys(of_every_dtype, span),
        _WINDOW=dict.fromkeys(of_every_dtype, 1 << 8),
        _SAMPLE=1 << 5,
        _RARE_BLOCK=span,
        _LOWER=size,
        _MASK=size,
    ):
        digits = [Digit(0, 16)] if score != "magnitude" or entry == "fp32" else [Digit(0, 0)]
        check_scores(triton_gpu, scores, range(len(scores)), digits)
    for now, then, (offset, entries) in zip(memory, before, layouts, strict=True):
        bits = BITS[now.itemsize]
        for outside in (slice(offset), slice(offset + entries, None)):
            assert torch.equal(now[outside].view(bits), then[outside].view(bits))


def check_window(device: str, entry: str) -> None:
    """Entries at both ends of a program's window and just outside are counted where they belong."""
    from axolotl_gmt.kernels import triton_gpu

    dtype = DTYPES[entry]
    span, window, sample = 1 << 10, 1 << 8, 1 << 4
    shift = dtype.itemsize * 8 - 16
    sampled = (1 << 14) + 7
    digits = torch.randint(1, 1 << 14, (2, span), generator=torch.Generator().manual_seed(0))
    first = sampled + window // 8 - (window - 2)
    ends = [
        first - 1,
        first,
        first + 1,
        *range(sampled + window // 8 - 1, sampled + window // 8 + 4),
    ]
    digits[0, 1 : 1 + len(ends)] = torch.tensor(ends)
    digits[1] = 0
    digits[1, 1 : 1 + len(ends)] = torch.tensor(ends)
    digits[:, :: span // sample] = sampled  # what the program samples
    entries = (digits << shift).to(BITS[dtype.itemsize]).view(dtype).to(device)
    with mock.patch.multiple(
        triton_gpu,
        _BLOCK=dict.fromkeys(DTYPES.values(), span),
        _WINDOW=dict.fromkeys(DTYPES.values(), window),
        _SAMPLE=sample,
        _RARE_BLOCK=span // 4,
    ):
        counts = torch.zeros(2, 1 << 15, dtype=torch.int64, device=device)
        scores = [Magnitudes(row) for row in entries]
        triton_gpu.count_digits(Batch(scores, [0, 1], dtype), Digit(shift, 15), None, counts)
    for found, row in zip(counts, digits, strict=True):
        difference = found.cpu() - row.bincount(minlength=1 << 15)
        assert not difference.any(), (first, difference.nonzero().flatten())


def check_made_scores(device: str, score: str, entry: str, weight: str, apart: int) -> None:
    """Scores that kernels make are those of torch, for programs of the usual size too."""
    from axolotl_gmt.kernels import triton_gpu

    dtype = DTYPES[entry]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of products that overflow.
        for layout in ("ragged", "aligned"):
            memory, cut = _laid_out(layout, "normal", dtype, device)
            memory[5::1009] = torch.tensor([torch.nan, torch.inf, 0.0]).repeat(len(memory))[
                : len(memory[5::1009])
            ]
            scores = _scored(score, cut(memory), DTYPES[weight], apart)
            rows = [index * 7 % 3 for index in range(len(scores))]
            check_scores(triton_gpu, scores, rows, [Digit(0, 16)])


def check_all(device: str, name: str) -> None:
    """Every check of Triton's kernels with entries of that dtype."""
    for layout in LAYOUTS:
        check_triton(device, name, layout)
    check_window(device, name)
    for score in ("magnitude", "inverse", "hash", "bit"):
        check_boundaries(device, score, name)
    for score in ("inverse", "hash", "bit"):
        check_made_scores(device, score, name, name, 0)
    for score, weight, apart in itertools.product(("product", "quotient"), DTYPES, (0, 1)):
        check_boundaries(device, score, name, weight, apart)
        check_made_scores(device, score, name, weight, apart)


if __name__ == "__main__":
    for dtype_name in DTYPES:
        check_all("cuda", dtype_name)
        print(f"{dtype_name}: counts and masks are those of the torch versions")
