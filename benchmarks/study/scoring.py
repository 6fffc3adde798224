"""How good a saved model is: loss on answers and on prose, and which of two replies it prefers.

Knows model folders and chats, nothing of the grid or of how a model was trained. Replies are asked
for and judged by :mod:`axolotl_gmt.tools.scoring`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.study.data import Turn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPE = "float32"
BATCH = 8
WINDOW = 256  # tokens of prose that a model reads at a time


def set_precision() -> None:
    """Have this process multiply float32 matrices in float32.

    TF32 is a setting of the process that training may leave behind, so without this the models that
    are scored right after training would be scored otherwise than the rest.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    # Axolotl sets these to TF32 too.
    torch.backends.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.fp32_precision = "ieee"


class Scorer:
    """A saved model, loaded for scoring in float32, on a GPU if there is one.

    From then on the whole process computes as :func:`set_precision` says.

    Args:
        folder: A saved model and its tokenizer with a chat template.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        set_precision()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: PreTrainedModel = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(device).eval()
        )

    def answers(self, chats: Sequence[Sequence[Turn]]) -> list[tuple[float, int]]:
        """For each chat, the log-likelihood of its last turn (nats), and that turn's tokens.

        The token that ends the turn counts, as it does in training.
        """
        encoded = [encode(self.tokenizer, chat) for chat in chats]
        # Chats of like length go together, so that little is padded.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
        found: dict[int, tuple[float, int]] = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            for index, value in zip(batch, self._batch([encoded[i] for i in batch]), strict=True):
                found[index] = (value, len(encoded[index][1]))
        return [found[index] for index in range(len(encoded))]

    def _batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        import torch

        lengths = [len(prompt) + len(answer) for prompt, answer in rows]
        tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        is_answer = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(rows):
            tokens[row, : lengths[row]] = torch.tensor(prompt + answer)
            mask[row, : lengths[row]] = 1
            is_answer[row, len(prompt) : lengths[row]] = True
        likelihood = self._log_likelihood(tokens, mask)
        return (likelihood * is_answer[:, 1:].to(likelihood.device)).sum(1).tolist()

    def _log_likelihood(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Of each token but the first, shape ``(rows, length - 1)``, float32."""
        import torch

        device = self.model.device
        with torch.inference_mode():
            logits = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
            log_probabilities = logits[:, :-1].float().log_softmax(-1)
            chosen = tokens[:, 1:, None].to(device)
            found: torch.Tensor = log_probabilities.gather(-1, chosen).squeeze(-1)
            return found

    def answer_loss(self, chats: Sequence[Sequence[Turn]]) -> float:
        """Mean negative log-likelihood of a token of the last turns, in nats."""
        found = self.answers(chats)
        return -sum(value for value, _ in found) / sum(count for _, count in found)

    def prose_loss(self, paragraphs: Sequence[str], tokens: int) -> float:
        """Mean negative log-likelihood of a token of plain text, in nats.

        Args:
            paragraphs: Joined and read in windows of 256 tokens, of which the first has no context
                and does not count.
            tokens: How many to read, a multiple of 256.
        """
        import torch

        text = self.tokenizer("\n\n".join(paragraphs), add_special_tokens=False)["input_ids"]
        windows = torch.tensor(text[: tokens - tokens % WINDOW]).view(-1, WINDOW)
        losses = [
            -self._log_likelihood(batch, torch.ones_like(batch)).mean(1)
            for batch in windows.split(BATCH)
        ]
        return float(torch.cat(losses).mean())


def encode(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """Token ids of a chat up to its last turn, and of that turn with the token that ends it.

    Raises:
        ValueError: If the chat template writes the last turn otherwise than after its prompt.
    """
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("The chat template does not write a reply right after its prompt.")
    reply = whole[len(prompt) :].rstrip("\n")
    first, second = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, reply)
    )
    return first, second


def preference_scores(
    policy: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]], beta: float
) -> tuple[float, float]:
    """Accuracy and loss of a DPO policy on pairs of replies (Rafailov et al. 2023, equation 7).

    Args:
        policy: Log-likelihoods (chosen, rejected) of each pair under the policy.
        reference: The same under the model that training started from.
        beta: Strength of the implicit reward.

    Returns:
        The share of pairs whose chosen reply has the larger implicit reward, and the mean of
        -log sigmoid(reward margin).
    """
    margins = [
        beta * ((chosen - base_chosen) - (rejected - base_rejected))
        for (chosen, rejected), (base_chosen, base_rejected) in zip(policy, reference, strict=True)
    ]
    accuracy = sum(margin > 0 for margin in margins) / len(margins)
    # log(1 + exp(-x)) without overflow
    losses = [max(-margin, 0) + math.log1p(math.exp(-abs(margin))) for margin in margins]
    return accuracy, sum(losses) / len(losses)
