"""One mask step against other ways to mask, an optimizer's step, and a copy of the same bytes.

The mask step of each built-in criterion: the method itself, which has no other name, and controls.
Then what is off by default: a mask that stays, weights that are held, and the overlap of masks.

CPU: the gradients of SmolLM2-135M. GPU: those of a Llama of 1B and of 7B.
"""

from __future__ import annotations

from typing import Any

import torch
from gradients import (
    DTYPES,
    MODELS,
    Gradients,
    mask_by_kthvalue,
    mask_by_topk,
    mask_by_unsorted_topk,
    mask_step_of,
)
from measuring import TRIAL, Row, arguments, chosen, in_turns, median_ms, save, show

from axolotl_gmt.criteria import BUILT_IN

MASK_RATIO = 0.5
CRITERIA = tuple(BUILT_IN)  # The built-in ones; gradient is the method itself.
OFF_BY_DEFAULT: dict[str, dict[str, Any]] = {
    "a mask that stays": {"mask_interval": "once"},  # Made in the run that does not count.
    "hold": {"hold": True},
    "log_overlap": {"log_overlap": True},
}
CASES = {
    "cpu": [
        ("SmolLM2-135M", "bf16"),
        ("SmolLM2-135M", "fp32"),
        (TRIAL, "bf16"),
        (TRIAL, "fp32"),
    ],
    "cuda": [("Llama-1B", "bf16"), ("Llama-1B", "fp32"), ("Llama-7B", "bf16")],
}


def measure(model: str, dtype: str, device: str, runs: int) -> list[Row]:
    """One row for each contender."""
    gradients = Gradients(MODELS[model].shapes(), DTYPES[dtype], device)
    grads = gradients.grads
    gmt = {
        "GMT mask step" if name == "gradient" else f"GMT mask step, {name}": mask_step_of(
            gradients.parameters, MASK_RATIO, name
        ).step
        for name in CRITERIA
    }
    gmt |= {
        f"GMT mask step, {name}": mask_step_of(gradients.parameters, MASK_RATIO, **settings).step
        for name, settings in OFF_BY_DEFAULT.items()
    }
    copies = [torch.empty_like(grad) for grad in grads]
    contenders = {
        **gmt,
        "copy of the gradients": lambda: torch._foreach_copy_(copies, grads),
        "torch.topk": lambda: mask_by_topk(grads, MASK_RATIO),
        "torch.topk, unsorted": lambda: mask_by_unsorted_topk(grads, MASK_RATIO),
        "torch.kthvalue": lambda: mask_by_kthvalue(grads, MASK_RATIO),
    }
    seconds = in_turns(contenders, device, runs, gradients.restore, f"{model} {dtype} {device}")
    copies.clear()  # Room for the optimizer's state.
    optimizer = torch.optim.AdamW(gradients.parameters, lr=1e-5, fused=True)
    seconds |= in_turns({"fused AdamW step": optimizer.step}, device, runs, label="AdamW")
    step = median_ms(seconds["GMT mask step"])
    # A copy moves the bytes twice (read, write); counting and masking move them three times.
    floor = 1.5 * median_ms(seconds["copy of the gradients"])
    return [
        {
            "model": model,
            "dtype": dtype,
            "device": device,
            "what": what,
            "median ms": median_ms(times),
            "fastest ms": min(times) * 1e3,
            "slowest ms": max(times) * 1e3,
            "times the mask step": median_ms(times) / step,
            "times 3 moves of the bytes": median_ms(times) / floor,
        }
        for what, times in seconds.items()
    ]


def main() -> None:
    """Measure on every device there is."""
    options = arguments(__doc__, MODELS, runs=5)
    rows = []
    for device, model, dtype in chosen(CASES, options):
        found = measure(model, dtype, device, options.runs)
        show(f"{model}, {dtype}, {device}: medians of {options.runs} runs", found)
        rows += found
    save(options.json, rows)


if __name__ == "__main__":
    main()
