"""GradientMasker on torch optimizers: what is masked, when, and what it says of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from axolotl_gmt import GMTConfig, GradientMasker
from axolotl_gmt.masking.masker import group_name
from tests.reference.gmt_reference import masked, masked_by_scores, random_scores


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 6)).to(dtype)


def backward(model: nn.Module, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    loss: Tensor = model(torch.randn(4, 12, generator=generator).to(dtype)).square().sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.9])
def test_only_the_largest_entries_reach_the_optimizer(
    dtype: torch.dtype, mask_ratio: float
) -> None:
    model = small_model(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    masker = GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=mask_ratio))
    masker.attach(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        expected = [
            masked([parameter.grad], mask_ratio)[0]
            for parameter in model.parameters()
            if parameter.grad is not None
        ]
        optimizer.step()
        for parameter, old, gradient in zip(model.parameters(), before, expected, strict=True):
            assert torch.equal(parameter, old - gradient)


def test_statistics_are_those_of_the_last_step() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight])
    masker = GradientMasker([("weight", weight)], GMTConfig(mask_ratio=0.5))
    assert masker.statistics() == {}
    masker.attach(optimizer)
    for gradient, kept, norm, l1_norm in [
        ([3.0, 0.0, -4.0, 0.0], 0.5, 1.0, 1.0),
        ([4.0, 1.0, -3.0, 1.0], 0.5, 5 / math.sqrt(27), 7 / 9),
        ([0.0, 0.0, 0.0, 0.0], 0.0, 1.0, 1.0),
    ]:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        assert masker.statistics() == pytest.approx(
            {"kept_fraction": kept, "grad_norm_kept": norm, "l1_kept": l1_norm}
        )


def test_a_broken_gradient_stays_visibly_broken() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    masker = GradientMasker([("weight", weight)], GMTConfig(mask_ratio=0.9))
    masker.attach(optimizer)
    weight.grad = torch.tensor([1.0, math.nan, math.inf, 2.0])
    optimizer.step()
    assert weight[1].isnan()
    assert weight[2].isinf()
    assert weight[0] == weight[3] == 0
    assert math.isnan(masker.statistics()["grad_norm_kept"])
    assert math.isnan(masker.statistics()["l1_kept"])


def test_removing_the_handle_ends_masking_and_allows_another() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters())
    masker = GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.9))
    handle = masker.attach(optimizer)
    with pytest.raises(ValueError, match="already attached"):
        masker.attach(optimizer)
    handle.remove()
    backward(model)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    optimizer.step()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]
    masker.attach(optimizer)


@pytest.mark.parametrize("keyword", [False, True])
def test_gradients_that_a_closure_makes_are_masked(keyword: bool) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.8)).attach(optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        return backward(model).item()

    loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert loss is not None
    for parameter in model.parameters():
        assert parameter.grad is not None
        kept = int(parameter.grad.count_nonzero())
        assert kept == max(1, parameter.numel() - round(0.8 * parameter.numel()))


def test_lbfgs_sees_masked_gradients_each_time_it_calls_its_closure() -> None:
    model = small_model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.8)).attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    optimizer.step(closure)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert int(flat.count_nonzero()) == sum(
        max(1, p.numel() - round(0.8 * p.numel())) for p in model.parameters()
    )


def classes_that_step_twice() -> tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer]]:
    """A parent and a child whose ``step()`` calls the parent's, both hooked by torch."""

    class Parent(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Child(Parent):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for kind in (torch.optim.SGD, Parent):
        kind([nn.Parameter(torch.zeros(1))], lr=0.0)  # torch hooks a class at its first instance.
    return Parent, Child


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_within_a_step_masks_once(with_closure: bool) -> None:
    _, child = classes_that_step_twice()
    weight = nn.Parameter(torch.zeros(100_000))
    optimizer = child([weight], lr=1.0)  # type: ignore[call-arg]
    config = GMTConfig(mask_ratio=0.5, criterion="random", seed=4)
    masker = GradientMasker([("weight", weight)], config)
    masker.attach(optimizer)

    def closure() -> float:
        weight.grad = torch.ones(100_000)
        return 0.0

    closure()
    for step in range(3):
        before = weight.detach().clone()
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert masker.step == step + 1
        scores = random_scores("weight", weight.shape, 4, step)
        (expected,) = masked_by_scores([torch.ones(100_000)], [scores], 0.5)
        assert torch.equal(before - weight.detach(), expected)
        statistics = masker.statistics()
        assert statistics["kept_fraction"] == float(expected.mean())
        assert statistics["grad_norm_kept"] == pytest.approx(float(expected.mean()) ** 0.5)
        assert statistics["l1_kept"] == statistics["kept_fraction"]


def test_a_step_that_fails_leaves_the_next_one_masked() -> None:
    _, child = classes_that_step_twice()
    model = small_model()

    class Failing(child):  # type: ignore[valid-type, misc]
        fails = True

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if self.fails:
                raise RuntimeError("planted")

    optimizer = Failing(model.parameters(), lr=1.0)
    GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.8)).attach(optimizer)
    errors = []  # Kept, as a notebook does, and with them the frames of the step.
    for optimizer.fails in (True, True, False):
        optimizer.zero_grad()
        backward(model)
        try:
            optimizer.step()
        except RuntimeError as error:
            errors.append(error)
        for parameter in model.parameters():
            assert parameter.grad is not None
            kept = int(parameter.grad.count_nonzero())
            assert kept == max(1, parameter.numel() - round(0.8 * parameter.numel()))
    assert len(errors) == 2


@pytest.mark.parametrize("how", ["a closure of its own", "two inner steps"])
def test_gradients_that_a_step_makes_itself_are_masked_as_part_of_it(how: str) -> None:
    weight = nn.Parameter(torch.zeros(1000))

    def make_gradient() -> Tensor:
        weight.grad = torch.ones(1000)
        return torch.tensor(0.0)

    class Makes(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if how == "a closure of its own":
                return super().step(make_gradient)
            super().step()
            make_gradient()
            return super().step()

    torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    optimizer = Makes([weight], lr=0.0)
    config = GMTConfig(criterion="random", seed=2)
    masker = GradientMasker([("weight", weight)], config)
    masker.attach(optimizer)
    for step in range(2):
        make_gradient()
        optimizer.step()
        scores = random_scores("weight", weight.shape, 2, step)
        assert weight.grad is not None
        assert torch.equal(weight.grad, masked_by_scores([torch.ones(1000)], [scores], 0.5)[0])
        assert masker.step == step + 1


def test_a_closure_that_fails_is_no_step() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    masker = GradientMasker(model.named_parameters(), GMTConfig(criterion="random"))
    masker.attach(optimizer)

    def fail() -> float:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step(fail)
    assert masker.step == 0


def test_a_lazily_negated_gradient_is_masked() -> None:
    weight = nn.Parameter(torch.zeros(100))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    GradientMasker([("weight", weight)]).attach(optimizer)
    weight.grad = torch._neg_view(torch.randn(100))
    (expected,) = masked([weight.grad.resolve_neg().clone()], 0.5)
    optimizer.step()
    assert torch.equal(weight, -expected)


def test_masks_on_a_cpu_do_not_depend_on_the_default_device() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = GMTConfig(criterion="random", log_modules=True, log_overlap=True)
    masker = GradientMasker(model.named_parameters(), config)
    masker.attach(optimizer)
    backward(model)
    with torch.device("meta"):
        for _ in range(2):
            optimizer.step()
            overall, of_modules = masker.statistics(), masker.module_statistics()
    for statistics in (overall, *of_modules.values()):
        assert statistics["kept_fraction"] == pytest.approx(0.25, abs=0.1)
        assert 0 < statistics["mask_overlap"] < 1
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert int(parameter.grad.count_nonzero()) <= parameter.numel() / 2 + 1


def test_module_statistics_come_in_the_order_of_the_model() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masker = GradientMasker(model.named_parameters(), GMTConfig(log_modules=True))
    masker.attach(optimizer)
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    assert list(masker.module_statistics()) == [str(index) for index in range(12)]


def test_all_masks_of_a_step_with_a_closure_are_drawn_for_that_step() -> None:
    weight = nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.LBFGS([weight], max_iter=3)
    masker = GradientMasker([("weight", weight)], GMTConfig(criterion="random"))
    masker.attach(optimizer)
    kept = []

    def closure() -> Tensor:
        if weight.grad is not None:
            kept.append(weight.grad != 0)
        optimizer.zero_grad()
        loss: Tensor = weight.pow(4).sum()
        loss.backward()
        return loss

    for step in range(2):
        optimizer.step(closure)
        assert masker.step == step + 1
        assert weight.grad is not None
        kept.append(weight.grad != 0)
    per_step = len(kept) // 2
    assert per_step > 1
    assert all(torch.equal(mask, kept[0]) for mask in kept[:per_step])
    assert not torch.equal(kept[0], kept[-1])


@pytest.mark.parametrize("nested", [False, True])
def test_a_compiled_step_masks_once_and_compiles_nothing_of_the_masker(nested: bool) -> None:
    from torch._dynamo.utils import counters

    kind = classes_that_step_twice()[1] if nested else torch.optim.SGD
    model = small_model()
    optimizer = kind(model.parameters(), lr=1.0, foreach=True)  # type: ignore[call-arg]
    masker = GradientMasker(model.named_parameters(), GMTConfig(criterion="random", seed=4))
    masker.attach(optimizer)
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(3):
        optimizer.zero_grad()
        backward(model, number)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        expected = []
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            scores = random_scores(name, parameter.shape, 4, number)
            expected += masked_by_scores([parameter.grad.clone()], [scores], 0.5)
        step()
        for parameter, old, gradient in zip(model.parameters(), before, expected, strict=True):
            assert torch.equal(parameter, old - gradient)
    assert masker.step == 3
    assert counters["stats"]["unique_graphs"] <= 6, counters["stats"]


class Wrapper:
    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            Wrapper(torch.optim.SGD([torch.zeros(1)])),
            "Wrapper is no torch optimizer.*attribute base",
        ),
        ([torch.optim.SGD([torch.zeros(1)])], "list is no torch optimizer.*Attach to the torch"),
        (None, "NoneType is no torch optimizer"),
    ],
)
def test_attaching_to_what_is_no_optimizer_says_what_to_attach_to(
    optimizer: object, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        GradientMasker(small_model().named_parameters()).attach(optimizer)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_ratio_zero_leaves_gradients_alone_that_cannot_be_masked(kind: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        if kind == "sparse":
            return nn.Embedding(10, 4, sparse=True)
        return nn.Linear(10, 4, dtype=torch.complex64)

    models = model(), model()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    masker = GradientMasker(models[0].named_parameters(), GMTConfig(mask_ratio=0))
    masker.attach(optimizers[0])
    for m, optimizer in zip(models, optimizers, strict=True):
        data = torch.arange(10)
        loss = m(data if kind == "sparse" else data.to(torch.complex64)).abs().sum()
        loss.backward()
        optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert masker.statistics() == {}


def test_tied_weights_are_masked_once_and_found_under_any_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    optimizer = torch.optim.SGD(model.parameters())
    names = list(model.named_parameters(remove_duplicate=False))
    assert len(names) == 2
    masker = GradientMasker(names, GMTConfig(include=("head",)))
    masker.attach(optimizer)
    model["head"](model["embed"](torch.arange(10))).square().sum().backward()
    optimizer.step()
    assert masker.statistics()["kept_fraction"] == pytest.approx(0.5)
    assert [name for name, _ in masker.masked_parameters(optimizer)] == ["embed.weight"]


def test_patterns_choose_parameters() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters())
    masker = GradientMasker(
        model.named_parameters(), GMTConfig(include=(r"^0\.",), exclude=(r"\.bias$",))
    )
    masker.attach(optimizer)
    backward(model)
    optimizer.step()
    masked_names = {
        name
        for name, p in model.named_parameters()
        if (p.grad == 0).any()  # type: ignore[union-attr]
    }
    assert masked_names == {"0.weight"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"include": "mlp"}, r"include .*'mlp' matches no trained parameter.*0\.weight"),
        ({"exclude": ["bias", "lora"]}, r"exclude .*'lora' matches no trained parameter"),
        ({"exclude": "."}, "leave no parameter to mask"),
    ],
)
def test_patterns_that_do_nothing_are_refused(config: dict[str, Any], message: str) -> None:
    model = small_model()
    masker = GradientMasker(model.named_parameters(), GMTConfig(**config))
    with pytest.raises(ValueError, match=message):
        masker.attach(torch.optim.SGD(model.parameters()))


def test_a_frozen_parameter_is_not_there_for_patterns() -> None:
    model = small_model()
    model[0].requires_grad_(False)  # type: ignore[index]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masker = GradientMasker(model.named_parameters(), GMTConfig(include=(r"^0\.",)))
    with pytest.raises(ValueError, match="matches no trained parameter"):
        masker.attach(torch.optim.SGD(trained))


def test_parameters_that_the_masker_was_not_told_of_are_refused() -> None:
    model, stranger = small_model(), nn.Linear(3, 5)
    masker = GradientMasker(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.add_param_group({"params": list(stranger.parameters())})
    with pytest.raises(ValueError, match=r"shape \(5, 3\) that is not among the named parameters"):
        masker.attach(optimizer)


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module.head.weight", "layers.0._flat_param"])
def test_fsdp1_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"belongs to FSDP1.*fsdp_version: 2"):
        GradientMasker([(name, nn.Parameter(torch.zeros(3)))])


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters())
    GradientMasker(embedding.named_parameters()).attach(optimizer)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of weight is sparse.*sparse=False"):
        optimizer.step()


def test_complex_gradients_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = torch.optim.SGD([weight])
    GradientMasker([("weight", weight)]).attach(optimizer)
    weight.grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"gradient of weight is torch\.complex64.*exclude"):
        optimizer.step()


@pytest.mark.parametrize(
    "gradient",
    [
        torch.arange(24.0).view(4, 6).t(),
        torch.arange(48.0).view(6, 8)[:, ::2],
        torch.arange(4.0).expand(6, 4),
        torch.arange(24.0)
        .view(1, 6, 4, 1)
        .contiguous(memory_format=torch.channels_last)[0, :, :, 0],
    ],
    ids=["transposed", "strided", "expanded", "channels last"],
)
def test_a_gradient_of_any_layout_is_masked(gradient: Tensor) -> None:
    weight = nn.Parameter(torch.zeros(6, 4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    GradientMasker([("weight", weight)], GMTConfig(mask_ratio=0.7)).attach(optimizer)
    weight.grad = gradient
    (expected,) = masked([gradient.clone()], 0.7)
    optimizer.step()
    assert torch.equal(weight, -expected)


def test_a_parameter_without_gradient_is_left_out() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    masker = GradientMasker(model.named_parameters(), GMTConfig(granularity="global"))
    masker.attach(optimizer)
    model[0](torch.ones(2, 12)).square().sum().backward()  # type: ignore[index]
    untouched = model[2].weight.detach().clone()  # type: ignore[index]
    optimizer.step()
    assert torch.equal(model[2].weight, untouched)  # type: ignore[index]
    assert masker.statistics()["kept_fraction"] == pytest.approx(0.5, abs=0.02)


def test_a_step_without_any_gradient_is_harmless() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    masker = GradientMasker(model.named_parameters())
    masker.attach(optimizer)
    optimizer.step()
    assert masker.statistics() == {}


def test_ratio_zero_is_the_base_optimizer_bit_for_bit() -> None:
    models = small_model(), small_model()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    GradientMasker(models[0].named_parameters(), GMTConfig(mask_ratio=0)).attach(optimizers[0])
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_step_with_overflow_changes_nothing_and_the_next_is_masked(fused: bool) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    masker = GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.8))
    masker.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    for overflow in (True, False):
        optimizer.zero_grad()
        loss = backward_scaled(model, scaler)
        assert loss.isfinite()
        if overflow:
            next(model.parameters()).grad[0, 0] = math.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        moved = [
            int((parameter != old).sum())
            for parameter, old in zip(model.parameters(), start, strict=True)
        ]
        kept = [max(1, p.numel() - round(0.8 * p.numel())) for p in model.parameters()]
        if overflow:
            assert not any(moved)
        elif not fused:  # AdamW's weight decay moves every entry of a fused step's weights too
            assert masker.statistics()["kept_fraction"] == sum(kept) / sum(
                p.numel() for p in model.parameters()
            )


def backward_scaled(model: nn.Module, scaler: torch.amp.GradScaler) -> Tensor:
    loss: Tensor = model(torch.ones(4, 12)).square().sum()
    scaler.scale(loss).backward()
    return loss


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.experts.5.w1.weight", "model.layers.3"),
        ("transformer.h.11.attn.c_attn.weight", "transformer.h.11"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0"),
        (
            "base_model.model.model.layers.0.q_proj.lora_A.default.weight",
            "base_model.model.model.layers.0",
        ),
        ("0.weight", "0"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.norm2.weight", "model.norm2.weight"),
    ],
)
def test_layer_granularity_groups_by_the_first_numbered_module(name: str, layer: str) -> None:
    assert group_name(name, "layer") == layer
    assert group_name(name, "tensor") == name
    assert group_name(name, "global") == "global"


def test_module_statistics_are_those_of_each_module_and_add_up_to_the_whole() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = GMTConfig(mask_ratio=0.6, granularity="global", log_modules=True)
    masker = GradientMasker(model.named_parameters(), config)
    masker.attach(optimizer)
    model(torch.randn(4, 6)).square().sum().backward()
    norms = {
        name: torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        for name, module in model.named_children()
    }
    optimizer.step()
    found = masker.module_statistics()
    assert found.keys() == {"0", "1", "2"}
    kept = 0.0
    for name, module in model.named_children():
        left = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        assert found[name]["kept_fraction"] == int(left.count_nonzero()) / left.numel()
        share = left.double().norm() / norms[name].double().norm()
        assert found[name]["grad_norm_kept"] == pytest.approx(float(share), rel=1e-6)
        share = left.double().norm(1) / norms[name].double().norm(1)
        assert found[name]["l1_kept"] == pytest.approx(float(share), rel=1e-6)
        kept += int(left.count_nonzero())
    entries = sum(parameter.numel() for parameter in model.parameters())
    assert masker.statistics()["kept_fraction"] == kept / entries


def test_without_log_modules_there_are_no_module_statistics() -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masker = GradientMasker(model.named_parameters())
    masker.attach(optimizer)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert masker.module_statistics() == {}


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        (lambda model: model.parameters(), r"model\.named_parameters\(\), not model\.parameters"),
        (lambda model: model, r"model\.named_parameters\(\), not model\."),
        (lambda model: torch.nn.Sequential(model), r"model\.named_parameters\(\), not model\."),
        (lambda model: dict(model.named_parameters()), "needs parameters with their names"),
    ],
)
def test_parameters_without_names_are_refused_with_what_to_write(
    given: Callable[[torch.nn.Module], Any], instead: str
) -> None:
    with pytest.raises(TypeError, match=instead):
        GradientMasker(given(torch.nn.Linear(2, 2)))


def test_settings_that_are_no_config_are_refused_with_what_to_write() -> None:
    parameters = torch.nn.Linear(2, 2).named_parameters()
    with pytest.raises(TypeError, match=r"0\.5 is no GMTConfig\. Write .*mask_ratio=0\.5"):
        GradientMasker(parameters, 0.5)  # type: ignore[arg-type]
