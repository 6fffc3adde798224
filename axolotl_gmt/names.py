"""Where a parameter sits in a model, as far as its name tells: the layer and the module in it.

Knows names only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# The path to the first numbered module: model.layers.3 of model.layers.3.mlp.experts.5.w1.weight.
_LAYER = re.compile(r"^(?:.*?\.)?(\d+)(?=\.)")


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
