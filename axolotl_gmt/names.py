"""Where a parameter sits in a model, as far as its name tells: the layer and the module in it.

Knows names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

# The path to the first numbered module: model.layers.3 of model.layers.3.mlp.experts.5.w1.weight.
# A longer number is no layer's, and Python reads none of thousands of digits.
_LAYER = re.compile(r"^(?:.*?\.)?(\d{1,9})(?=\.)")
_NUMBER_IN_PATH = re.compile(r"(?<![^.])\d+(?![^.])")

# The first pattern found in a module's path gives its rank, then the first found in its last part.
_BLOCKS = tuple(
    re.compile(pattern)
    for pattern in (
        r"embed|wte|wpe",
        r"input_layernorm|ln_1\b|attention_norm",
        r"attn|(?<!post_)attention|mixer",
        r"post_attention|pre_feedforward|ln_2\b|ffn_norm",
        r"mlp|ffn|feed_forward|experts|moe",
        r"post_feedforward",
        r"lm_head|score|classifier",
    )
)
# What is in no block, such as the final norm, comes just before the head.
_NO_BLOCK = len(_BLOCKS) - 1.5
_PROJECTIONS = tuple(
    re.compile(pattern)
    for pattern in ("qkv|c_attn|query_key_value", "^w?q", "^w?k", "^w?v", "gate|w1|c_fc", "up|w3")
)


class Place(NamedTuple):
    """A decoder layer's number, None outside any, and the path of the module in it."""

    layer: int | None
    module: str


def layer_name(parameter_name: str) -> str | None:
    """The path of the decoder layer that a parameter is in: ``model.layers.3``; None if in none."""
    layer = _LAYER.match(parameter_name)
    return layer.group() if layer else None


def module_name(parameter_name: str) -> str:
    """The path of the module that owns a parameter: its name without ``.weight`` or ``.bias``."""
    return parameter_name.rpartition(".")[0] or parameter_name


def place(parameter_name: str) -> Place:
    """Where a parameter sits.

    Example:
        >>> place("model.layers.3.mlp.down_proj.weight")
        Place(layer=3, module='mlp.down_proj')
        >>> place("model.embed_tokens.weight")
        Place(layer=None, module='model.embed_tokens')
    """
    layer = _LAYER.match(parameter_name)
    if layer is None:
        return Place(None, module_name(parameter_name))
    return Place(int(layer.group(1)), module_name(parameter_name[layer.end() + 1 :]))


def stack_labels(parameter_names: Iterable[str]) -> dict[str, str]:
    """What to call each list of layers: nothing if there is one, else how its path ends.

    Example:
        >>> stack_labels(["vision.layers.0.fc.weight", "text.layers.0.fc.weight"])
        {'vision.layers': 'vision.layers', 'text.layers': 'text.layers'}
        >>> stack_labels(["model.layers.0.fc.weight"])
        {'model.layers': ''}
    """
    stacks = (stack_name(name) for name in parameter_names if layer_name(name))
    paths = {stack: stack.split(".") for stack in stacks}
    columns = zip(*paths.values(), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return {stack: ".".join(path[common:]) for stack, path in paths.items()}


def module_type(parameter_name: str, labels: Mapping[str, str]) -> str:
    """The module's path in its layer, with numbers such as an expert's as ``*``.

    Args:
        parameter_name: The name of one of the parameters that ``labels`` was made of.
        labels: What :func:`stack_labels` said; a label that is not empty comes first.
    """
    module = _NUMBER_IN_PATH.sub("*", place(parameter_name).module)
    label = labels.get(stack_name(parameter_name))
    return f"{label}.*.{module}" if label else module


def stack_name(parameter_name: str) -> str:
    """The path of the list that a layer is in: ``model.layers``; empty if in none."""
    return (layer_name(parameter_name) or "").rpartition(".")[0]


def model_order(parameter_name: str) -> tuple[object, ...]:
    """A key to sort names by in the order in which a model applies them, not by alphabet.

    What comes before the layers is first, then the module types, layers within them, then the rest.
    """
    where = place(parameter_name)
    parent, _, leaf = where.module.rpartition(".")
    block = _rank(where.module, _BLOCKS, _NO_BLOCK)
    projection = _rank(leaf, _PROJECTIONS, len(_PROJECTIONS))
    after_layers = where.layer is None and block > 0
    return (
        (after_layers, stack_name(parameter_name), block),
        (natural_order(parent), projection, leaf),
        (where.layer or 0, parameter_name),
    )


def natural_order(text: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    parts = re.split(r"(\d{1,9})", text)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _rank(text: str, patterns: Sequence[re.Pattern[str]], otherwise: float) -> float:
    """The place of the first pattern that is found in ``text``."""
    return next((rank for rank, part in enumerate(patterns) if part.search(text)), otherwise)
