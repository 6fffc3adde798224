"""A file that holds a config: reads it as YAML, whatever it is, and refuses what is too large.

Knows nothing of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from axolotl_gmt.errors import UserError

MAX_BYTES = 1_000_000
# Of a file with its aliases written out, which would else grow without bounds.
MAX_NODES = 100_000
# Of a whole number. Python itself refuses to print those of thousands.
MAX_DIGITS = 100


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: If it cannot be read, is too large or is no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}.") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"has more than {MAX_BYTES:,} bytes, too many for a config.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"is not UTF-8 text ({error.reason} at byte {error.start}), so no YAML."
        ) from error


def parse(text: str) -> tuple[dict[str, object], list[str]]:
    """The config in ``text``, and a warning for each key that is given twice.

    Raises:
        UserError: If it is not a YAML mapping with keys in text.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        nodes = _nodes(root)
        if len(nodes) > MAX_NODES:
            raise UserError(
                f"has more than {MAX_NODES:,} values with aliases written out, or contains itself."
            )
        for node in nodes:
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
                line = node.start_mark.line + 1
                raise UserError(f"has a number of more than {MAX_DIGITS} digits in line {line}.")
        # An alias brings the same node again. To construct a mapping changes its node.
        twice = list(dict.fromkeys(line for node in nodes for line in _duplicates(node)))
        raw = loader.construct_document(root) if root else None
    except RecursionError as error:
        raise UserError("is nested too deeply to be a config.") from error
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"is not valid YAML{place}: {error.problem}.") from error
    except UserError:
        raise
    # PyYAML lets errors of many kinds out of values such as the date 2024-99-99.
    except Exception as error:
        raise UserError(f"is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        kind = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise UserError(f"holds {kind}, not keys and values such as 'base_model: ...'.")
    for key in raw:
        if not isinstance(key, str):
            raise UserError(f"has the key {key!r}, which is not text. Put it in quotes.")
    return raw, twice


def _nodes(root: yaml.Node | None) -> list[yaml.Node]:
    """Every node below ``root``, once for each alias; not many more than MAX_NODES."""
    nodes: list[yaml.Node] = []
    waiting = [root] if root else []
    while waiting and len(nodes) <= MAX_NODES:
        node = waiting.pop()
        nodes.append(node)
        if isinstance(node, yaml.MappingNode):
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return nodes


def _duplicates(node: yaml.Node) -> Iterator[str]:
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            line = key.start_mark.line + 1
            if key.value in lines:
                yield (
                    f"{key.value}: is given twice, in lines {lines[key.value]} and {line}. The "
                    "last one wins in silence. Remove one."
                )
            lines[key.value] = line
