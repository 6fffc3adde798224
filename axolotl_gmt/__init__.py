"""Gradient-Mask Tuning: only the gradient entries of largest magnitude reach the optimizer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from axolotl_gmt.callback import GMTCallback as GMTCallback
    from axolotl_gmt.config import GMTConfig as GMTConfig
    from axolotl_gmt.masker import GradientMasker as GradientMasker
    from axolotl_gmt.plugin import GMTPlugin as GMTPlugin

__version__ = "0.1.0"

# Imported on first use, so that importing the package imports neither axolotl nor torch.
_HOME = {
    "GMTCallback": "callback",
    "GMTConfig": "config",
    "GMTPlugin": "plugin",
    "GradientMasker": "masker",
}

__all__ = ["GMTCallback", "GMTConfig", "GMTPlugin", "GradientMasker"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
