"""Compiled passes against the torch versions, bit for bit, and what happens without them."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from axolotl_gmt import passes
from axolotl_gmt.shards import Rows, Shard
from axolotl_gmt.threshold import find_thresholds, mask_below_
from tests import kernel_checks
from tests.kernel_checks import BITS, CONTENTS, DTYPES, LAYOUTS

# The slow interpreter needs no more than the smallest and the largest programs for both designs.
OLD_TRITON = ["ragged", "many programs"]


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


@pytest.mark.parametrize("score", ["magnitude", "hash"])
@pytest.mark.parametrize("dtype", DTYPES)
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
    ("entry", "weight"), [("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "bf16")]
)
def test_triton_kernels_find_the_weight_of_every_entry_wherever_both_lie(
    interpreter: Executor, entry: str, weight: str, apart: int
) -> None:
    interpreter.submit(
        kernel_checks.check_boundaries, "cpu", "product", entry, weight, apart
    ).result()


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("entry", DTYPES)
def test_products_that_triton_kernels_make_are_those_of_torch(
    interpreter: Executor, entry: str, weight: str
) -> None:
    apart = (list(DTYPES).index(entry) + list(DTYPES).index(weight)) % 2
    interpreter.submit(
        kernel_checks.check_made_scores, "cpu", "product", entry, weight, apart
    ).result()


@pytest.mark.parametrize("entry", DTYPES)
def test_hashes_that_triton_kernels_make_are_those_of_torch(
    interpreter: Executor, entry: str
) -> None:
    interpreter.submit(kernel_checks.check_made_scores, "cpu", "hash", entry, entry, 0).result()


@pytest.mark.parametrize("layout", OLD_TRITON)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_kernels_agree_with_torch_without_a_fast_histogram(
    interpreter: Executor, dtype: str, layout: str
) -> None:
    interpreter.submit(kernel_checks.check_triton, "cpu", dtype, layout, False).result()


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
    from axolotl_gmt import kernels_cpu

    kernel_checks.check_counts(kernels_cpu, "cpu", dtype, layout, content)
    kernel_checks.check_masks(kernels_cpu, "cpu", dtype, layout, content)


@pytest.mark.parametrize("threads", [1, 3])
def test_numba_kernels_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    pytest.importorskip("numba")
    from axolotl_gmt import kernels_cpu

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernel_checks.check_counts(kernels_cpu, "cpu", "bf16", "many programs", "normal")
        kernel_checks.check_masks(kernels_cpu, "cpu", "fp32", "many programs", "normal")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["compiled", "torch"])
def test_candidates_are_the_entries_that_match_if_these_are_few(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "torch":
        monkeypatch.setattr(passes, "_COMPILED", {})
        passes._compiled_passes.cache_clear()
    few = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    many = torch.full((1000,), 1.5)
    prefixes = torch.tensor([int(few[7].abs().view(torch.int32)) >> 16, 0x3FC0])
    kept_few, kept_many, kept_none = passes.keep_candidates(
        [few, many, few[:0]], [0, 1, 0], torch.float32, 16, prefixes
    )
    matching = few[few.abs().view(torch.int32) >> 16 == prefixes[0]]
    assert 0 < len(matching) == len(kept_few)
    assert torch.equal(kept_few, matching)
    assert kept_many.data_ptr() == many.data_ptr()
    assert len(kept_none) == 0
    passes._compiled_passes.cache_clear()


def _masked(gradient: Tensor) -> Tensor:
    entries = gradient.clone()
    rows = Rows([[Shard("", entries, entries, ())]])
    thresholds = find_thresholds([entries], rows, 0.5, entries.dtype)
    mask_below_(
        [entries], rows.of_shard, entries.dtype, thresholds, torch.zeros(1, 4, dtype=torch.float64)
    )
    return entries


@pytest.fixture
def afresh() -> Iterator[None]:
    """Forget before and after a test which compiled passes there are."""
    passes._compiled_passes.cache_clear()
    passes._broken.clear()
    yield
    passes._compiled_passes.cache_clear()
    passes._broken.clear()


def _missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_COMPILED", {"cpu": ("axolotl_gmt.no_such_module", "Numba")})


def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl_gmt import kernels_cpu

    def fail(*arguments: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels_cpu, "count_digits", fail)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("without", [_missing, _broken])
def test_without_kernels_torch_gives_the_same_mask_and_one_warning(
    without: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    expected = _masked(gradient)
    passes._compiled_passes.cache_clear()
    without(monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bits = BITS[gradient.itemsize]
            assert torch.equal(_masked(gradient).view(bits), expected.view(bits))
    assert [record.name for record in caplog.records] == ["axolotl_gmt.passes"]
    assert "Numba cannot be used" in caplog.text


def test_kernels_are_imported_when_they_are_needed_and_not_before() -> None:
    code = (
        "import sys, axolotl_gmt.threshold\n"
        "assert not {'triton', 'numba', 'axolotl_gmt.kernels'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiled_kernels_are_compared_with_torch_before_a_gpu_uses_them() -> None:
    kernels_cpu = pytest.importorskip("axolotl_gmt.kernels_cpu")
    passes.compare_with_torch(kernels_cpu, torch.device("cpu"))

    class Wrong:
        DTYPES = kernels_cpu.DTYPES
        mask_below_ = staticmethod(kernels_cpu.mask_below_)

        @staticmethod
        def count_digits(*arguments: Any) -> None:
            kernels_cpu.count_digits(*arguments)
            arguments[-1][0, 5] += 1

    with pytest.raises(RuntimeError, match=r"count of .* differs"):
        passes.compare_with_torch(cast(ModuleType, Wrong), torch.device("cpu"))
    Wrong.count_digits = staticmethod(kernels_cpu.count_digits)  # type: ignore[method-assign]
    Wrong.mask_below_ = staticmethod(lambda *arguments: None)
    with pytest.raises(RuntimeError, match=r"mask of .* differs"):
        passes.compare_with_torch(cast(ModuleType, Wrong), torch.device("cpu"))
