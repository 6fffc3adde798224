"""Which passes run, and that a mask is exact or the step ends when compiled ones break."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from axolotl_gmt import GMTConfig, GradientMasker
from axolotl_gmt.kernels import dispatch, eager
from axolotl_gmt.kernels.contract import Backend, Batch, CompiledBackend, most_copies
from axolotl_gmt.kernels.dtypes import Digit
from axolotl_gmt.kernels.scores import (
    Hashes,
    Inverses,
    Kind,
    Magnitudes,
    Products,
    Quotients,
    Scores,
)
from axolotl_gmt.kernels.self_check import compare
from tests.reference.gmt_reference import masked, masked_by_scores

numba_cpu = pytest.importorskip("axolotl_gmt.kernels.numba_cpu")


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
@pytest.mark.parametrize(
    ("dtype", "makes_room"), [(torch.bfloat16, "zeros_like"), (torch.float32, "empty")]
)
@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_pass_that_fails_half_way_ends_the_step_and_the_next_one_is_exact(
    dtype: torch.dtype, makes_room: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 is counted, and of fp32 a part is copied."""
    gradients = [gradient.to(dtype) for gradient in normal(1_000_000)]
    optimizer = optimizer_of(gradients)
    optimizer.step()  # Whatever is compiled is compiled now.
    calls = iter(range(1, 100))
    make_room = getattr(np, makes_room)

    def fail(*arguments: Any) -> Any:
        if next(calls) == call:
            raise MemoryError("planted")
        return make_room(*arguments)

    for weight, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        weight.grad = gradient.clone()
    with monkeypatch.context() as patch:
        patch.setattr(np, makes_room, fail)
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
        numba_cpu._in_threads(work, 16)
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

    numba_cpu._pool.cache_clear()
    counts = torch.zeros(1, 1 << 15, dtype=torch.int32)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        optimizer.step()
        numba_cpu._pool.cache_clear()
        started = iter(range(startable))
        batch = Batch([Magnitudes(gradients[0])], [0], torch.float32)
        dispatch.count_digits(batch, Digit(16, 15), None, counts)
    assert_masked(optimizer, gradients)
    assert int(counts.sum()) == 2_000_000
    numba_cpu._pool.cache_clear()


def test_there_is_one_pool_of_threads_whatever_the_sizes_are(
    four_threads: None,
) -> None:
    numba_cpu._pool.cache_clear()
    before = set(threading.enumerate())  # Those of a pool of before end at their own time.
    for size in (70_000, 140_000, 200_000, 2_000_000):
        optimizer_of(normal(size)).step()
    new = [t for t in threading.enumerate() if t not in before and "axolotl_gmt" in t.name]
    assert 0 < len(new) <= 3


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
        numba_cpu._in_threads(work, 8)
    assert running == 0


@pytest.mark.usefixtures("four_threads")
def test_work_that_was_queued_for_a_thread_that_cannot_start_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numba_cpu._pool.cache_clear()
    pool = numba_cpu._pool(3, os.getpid(), numba_cpu._flushes_denormals())
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
        numba_cpu._in_threads(work, 6)
    assert not running
    numba_cpu._pool.cache_clear()


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
from tests.kernels.test_dispatch import assert_masked, normal, optimizer_of
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
    assert "delete that folder's numba_cpu.* files" in log


def _missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_COMPILED", {"cpu": ("axolotl_gmt.no_such_module", "Numba")})


def _does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(numba_cpu, "count_digits", fail)


def _compiles_to_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    count_digits = numba_cpu.count_digits

    def wrong(*arguments: Any) -> None:
        count_digits(*arguments)
        arguments[-1][0, 5] += 1

    monkeypatch.setattr(numba_cpu, "count_digits", wrong)


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


@pytest.mark.usefixtures("afresh")
def test_a_kind_of_scores_that_does_not_compile_leaves_the_others_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count_digits = numba_cpu.count_digits

    def fail_for_hashes(batch: Batch, *arguments: Any) -> None:
        if isinstance(batch.scores[0], Hashes):
            raise RuntimeError("no such instruction")
        count_digits(batch, *arguments)

    monkeypatch.setattr(numba_cpu, "count_digits", fail_for_hashes)
    hashes = Hashes(torch.ones(8), 5, 7).kind(torch.float32)
    magnitudes = Magnitudes(torch.ones(8)).kind(torch.float32)
    name, error = dispatch.passes("cpu", hashes)
    assert (name, str(error)) == ("torch", "no such instruction")
    assert dispatch.passes("cpu", magnitudes) == ("Numba", None)


def test_kernels_are_imported_when_they_are_needed_and_not_before() -> None:
    code = (
        "import sys, axolotl_gmt.masking.threshold\n"
        "assert not {'triton', 'numba', 'axolotl_gmt.kernels.triton_gpu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("wrong", ["count_digits", "mask_below_", "copy_between"])
def test_a_compiled_pass_that_differs_from_torchs_is_noticed(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Kind(Magnitudes, torch.float32, None, torch.float32)
    backend = cast(CompiledBackend, numba_cpu)
    compare(backend, torch.device("cpu"), kind)
    nothing: dict[str, Callable[..., Any]] = {
        "count_digits": lambda *arguments: None,
        "mask_below_": lambda *arguments: None,
        "copy_between": lambda batch, *limits: [torch.empty(0, dtype=torch.int32)] * len(batch[0]),
    }
    monkeypatch.setattr(numba_cpu, wrong, nothing[wrong])
    with pytest.raises(RuntimeError, match="differ"):
        compare(backend, torch.device("cpu"), kind)


def test_scores_of_a_class_that_no_pass_knows_are_never_taken_for_magnitudes() -> None:
    class Unknown(Magnitudes):
        """A class that was forgotten."""

    scores = Unknown(torch.ones(8))
    backend = dispatch._backend("cpu", scores.kind(torch.float32))
    assert backend is cast(Backend, eager)
    counts = torch.zeros(1, 1 << 15, dtype=torch.int32)
    with pytest.raises(KeyError):
        numba_cpu.count_digits(Batch([scores], [0], torch.float32), Digit(16, 15), None, counts)


def scores_of_every_kind() -> dict[str, Scores]:
    first, second = normal(300_000, 300_000)
    return {
        "magnitudes": Magnitudes(first),
        "magnitudes of bf16": Magnitudes(first.bfloat16()),
        "magnitudes of fp16": Magnitudes(first.half()),
        "inverses": Inverses(first),
        "inverses of bf16": Inverses(first.bfloat16()),
        "inverses of fp16": Inverses(first.half()),
        "products": Products(first.bfloat16(), second),
        "quotients": Quotients(first.bfloat16(), second),
        "hashes": Hashes(first, 5, 7),
    }


def first_of(scores: Scores) -> Scores:
    tensors = {name: value for name, value in vars(scores).items() if isinstance(value, Tensor)}
    return replace(scores, **{name: tensor[:1] for name, tensor in tensors.items()})


@pytest.mark.parametrize("kind", scores_of_every_kind())
@pytest.mark.parametrize("compiled", [True, False])
def test_what_lies_between_two_patterns_is_copied_if_it_is_little(
    kind: str, compiled: bool, afresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(dispatch, "_COMPILED", {})
    scores = scores_of_every_kind()[kind]
    patterns = scores.patterns(0, len(scores.entries), torch.float32)
    ordered = patterns.sort().values.long()
    batch = Batch([scores, scores, first_of(scores), scores], [0, 1, 0, 2], torch.float32)
    places = torch.tensor([[150_000, 50_000, 150_000], [160_000, 160_000, 150_600]])
    low, high = ordered[places]
    above = torch.zeros(3, dtype=torch.int64)
    few, many, one, hardly_any = dispatch.copy_between(batch, low, high, above)
    assert few is not None
    assert torch.equal(few, patterns[(patterns >= low[0]) & (patterns < high[0])])
    assert many is None
    assert 0 < len(few) <= most_copies(300_000)
    is_one_above = int(patterns[0] >= high[0])
    assert one is not None
    assert hardly_any is not None
    assert torch.equal(hardly_any, patterns[(patterns >= low[2]) & (patterns < high[2])])
    is_above = [int((patterns >= limit).sum()) for limit in high]
    assert above.tolist() == [is_above[0] + is_one_above, 0, is_above[2]]


@pytest.mark.usefixtures("afresh")
def test_every_kind_of_scores_has_compiled_passes(caplog: pytest.LogCaptureFixture) -> None:
    for scores in scores_of_every_kind().values():
        backend = dispatch._backend("cpu", scores.kind(torch.float32))
        assert backend is cast(Backend, numba_cpu)
    assert not caplog.records
