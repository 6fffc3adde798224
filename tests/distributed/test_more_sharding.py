"""What is off by default does in several processes what it does in one.

Apart from test_sharding.py, so that two processes share the work.
"""

from __future__ import annotations

import pytest

from axolotl_gmt.criteria import BUILT_IN
from tests.distributed.test_sharding import said, torchrun


@pytest.mark.parametrize(
    ("processes", "case"),
    [
        (2, "ddp"),
        (2, "fsdp2_bf16"),
        (2, "fsdp2_cpu_offload"),
        (2, "tp"),
        (2, "zero_2"),
        (2, "zero_3_bf16"),
        (2, "zero_3_cpu_offload"),
        (4, "fsdp2_and_tp"),
        (4, "random_shardings"),
    ],
)
def test_criteria_choose_the_mask_of_one_process(processes: int, case: str) -> None:
    names = {"random", "gradient_weight", "half"}
    if case in ("fsdp2_bf16", "zero_3_bf16", "random_shardings"):
        names = BUILT_IN.keys() - {"gradient"}
    if case == "random_shardings":  # Its shapes need not have matrices in layers.
        names -= {"half"}
    result = torchrun(processes, "tests.distributed.worker", case, *names)
    assert result.returncode == 0, said(result)
    for name in names:
        assert f"ok {case} {name}" in result.stdout


@pytest.mark.parametrize(
    ("processes", "case"),
    [
        (2, "ddp"),
        (2, "fsdp2_cpu_offload"),
        (2, "tp"),
        (4, "fsdp2"),
        (4, "hsdp"),
        (2, "zero_1"),
        (2, "zero_2"),
        (2, "zero_3"),
        (2, "zero_3_cpu_offload"),
    ],
)
def test_masks_that_stay_and_held_weights_are_those_of_one_process(
    processes: int, case: str
) -> None:
    result = torchrun(processes, "tests.distributed.sparse_cases", case)
    assert result.returncode == 0, said(result)
    assert f"ok {case} sparse" in result.stdout


@pytest.mark.parametrize(
    "case",
    [
        "mask_overlap_ddp",
        "mask_overlap_fsdp2",
        "mask_overlap_of_gradients_missing_on_one_rank",
        "mask_overlap_zero_2",
        "mask_overlap_zero_3",
    ],
)
def test_masks_overlap_as_those_of_one_process(case: str) -> None:
    result = torchrun(2, "tests.distributed.worker", case)
    assert result.returncode == 0, said(result)
    assert f"ok {case} gradient" in result.stdout


@pytest.mark.parametrize(
    "case",
    [
        "ddp",
        "fsdp2",
        "fsdp2_mixed_precision",
        "fsdp2_cpu_offload",
        "zero_2",
        "zero_3",
        "zero_3_cpu_offload",
        "trainer_with_zero_3",
    ],
)
def test_forgetting_is_that_of_one_process_and_changes_no_training(case: str) -> None:
    result = torchrun(2, "tests.distributed.forgetting_cases", case)
    assert result.returncode == 0, said(result)
    assert f"ok {case} forgetting" in result.stdout
