"""Kinds of modules: what tables and pictures call the modules that are alike in all layers.

Knows names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile

from axolotl_gmt.names import kind_name, layer_name, place


def stack_name(parameter_name: str) -> str:
    """The path of the list that a layer is in: ``model.layers``; empty if in none."""
    return (layer_name(parameter_name) or "").rpartition(".")[0]


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
    """The module's path in its layer, with ``*`` for numbers such as an expert's.

    Args:
        parameter_name: The name of one of the parameters that ``labels`` was made of.
        labels: What :func:`stack_labels` said; a label that is not empty comes first.
    """
    module = kind_name(place(parameter_name).module)
    label = labels.get(stack_name(parameter_name))
    return f"{label}.*.{module}" if label else module


def natural_order(text: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    parts = re.split(r"(\d{1,9})", text)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]
