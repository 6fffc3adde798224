"""Which layer and module a parameter belongs to, as far as its name tells."""

from __future__ import annotations

import re
from typing import NamedTuple

# The path to the first numbered module, taken for the layer: model.layers.3 of
# model.layers.3.mlp.experts.5.w1.weight. At most nine digits, since int() refuses very long
# numbers.
_LAYER = re.compile(r"^(?:.*?\.)?(\d{1,9})(?=\.)")
_NUMBER_IN_PATH = re.compile(r"(?<![^.])\d+(?![^.])")


class Place(NamedTuple):
    """A decoder layer's number, None outside any, and the path of the module in it."""

    layer: int | None
    module: str


def layer_name(parameter_name: str) -> str | None:
    """The path to the first numbered module, taken for the layer: ``model.layers.3``, or None."""
    layer = _LAYER.match(parameter_name)
    return layer.group() if layer else None


def module_name(parameter_name: str) -> str:
    """The path of the module that owns a parameter: its name without ``.weight`` or ``.bias``."""
    return parameter_name.rpartition(".")[0] or parameter_name


def kind_name(path: str) -> str:
    """A path with ``*`` for each number in it, such as that of a layer or of an expert.

    Example:
        >>> kind_name("model.layers.3.mlp.experts.5.w1")
        'model.layers.*.mlp.experts.*.w1'
    """
    return _NUMBER_IN_PATH.sub("*", path)


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
