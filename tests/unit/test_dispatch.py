"""Which passes run, and that a mask is exact or the step ends when compiled ones break."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from axolotl_gmt import GMTConfig, GradientMasker
from axolotl_gmt.kernels import dispatch
from axolotl_gmt.kernels.scores import Kind, Magnitudes
from tests.reference.gmt_reference import masked, masked_by_scores

kernels_cpu = pytest.importorskip("axolotl_gmt.kernels.numba_cpu")


@pytest.fixture
def afresh() -> Iterator[None]:
    """Forget before and after a test which compiled passes there are."""
    dispatch.forget_backends()
    yield
    dispatch.forget_backends()


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def optimizer_of(gradients: list[Tensor], **settings: Any) -> torch.optim.Optimizer:
    """An optimizer whose step masks these gradients and does nothing else that shows."""
    weights = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    optimizer = torch.optim.SGD(weights, lr=0.0)
    named = [(f"w{index}", weight) for index, weight in enumerate(weights)]
    GradientMasker(named, GMTConfig(**settings)).attach(optimizer)
    return optimizer


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight.grad for weight in optimizer.param_groups[0]["params"]]


def normal(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator) for size in sizes]


def assert_masked(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    for found, gradient in zip(gradients_of(optimizer), gradients, strict=True):
        assert torch.equal(found, masked([gradient], 0.5)[0])


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_count_that_fails_half_way_ends_the_step_and_the_next_one_is_exact(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = normal(1_000_000)
    optimizer = optimizer_of(gradients)
    optimizer.step()  # Whatever is compiled is compiled now.
    calls = iter(range(1, 100))
    zeros_like = np.zeros_like

    def fail(array: Any) -> Any:
        if next(calls) == call:
            raise MemoryError("planted")
        return zeros_like(array)

    for weight, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        weight.grad = gradient.clone()
    with monkeypatch.context() as patch:
        patch.setattr(np, "zeros_like", fail)
        with pytest.raises(MemoryError, match="planted"):
            optimizer.step()
    assert torch.equal(gradients_of(optimizer)[0], gradients[0])
    optimizer.step()
    assert_masked(optimizer, gradients)


@pytest.mark.usefixtures("four_threads")
def test_no_thread_works_any_more_when_a_pass_has_failed() -> None:
    working = 0
    slow = threading.Event()

    def work(share: int) -> None:
        nonlocal working
        working += 1
        if share == 0:
            working -= 1
            slow.set()
            raise MemoryError("planted")
        slow.wait()
        threading.Event().wait(0.2)
        working -= 1

    with pytest.raises(MemoryError, match="planted"):
        kernels_cpu._in_threads(work, 16)
    assert working == 0


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("startable", [0, 1])
def test_threads_that_cannot_start_change_nothing(
    startable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = normal(2_000_000)
    optimizer = optimizer_of(gradients)
    start, started = threading.Thread.start, iter(range(startable))

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("axolotl_gmt") and next(started, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    kernels_cpu._pool.cache_clear()
    counts = torch.zeros(1, 1 << 15, dtype=torch.int32)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        optimizer.step()
        kernels_cpu._pool.cache_clear()
        started = iter(range(startable))
        scores = [Magnitudes(gradients[0])]
        dispatch.count_digits(scores, [0], torch.float32, dispatch.Digit(16, 15), None, counts)
    assert_masked(optimizer, gradients)
    assert int(counts.sum()) == 2_000_000
    kernels_cpu._pool.cache_clear()


def test_there_is_one_pool_of_threads_whatever_the_sizes_are(
    four_threads: None,
) -> None:
    kernels_cpu._pool.cache_clear()
    for size in (70_000, 140_000, 200_000, 2_000_000):
        optimizer_of(normal(size)).step()
    ours = [t for t in threading.enumerate() if t.name.startswith("axolotl_gmt")]
    assert len(ours) <= 3


@pytest.mark.usefixtures("four_threads")
def test_an_interrupt_waits_for_the_threads_that_still_write() -> None:
    began, running = threading.Event(), 0

    def work(share: int) -> None:
        nonlocal running
        if threading.current_thread() is threading.main_thread():
            began.wait()
            raise KeyboardInterrupt
        running += 1
        began.set()
        threading.Event().wait(0.3)
        running -= 1

    with pytest.raises(KeyboardInterrupt):
        kernels_cpu._in_threads(work, 8)
    assert running == 0


@pytest.mark.usefixtures("four_threads")
def test_work_that_was_queued_for_a_thread_that_cannot_start_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels_cpu._pool.cache_clear()
    pool = kernels_cpu._pool(3, os.getpid(), kernels_cpu._flushes_denormals())
    begun, release = threading.Event(), threading.Event()

    def keep_busy() -> None:
        begun.set()
        release.wait()

    pool.submit(keep_busy)  # Its one thread.
    begun.wait()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    running: set[int] = set()

    def work(share: int) -> None:
        running.add(share)
        release.set()  # Now that thread takes what was queued for the one that did not start.
        threading.Event().wait(0.1)
        running.discard(share)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        kernels_cpu._in_threads(work, 6)
    assert not running
    kernels_cpu._pool.cache_clear()


@pytest.mark.usefixtures("four_threads")
def test_all_threads_make_denormal_products_as_the_one_that_asks() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(600_000, generator=generator) * 1e-20)
    gradient = torch.randn(600_000, generator=generator) * 1e-19
    optimizer = torch.optim.SGD([weight], lr=0.0)
    config = GMTConfig(mask_ratio=0.9, criterion="gradient_weight")
    GradientMasker([("weight", weight)], config).attach(optimizer)
    kept = {}
    for flushes in (False, True, False):
        if not torch.set_flush_denormal(flushes):
            pytest.skip("this CPU does not flush denormal numbers")
        try:
            weight.grad = gradient.clone()
            # By this thread alone: the flag is not that of torch's other threads.
            products = gradient.numpy() * weight.detach().numpy()
            optimizer.step()
        finally:
            torch.set_flush_denormal(False)
        expected = torch.from_numpy(np.abs(products))
        threshold = expected.sort(descending=True).values[60_000 - 1]
        assert torch.equal(weight.grad != 0, expected >= threshold)
        kept[flushes] = int(weight.grad.count_nonzero())
    assert kept[True] > kept[False]


def test_memory_that_is_not_aligned_takes_torchs_passes() -> None:
    memory = torch.frombuffer(bytearray(400_005), dtype=torch.uint8)
    weights = torch.frombuffer(memory.numpy(), dtype=torch.float32, offset=1, count=100_000)
    weights.copy_(normal(100_000)[0])
    weight = nn.Parameter(weights)
    (gradient,) = normal(100_000)
    weight.grad = gradient.clone()
    optimizer = torch.optim.SGD([weight], lr=0.0)
    GradientMasker([("w", weight)], GMTConfig(criterion="gradient_weight")).attach(optimizer)
    optimizer.step()
    (expected,) = masked_by_scores([gradient], [(gradient * weight.detach()).abs()], 0.5)
    assert torch.equal(weight.grad, expected)


# Run in a process of its own, whose Numba keeps its code in a folder of the test.
STEP = """
import logging, resource, sys
logging.basicConfig(level=logging.WARNING)
if sys.argv[1] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
import torch
torch.set_num_threads(4)
from tests.unit.test_dispatch import assert_masked, normal, optimizer_of
gradients = normal(1_000_000)
optimizer = optimizer_of(gradients)
optimizer.step()
assert_masked(optimizer, gradients)
"""


def step_in_a_process(cache: Path, disk: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", STEP, disk],
        env={"NUMBA_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_a_full_disk_does_not_change_the_mask_and_costs_no_speed(tmp_path: Path) -> None:
    log = step_in_a_process(tmp_path, "full")
    assert log.count("GMT compiles its passes anew in every run") == 1
    assert str(tmp_path) in log
    assert "torch operations" not in log


def test_a_damaged_cache_is_said_with_what_to_delete(tmp_path: Path) -> None:
    assert "GMT compiles" not in step_in_a_process(tmp_path, "room")
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name.startswith("numba_cpu.") for file in kept)
    for file in kept:
        file.write_bytes(file.read_bytes()[:40])
    log = step_in_a_process(tmp_path, "room")
    assert log.count("GMT compiles its passes anew in every run") == 1
    assert "delete that folder's kernels_cpu.* files" in log


def _missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_COMPILED", {"cpu": ("axolotl_gmt.no_such_module", "Numba")})


def _does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels_cpu, "count_digits", fail)


def _compiles_to_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    count_digits = kernels_cpu.count_digits

    def wrong(*arguments: Any) -> None:
        count_digits(*arguments)
        arguments[-1][0, 5] += 1

    monkeypatch.setattr(kernels_cpu, "count_digits", wrong)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("without", [_missing, _does_not_compile, _compiles_to_something_else])
def test_without_compiled_passes_torch_gives_the_same_mask_and_one_warning(
    without: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    without(monkeypatch)
    gradients = normal(1000)
    gradients.append(gradients[0].bfloat16())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            optimizer = optimizer_of(gradients)
            optimizer.step()
            assert_masked(optimizer, gradients)
    assert [record.name for record in caplog.records] == ["axolotl_gmt.kernels.dispatch"]
    assert "Numba cannot be used" in caplog.text


def test_kernels_are_imported_when_they_are_needed_and_not_before() -> None:
    code = (
        "import sys, axolotl_gmt.masking.threshold\n"
        "assert not {'triton', 'numba', 'axolotl_gmt.kernels.triton_gpu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("wrong", ["count_digits", "mask_below_", "keep_candidates"])
def test_a_compiled_pass_that_differs_from_torchs_is_found_out(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Kind(Magnitudes, torch.float32, None)
    module = cast(dispatch.Backend, kernels_cpu)
    dispatch.compare_with_torch(module, torch.device("cpu"), kind)
    nothing: dict[str, Callable[..., Any]] = {
        "count_digits": lambda *arguments: None,
        "mask_below_": lambda *arguments: None,
        "keep_candidates": lambda scores, *arguments: [Magnitudes(s.entries[:0]) for s in scores],
    }
    monkeypatch.setattr(kernels_cpu, wrong, nothing[wrong])
    with pytest.raises(RuntimeError, match="differ"):
        dispatch.compare_with_torch(module, torch.device("cpu"), kind)


@pytest.mark.parametrize("backend", ["compiled", "torch"])
def test_candidates_are_the_entries_that_match_if_these_are_few(
    backend: str, afresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "torch":
        monkeypatch.setattr(dispatch, "_COMPILED", {})
    (few,) = normal(300_000)
    many = torch.full((1000,), 1.5)
    prefixes = torch.tensor([int(few[7].abs().view(torch.int32)) >> 16, 0x3FC0])
    scores = [Magnitudes(few), Magnitudes(many), Magnitudes(few[:0])]
    kept_few, kept_many, kept_none = dispatch.keep_candidates(
        scores, [0, 1, 0], torch.float32, 16, prefixes
    )
    matching = few.abs()[few.abs().view(torch.int32) >> 16 == prefixes[0]]
    assert 0 < len(matching) == len(kept_few.entries)
    assert torch.equal(kept_few.entries.abs(), matching)
    assert kept_many is scores[1]
    assert len(kept_none.entries) == 0
