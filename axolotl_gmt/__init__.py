"""Gradient-Mask Tuning: only the gradient entries of largest magnitude reach the optimizer."""

from __future__ import annotations

TYPE_CHECKING = False  # As in typing, whose import takes longer than all else here.
if TYPE_CHECKING:
    from axolotl_gmt.config import GMTConfig as GMTConfig
    from axolotl_gmt.integrations.axolotl.plugin import GMTPlugin as GMTPlugin
    from axolotl_gmt.integrations.callback import GMTCallback as GMTCallback
    from axolotl_gmt.integrations.report_callback import GMTReportCallback as GMTReportCallback
    from axolotl_gmt.masking.masker import GradientMasker as GradientMasker

__version__ = "0.1.0"

# Imported on first use, so that importing the package imports neither axolotl nor torch.
_HOME = {
    "GMTCallback": "integrations.callback",
    "GMTConfig": "config",
    "GMTPlugin": "integrations.axolotl.plugin",
    "GMTReportCallback": "integrations.report_callback",
    "GradientMasker": "masking.masker",
}

__all__ = ["GMTCallback", "GMTConfig", "GMTPlugin", "GMTReportCallback", "GradientMasker"]


def __getattr__(name: str) -> object:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
