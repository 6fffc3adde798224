"""Gradient-Mask Tuning: only the gradient entries of largest magnitude reach the optimizer.

The house, from the top down; imports never go up (``docs/architecture.md`` has the whole map):

- ``cli`` prints, ``tools`` works for it; ``integrations`` puts GMT into trainers and Axolotl
- ``masking`` is one optimizer step from start to end; ``report`` reads and draws a run's log
- ``config`` has the settings, ``criteria`` what makes an entry important
- ``kernels`` counts and masks flat tensors, ``gradients`` knows ranks, DTensor and ZeRO
- ``names``, ``files``, ``errors`` and ``record`` are small facts that all may know
"""

from __future__ import annotations

TYPE_CHECKING = False  # As in typing, whose import takes longer than all else here.
if TYPE_CHECKING:
    from axolotl_gmt.config import GMTConfig as GMTConfig
    from axolotl_gmt.integrations.axolotl.plugin import GMTPlugin as GMTPlugin
    from axolotl_gmt.integrations.callback import GMTCallback as GMTCallback
    from axolotl_gmt.integrations.report_callback import GMTReportCallback as GMTReportCallback
    from axolotl_gmt.masking.masker import GradientMasker as GradientMasker

__version__ = "0.1.0.dev0"

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
