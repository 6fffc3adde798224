# mypy: disable-error-code="import-untyped"
"""Checks of compiled passes against the torch versions, on any device.

Tests run them where Triton interprets its kernels; on a machine with a GPU
``python -m tests.kernel_checks`` runs them all there.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from axolotl_gmt import passes
from axolotl_gmt.passes import Digit

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


def _normal(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return (torch.randn(size, generator=generator) * 1e-3).to(dtype)


def _ties(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randint(-2, 3, (size,), generator=generator).to(dtype)


def _sparse(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Zeros, and a few entries that a sample is likely to miss, far apart in magnitude."""
    entries = torch.zeros(size, dtype=dtype)
    entries[1::97] = _patterns(len(entries[1::97]), dtype, generator)
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
    """Counts of both digits are those of the torch version, in tables of either width."""
    dtype = DTYPES[name]
    memory, cut = _laid_out(layout, content, dtype, device)
    tensors = cut(memory)
    rows = [index * 7 % 3 for index in range(len(tensors))]
    upper = Digit(dtype.itemsize * 8 - 16, 15)
    passed: list[tuple[Digit, Tensor | None]] = [(upper, None)]
    if dtype == torch.float32:
        values = passes.magnitude_patterns(memory, dtype) >> 16
        some = torch.stack([values.mode().values, values[1], values.max()]).long()
        passed.append((Digit(0, 16), some))
    for (digit, prefixes), width in itertools.product(passed, [torch.int32, torch.int64]):
        expected = torch.ones(3, 1 << digit.width, dtype=width, device=device)
        got = expected.clone()
        for tensor, row in zip(tensors, rows, strict=True):
            passes._count_by_torch(tensor, row, dtype, digit, prefixes, expected)
        module.count_digits(tensors, rows, dtype, digit, prefixes, got)
        assert torch.equal(got, expected), (digit, width, (got != expected).nonzero()[:5])


def check_masks(module: Any, device: str, name: str, layout: str, content: str) -> None:
    """Masked entries are those of the torch version, bit for bit, and nothing else changes."""
    dtype = DTYPES[name]
    memory, cut = _laid_out(layout, content, dtype, device)
    magnitudes = passes.magnitude_patterns(memory, dtype).long()
    infinity = int(passes.magnitude_patterns(torch.tensor(torch.inf), dtype))
    median = magnitudes.median().clamp(max=infinity)
    thresholds = torch.stack([median, torch.zeros_like(median), magnitudes[1].clamp(max=infinity)])
    expected, got = memory.clone(), memory.clone()
    rows = [index * 5 % 3 for index in range(len(cut(memory)))]
    totals = torch.zeros(len(rows), 4, dtype=torch.float64, device=device)
    wanted = totals.clone()
    for tensor, row, total in zip(cut(expected), rows, wanted, strict=True):
        passes._mask_by_torch_(tensor, dtype, thresholds[row], total)
    module.mask_below_(cut(got), rows, dtype, thresholds, totals)
    assert torch.equal(got.view(BITS[dtype.itemsize]), expected.view(BITS[dtype.itemsize]))
    assert torch.equal(totals[:, :2], wanted[:, :2])
    if content != "any patterns" and content != "sparse":  # Squares there leave float32's range.
        assert torch.allclose(totals, wanted, rtol=1e-5)
    assert torch.equal(totals.isnan(), wanted.isnan())


def check_triton(device: str, name: str, layout: str, histogram_is_fast: bool = True) -> None:
    """Triton's kernels with every content; on the CPU only where they are interpreted."""
    from axolotl_gmt import kernels

    kernels._HISTOGRAM_IS_FAST = histogram_is_fast
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of squares that overflow.
        for content in CONTENTS:
            check_counts(kernels, device, name, layout, content)
            check_masks(kernels, device, name, layout, content)


def _at_boundaries(dtype: torch.dtype, span: int, device: str) -> list[Tensor]:
    """Tensors of their own memory, one for each of the layouts at the end of a program's span."""
    from axolotl_gmt import kernels

    generator = torch.Generator().manual_seed(span)
    tensors = []
    for offset, size in kernels.boundary_layouts(dtype.itemsize, span):
        memory = _ties(offset + size + 32, dtype, generator).to(device)
        assert memory.data_ptr() % 16 == 0
        tensors.append(memory[offset : offset + size])
    return tensors


def check_boundaries(device: str, name: str) -> None:
    """Every entry is counted once, wherever a tensor lies and ends."""
    from axolotl_gmt import kernels

    dtype = DTYPES[name]
    span = 1 << 7
    with mock.patch.multiple(kernels, _SPAN=span, _COUNT_BLOCK=span, _MASK_BLOCK=span // 2):
        tensors = _at_boundaries(dtype, span, device)
        rows = list(range(len(tensors)))
        upper = Digit(dtype.itemsize * 8 - 16, 15)
        digits: list[tuple[Digit, Tensor | None]] = [(upper, None)]
        if upper.shift:
            ones = torch.ones(len(rows), dtype=torch.int64, device=device)
            digits.append((Digit(0, 16), 0x3F80 * ones))  # the upper digit of 1
        for digit, prefixes in digits:
            got = torch.zeros(len(rows), 1 << digit.width, dtype=torch.int32, device=device)
            kernels.count_digits(tensors, rows, dtype, digit, prefixes, got)
            for index, tensor in enumerate(tensors):
                expected = torch.zeros_like(got[:1])
                of_row = None if prefixes is None else prefixes[:1]
                passes._count_by_torch(tensor, 0, dtype, digit, of_row, expected)
                difference = got[index] - expected[0]
                place = (tensor.data_ptr() % 16, len(tensor), digit)
                assert not difference.any(), (place, difference.nonzero()[:5], difference.unique())


def compile_triton(name: str) -> None:
    """Compile each kernel to machine code of an NVIDIA H100, which needs no GPU."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from axolotl_gmt import kernels

    dtype = DTYPES[name]
    is_fp32 = dtype == torch.float32
    layout = {"pattern": kernels._PATTERN[dtype.itemsize], "last": kernels._LAST[dtype.itemsize]}
    bins = {"shift": 16 * is_fp32, "bins": 1 << 15, "window": kernels._WINDOW[dtype]}
    span = {"span": kernels._SPAN, "alignment": kernels._ALIGNMENT}
    item = {"itemsize": dtype.itemsize}
    block = {"block": kernels._COUNT_BLOCK}
    table, counts = {"table": "*i64"}, {"counts": "*i32", "tensors": "i32"}
    made: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (
            kernels._place_windows,
            table | {"windows": "*i32"},
            layout | bins | {"infinity": kernels._INFINITY[dtype], "sample": kernels._SAMPLE},
        ),
        (
            kernels._count_upper,
            table | {"windows": "*i32"} | counts,
            item | bins | span | block | {"shared": kernels._HISTOGRAM_IS_FAST},
        ),
        (
            kernels._mask_below,
            table | {"thresholds": "*i64", "totals": "*fp64", "tensors": "i32"},
            layout | item | span | {"value": kernels._VALUE[dtype], "block": kernels._MASK_BLOCK},
        ),
    ]
    if is_fp32:
        made.append(
            (
                kernels._count_lower,
                table | {"prefixes": "*i64"} | counts,
                span | block | {"shift": 0, "width": 16},
            )
        )
    for kernel, arguments, constants in made:
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            signature={argument: arguments.get(argument, "constexpr") for argument in names},
            constexprs={(names.index(key),): value for key, value in constants.items()},
        )
        warps = 8 if kernel is kernels._mask_below else 16
        compiled = compile_kernel(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}
        )
        assert compiled.asm["cubin"]


if __name__ == "__main__":
    for dtype_name, some_layout in itertools.product(DTYPES, LAYOUTS):
        check_triton("cuda", dtype_name, some_layout)
        print(f"{dtype_name}, {some_layout}: counts and masks are those of the torch versions")
