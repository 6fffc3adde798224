"""The mask in several processes is that of one, in each set-up; worker.py has the checks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.reference.gmt_reference import masked

ROOT = Path(__file__).parents[2]
ON_TWO = [
    "ddp",
    "ddp_with_unused_parameters",
    "fsdp2",
    "fsdp2_bf16",
    "fsdp2_mixed_precision",
    "fsdp2_cpu_offload",
    "tp",
    "gradients_missing_on_one_rank",
    "random_shardings",
    "no_gradient_at_all_on_one_rank",
    "nothing_is_sent_where_nothing_is_sharded",
    "hashes_that_one_rank_cannot_make_change_nothing",
    "zero_1",
    "zero_1_clipped",
    "zero_2",
    "zero_2_bf16",
    "zero_2_clipped",
    "zero_2_cpu_offload",
    "zero_3",
    "zero_3_bf16",
    "zero_3_clipped",
    "zero_3_cpu_offload",
    "deepspeed_trainer",
]
ON_FOUR = ["fsdp2", "hsdp", "fsdp2_and_tp", "random_shardings"]
ON_BOTH = [
    "parameters_in_another_order",
    "ranks_that_differ_are_refused",
    "a_gradient_missing_on_one_rank_has_its_parameters_dtype",
    "an_error_on_one_rank_is_raised_on_all",
    "a_gradient_sharded_otherwise_than_its_parameter_is_refused",
]


def torchrun(processes: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``module`` in several processes on this machine, over the loopback interface."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", module, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONFAULTHANDLER": "1",  # Says where a rank was that a signal ended.
        },
        capture_output=True,
        text=True,
        timeout=400,
    )


def said(result: subprocess.CompletedProcess[str]) -> str:
    """What all ranks wrote, but for the fault handler's lists of modules, which hide the rest."""
    lines = (result.stdout + result.stderr).splitlines()
    return "\n".join(line for line in lines if "Extension modules:" not in line)[-30_000:]


@pytest.mark.parametrize(
    ("processes", "case"),
    [pytest.param(2, case, id=f"{case}-on-2") for case in ON_TWO]
    + [pytest.param(4, case, id=f"{case}-on-4") for case in ON_FOUR],
)
def test_every_mask_is_that_of_one_process(processes: int, case: str) -> None:
    result = torchrun(processes, "tests.distributed.worker", case)
    assert result.returncode == 0, said(result)
    assert f"ok {case} gradient" in result.stdout


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", ON_BOTH)
def test_ranks_agree_or_all_of_them_say_who_does_not(processes: int, case: str) -> None:
    result = torchrun(processes, "tests.distributed.worker", case)
    assert result.returncode == 0, said(result)
    assert f"ok {case} gradient" in result.stdout


def test_experts_that_live_on_other_ranks_are_refused() -> None:
    case = "experts_of_other_ranks_are_refused"
    result = torchrun(2, "tests.distributed.worker", case)
    assert result.returncode == 0, said(result)
    assert f"ok {case} gradient" in result.stdout


@pytest.mark.parametrize(
    ("processes", "case", "reason"),
    [
        (2, "a_rank_that_dies_ends_the_others", "exitcode  : 7"),
        (2, "a_criterion_that_fails_on_one_rank_ends_the_others", "OutOfMemoryError: planted"),
        (4, "a_criterion_that_fails_on_one_rank_ends_the_others", "OutOfMemoryError: planted"),
    ],
)
def test_a_rank_that_leaves_ends_the_others_with_an_error(
    processes: int, case: str, reason: str
) -> None:
    start = time.monotonic()
    result = torchrun(processes, "tests.distributed.worker", case)
    assert result.returncode != 0
    assert reason in result.stderr
    assert time.monotonic() - start < 120


def test_one_sgd_step_of_axolotl_in_two_ddp_processes(
    sft_yaml: dict[str, Any], toy_model: Path, tmp_path: Path
) -> None:
    settings = {
        **sft_yaml,
        "optimizer": "gmt",
        "gmt_base_optimizer": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler": "constant",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "max_steps": 1,
        "output_dir": str(tmp_path / "out"),
    }
    file, record = tmp_path / "sft.yml", tmp_path / "gradients.pt"
    file.write_text(yaml.safe_dump(settings))
    module = "tests.distributed.axolotl_on_cpu"
    result = torchrun(2, module, str(file), "--record", str(record))
    assert result.returncode == 0, said(result)
    before = load_file(toy_model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    gradients = torch.load(record)
    assert gradients.keys() == before.keys()
    for name, weight in before.items():
        (survivor,) = masked([gradients[name]], 0.5)
        assert torch.equal(after[name], weight - survivor), name
