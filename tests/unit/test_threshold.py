"""The fast threshold and mask against the sorting reference, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from axolotl_gmt.gradients.shard import Shard
from axolotl_gmt.kernels import dispatch, eager
from axolotl_gmt.kernels.contract import TOTALS, Batch
from axolotl_gmt.kernels.dispatch import mask_below_
from axolotl_gmt.kernels.dtypes import Digit
from axolotl_gmt.kernels.scores import Hashes, Inverses, Magnitudes, Products, Quotients, Scores
from axolotl_gmt.masking import threshold
from axolotl_gmt.masking.threshold import Rows, common_dtype, entries_to_keep, find_thresholds
from tests.reference.gmt_reference import masked, masked_by_scores

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(scope="module", params=["compiled", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """All tests here hold for the compiled passes and for the torch versions alike."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "torch":
            monkeypatch.setattr(dispatch, "_COMPILED", {})
        dispatch.forget_backends()
        yield
    dispatch.forget_backends()


def bits(tensor: Tensor) -> Tensor:
    """Bit patterns, which tell -0.0 from 0.0 and one NaN from another."""
    return tensor.view(BITS[tensor.dtype.itemsize])


def rows_of(groups: Sequence[Sequence[Scores]]) -> Rows:
    return Rows([[Shard("", s.entries, s.entries, ()) for s in group] for group in groups])


def thresholds_of(
    groups: Sequence[Sequence[Scores]], mask_ratio: float, dtype: torch.dtype
) -> Tensor:
    rows = rows_of(groups)
    scores = [score for group in groups for score in group]
    return find_thresholds(Batch(scores, rows.of_shard, dtype), rows, mask_ratio)


def mask(scores: Sequence[Scores], mask_ratio: float, dtype: torch.dtype) -> Tensor:
    """Mask what competes for one threshold; the totals."""
    thresholds = thresholds_of([scores], mask_ratio, dtype)
    totals = torch.zeros(len(scores), TOTALS, dtype=torch.float64)
    mask_below_(Batch(scores, [0] * len(scores), dtype), thresholds, totals)
    return totals


def fast(gradients: list[Tensor], mask_ratio: float) -> tuple[list[Tensor], Tensor]:
    """What :mod:`axolotl_gmt.masking.threshold` makes of one group, and its totals."""
    entries = [gradient.clone() for gradient in gradients]
    dtype = common_dtype([gradient.dtype for gradient in gradients])
    totals = mask([Magnitudes(tensor) for tensor in entries], mask_ratio, dtype)
    return entries, totals


def assert_like_reference(gradients: list[Tensor], mask_ratio: float) -> None:
    entries, totals = fast(gradients, mask_ratio)
    expected = masked(gradients, mask_ratio)
    for got, want in zip(entries, expected, strict=True):
        assert torch.equal(bits(got), bits(want))
    assert totals[:, 0].tolist() == [want.numel() for want in expected]
    assert totals[:, 1].tolist() == [int(want.count_nonzero()) for want in expected]


def counted_digits(monkeypatch: pytest.MonkeyPatch) -> list[Digit]:
    """The digits that are counted from now on, in order."""
    digits: list[Digit] = []

    def count(batch: Batch, digit: Digit, prefixes: Tensor | None, counts: Tensor) -> None:
        digits.append(digit)
        dispatch.count_digits(batch, digit, prefixes, counts)

    monkeypatch.setattr(threshold, "count_digits", count)
    return digits


@st.composite
def gradient(draw: st.DrawFn) -> Tensor:
    """A tensor of any float dtype: random bit patterns, few distinct values, zeros, NaN, Inf."""
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.integers(0, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["patterns", "normal", "ties", "zeros"]))
    if kind == "patterns":
        info = torch.iinfo(BITS[dtype.itemsize])
        tensor = torch.randint(
            info.min, info.max, (size,), generator=generator, dtype=BITS[dtype.itemsize]
        ).view(dtype)
    elif kind == "normal":
        tensor = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    else:
        high = 3 if kind == "ties" else 1
        tensor = torch.randint(0, high, (size,), generator=generator).to(dtype)
    special = draw(
        st.lists(st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan]), max_size=9)
    )
    tensor[: len(special)] = torch.tensor(special[:size], dtype=torch.float64).to(dtype)
    return tensor


RATIOS = st.one_of(
    st.sampled_from([0.0, 0.5, 0.9, 0.999999]), st.floats(0, 1, exclude_max=True, allow_nan=False)
)


@given(tensor=gradient(), mask_ratio=RATIOS)
@settings(max_examples=300, deadline=None)
@example(tensor=torch.zeros(7), mask_ratio=0.5)
@example(tensor=torch.full((8,), math.nan), mask_ratio=0.9)
@example(tensor=torch.tensor([1.0, -1.0, 1.0, 0.5]), mask_ratio=0.75)
@example(tensor=torch.tensor([-0.0, 0.0, 1e-45]), mask_ratio=0.5)
def test_one_tensor_is_masked_like_the_reference(tensor: Tensor, mask_ratio: float) -> None:
    assert_like_reference([tensor], mask_ratio)


@given(tensors=st.lists(gradient(), min_size=1, max_size=5), mask_ratio=RATIOS)
@settings(max_examples=100, deadline=None)
def test_tensors_of_any_dtypes_compete_like_the_reference(
    tensors: list[Tensor], mask_ratio: float
) -> None:
    assert_like_reference(tensors, mask_ratio)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_several_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "chunk_size", lambda device: 64)
    monkeypatch.setattr(eager, "_CHUNK", 64)
    generator = torch.Generator().manual_seed(1)
    assert_like_reference([torch.randn(1000, generator=generator).to(dtype)], 0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_do_not_see_each_other(dtype: torch.dtype) -> None:
    groups = [torch.arange(1, 101).to(dtype), torch.arange(1, 101).to(dtype) * 64]
    thresholds = thresholds_of([[Magnitudes(group)] for group in groups], 0.5, dtype)
    values = thresholds.to(BITS[dtype.itemsize]).view(dtype)
    assert values.tolist() == [51, 51 * 64]


def test_nan_of_any_payload_and_infinity_are_kept_beside_each_other() -> None:
    patterns = torch.tensor([0x7F80, 0x7F81, 0x7FFF, -0x0080, -1, 0x3F80], dtype=torch.int16)
    tensor = patterns.view(torch.bfloat16)
    (got,), _ = fast([tensor], 0.8)
    assert torch.equal(bits(got)[:5], patterns[:5])
    assert got[5] == 0


def test_ties_at_the_threshold_all_stay() -> None:
    (got,), totals = fast([torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5])], 0.6)
    assert got.tolist() == [2.0, 1.0, 1.0, 1.0, 0.0]
    assert totals.tolist() == [pytest.approx([5, 4, 7.25, 7.0, 5.5, 5.0])]


def test_denormals_are_told_apart_even_if_the_cpu_flushes_them() -> None:
    tensor = torch.tensor([1, 2, 3, 4], dtype=torch.int32).view(torch.float32)
    flushes = torch.set_flush_denormal(True)
    try:
        (got,), _ = fast([tensor], 0.5)
    finally:
        torch.set_flush_denormal(False)
    assert flushes or not torch.backends.cpu.get_cpu_capability()
    assert bits(got).tolist() == [0, 0, 3, 4]


def test_an_empty_group_has_threshold_zero() -> None:
    assert thresholds_of([[Magnitudes(torch.empty(0))]], 0.5, torch.float32).tolist() == [0]


@st.composite
def scored(draw: st.DrawFn) -> Scores:
    """Products, quotients or hashes over any gradient, at addresses of any alignment."""
    entries = draw(gradient().filter(lambda tensor: tensor.dtype != torch.float64))
    if draw(st.booleans()):
        return Hashes(entries, draw(st.integers(-(2**63), 2**63 - 1)), draw(st.integers(0, 2**50)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weights = torch.randn(len(entries) + 3, generator=generator)
    weights[:3] = torch.tensor([0.0, math.inf, math.nan])
    weights = weights.to(draw(st.sampled_from(DTYPES)))
    start = draw(st.integers(0, 3))
    made = draw(st.sampled_from([Products, Quotients]))
    return made(entries, weights[start : start + len(entries)])


@given(scores=st.lists(scored(), min_size=1, max_size=5), mask_ratio=RATIOS)
@settings(max_examples=100, deadline=None)
def test_scores_of_any_kinds_are_masked_like_the_reference(
    scores: list[Scores], mask_ratio: float
) -> None:
    before = [score.entries.clone() for score in scores]
    values = [score.values(0, len(score.entries)).clone() for score in scores]
    mask(scores, mask_ratio, torch.float32)
    for score, expected in zip(scores, masked_by_scores(before, values, mask_ratio), strict=True):
        assert torch.equal(bits(score.entries), bits(expected))


@pytest.mark.parametrize("mask_ratio", [0.0, 0.03, 0.5, 0.999])
@pytest.mark.parametrize("sizes", [[700_001], [9_216, 100, 65_537], [12, 5], [3]])
def test_hashes_of_large_tensors_are_masked_like_the_reference(
    sizes: list[int], mask_ratio: float
) -> None:
    scores = [Hashes(torch.randn(size), 77, 1000 * size) for size in sizes]
    before = [score.entries.clone() for score in scores]
    values = [score.values(0, len(score.entries)).clone() for score in scores]
    mask(scores, mask_ratio, torch.float32)
    for score, expected in zip(scores, masked_by_scores(before, values, mask_ratio), strict=True):
        assert torch.equal(score.entries, expected)


def test_scores_that_are_not_near_where_they_should_be_are_still_masked_exactly() -> None:
    entries = torch.full((100_000,), math.inf)
    entries[:30_000] = 1.0  # Of these alone the scores are uniform; all others win.
    scores = Hashes(entries, 3, 0)
    before, values = entries.clone(), scores.values(0, len(entries)).clone()
    mask([scores], 0.2, torch.float32)
    assert torch.equal(entries, masked_by_scores([before], [values], 0.2)[0])
    assert not torch.equal(entries, before)


def test_too_many_ties_to_copy_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [torch.full((200_000,), 0.5), torch.randn(60_000)]
    gradients[0][::3] = 0.25
    digits = counted_digits(monkeypatch)
    for mask_ratio in (0.1, 0.4, 0.6, 0.9):
        digits.clear()
        assert_like_reference(gradients[:1], mask_ratio)
        assert digits == [Digit(16, 15), Digit(0, 16)]
        assert_like_reference(gradients, mask_ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_that_must_be_counted_and_others_are_told_apart(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    some, more, most = (
        torch.randn(size, generator=generator).to(dtype) for size in (30_000, 700, 90_000)
    )
    ties = torch.full((200_000,), 0.5, dtype=dtype)
    broken = torch.full((50,), math.nan, dtype=dtype)
    groups = [[some], [ties, more], [torch.empty(0, dtype=dtype)], [broken], [most]]
    found = thresholds_of([[Magnitudes(t) for t in group] for group in groups], 0.3, dtype)
    for group, of_group in zip(groups, found.tolist(), strict=True):
        entries = torch.cat(group)
        k = entries_to_keep(torch.tensor(len(entries)), 0.3)
        infinity = bits(torch.tensor(math.inf, dtype=dtype))
        ordered = bits(entries.abs()).sort(descending=True).values.clamp(max=infinity)
        assert of_group == (ordered[k - 1] if len(entries) else 0)


def test_scores_that_are_few_are_copied_and_not_counted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digits = counted_digits(monkeypatch)
    assert_like_reference([torch.randn(200_000)], 0.5)
    assert digits == [Digit(16, 15)]


@pytest.mark.parametrize("made", [Magnitudes, Inverses])
def test_bits_by_which_scores_are_widened_are_not_counted(
    made: type[Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = torch.randn(40_000).bfloat16()
    entries[:2] = torch.tensor([math.nan, math.inf])
    by_torch = made(entries).patterns(0, len(entries), torch.float32)
    digits = counted_digits(monkeypatch)
    for mask_ratio in (0.0, 0.3, 0.99999):
        digits.clear()
        found = thresholds_of([[made(entries)]], mask_ratio, torch.float32)
        k = entries_to_keep(torch.tensor(len(entries)), mask_ratio)
        assert found.item() == by_torch.sort(descending=True).values[k - 1]
        assert digits == [Digit(16, 15)]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_large_tensors_of_other_dtypes_in_a_group_are_masked_like_the_reference(
    narrow: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(5)
    gradients = [
        torch.randn(200_000, generator=generator).to(narrow),
        torch.randn(50, generator=generator),
        torch.randn(70_000, generator=generator).to(narrow),
    ]
    # A threshold that is a value of the narrow dtype, and thresholds that lie between two.
    for mask_ratio in (0.1, 0.5, 0.93):
        assert_like_reference(gradients, mask_ratio)
