"""Which layer and module a parameter belongs to."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_gmt.names import kind_name, layer_name, module_name, place


@pytest.mark.parametrize(
    ("name", "layer", "where"),
    [
        ("model.layers.3.mlp.down_proj.weight", "model.layers.3", (3, "mlp.down_proj")),
        ("model.layers.3.mlp.experts.5.w1.weight", "model.layers.3", (3, "mlp.experts.5.w1")),
        ("model.embed_tokens.weight", None, (None, "model.embed_tokens")),
        ("h.12345678901.fc.weight", None, (None, "h.12345678901.fc")),
        ("0.weight", "0", (0, "weight")),
        ("weight", None, (None, "weight")),
    ],
)
def test_a_name_says_which_layer_and_module_it_is_in(
    name: str, layer: str | None, where: tuple[int | None, str]
) -> None:
    assert layer_name(name) == layer
    assert place(name) == where


def test_modules_that_differ_in_numbers_alone_are_of_one_kind() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in (2, 11) for expert in "37"
    ]
    assert {kind_name(name) for name in names} == {"model.layers.*.mlp.experts.*.w1"}
    assert kind_name("transformer.h.0.ln_1") == "transformer.h.*.ln_1"


# Files and logs hold whatever somebody wrote into them.
@given(st.text(alphabet="a.10²٣\n", max_size=12))
def test_any_name_has_a_place_and_a_kind(name: str) -> None:
    layer = layer_name(name)
    assert place(name).layer == (None if layer is None else int(layer.rpartition(".")[2]))
    assert name.startswith(module_name(name))
    assert not re.search(r"(?<![^.])\d+(?![^.])", kind_name(name))
