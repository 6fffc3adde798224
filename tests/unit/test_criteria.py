"""The built-in criteria, those of other packages, and what happens if one breaks its contract."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from axolotl_gmt import GMTCallback, GMTConfig, GradientMasker, criteria
from axolotl_gmt.criteria import DROP, KEEP, MAGNITUDE, Entries
from axolotl_gmt.kernels.scores import Hashes
from axolotl_gmt.masking.masker import group_name
from tests.reference.gmt_reference import (
    masked,
    masked_but_smallest,
    masked_by,
    masked_by_scores,
)

SCORED = ["random", "fixed_random", "smallest", "gradient_weight", "relative"]

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPES = {"layers.0.w": torch.Size((13, 9)), "layers.1.w": torch.Size((30,))}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    """Named weights with gradients, drawn anew for each seed."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in SHAPES.items():
        made[name] = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        made[name].grad = torch.randn(shape, generator=generator).to(dtype)
    return made


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def masker_of(named: Mapping[str, nn.Parameter], **settings: Any) -> GradientMasker:
    masker = GradientMasker(named.items(), GMTConfig(**settings))
    masker.attach(torch.optim.SGD(named.values(), lr=0.0))
    return masker


def step(named: Mapping[str, nn.Parameter], **settings: Any) -> list[Tensor]:
    """The gradients that are left after one step with these settings."""
    optimizer = torch.optim.SGD(named.values(), lr=0.0)
    GradientMasker(named.items(), GMTConfig(**settings)).attach(optimizer)
    optimizer.step()
    return [gradient(parameter) for parameter in named.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("granularity", ["tensor", "global"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("criterion", SCORED)
def test_scored_masks_are_those_of_the_reference(
    dtype: torch.dtype, granularity: str, mask_ratio: float, criterion: str
) -> None:
    assert_like_reference(
        parameters(dtype), criterion=criterion, mask_ratio=mask_ratio, granularity=granularity
    )


def assert_like_reference(
    named: Mapping[str, nn.Parameter], criterion: str, mask_ratio: float, granularity: str
) -> None:
    gradients = {name: gradient(parameter) for name, parameter in named.items()}
    weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, g in gradients.items():
        groups[group_name(name, granularity)][name] = g  # type: ignore[arg-type]
    expected: dict[str, Tensor] = {}
    if mask_ratio == 0:
        expected = gradients
    else:
        for group in groups.values():
            expected |= masked_by(criterion, group, weights, mask_ratio, seed=5, step=0)
    left = step(named, criterion=criterion, mask_ratio=mask_ratio, granularity=granularity, seed=5)
    for name, found in zip(named, left, strict=True):
        bits = BITS[found.itemsize]
        assert torch.equal(found.view(bits), expected[name].view(bits)), name


@st.composite
def any_patterns(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    """Any bit patterns, with more than their share of what is special: shape ``(size,)``."""
    bits = BITS[dtype.itemsize]
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    drawn = torch.randint(
        torch.iinfo(bits).min, torch.iinfo(bits).max, (size,), generator=generator, dtype=bits
    ).view(dtype)
    smallest = info.smallest_normal * info.eps
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, 1.0, -1.0]
    special += [smallest, -smallest, 3 * smallest, info.smallest_normal]
    chosen = torch.tensor(special, dtype=torch.float64).to(dtype)
    chosen = chosen[torch.randint(len(special), (size,), generator=generator)]
    is_special = torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    return torch.where(is_special, chosen, drawn)


@given(
    tensors=st.lists(
        st.integers(0, 60).flatmap(
            lambda size: st.tuples(
                *(st.sampled_from(DTYPES).flatmap(partial(any_patterns, size)) for _ in range(2))
            )
        ),
        min_size=1,
        max_size=4,
    ),
    criterion=st.sampled_from(SCORED),
    granularity=st.sampled_from(["tensor", "layer", "global"]),
    mask_ratio=st.floats(0.01, 0.99),
)
@settings(max_examples=300, deadline=None)
def test_masks_of_any_bit_patterns_are_those_of_the_reference(
    tensors: list[tuple[Tensor, Tensor]], criterion: str, granularity: str, mask_ratio: float
) -> None:
    named = {}
    for index, (weight, of_weight) in enumerate(tensors):
        named[f"layers.{index % 2}.{index}.weight"] = parameter = nn.Parameter(weight)
        parameter.grad = of_weight.to(weight.dtype)
    assert_like_reference(named, criterion, mask_ratio, granularity)


@pytest.mark.parametrize("criterion", SCORED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masks_of_large_tensors_are_those_of_the_reference(
    dtype: torch.dtype, criterion: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(90_001, generator=generator).to(dtype))
    weight.grad = torch.randn(90_001, generator=generator).mul_(1e-3).to(dtype)
    weight.grad[::10] = 0
    assert_like_reference({"w": weight}, criterion, 0.7, "tensor")


@pytest.mark.parametrize("dtype", DTYPES)
def test_smallest_keeps_what_gradient_would_mask_and_spends_nothing_on_zeros(
    dtype: torch.dtype,
) -> None:
    weight = nn.Parameter(torch.zeros(8, dtype=dtype))
    weight.grad = torch.tensor([0.0, 3.0, -1.0, 4.0, -0.0, -2.0, 6.0, 5.0], dtype=dtype)
    (left,) = step({"w": weight}, criterion="smallest", mask_ratio=0.5)
    assert left.tolist() == [0.0, 3.0, -1.0, 4.0, 0.0, -2.0, 0.0, 0.0]


def test_relative_favours_small_weights_and_takes_those_that_are_zero_or_broken() -> None:
    gradients = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1e-3, torch.inf]
    weights = [1.0, 0.5, -0.25, 0.0, torch.inf, 0.0, 1e-4, torch.inf]
    ranks = [7, 3, 6, 2, 1, 0]  # Infinite, without a divisor but 1e-8, 10, 4, 2, 1; the rest 0.
    for kept in range(1, len(ranks) + 1):
        weight = nn.Parameter(torch.tensor(weights))
        weight.grad = torch.tensor(gradients)
        (left,) = step({"w": weight}, criterion="relative", mask_ratio=1 - kept / 8)
        assert left.nonzero().flatten().tolist() == sorted(ranks[:kept])


def test_random_keeps_exactly_the_share_that_it_should_and_draws_anew_at_each_step() -> None:
    named = parameters()
    optimizer = torch.optim.SGD(named.values(), lr=0.0)
    masker = GradientMasker(named.items(), GMTConfig(criterion="random", mask_ratio=0.4))
    masker.attach(optimizer)
    kept = []
    for _ in range(3):
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        kept.append(torch.cat([gradient(parameter).flatten() for parameter in named.values()]))
    assert [int(mask.sum()) for mask in kept] == [117 - 47 + 30 - 12] * 3
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


@pytest.mark.parametrize("criterion", ["random", "fixed_random"])
def test_random_masks_depend_on_seed_step_and_name_and_on_nothing_else(criterion: str) -> None:
    def kept(seed: int = 0, steps: int = 0, data: int = 0) -> Tensor:
        named = parameters(seed=data)
        masker = GradientMasker(named.items(), GMTConfig(criterion=criterion, seed=seed))
        optimizer = torch.optim.SGD(named.values(), lr=0.0)
        masker.attach(optimizer)
        masker.step = steps
        optimizer.step()
        return torch.cat([gradient(parameter).flatten() for parameter in named.values()]) != 0

    assert torch.equal(kept(), kept(data=1))
    assert not torch.equal(kept(), kept(seed=1))
    assert torch.equal(kept(), kept(steps=1)) == (criterion == "fixed_random")
    half_of_both = kept()[: SHAPES["layers.1.w"].numel()], kept()[SHAPES["layers.0.w"].numel() :]
    assert not torch.equal(*half_of_both)


def test_random_scores_are_uniform() -> None:
    scorer = criteria.random_uniform({"w": torch.Size((200_000,))}, 3)["w"]
    assert callable(scorer)
    entries = Entries(
        "w", torch.zeros(200_000), 7, lambda: torch.empty(0), lambda a, b: torch.arange(a, b)
    )
    scores = scorer(entries)
    assert isinstance(scores, Tensor)
    hashes = scorer(replace(entries, first_position=0))
    assert isinstance(hashes, Hashes)
    assert torch.equal(hashes.values(0, 200_000), scores)
    counts = torch.histc(scores, bins=100, min=0, max=1)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 99 + 6 * (2 * 99) ** 0.5
    assert abs(float(scores[1:].sub(0.5).mul(scores[:-1].sub(0.5)).mean())) < 1e-3


@pytest.mark.parametrize("layout", ["transposed", "expanded", "channels last"])
def test_positions_and_weights_follow_the_gradients_layout(layout: str) -> None:
    shape = torch.Size((2, 3, 4, 5) if layout == "channels last" else (6, 5))
    weight = nn.Parameter(torch.randn(shape))
    weight.grad = {
        "transposed": lambda: torch.randn(5, 6).T,
        "expanded": lambda: torch.randn(5).expand(6, 5),
        "channels last": lambda: torch.randn(shape).to(memory_format=torch.channels_last),
    }[layout]()
    before = gradient(weight)
    for criterion in SCORED:
        weight.grad = (
            before.clone()
            if layout == "expanded"
            else before.clone(memory_format=torch.preserve_format)
        )
        (left,) = step({"w": weight}, criterion=criterion)
        expected = masked_by(criterion, {"w": before}, {"w": weight.detach()}, 0.5, 0, 0)
        assert torch.equal(left, expected["w"])


@pytest.mark.parametrize("criterion", [*SCORED, "half"])
def test_broken_entries_are_never_masked_away(criterion: str) -> None:
    named = {f"layers.{i}.w.weight": nn.Parameter(torch.randn(8, 8)) for i in range(2)}
    for parameter in named.values():
        parameter.grad = torch.randn(8, 8)
        parameter.grad[0, :2] = torch.tensor([float("nan"), -float("inf")])
    for left in step(named, criterion=criterion, mask_ratio=0.99):
        assert left[0, 0].isnan()
        assert left[0, 1] == -float("inf")


def llama_shapes(layers: int) -> dict[str, torch.Size]:
    matrices = [*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate", "mlp.up", "mlp.down"]
    shapes = {"model.embed_tokens.weight": torch.Size((9, 4)), "lm_head.weight": torch.Size((9, 4))}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{m}.weight": torch.Size((4, 4)) for m in matrices}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = torch.Size((4,))
    return shapes


def test_half_freezes_half_of_each_layers_matrices_for_the_whole_run() -> None:
    shapes = llama_shapes(4)
    scorers = criteria.half(shapes, 0)
    frozen = [name for name, scorer in scorers.items() if scorer is DROP]
    assert all(scorer in (DROP, KEEP) for scorer in scorers.values())
    assert scorers.keys() == shapes.keys()
    for layer in range(4):
        of_layer = [name for name in frozen if f"layers.{layer}." in name]
        assert sum(".self_attn." in name for name in of_layer) == 2
        assert sum(".mlp." in name for name in of_layer) == 1 + layer % 2
        assert not any("norm" in name for name in of_layer)
    assert len(frozen) == 4 * 7 / 2
    assert scorers == criteria.half(dict(reversed(shapes.items())), 0)
    assert scorers != criteria.half(shapes, 1)


def test_half_freezes_pairs_of_lora_matrices_and_matrices_that_belong_to_the_layer_itself() -> None:
    shapes = {}
    for layer in range(6):
        for module in ("self_attn.q_proj", "self_attn.v_proj", "fc1", "fc2"):
            for matrix in "AB":
                name = f"base_model.model.layers.{layer}.{module}.lora_{matrix}.default.weight"
                shapes[name] = torch.Size((2, 4))
    scorers = criteria.half(shapes, 3)
    for layer in range(6):
        for pair in (("self_attn.q_proj", "self_attn.v_proj"), ("fc1", "fc2")):
            frozen = [
                name
                for name, scorer in scorers.items()
                if scorer is DROP and any(f".{layer}.{module}." in name for module in pair)
            ]
            assert [name.replace("lora_A", "lora_B") for name in frozen[:1]] == frozen[1:]
            assert len(frozen) == 2


def test_half_refuses_a_model_of_which_it_would_freeze_nothing() -> None:
    with pytest.raises(ValueError, match="'half' would freeze nothing"):
        criteria.half({"0.weight": torch.Size((4, 4)), "2.weight": torch.Size((4, 4))}, 0)


def test_half_keeps_frozen_what_it_froze_when_parameters_join_later() -> None:
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in llama_shapes(4).items()}
    first = {name: p for name, p in named.items() if "v_proj" not in name}
    optimizer = torch.optim.SGD(first.values(), lr=1.0)
    GradientMasker(named.items(), GMTConfig(criterion="half")).attach(optimizer)
    frozen = []
    for joins in (False, True):
        if joins:
            optimizer.add_param_group({"params": [p for n, p in named.items() if n not in first]})
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        frozen.append({name for name in first if not gradient(named[name]).any()})
    assert frozen[0] == frozen[1]


@pytest.mark.parametrize("criterion", criteria.BUILT_IN)
def test_ratio_zero_masks_nothing_under_any_criterion(criterion: str) -> None:
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in llama_shapes(2).items()}
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    before = [gradient(parameter) for parameter in named.values()]
    left = step(named, criterion=criterion, mask_ratio=0)
    assert all(torch.equal(a, b) for a, b in zip(before, left, strict=True))


def test_a_broken_weight_is_not_blamed_on_the_criterion() -> None:
    named = parameters()
    weight = next(iter(named.values()))
    with torch.no_grad():
        weight[0, 0] = float("inf")
    assert weight.grad is not None
    weight.grad[0, 0] = 0.0
    step(named, criterion="gradient_weight")


def test_random_works_whatever_the_default_dtype_is() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        step(parameters(), criterion="random")
    finally:
        torch.set_default_dtype(torch.float32)


def test_half_leaves_free_gradients_as_they_are_and_frozen_weights_where_they_are() -> None:
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in llama_shapes(2).items()}
    optimizer = torch.optim.AdamW(named.values(), lr=0.1, weight_decay=0.0)
    masker = GradientMasker(named.items(), GMTConfig(criterion="half", mask_ratio=0.9))
    masker.attach(optimizer)
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    scorers = criteria.half({name: p.shape for name, p in named.items()}, 0)
    for _ in range(3):
        gradients = {}
        for name, parameter in named.items():
            parameter.grad = torch.randn_like(parameter)
            gradients[name] = gradient(parameter)
        optimizer.step()
        for name, parameter in named.items():
            if scorers[name] is KEEP:
                assert torch.equal(gradient(parameter), gradients[name])
                assert not torch.equal(parameter, start[name])
            else:
                assert torch.equal(parameter, start[name])
    free = sum(p.numel() for name, p in named.items() if scorers[name] is KEEP)
    entries = sum(parameter.numel() for parameter in named.values())
    assert masker.statistics()["kept_fraction"] == free / entries


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Installs a package, for this test, whose module has the given source."""
    points: list[EntryPoint] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "axolotl_gmt.criteria.entry_points", lambda group: [p for p in points if p.group == group]
    )

    class Package(Distribution):
        def __init__(self, name: str) -> None:
            self.package = name

        def read_text(self, filename: str) -> str | None:
            return f"Name: {self.package}\n" if filename == "METADATA" else None

        def locate_file(self, path: Any) -> Path:
            return tmp_path / str(path)

    def install(module: str, source: str) -> None:
        criteria._installed.cache_clear()
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
        point = EntryPoint("criteria", module, criteria.ENTRY_POINT_GROUP)
        points.append(point._for(Package(module)))  # type: ignore[attr-defined]

    yield install
    criteria._installed.cache_clear()


TEMPLATE = """
import torch
from axolotl_gmt.criteria import DROP, KEEP, MAGNITUDE, SMALLEST, hookimpl

def scored(shapes, seed):
    return dict.fromkeys(shapes, lambda entries: {score})

@hookimpl
def gmt_criteria():
    return {{"{name}": scored}}
"""


def test_a_criterion_of_another_package_is_found_and_used(offer: Callable[..., None]) -> None:
    score = "1 / (1 + entries.gradient.float().abs())"
    offer("inverse", TEMPLATE.format(name="inverse", score=score))
    named = parameters()
    gradients = [gradient(parameter) for parameter in named.values()]
    left = step(named, criterion="inverse", mask_ratio=0.7)
    for found, g in zip(left, gradients, strict=True):
        assert torch.equal(found, masked_by_scores([g], [1 / (1 + g.abs())], 0.7)[0])


def test_the_example_in_the_contract_works_as_it_is_printed(offer: Callable[..., None]) -> None:
    assert criteria.__doc__ is not None
    lines = criteria.__doc__.splitlines()
    start, end = lines.index("    # weight_magnitude.py"), lines.index("    # pyproject.toml")
    offer("weight_magnitude", "\n".join(line[4:] for line in lines[start:end]))
    named = parameters()
    before = [(gradient(p), p.detach().clone()) for p in named.values()]
    left = step(named, criterion="weight_magnitude")
    for found, (g, w) in zip(left, before, strict=True):
        assert torch.equal(found, masked_by_scores([g], [w.abs()], 0.5)[0])


@pytest.mark.parametrize("other", ["KEEP", "SMALLEST"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_may_be_scored_in_different_ways(
    offer: Callable[..., None], other: str, dtype: torch.dtype
) -> None:
    source = TEMPLATE.format(name="mixed", score="0").replace(
        "return dict.fromkeys(shapes, lambda entries: 0)",
        f'return {{n: MAGNITUDE if "0" in n else {other} for n in shapes}}',
    )
    offer("mixed", source)
    named = parameters(dtype)
    first, second = (gradient(parameter) for parameter in named.values())
    granularity = "global" if other == "KEEP" else "tensor"
    left = step(named, criterion="mixed", granularity=granularity, mask_ratio=0.8)
    assert torch.equal(left[0], masked([first], 0.8)[0])
    expected = second if other == "KEEP" else masked_but_smallest([second], 0.8)[0]
    assert torch.equal(left[1], expected)


def test_two_packages_with_one_name_are_refused(offer: Callable[..., None]) -> None:
    offer("one", TEMPLATE.format(name="twin", score="0"))
    offer("other", TEMPLATE.format(name="twin", score="0"))
    with pytest.raises(ValidationError, match=r"'twin' is claimed by one \(one\) and by other"):
        GMTConfig(criterion="twin")


def test_a_package_may_not_take_a_built_in_name(offer: Callable[..., None]) -> None:
    source = TEMPLATE.format(name="random", score="0")
    offer("taker", source.replace("return {", 'return {"other": scored, '))
    assert criteria.find("random") is criteria.random_uniform
    with pytest.raises(
        ValidationError, match=r"package taker \(taker\) .*claims the built-in name 'random'"
    ):
        GMTConfig(criterion="other")


def test_built_in_criteria_are_found_without_importing_a_package(
    offer: Callable[..., None],
) -> None:
    offer("imported", TEMPLATE.format(name="imported", score="0"))
    for name in criteria.BUILT_IN:
        GMTConfig(criterion=name)
    assert "imported" not in sys.modules
    GMTConfig(criterion="imported")
    assert "imported" in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module", r"package broken \(broken\) offers .*no_such_module.*Repair"),
        ("def gmt_criteria(): return {}", r"broken.*has no function gmt_criteria marked with hook"),
        (
            "from axolotl_gmt.criteria import hookimpl\n@hookimpl\ndef gmt_criteria(): 1 / 0",
            r"package broken \(broken\) offers criteria, but fails \(ZeroDivisionError",
        ),
        (
            "from axolotl_gmt.criteria import hookimpl\n@hookimpl\ndef gmt_criteria(): return [1]",
            r"broken.*must return a dictionary of criteria by name",
        ),
    ],
)
def test_a_broken_package_stops_only_runs_that_may_mean_it(
    offer: Callable[..., None], source: str, message: str
) -> None:
    offer("broken", source)
    assert GMTConfig(criterion="random").criterion == "random"
    with pytest.raises(ValidationError, match=message):
        GMTConfig(criterion="theirs")


def test_two_entry_points_to_one_module_are_one_offer(offer: Callable[..., None]) -> None:
    offer("twice", TEMPLATE.format(name="twice", score="0"))
    offer("twice", TEMPLATE.format(name="twice", score="0"))
    assert GMTConfig(criterion="twice").criterion == "twice"


def test_an_unknown_criterion_is_refused_with_the_names_that_there_are() -> None:
    names = "gradient, random, fixed_random, smallest, gradient_weight, relative, half"
    for unknown in ("fisher", ["random"], None):
        with pytest.raises(
            ValidationError, match=rf"{re.escape(repr(unknown))} is not one of {names}"
        ):
            GMTConfig.model_validate({"criterion": unknown})


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("entries.gradient.abs()[:-1]", r"scores of layers\.0\.w must be .*\(117,\).*\(116,\)"),
        ("entries.gradient.abs().view(1, -1)", r"returned \(1, 117\)"),
        ("entries.gradient.abs().double()", r"float32 on cpu, but it returned .*float64"),
        ("entries.gradient.abs().to('meta')", "on meta"),
        ("0.0", r"returned 0\.0"),
        ("entries.gradient", r"'bad' returned scores that are negative or NaN"),
        ("entries.gradient.abs() * float('nan')", r"'bad' returned scores that are negative"),
        ("(0.5 if '0' in entries.name else -1) * entries.gradient.abs()", "'bad' returned scores"),
    ],
)
def test_a_criterion_that_breaks_its_contract_stops_at_the_first_step(
    offer: Callable[..., None], score: str, message: str
) -> None:
    offer("bad", TEMPLATE.format(name="bad", score=score))
    with pytest.raises(ValueError, match=message):
        step(parameters(), criterion="bad")


def test_scores_that_turn_bad_later_are_found_when_statistics_are_read(
    offer: Callable[..., None],
) -> None:
    score = "entries.gradient.abs() * (1.0 if entries.step == 0 else -1.0)"
    offer("turning", TEMPLATE.format(name="turning", score=score))
    named = parameters()
    optimizer = torch.optim.SGD(named.values(), lr=0.0)
    masker = GradientMasker(named.items(), GMTConfig(criterion="turning"))
    masker.attach(optimizer)
    optimizer.step()
    masker.statistics()
    optimizer.step()
    with pytest.raises(ValueError, match="'turning' returned scores that are negative or NaN"):
        masker.statistics()


def test_a_criterion_that_leaves_a_parameter_out_is_refused(offer: Callable[..., None]) -> None:
    whole = "dict.fromkeys(shapes, lambda entries: 0)"
    for index, scorers in enumerate(("{}", "None", "dict.fromkeys(shapes, 'keep')")):
        name = f"partial_{index}"
        offer(name, TEMPLATE.format(name=name, score="0").replace(whole, scorers))
        with pytest.raises(ValueError, match=r"gives .* for layers\.0\.w\. It must return"):
            masker_of(parameters(), criterion=name)


def test_the_papers_criterion_takes_the_fast_path() -> None:
    assert set(criteria.gradient(SHAPES, 0).values()) == {MAGNITUDE}


def test_a_resumed_run_draws_the_masks_of_an_uninterrupted_one(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    rows = [{"input_ids": t, "labels": t} for t in torch.randint(0, 32, (16, 6)).tolist()]
    losses = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        trainer = Trainer(
            LlamaForCausalLM(config),
            TrainingArguments(
                str(tmp_path),
                use_cpu=True,
                max_steps=4,
                save_steps=2,
                logging_steps=1,
                per_device_train_batch_size=2,
                report_to=[],
                disable_tqdm=True,
                learning_rate=0.1,
            ),
            train_dataset=rows,
            callbacks=[GMTCallback(criterion="random", mask_ratio=0.7)],
        )
        trainer.train(resume_from_checkpoint=resume)
        losses.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    for name, weight in losses[0].items():
        assert torch.equal(weight, losses[1][name]), name
