"""How masks change over time: their overlap, and what was ever kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from axolotl_gmt import GMTConfig, GradientMasker
from axolotl_gmt.kernels import bits
from axolotl_gmt.names import module_name
from tests.reference.overlap_reference import MaskHistory

KEYS = ("mask_overlap", "mask_overlap_by_chance", "ever_kept")


def overlap_of(statistics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in statistics.items() if key in KEYS}


def attached(
    sizes: dict[str, int], dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer, GradientMasker]:
    weights = {name: nn.Parameter(torch.zeros(size, dtype=dtype)) for name, size in sizes.items()}
    optimizer = torch.optim.SGD(weights.values(), lr=0.0)
    masker = GradientMasker(weights.items(), GMTConfig(log_overlap=True, **config))
    masker.attach(optimizer)
    return weights, optimizer, masker


steps = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["values", "ties", "zeros", "absent"]), min_size=4, max_size=4),
        st.integers(0, 2),  # How often the statistics are read.
    ),
    min_size=1,
    max_size=6,
)


@given(
    sizes=st.lists(st.integers(0, 70), min_size=4, max_size=4),
    steps=steps,
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    config=st.fixed_dictionaries(
        {
            "mask_ratio": st.sampled_from([0.0, 0.5, 0.9]),
            "granularity": st.sampled_from(["tensor", "layer", "global"]),
            "mask_interval": st.sampled_from([1, 2, "once"]),
            "warmup_steps": st.integers(0, 2),
            "log_modules": st.booleans(),
        }
    ),
)
@settings(deadline=None, max_examples=60)
def test_the_numbers_are_those_of_sets(
    sizes: list[int], steps: Any, seed: int, dtype: torch.dtype, config: dict[str, Any]
) -> None:
    names = ["layers.0.up.weight", "layers.0.up.bias", "layers.1.up.weight", "head"]
    of_name = dict(zip(names, sizes, strict=True))
    weights, optimizer, masker = attached(of_name, dtype, **config)
    history = MaskHistory(of_name)
    generator = torch.Generator().manual_seed(seed)
    for kinds, reads in steps:
        for (name, weight), kind in zip(weights.items(), kinds, strict=True):
            drawn = torch.randn(of_name[name], generator=generator).to(dtype)
            weight.grad = {"values": drawn, "ties": drawn.sign(), "zeros": 0 * drawn}.get(kind)
        optimizer.step()
        history.step({n: w.grad for n, w in weights.items() if w.grad is not None})
        for _ in range(reads):
            assert overlap_of(masker.statistics()) == history.log(names)
            expected = {}
            for module in dict.fromkeys(map(module_name, names)):
                of_module = history.log([n for n in names if module_name(n) == module])
                if of_module and config["log_modules"]:
                    expected[module] = of_module
            of_modules = masker.module_statistics().items()
            assert {module: overlap_of(numbers) for module, numbers in of_modules} == expected


def test_random_masks_overlap_as_by_chance_and_fixed_ones_wholly() -> None:
    measured: dict[str, list[float]] = {}
    for criterion in ("random", "fixed_random"):
        sizes = {"a": 40_000, "b": 20_000}
        weights, optimizer, masker = attached(sizes, criterion=criterion, mask_ratio=0.9, seed=1)
        for _ in range(2):
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape)
            optimizer.step()
            statistics = masker.statistics()
        assert statistics["mask_overlap_by_chance"] == pytest.approx(0.01 / 0.19, rel=1e-3)
        measured[criterion] = [statistics["mask_overlap"], statistics["ever_kept"]]
    assert measured["fixed_random"] == pytest.approx([1, 0.1], rel=1e-3)
    assert measured["random"] == pytest.approx([0.01 / 0.19, 0.19], rel=0.1)


def test_a_gradient_may_lie_otherwise_in_memory_at_each_step() -> None:
    weight = nn.Parameter(torch.zeros(6, 10))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    masker = GradientMasker([("weight", weight)], GMTConfig(log_overlap=True))
    masker.attach(optimizer)
    gradient = torch.randn(6, 10)
    for kept in (gradient, gradient.t().contiguous().t()):
        weight.grad = kept.clone()
        optimizer.step()
        statistics = masker.statistics()
    assert statistics["mask_overlap"] == 1.0
    assert statistics["ever_kept"] == 0.5


def test_without_the_setting_nothing_is_counted_or_held() -> None:
    weight = nn.Parameter(torch.zeros(64))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    masker = GradientMasker([("weight", weight)])
    masker.attach(optimizer)
    for _ in range(2):
        weight.grad = torch.randn(64)
        optimizer.step()
        assert overlap_of(masker.statistics()) == {}
    assert masker.extra_bytes(optimizer) == 0


def test_it_takes_three_bits_an_entry() -> None:
    weights, optimizer, masker = attached({"a": 800})
    assert masker.extra_bytes(optimizer) == 300
    for _ in range(3):
        weights["a"].grad = torch.randn(800)
        optimizer.step()
        masker.statistics()
    assert masker._overlap is not None
    fields = (masker._overlap._ever, masker._overlap._now, masker._overlap._before)
    assert sum(tensor.nbytes for field in fields for tensor in field.values()) == 300


@given(
    words=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20),
    cut=st.integers(0, 7),
)
def test_bits_are_counted_on_a_cpu_and_as_on_a_gpu(words: list[int], cut: int) -> None:
    tensor = torch.tensor([0, -1, *words])
    ones = [(word % 2**64).bit_count() for word in tensor.tolist()]
    assert bits._ones(tensor).tolist() == ones
    of_bytes: Tensor = tensor.view(torch.uint8)[: 8 * len(tensor) - cut]
    assert int(bits.count(of_bytes)) == sum(byte.bit_count() for byte in of_bytes.tolist())
