"""The passes on a CPU in torch operations, compiled by torch.compile, and by Numba.

28 M bf16 entries in one tensor. This decided how the CPU path is made. Those of ``gradient_weight``
besides, by Numba: its scores have 32 bits, so that a third pass copies those that share the
threshold's first digit.
"""

from __future__ import annotations

import torch
from measuring import Row, arguments, in_turns, median_ms, save, show
from torch import Tensor

from axolotl_gmt.kernels import eager, numba_cpu
from axolotl_gmt.kernels.contract import TOTALS, Batch
from axolotl_gmt.kernels.dtypes import Digit, digits, magnitude_patterns
from axolotl_gmt.kernels.scores import Magnitudes, Products

ENTRIES = 28_000_000
DIGIT = Digit(0, 15)
THRESHOLD = 0x3A00
WEIGHTED = digits(torch.float32)[0]


@torch.compile
def compiled_count(entries: Tensor, counts: Tensor) -> Tensor:
    """What Inductor makes of a histogram."""
    patterns = entries.view(torch.int16).long() & 0x7FFF
    return counts.scatter_add(0, patterns, torch.ones_like(patterns, dtype=counts.dtype))


@torch.compile
def compiled_mask(entries: Tensor, threshold: int) -> tuple[Tensor, ...]:
    """What Inductor makes of the mask and its statistics."""
    magnitudes = entries.view(torch.int16).int() & 0x7FFF
    keep = magnitudes >= threshold
    values = entries.float()
    values_after = torch.where(keep, values, 0)
    sums = [
        part.sum(dtype=torch.float64)
        for part in (
            values.square(),
            values_after.square(),
            values.abs(),
            values_after.abs(),
        )
    ]
    return torch.where(keep, entries, 0), (keep & (magnitudes > 0)).sum(), *sums


def measure(runs: int) -> list[Row]:
    """A row for each pass made in each way."""
    torch.manual_seed(0)
    entries = (torch.randn(ENTRIES) * 1e-3).bfloat16()
    original = entries.clone()
    counts = torch.zeros(1, 1 << 15, dtype=torch.int32)
    totals = torch.zeros(1, TOTALS, dtype=torch.float64)
    threshold = torch.tensor([THRESHOLD])
    one = Batch([Magnitudes(entries)], [0], torch.bfloat16)
    products = Products(entries, (torch.randn(ENTRIES) * 0.02).bfloat16())
    weighted = Batch([products], [0], torch.float32)
    # The patterns that share their first digit with the median's.
    median = magnitude_patterns(products.values(0, ENTRIES).median().view(1), torch.float32).long()
    low = median >> WEIGHTED.shift << WEIGHTED.shift
    high, above = low + (1 << WEIGHTED.shift), torch.zeros_like(low)
    ways = {
        ("count", "torch operations"): lambda: eager.count_digits(one, DIGIT, None, counts),
        ("count", "torch.compile"): lambda: compiled_count(entries, counts[0]),
        ("count", "Numba"): lambda: numba_cpu.count_digits(one, DIGIT, None, counts),
        ("mask", "torch operations"): lambda: eager.mask_below_(one, threshold, totals),
        ("mask", "torch.compile"): lambda: compiled_mask(entries, THRESHOLD),
        ("mask", "Numba"): lambda: numba_cpu.mask_below_(one, threshold, totals),
        ("count, gradient_weight", "Numba"): lambda: numba_cpu.count_digits(
            weighted, WEIGHTED, None, counts
        ),
        ("copy, gradient_weight", "Numba"): lambda: numba_cpu.copy_between(
            weighted, low, high, above
        ),
        ("mask, gradient_weight", "Numba"): lambda: numba_cpu.mask_below_(weighted, low, totals),
    }
    seconds = in_turns(
        {" ".join(way): run for way, run in ways.items()},
        "cpu",
        runs,
        lambda: entries.copy_(original),
        "28 M bf16",
    )
    return [
        {
            "pass": what,
            "made of": how,
            "device": "cpu",
            "median ms": median_ms(times),
            "fastest ms": min(times) * 1e3,
        }
        for (what, how), times in zip(ways, seconds.values(), strict=True)
    ]


def main() -> None:
    """Measure on the CPU."""
    options = arguments(__doc__, runs=7)
    rows = measure(options.runs)
    show("Passes over 28 M bf16 entries, cpu", rows)
    save(options.json, rows)


if __name__ == "__main__":
    main()
