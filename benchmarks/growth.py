"""How the mask step grows: with the entries (10 M to 1 B), and with the tensors they are in.

All cases are views of the same gradients and take turns, so that they are measured alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gradients import DTYPES, NoStep, mask_step_of
from measuring import Row, arguments, devices, in_turns, median_ms, save, show
from torch import Tensor

MILLIONS = [10, 30, 100, 300, 1000]
TENSORS = [10, 30, 100, 300, 1000]
TENSORS_OF_ENTRIES = 100


def cut(memory: Tensor, millions: int, tensors: int) -> NoStep:
    """A mask step over the first ``millions`` of entries, as gradients of equal size."""
    parameters = []
    for grad in memory[: millions * 1_000_000].chunk(tensors):
        # The values of parameters do not matter, so they take no memory.
        parameter = memory.new_zeros(1).expand(len(grad)).requires_grad_()
        parameter.grad = grad
        parameters.append(parameter)
    return mask_step_of(parameters, 0.5)


def cases(largest: int) -> Iterator[tuple[str, int, int]]:
    """Series, millions of entries, and number of tensors."""
    for millions in MILLIONS:
        if millions <= largest:
            yield "entries", millions, TENSORS_OF_ENTRIES
    for tensors in TENSORS:
        yield "tensors", largest, tensors


def measure(device: str, dtype: str, largest: int, runs: int) -> list[Row]:
    """A row for each case."""
    torch.manual_seed(0)
    memory = torch.empty(largest * 1_000_000, dtype=DTYPES[dtype], device=device).normal_()
    original = memory.clone()
    contenders = {case: cut(memory, *case[1:]).step for case in cases(largest)}
    seconds = in_turns(
        {f"{series}, {millions} M in {tensors}": step
         for (series, millions, tensors), step in contenders.items()},
        device,
        runs,
        lambda: memory.copy_(original),
        f"{dtype} {device}",
    )  # fmt: skip
    return [
        {
            "series": series,
            "dtype": dtype,
            "device": device,
            "million entries": millions,
            "tensors": tensors,
            "median ms": median_ms(times),
            "fastest ms": min(times) * 1e3,
            "ns an entry": median_ms(times) / millions,
        }
        for (series, millions, tensors), times in zip(contenders, seconds.values(), strict=True)
    ]


def main() -> None:
    """Measure on every device there is."""
    options = arguments(__doc__, runs=7, millions=1000)
    rows = []
    for device in [options.device] if options.device else devices():
        found = measure(device, "bf16", options.millions, options.runs)
        show(f"Growth of the mask step, bf16, {device}", found)
        rows += found
    save(options.json, rows)


if __name__ == "__main__":
    main()
