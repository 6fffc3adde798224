"""Names are sorted and grouped as a reader thinks of a model."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_gmt.names import model_order, module_type, place, stack_labels, stack_name

LLAMA = [
    "model.embed_tokens.weight",
    "model.layers.2.input_layernorm.weight",
    "model.layers.10.input_layernorm.weight",
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.10.self_attn.q_proj.weight",
    "model.layers.2.self_attn.k_proj.weight",
    "model.layers.2.self_attn.v_proj.weight",
    "model.layers.2.self_attn.o_proj.weight",
    "model.layers.2.post_attention_layernorm.weight",
    "model.layers.2.mlp.gate_proj.weight",
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]
GPT2 = [
    "transformer.wpe.weight",
    "transformer.wte.weight",
    "transformer.h.0.ln_1.bias",
    "transformer.h.0.ln_1.weight",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.0.attn.c_proj.weight",
    "transformer.h.0.ln_2.weight",
    "transformer.h.0.mlp.c_fc.weight",
    "transformer.h.0.mlp.c_proj.weight",
    "transformer.ln_f.weight",
]


@pytest.mark.parametrize("names", [LLAMA, GPT2], ids=["Llama", "GPT-2"])
def test_a_models_order_is_not_the_alphabets(names: list[str]) -> None:
    assert sorted(names) != names
    assert sorted(sorted(names), key=model_order) == names


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


# Files and logs hold whatever somebody wrote into them.
@given(st.lists(st.text(alphabet="a.10²٣\n", max_size=12), max_size=5))
def test_any_names_can_be_sorted_and_grouped(names: list[str]) -> None:
    assert sorted(sorted(names, key=model_order)) == sorted(names)
    labels = stack_labels(names)
    assert labels.keys() == {stack_name(name) for name in names if place(name).layer is not None}
    for name in names:
        assert not re.search(r"\.\d+(\.|\Z)", module_type(name, labels))
