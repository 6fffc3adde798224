"""An Axolotl plugin that writes down what GMT met as training began, such as sharded parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from benchmarks.gpu_day.training import SEEN_FILE


class _Write(TrainerCallback):
    def on_train_begin(
        self, args: Any, *_: Any, model: Any = None, optimizer: Any = None, **__: Any
    ) -> None:
        """Write the classes, dtypes and devices of the parameters, and the innermost optimizer."""
        while (inner := getattr(optimizer, "optimizer", None)) is not None and not type(
            optimizer
        ).__module__.startswith("deepspeed."):
            optimizer = inner
        seen = {
            "parameters": sorted(
                {type(parameter.data).__name__ for parameter in model.parameters()}
            ),
            "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
            "devices": sorted({parameter.device.type for parameter in model.parameters()}),
            "optimizer": type(optimizer).__name__,
        }
        file = Path(args.output_dir, SEEN_FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(seen), encoding="utf-8")


class SeenPlugin(BasePlugin):
    """Adds the callback to whatever trainer Axolotl makes."""

    def add_callbacks_post_trainer(self, *_: Any, **__: Any) -> list[TrainerCallback]:
        """One callback; nothing of the training changes."""
        return [_Write()]
