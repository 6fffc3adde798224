"""What an Axolotl config says of a run, for its report: the data sets, and the file itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from axolotl_gmt.record import shown_name
from axolotl_gmt.tokens import MARK, hide, hide_in

_DATA_KEYS = ("datasets", "pretraining_dataset")
_HIDDEN = "HIDDEN"  # Wherever it stands, the text remains YAML.


def data_names(cfg: Mapping[str, Any]) -> list[str]:
    """The data sets of a config in its order, each once: their ids, or the names of their files."""
    found = [entry for key in _DATA_KEYS for entry in _listed(cfg.get(key))]
    # A report is shown to others, whom neither folders of a disk nor signed URLs concern.
    names = [
        hide(shown_name(path))[0].replace(MARK, _HIDDEN)
        for entry in found
        for path in _paths(entry)
    ]
    return list(dict.fromkeys(names))


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | Mapping) else list(value or [])


def _paths(entry: Any) -> Iterator[str]:
    """Where a data set comes from: its files if it names them, since its path may be ``json``."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, Mapping):
        yield from map(str, _listed(entry.get("data_files")) or _listed(entry.get("path")))


def config_text(cfg: Mapping[str, Any]) -> str:
    """The file that Axolotl read, without comments and secrets; empty if unknown."""
    try:
        config = yaml.safe_load(Path(cfg.get("axolotl_config_path") or "").read_text("utf-8"))
        text = yaml.safe_dump(hide_in(config).copy, sort_keys=False, allow_unicode=True)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return ""  # A temporary file may be gone, and no report is worth a training.
    return text.replace(MARK, _HIDDEN)
