"""One mask step over tensors of different dtypes that compete for one threshold, on a CPU.

20 M entries in ten 16-bit tensors, alone and with one fp32 norm of 2,048 entries, as a model in
bfloat16 has it whose norms are kept in float32.
"""

from __future__ import annotations

import torch
from gradients import NoStep
from measuring import Row, arguments, in_turns, median_ms, save, show
from torch import Tensor

from axolotl_gmt import GMTConfig, GradientMasker

SIZES = [2_000_000] * 10
NORM = 2048


def mask_step(dtype: torch.dtype, with_norm: bool) -> NoStep:
    """An optimizer whose step is a mask step over all tensors together."""
    torch.manual_seed(0)
    tensors: list[Tensor] = []
    for size, of_tensor in [(size, dtype) for size in SIZES] + [(NORM, torch.float32)] * with_norm:
        tensor = torch.zeros(size, dtype=of_tensor, requires_grad=True)
        tensor.grad = (torch.randn(size) * 1e-3).to(of_tensor)
        tensors.append(tensor)
    optimizer = NoStep(tensors)
    named = [(f"tensor{index}", tensor) for index, tensor in enumerate(tensors)]
    GradientMasker(named, GMTConfig(granularity="global")).attach(optimizer)
    return optimizer


def measure(runs: int) -> list[Row]:
    """A row for each mixture; a step masks what the last has left, which takes as long."""
    steps = {
        f"{name}{' and one fp32 norm' if with_norm else ''}": mask_step(dtype, with_norm).step
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
        for with_norm in (False, True)
    }
    seconds = in_turns(steps, "cpu", runs, label="20 M entries")
    return [
        {
            "what": what,
            "device": "cpu",
            "median ms": median_ms(times),
            "fastest ms": min(times) * 1e3,
            "slowest ms": max(times) * 1e3,
        }
        for what, times in seconds.items()
    ]


def main() -> None:
    """Measure on the CPU."""
    options = arguments(__doc__, runs=7)
    rows = measure(options.runs)
    show("One threshold over 20 M entries, cpu", rows)
    save(options.json, rows)


if __name__ == "__main__":
    main()
