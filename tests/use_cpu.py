"""An Axolotl plugin that lets ``bf16: true`` train on a CPU, which Axolotl 0.21 refuses."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin


class UseCpu(BasePlugin):
    def get_training_args(self, cfg: Any) -> dict[str, bool]:
        return {"use_cpu": True}
