"""How many parameters GMT would mask."""

from __future__ import annotations

import torch

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.masking.masker import GradientMasker
from axolotl_gmt.tools.check.report import Mask


def count(model: torch.nn.Module, settings: GMTConfig) -> Mask:
    """What GMT masks of ``model``, whose tensors may lie on the meta device.

    Raises:
        ValueError: If nothing is trained, a pattern matches nothing that is, or the criterion
            cannot do with these parameters, as in training.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("unfrozen_parameters: nothing is trained. Change the patterns.")
    masker = GradientMasker(model.named_parameters(remove_duplicate=False), settings)
    optimizer = torch.optim.SGD(trained)
    masker.attach(optimizer).remove()  # Which checks the patterns.
    masked = [parameter for _, parameter in masker.masked_parameters(optimizer)]
    return Mask(
        len(masked), sum(p.numel() for p in masked), len(trained), sum(p.numel() for p in trained)
    )
