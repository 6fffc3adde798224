"""The loss on a held-out text, slow and obvious: one document and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


def mean_loss(model: nn.Module, documents: Sequence[Sequence[int]], longest: int) -> float:
    """Mean negative log-likelihood of each token but a document's first, in nats.

    A token is predicted from those of its document back to the last one whose position is a
    multiple of ``longest`` - 1, where a model's window begins.
    """
    losses = []
    with torch.no_grad():
        for document in documents:
            for position in range(1, len(document)):
                start = (position - 1) // (longest - 1) * (longest - 1)
                logits = model(input_ids=torch.tensor([document[start:position]])).logits[0, -1]
                chances = logits.double().softmax(0)
                losses.append(-math.log(chances[document[position]]))
    return sum(losses) / len(losses)
