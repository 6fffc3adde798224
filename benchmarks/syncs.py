"""Host-device synchronisations a step, between logs: PyTorch raises an error at the first."""

from __future__ import annotations

import torch
from gradients import DTYPES, MODELS, Gradients, mask_step_of
from measuring import Row, arguments, devices, save, show, steps


def measure(dtype: str, criterion: str, runs: int) -> Row:
    """Mask steps under ``torch.cuda.set_sync_debug_mode("error")``."""
    gradients = Gradients(MODELS["Llama-1B"].shapes(), DTYPES[dtype], "cuda", restorable=False)
    gmt = mask_step_of(gradients.parameters, 0.5, criterion)
    gmt.step()  # Compiles the kernels; a criterion's first scores are looked at.
    torch.cuda.synchronize()
    found = "0"
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in steps(runs, f"Llama-1B {dtype} {criterion}"):
            gmt.step()
    except RuntimeError as error:
        found = f"at least 1: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {
        "model": "Llama-1B",
        "what": f"{dtype}, {criterion}",
        "device": "cuda",
        "steps": runs,
        "synchronisations": found,
    }


def main() -> None:
    """Measure on a GPU; there is nothing to wait for on a CPU."""
    options = arguments(__doc__, runs=10)
    rows = []
    if "cuda" in devices():
        rows = [
            measure(dtype, criterion, options.runs)
            for dtype in ("bf16", "fp32")
            for criterion in ("gradient", "random", "gradient_weight")
        ]
        show("Host-device synchronisations, Llama-1B", rows)
    save(options.json, rows)


if __name__ == "__main__":
    main()
