"""Mixed precision as Axolotl 0.21 has no key for: float32 weights, bf16 in the forward pass.

With ``bf16: true`` Axolotl loads the weights themselves in bf16, and its key ``float32`` is read by
nothing. With ``bf16: false`` they are float32, and this plugin asks the trainer for autocast.
"""

from __future__ import annotations

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault

NAME = f"{__name__}.Autocast"


class Autocast(BasePlugin):
    """Has the trainer run in bf16 autocast, whatever the dtype of the weights."""

    def get_training_args(self, _: DictDefault) -> dict[str, bool]:
        """Arguments of the trainer, which override those that Axolotl makes of the YAML."""
        # Transformers wants to be told that bf16 on a CPU is meant.
        return {"bf16": True, "use_cpu": not torch.cuda.is_available()}
