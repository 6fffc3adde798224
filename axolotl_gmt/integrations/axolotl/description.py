"""What an Axolotl config says of a run, for its report: the data sets, and the file itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DATA_KEYS = ("datasets", "pretraining_dataset")
# What follows such a key on its line, be it in a block or in braces.
_SECRET = re.compile(
    r"([\w-]*(?:api_key|hub_token|hf_token|auth_token|access_token|password|secret)[\w\"']*\s*:).+",
    re.IGNORECASE,
)


def data_names(cfg: Mapping[str, Any]) -> list[str]:
    """The data sets of a config in its order: their ids, or the names of their files."""
    names = []
    for key in _DATA_KEYS:
        entries = cfg.get(key) or []
        for entry in [entries] if isinstance(entries, str | Mapping) else entries:
            path = str(entry.get("path", "") if isinstance(entry, Mapping) else entry)
            # A report is shown to others, whom a disk's folders do not concern.
            names.append(Path(path).name if Path(path).is_absolute() else path)
    return [name for name in names if name]


def config_text(cfg: Mapping[str, Any]) -> str:
    """The file that Axolotl read, without the values of keys that are secret; empty if unknown."""
    try:
        text = Path(cfg.get("axolotl_config_path") or "").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""  # A temporary file may be gone, and no report is worth a training.
    return _SECRET.sub(r"\1 (left out)", text)
