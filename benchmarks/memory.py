"""Extra memory at the peak of a mask step, as a share of the gradients' bytes.

On a GPU what PyTorch allocated; on a CPU (Linux) the growth of the process's resident memory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gradients import DTYPES, MODELS, Gradients, mask_by_unsorted_topk, mask_step_of
from measuring import TRIAL, Row, arguments, chosen, save, show

CASES = {
    "cpu": [("SmolLM2-135M", "bf16"), ("SmolLM2-135M", "fp32"), (TRIAL, "bf16")],
    "cuda": [("Llama-1B", "bf16"), ("Llama-7B", "bf16"), ("Llama-1B", "fp32")],
}


def start_of_peak(device: str) -> int:
    """Bytes in use; the peak is counted from now on."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak(device: str) -> int:
    """Bytes in use at the peak since :func:`start_of_peak`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(model: str, dtype: str, device: str) -> list[Row]:
    """A row for GMT and one for topk."""
    small = Gradients([(300, 1000)], DTYPES[dtype], device)
    mask_step_of(small.parameters, 0.5).step()  # Loads the code.
    gradients = Gradients(MODELS[model].shapes(), DTYPES[dtype], device)
    gmt = mask_step_of(gradients.parameters, 0.5)
    ways = {
        "GMT mask step": gmt.step,
        "torch.topk, unsorted": lambda: mask_by_unsorted_topk(gradients.grads, 0.5),
    }
    total = gradients.entries * DTYPES[dtype].itemsize
    rows: list[Row] = []
    for what, way in ways.items():
        gradients.restore()
        before = start_of_peak(device)
        way()
        extra = peak(device) - before
        rows.append(
            {
                "model": model,
                "dtype": dtype,
                "device": device,
                "what": what,
                "gradients MiB": total / 2**20,
                "extra MiB": extra / 2**20,
                "extra, % of the gradients": 100 * extra / total,
            }
        )
    return rows


def main() -> None:
    """Measure on every device there is."""
    options = arguments(__doc__, MODELS)
    rows = []
    for device, model, dtype in chosen(CASES, options):
        found = measure(model, dtype, device)
        show(f"{model}, {dtype}, {device}", found)
        rows += found
    save(options.json, rows)


if __name__ == "__main__":
    main()
