"""How well a model in training still predicts a text that it is not trained on.

Knows models and how they are sharded, and no trainer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence

from axolotl_gmt.record import FORGETTING, FORGETTING_LOSS

_IGNORED = -100  # The label of what is no token.
LONGEST_WINDOW = 1024
"""Tokens that a model is shown at once, in one window or several: less than in most trainings."""


def longest_window(model: nn.Module) -> int:
    """How many tokens of a text a model can be shown at once, :data:`LONGEST_WINDOW` at most."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    config = get_text_config() if get_text_config else config
    positions = getattr(config, "max_position_embeddings", None)
    return min(positions, LONGEST_WINDOW) if isinstance(positions, int) else LONGEST_WINDOW


def mean_loss(model: nn.Module, windows: Sequence[Sequence[int]], device: torch.device) -> float:
    """Mean negative log-likelihood of the windows' tokens, in nats a token, but for each first one.

    Takes one forward pass over the windows, without gradients and in evaluation mode. It leaves the
    model, its gradients and the random number generators as they were. Where parameters are
    sharded (FSDP2, ZeRO-3) all ranks gather them, so all must call this with the same windows.

    Args:
        model: A causal language model, whose output has ``logits`` of shape [windows, tokens,
            vocabulary]. Its ``forward`` decides on autocast, as it does in training.
        windows: Token ids, two or more in each.
        device: Where a batch of the training is put.

    Raises:
        ValueError: If the model gives no logits of each token.
    """
    sums: list[Tensor] = []
    largest = max(map(max, windows))
    with _left_as_it_was(model, device):
        for batch in _batches(windows):
            ids, labels = (
                pad_sequence([torch.tensor(window) for window in batch], True, padding).to(device)
                for padding in (0, _IGNORED)
            )
            # What pads a window comes after it, so that no token of it sees any: it takes no
            # attention mask, which not every kind of attention treats alike.
            logits = model(input_ids=ids, use_cache=False).logits
            if logits.shape[:2] != ids.shape or logits.shape[2] <= largest:
                raise ValueError(
                    f"forgetting: {type(model).__name__} gives logits of shape "
                    f"{list(logits.shape)} for token ids of shape {list(ids.shape)} up to "
                    f"{largest}, so it is no causal language model. Turn forgetting off."
                )
            dtype = torch.promote_types(logits.dtype, torch.float32)
            sums.append(
                nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).to(dtype),
                    labels[:, 1:].flatten().to(logits.device),
                    ignore_index=_IGNORED,
                    reduction="sum",
                )
            )
    predicted = sum(len(window) - 1 for window in windows)
    return math.fsum(torch.stack(sums).tolist()) / predicted


def _batches(windows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Windows of similar length together, of at most LONGEST_WINDOW tokens with padding."""
    ordered = sorted(windows, key=len, reverse=True)
    while ordered:
        rows = max(1, LONGEST_WINDOW // len(ordered[0]))
        yield ordered[:rows]
        ordered = ordered[rows:]


@contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A block in which a model predicts, and of which the training after it shows no trace."""
    was_training = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    try:
        # A model's own code may draw in evaluation mode too.
        with torch.no_grad(), torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, was in was_training.items():
            module.training = was
            # The outermost keeps its parameters gathered until the backward pass, of which there
            # is none here.
            if isinstance(module, FSDPModule):
                module.reshard()


class Forgetting:
    """The loss of a model on a text, against what it was before training.

    Args:
        windows: The text, as :func:`mean_loss` takes it.
        device: The same.
        loss_before: What was measured before training, if it was; else measured first of all.

    Attributes:
        tokens: How many tokens are predicted.
        step: After how many optimizer steps it was measured last.
    """

    def __init__(
        self,
        windows: Sequence[Sequence[int]],
        device: torch.device,
        loss_before: float | None = None,
    ) -> None:
        self.loss_before = loss_before
        self.tokens = sum(len(window) - 1 for window in windows)
        self._windows = windows
        self._device = device
        self.step: int | None = None
        self._loss = math.nan

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """What joins the log after ``step`` optimizer steps; measured once for each step."""
        if self.step != step:
            self._loss = mean_loss(model, self._windows, self._device)
            self.step = step
        if self.loss_before is None:
            self.loss_before = self._loss
        return {FORGETTING: self._loss - self.loss_before, FORGETTING_LOSS: self._loss}
