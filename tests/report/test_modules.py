"""Modules are sorted and grouped as a reader thinks of a model."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from axolotl_gmt.names import place
from axolotl_gmt.report.modules import module_type, natural_order, stack_labels, stack_name


def test_experts_are_one_type_and_stacks_are_told_apart() -> None:
    experts = [f"model.layers.0.mlp.experts.{number}.w1.weight" for number in (3, 11)]
    labels = stack_labels(experts)
    assert {module_type(name, labels) for name in experts} == {"mlp.experts.*.w1"}
    names = ["model.vision.layers.0.fc.weight", "model.text.layers.0.fc.bias", "model.norm.weight"]
    labels = stack_labels(names)
    assert [module_type(name, labels) for name in names] == [
        "vision.layers.*.fc",
        "text.layers.*.fc",
        "model.norm",
    ]


def test_layer_10_comes_after_layer_9() -> None:
    names = ["h.10.fc.bias", "h.9.fc.weight", "h.10.attn.weight", "embed", "h.9.fc.bias"]
    assert sorted(names, key=natural_order) == [
        "embed",
        "h.9.fc.bias",
        "h.9.fc.weight",
        "h.10.attn.weight",
        "h.10.fc.bias",
    ]


# Files and logs hold whatever somebody wrote into them.
@given(st.lists(st.text(alphabet="a.10²٣\n", max_size=12), max_size=5))
def test_any_names_can_be_sorted_and_grouped(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural_order)) == sorted(names)
    labels = stack_labels(names)
    assert labels.keys() == {stack_name(name) for name in names if place(name).layer is not None}
    for name in names:
        assert not re.search(r"\.\d+(\.|\Z)", module_type(name, labels))
