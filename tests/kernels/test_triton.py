"""Compiled passes against the torch versions, bit for bit."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest
import torch

from tests.kernels import gpu_path_checks, kernel_checks
from tests.kernels.kernel_checks import CONTENTS, DTYPES, LAYOUTS


def _process(**environment: str) -> Executor:
    """A process of its own: Triton decides as it is imported whether it interprets."""
    return ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), _set_environment, (environment,)
    )


def _set_environment(environment: dict[str, str]) -> None:
    import os

    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ.update(environment)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    pytest.importorskip("triton")
    with _process(TRITON_INTERPRET="1") as process:
        yield process


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_kernels_agree_with_torch(interpreter: Executor, dtype: str, layout: str) -> None:
    interpreter.submit(kernel_checks.check_triton, "cpu", dtype, layout).result()


@pytest.mark.parametrize(
    ("score", "dtype"),
    [
        *(("magnitude", dtype) for dtype in DTYPES),
        *(("inverse", dtype) for dtype in DTYPES),
        ("hash", "bf16"),
        ("bit", "bf16"),
    ],
)
def test_triton_kernels_take_every_entry_once_wherever_a_tensor_lies_and_ends(
    interpreter: Executor, dtype: str, score: str
) -> None:
    interpreter.submit(kernel_checks.check_boundaries, "cpu", score, dtype).result()


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_kernels_count_what_lies_at_the_ends_of_a_window(
    interpreter: Executor, dtype: str
) -> None:
    interpreter.submit(kernel_checks.check_window, "cpu", dtype).result()


@pytest.mark.parametrize("apart", [0, 1])
@pytest.mark.parametrize(
    ("score", "entry", "weight"),
    [
        ("product", "bf16", "bf16"),
        ("product", "fp16", "fp32"),
        ("product", "fp32", "bf16"),
        ("quotient", "bf16", "fp32"),
    ],
)
def test_triton_kernels_find_the_weight_of_every_entry_wherever_both_lie(
    interpreter: Executor, score: str, entry: str, weight: str, apart: int
) -> None:
    interpreter.submit(kernel_checks.check_boundaries, "cpu", score, entry, weight, apart).result()


@pytest.mark.parametrize("score", ["product", "quotient"])
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("entry", DTYPES)
def test_products_and_quotients_that_triton_kernels_make_are_those_of_torch(
    interpreter: Executor, entry: str, weight: str, score: str
) -> None:
    apart = (list(DTYPES).index(entry) + list(DTYPES).index(weight)) % 2
    interpreter.submit(kernel_checks.check_made_scores, "cpu", score, entry, weight, apart).result()


@pytest.mark.parametrize("score", ["inverse", "hash", "bit"])
@pytest.mark.parametrize("entry", DTYPES)
def test_inverses_hashes_and_bits_that_triton_kernels_make_are_those_of_torch(
    interpreter: Executor, entry: str, score: str
) -> None:
    interpreter.submit(kernel_checks.check_made_scores, "cpu", score, entry, entry, 0).result()


@pytest.mark.parametrize(
    ("criterion", "dtype"),
    [
        *(("gradient", dtype) for dtype in (*DTYPES, "mixed")),
        *(("smallest", dtype) for dtype in (*DTYPES, "mixed")),
        *(
            (criterion, dtype)
            for criterion in ("random", "gradient_weight", "relative")
            for dtype in ("bf16", "mixed")
        ),
        ("fixed_random", "mixed"),
    ],
)
def test_the_whole_triton_path_gives_the_mask_of_the_reference(
    interpreter: Executor, criterion: str, dtype: str
) -> None:
    interpreter.submit(gpu_path_checks.check, criterion, dtype).result()


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_kernels_count_as_torch_without_a_fast_histogram(
    interpreter: Executor, dtype: str
) -> None:
    interpreter.submit(kernel_checks.check_old_triton, "cpu", dtype, "ragged").result()


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_kernels_agree_with_torch_on_a_gpu(dtype: str) -> None:
    with _process() as process:
        process.submit(kernel_checks.check_all, "cuda", dtype).result()


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numba_kernels_agree_with_torch(dtype: str, layout: str, content: str) -> None:
    pytest.importorskip("numba")
    from axolotl_gmt.kernels import numba_cpu

    kernel_checks.check_counts(numba_cpu, "cpu", dtype, layout, content)
    kernel_checks.check_masks(numba_cpu, "cpu", dtype, layout, content)


@pytest.mark.parametrize("threads", [1, 3])
def test_numba_kernels_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    pytest.importorskip("numba")
    from axolotl_gmt.kernels import numba_cpu

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernel_checks.check_counts(numba_cpu, "cpu", "bf16", "many programs", "normal")
        kernel_checks.check_masks(numba_cpu, "cpu", "fp32", "many programs", "normal")
    finally:
        torch.set_num_threads(before)
