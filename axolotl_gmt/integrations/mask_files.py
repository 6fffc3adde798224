"""Masks that stay, as a part of a checkpoint: one file a process, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from axolotl_gmt.files import whole

FOLDER = "gmt_masks"
"""In a checkpoint's folder, beside ``trainer_state.json``."""
_FORMAT = "1"


def path_in(checkpoint: Path, rank: int, ranks: int) -> Path:
    """Where the masks of a process are in a checkpoint."""
    return checkpoint / FOLDER / f"rank_{rank}_of_{ranks}.safetensors"


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a masker that keeps masks.

    Args:
        path: See :func:`path_in`.
        state: What :meth:`~axolotl_gmt.masking.masker.GradientMasker.state_dict` gave.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in state.items() if name != "masks"}
    masks = {name: bits.cpu() for name, bits in state["masks"].items()}
    with whole(path) as part:
        save_file(masks, part, {"format": _FORMAT, "state": json.dumps(about)})


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError(f"format {about.get('format')}")
            masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {**json.loads(about["state"]), "masks": masks}
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} does not hold masks that this version of GMT has written ({error})."
        ) from error


def is_checkpoint_of(folder: Path, step: int, log_history: object) -> bool:
    """Whether ``folder`` is the checkpoint that a trainer at ``step`` has this log from."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        found = (state["global_step"], state["log_history"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return json.dumps(found) == json.dumps((step, log_history))  # NaN equals itself as text.
