"""Masks that stay for several steps, steps before the first mask, and weights that hold still."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes
import pytest
import schedulefree  # type: ignore[import-untyped]
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from axolotl_gmt import GMTConfig, GradientMasker
from axolotl_gmt.kernels.bits import pack, unpack
from axolotl_gmt.kernels.scores import Bits
from axolotl_gmt.masking.masker import group_name
from tests.reference.gmt_reference import SparseTraining

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, foreach=False),
    "adamw_foreach": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw_fused": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, fused=True),
    "adam_l2_maximize": partial(
        torch.optim.Adam, lr=0.1, weight_decay=0.1, foreach=True, maximize=True
    ),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, weight_decay=0.1),
    "adafactor": partial(torch.optim.Adafactor, lr=0.1, weight_decay=0.1),
}


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 5), nn.Linear(5, 3, bias=False))
    return model.to(dtype)


def backward(model: nn.Module, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    loss: Tensor = model(torch.randn(4, 7, generator=generator).to(dtype)).square().sum()
    loss.backward()
    return loss.item()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def reference(model: nn.Module, config: GMTConfig, optimizer: MakeOptimizer) -> SparseTraining:
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(group_name(name, config.granularity), []).append(name)
    return SparseTraining(
        {name: parameter.detach() for name, parameter in model.named_parameters()},
        list(groups.values()),
        optimizer,
        config.mask_ratio,
        config.mask_interval,
        config.warmup_steps,
        config.hold,
    )


def check_against_reference(
    config: GMTConfig,
    make: MakeOptimizer,
    steps: int,
    resume: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    model = small_model(dtype)
    slow = reference(model, config, make)
    optimizer = make(list(model.parameters()))
    masker = GradientMasker(model.named_parameters(), config)
    handle = masker.attach(optimizer)
    for step in range(steps):
        if resume:
            handle.remove()
            state = copy.deepcopy(masker.state_dict())
            masker = GradientMasker(model.named_parameters(), config)
            masker.load_state_dict(state)
            handle = masker.attach(optimizer)
        backward(model, step)
        if step == 3:  # A tensor without a gradient, and one with a broken one.
            weights = dict(model.named_parameters())
            weights["3.weight"].grad = None
            broken = weights["2.bias"].grad
            assert broken is not None
            broken[1] = float("inf")
        expected = slow.step(gradients_of(model))
        optimizer.step()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(
                    parameter.grad, expected[name], rtol=0, atol=0, equal_nan=True
                )
            torch.testing.assert_close(
                parameter.detach(), slow.weights[name].detach(), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mask_interval", [1, "once"])
def test_held_weights_keep_still_under_any_optimizer(optimizer: str, mask_interval: Any) -> None:
    config = GMTConfig(mask_ratio=0.7, hold=True, mask_interval=mask_interval)
    check_against_reference(config, OPTIMIZERS[optimizer], steps=3)


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "Lion8bit", "AdamW", "Lion"])
def test_held_weights_keep_still_under_the_optimizers_of_bitsandbytes(optimizer: str) -> None:
    make = partial(getattr(bitsandbytes.optim, optimizer), lr=0.1, weight_decay=0.1)
    torch.manual_seed(0)
    model = nn.Linear(96, 96)  # Large enough for 8 bits.
    config = GMTConfig(mask_ratio=0.7, hold=True)
    slow, optimizer_ = reference(model, config, make), make(model.parameters())
    GradientMasker(model.named_parameters(), config).attach(optimizer_)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        slow.step(gradients_of(model))
        optimizer_.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, slow.weights[name])


@given(
    mask_ratio=st.sampled_from([0.0, 0.5, 0.9]),
    granularity=st.sampled_from(["tensor", "layer", "global"]),
    mask_interval=st.sampled_from([1, 2, 3, 7, "once"]),
    warmup_steps=st.integers(0, 4),
    hold=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    resume=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_every_step_is_that_of_the_reference(
    resume: bool, dtype: torch.dtype, **config: Any
) -> None:
    make = OPTIMIZERS["adamw"]
    check_against_reference(GMTConfig(**config), make, steps=8, resume=resume, dtype=dtype)


def test_a_run_with_one_mask_and_held_weights_changes_the_entries_of_that_mask_alone() -> None:
    model = small_model()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    config = GMTConfig(mask_ratio=0.9, mask_interval="once", hold=True)
    GradientMasker(model.named_parameters(), config).attach(optimizer)
    masks: dict[str, Tensor] = {}
    for step in range(5):
        backward(model, step)
        optimizer.step()
        masks = masks or {name: gradient != 0 for name, gradient in gradients_of(model).items()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter != base[name], masks[name]), name


def test_without_hold_a_masked_entry_moves_by_momentum_and_weight_decay() -> None:
    """Else the test above could not fail."""
    model = small_model()
    base = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.9)).attach(optimizer)
    backward(model, 0)
    optimizer.step()
    for parameter, old in zip(model.parameters(), base, strict=True):
        assert parameter.grad is not None
        assert int((parameter != old).sum()) > int(parameter.grad.count_nonzero())


def test_parameters_outside_the_mask_are_not_held() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    config = GMTConfig(mask_ratio=0.9, hold=True, exclude=("bias",))
    GradientMasker(model.named_parameters(), config).attach(optimizer)
    bias = dict(model.named_parameters())["0.bias"]
    before = bias.detach().clone()
    backward(model, 0)
    bias.grad = torch.zeros_like(bias)
    optimizer.step()
    assert not torch.equal(bias, before)


@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_makes_the_gradients_that_weights_are_held_by(keyword: bool) -> None:
    model, other = small_model(), small_model()
    config = GMTConfig(mask_ratio=0.7, hold=True, mask_interval=2)
    make = OPTIMIZERS["adamw"]
    optimizer, slow = make(model.parameters()), reference(model, config, make)
    GradientMasker(model.named_parameters(), config).attach(optimizer)
    for step in range(4):
        other.load_state_dict(model.state_dict())
        backward(other, step)
        slow.step(gradients_of(other))
        closure = partial(backward, model, step)
        optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, slow.weights[name])


def test_a_weight_whose_memory_lies_otherwise_than_its_gradient_is_held() -> None:
    weight = nn.Parameter(torch.arange(12.0).view(3, 4).t())
    assert not weight.is_contiguous()
    weight.grad = torch.arange(12.0).view(4, 3).contiguous()
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=1.0, weight_decay=0.5)
    masker = GradientMasker([("w", weight)], GMTConfig(mask_ratio=0.5, hold=True))
    masker.attach(optimizer)
    optimizer.step()
    assert torch.equal(weight != before, torch.arange(12.0).view(4, 3) >= 6)


def test_nothing_is_held_in_memory_between_steps() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masker = GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.5, hold=True))
    handle = masker.attach(optimizer)
    entries = sum(parameter.numel() for parameter in model.parameters())
    assert masker.extra_bytes(optimizer) == 4 * entries + entries // 8
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model, 0)
    optimizer.step()
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))


def test_optimizers_that_keep_other_weights_are_refused() -> None:
    model = small_model()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters())
    masker = GradientMasker(model.named_parameters(), GMTConfig(hold=True))
    with pytest.raises(ValueError, match=r"hold \(gmt_hold in YAML\): AdamWScheduleFree.*AdamW"):
        masker.attach(optimizer)
    GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0, hold=True)).attach(optimizer)


def test_a_criterion_is_asked_only_when_a_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl_gmt import criteria

    asked = []

    def counted(shapes: Any, seed: int) -> Any:
        def score(entries: criteria.Entries) -> Tensor:
            asked.append(entries.step)
            return entries.gradient.abs().float()

        return dict.fromkeys(shapes, score)

    monkeypatch.setitem(criteria.BUILT_IN, "counted", counted)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = GMTConfig(criterion="counted", mask_interval=3, warmup_steps=1)
    GradientMasker(model.named_parameters(), config).attach(optimizer)
    for step in range(8):
        backward(model, step)
        optimizer.step()
    assert sorted(set(asked)) == [1, 4, 7]


def test_a_state_without_the_masks_of_the_interval_is_refused() -> None:
    model = small_model()
    masker = GradientMasker(model.named_parameters(), GMTConfig(mask_interval=3))
    masker.load_state_dict({"step": 3})
    with pytest.raises(ValueError, match="Step 4 goes on with masks"):
        masker.load_state_dict({"step": 4})


@given(entries=st.integers(0, 100), chunk=st.sampled_from([8, 16, 64]), seed=st.integers(0, 2**31))
def test_bits_are_the_flags(entries: int, chunk: int, seed: int) -> None:
    flags = torch.rand(entries, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack(lambda start, stop: flags[start:stop], entries, chunk, flags.device)
    assert [bool(bits[i // 8] >> (i % 8) & 1) for i in range(entries)] == flags.tolist()
    start = 8 * (seed % (entries // 8 + 1))
    assert torch.equal(unpack(bits, start, entries), flags[start:])
    scores = Bits(
        torch.full((entries,), 2.0).index_fill_(0, torch.arange(0, entries, 7), torch.nan), bits
    )
    expected = flags.float()
    expected[::7] = torch.inf
    assert torch.equal(scores.values(0, entries), expected)
