"""Masks under DeepSpeed ZeRO with CPU offload on one rank, bit for bit; a row for each set-up.

``python -m benchmarks.gpu_day.zero --device cuda --json FILE``. With a GPU the group is NCCL's and
the gradients lie on the CPU, so that counts must go over the GPU.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.exactness import run_check
from benchmarks.gpu_day.record import Row, write_rows
from benchmarks.gpu_day.training import join_group

LEARNING_RATE = 2.0**-7  # A power of two, so that a step of SGD rounds once.
STEPS = 3


def check_sums(device: str) -> None:
    """Counts and totals on the CPU are summed by a group that may only know the GPU.

    Raises:
        AssertionError: If a value changed: a group of one rank sums nothing.
    """
    import torch
    import torch.distributed as dist

    from axolotl_gmt.gradients.shard import sum_over_ranks

    backend = "nccl" if device == "cuda" else "gloo"
    group = dist.new_group(backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    for dtype in (torch.int32, torch.int64, torch.float64):
        values = torch.arange(100_000).to(dtype)
        before = values.clone()
        sum_over_ranks(values, (group,))
        assert torch.equal(values, before), dtype


def check_zero(device: str, stage: int, dtype_name: str) -> None:
    """Each step moves the weights as SGD would with the gradients that sorting leaves.

    Raises:
        AssertionError: If a weight differs.
    """
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param
    from torch import nn

    from axolotl_gmt import GMTConfig, GradientMasker
    from tests.reference.gmt_reference import masked

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]

    def model_of() -> nn.Sequential:
        torch.manual_seed(0)
        layers = nn.Linear(67, 131), nn.GELU(), nn.Linear(131, 130), nn.GELU(), nn.Linear(130, 5)
        return nn.Sequential(*layers).to(device=device, dtype=dtype)

    def loss_of(model: Any, step: int) -> Any:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 67, generator=generator).to(device=device, dtype=dtype)
        return model(inputs).float().square().sum()

    model, plain = model_of(), model_of()
    named = list(model.named_parameters())
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([parameter for _, parameter in named], lr=LEARNING_RATE),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        },
    )
    config = GMTConfig(mask_ratio=0.7, granularity="tensor")
    GradientMasker(engine.module.named_parameters(), config).attach(optimizer)
    for step in range(STEPS):
        before = {name: safe_get_full_fp32_param(p).cpu().clone() for name, p in named}
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(before[name].view_as(parameter))
        plain.zero_grad()
        loss_of(plain, step).backward()
        engine.backward(loss_of(engine, step))
        engine.step()
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            (survivor,) = masked([parameter.grad.cpu()], config.mask_ratio)
            after = safe_get_full_fp32_param(dict(named)[name]).cpu().view_as(survivor)
            expected = before[name].view_as(survivor) - LEARNING_RATE * survivor.float()
            assert torch.equal(after, expected), f"step {step}, {name}"
    engine.destroy()


def main() -> None:
    """Run all checks on the device, and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    options = parser.parse_args()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # The same gradients at every call.
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    join_group()

    import deepspeed
    import torch

    if options.device == "cuda":
        torch.cuda.set_device(0)
    deepspeed.init_distributed("nccl" if options.device == "cuda" else "gloo")
    rows: list[Row] = [run_check("sums", "counts on the CPU", partial(check_sums, options.device))]
    for stage in (2, 3):
        for dtype in ("bf16", "fp32"):
            check = partial(check_zero, options.device, stage, dtype)
            rows.append(run_check("ZeRO", f"stage {stage}, {dtype}", check))
    write_rows(options.json, rows)
    # Not the interpreter's own end, which threads of torch or DeepSpeed can turn into an abort.
    os._exit(0)


if __name__ == "__main__":
    main()
