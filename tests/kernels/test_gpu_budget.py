# mypy: disable-error-code="import-untyped"
"""What the Triton kernels need of a GPU, held to a budget by compiling them ahead of time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

pytest.importorskip("triton")

from axolotl_gmt.kernels import triton_gpu
from axolotl_gmt.kernels.contract import Batch
from axolotl_gmt.kernels.scores import Products
from benchmarks import kernel_budget
from benchmarks.kernel_budget import Budget, Case

# Bytes of shared memory that a program may have: CUDA's programming guide, compute capabilities.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 1 << 16  # of a multiprocessor, on each of these
CASES = {case.name: case for case in kernel_budget.cases()}

# Percent of the issue rate at which bytes arrive. Hashes are arithmetic, which bounds them.
MOST_OF_THE_ISSUE_RATE = {
    "count upper, magnitude bf16": 60,
    "count upper, magnitude fp16": 70,  # A window of 2^14 bins is cleared, read and added.
    "count upper, magnitude fp32": 60,
    "count lower, magnitude fp32": 60,
    "mask, magnitude bf16": 60,
    "mask, magnitude fp16": 60,
    "mask, magnitude fp32": 60,
    "count upper, product bf16 x bf16": 60,
    "mask, product bf16 x bf16": 60,
    "mask, inverse bf16": 70,
}


@pytest.fixture(scope="module")
def compiler() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield process


@pytest.fixture(scope="module")
def amd_compiler() -> Iterator[Executor]:
    """A process of its own, since kernels know for which GPU PyTorch is made."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield process


def _read(name: str, is_aligned: bool) -> Budget:
    case = CASES[name]
    kind = case.kind._replace(aligned=is_aligned)
    return kernel_budget.budget(Case(case.step, kind, triton_gpu.mask_launch(kind)), 90)


def _budget(name: str, architecture: int) -> Budget:
    return kernel_budget.budget(CASES[name], architecture)


def _amdgcn(name: str) -> str:
    triton_gpu._HISTOGRAM_IS_FAST = False  # As it is where PyTorch is made for AMD.
    case = next(case for case in kernel_budget.cases() if case.name == name)
    return str(kernel_budget.compiled(case.launch, "hip", "gfx942").asm["amdgcn"])


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("name", CASES)
def test_a_triton_kernel_keeps_to_its_budget(
    compiler: Executor, name: str, architecture: int
) -> None:
    case = CASES[name]
    found = compiler.submit(_budget, name, architecture).result()
    assert found.shared <= SHARED[architecture]
    assert (found.reciprocals > 0) == (case.kind.score == "quotient")  # Integers are not divided.
    assert ".ftz" not in found.ptx  # Scores below the smallest normal number keep their order.
    if architecture == 90:
        assert found.stack == found.spills == 0
    threads = 32 * case.launch.options["num_warps"]
    if case.step == "count upper":
        assert "LDG.E.128" in found.accesses("LDG")
        if architecture == 90:  # Two programs share a multiprocessor.
            assert 2 * found.registers * threads <= REGISTERS
            assert 2 * (found.shared + 1024) <= 228 * 1024
    if case.step == "mask":
        assert "LDG.E.128" in found.accesses("LDG")
        assert found.accesses("STG") == {"STG.E.128"}


@pytest.mark.parametrize("name", MOST_OF_THE_ISSUE_RATE)
def test_a_triton_kernel_leaves_room_to_issue_its_instructions_while_bytes_arrive(
    compiler: Executor, name: str
) -> None:
    row = kernel_budget.row(CASES[name], compiler.submit(_budget, name, 90).result())
    assert 10 < row["% of the issue rate"] < MOST_OF_THE_ISSUE_RATE[name]


@pytest.mark.parametrize("name", CASES)
def test_a_triton_kernel_spills_nothing_on_an_amd_gpu(amd_compiler: Executor, name: str) -> None:
    from triton.backends import backends

    if "amd" not in backends:
        pytest.skip("this Triton does not compile for AMD")
    code = amd_compiler.submit(_amdgcn, name).result()
    figures = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", code)}
    assert figures["vgpr_spill_count"] == 0
    assert figures["group_segment_fixed_size"] <= 64 * 1024


@pytest.mark.parametrize("apart", range(8))
def test_a_triton_kernel_reads_weights_as_widely_as_they_lie(
    compiler: Executor, apart: int
) -> None:
    memory = torch.zeros(2, 64, dtype=torch.bfloat16)
    scores = [Products(memory[0, 3:40], memory[1, 3:40]), Products(memory[0], memory[1])]
    if apart:
        scores[1] = Products(memory[0, :40], memory[1, apart : 40 + apart])
    kind = triton_gpu._variant(Batch(scores, [0, 0], torch.float32))
    assert kind.aligned == (apart == 0)
    if apart < 2:
        found = compiler.submit(_read, "mask, product bf16 x bf16", kind.aligned).result()
        narrow = set() if kind.aligned else {"LDG.E.U16"}
        assert found.accesses("LDG") == {"LDG.E.128"} | narrow
