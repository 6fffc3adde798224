"""Precisions that Axolotl 0.21 has no key for, by a plugin that the YAML of a cell names.

With ``bf16: false`` weights are float32, and the trainer computes in float32; the key ``float32``
is read by nothing. With ``bf16: true`` the weights are loaded in bf16 and the trainer runs in
autocast, but embeddings, head and norms are made float32 again where attention is torch's.
"""

from __future__ import annotations

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from transformers import PreTrainedModel


class Precision(BasePlugin):
    """bf16 autocast, over float32 weights with ``bf16: false`` and bf16 weights with ``true``."""

    def get_training_args(self, _: DictDefault) -> dict[str, bool]:
        """Arguments of the trainer, which override those that Axolotl makes of the YAML."""
        # Transformers wants to be told that bf16 on a CPU is meant.
        return {"bf16": True, "use_cpu": not torch.cuda.is_available()}

    def post_model_load(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """Make every weight bf16, if that is wanted, before the optimizer sees them."""
        if cfg.bf16:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
