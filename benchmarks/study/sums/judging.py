"""How good a saved model is at sums, how much it forgot, and how far it moved.

Knows model folders and sums, nothing of arms or of how a model was trained.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_gmt.tools.quickstart import Sum
from benchmarks.study.scoring import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOGETHER = 50  # sums in a forward pass
_REPLIES_TOGETHER = 8


@dataclass(frozen=True)
class Judged:
    """What a model makes of sums, in their order."""

    is_right: list[bool]
    """Whether greedy decoding answers with the right number and ends its turn."""
    losses: list[float]
    """Negative log-likelihood of the right answer, its end included, in nats."""
    tokens: int
    """Of all right answers."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.is_right) / len(self.is_right)

    @property
    def loss(self) -> float:
        """Nats for each token of the right answers."""
        return math.fsum(self.losses) / self.tokens


def load(folder: Path) -> PreTrainedModel:
    """A saved model in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sums: Sequence[Sum]
) -> Judged:
    """Judge by one forward pass over each sum and its right answer.

    Greedy decoding writes the right answer if and only if, after each part of it, its next token
    has the largest logit. So nothing has to be decoded, and one pass gives loss and accuracy.
    """
    chats = [encode(tokenizer, sum_.chat()["messages"]) for sum_ in sums]  # type: ignore[arg-type]
    right = [False] * len(sums)
    losses = [0.0] * len(sums)
    alike: dict[tuple[int, int], list[int]] = {}
    for index, (prompt, answer) in enumerate(chats):
        alike.setdefault((len(prompt), len(answer)), []).append(index)
    # What all of them begin with is read once.
    columns = zip(*(prompt[:-1] for prompt, _ in chats), strict=False)
    start = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    # Axolotl saves models that ask for no cache.
    beginning = torch.tensor([chats[0][0][:start]])
    shared = model(input_ids=beginning, use_cache=True, logits_to_keep=1)
    for (_, length), indices in alike.items():  # Of one length, so that nothing is padded.
        for some in itertools.batched(indices, _TOGETHER):
            tokens = torch.tensor([(chats[index][0] + chats[index][1])[start:] for index in some])
            cache = copy.deepcopy(shared.past_key_values)
            cache.batch_repeat_interleave(len(some))
            found = model(input_ids=tokens, past_key_values=cache, logits_to_keep=length + 1)
            logits, answers = found.logits[:, :-1], tokens[:, -length:]
            likelihoods = logits.log_softmax(-1).gather(-1, answers[..., None])
            hits = (logits.argmax(-1) == answers).all(-1)
            for row, index in enumerate(some):
                right[index] = bool(hits[row])
                losses[index] = -float(likelihoods[row].sum())
    return Judged(right, losses, sum(len(answer) for _, answer in chats))


@torch.inference_mode()
def write_replies(model: Path, prompts: Sequence[str], new_tokens: int, file: Path) -> None:
    """Write what a model replies to prompts, decoded greedily: a JSON list of token ids.

    Each item has the ``prompt`` and the ``reply``, at most ``new_tokens`` of them.
    """
    from benchmarks.study.data import write_text

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = load(model)
    replies = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = loaded.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        replies.append({"prompt": ids, "reply": whole[0, len(ids) :].tolist()})
    write_text(file, json.dumps(replies))


@torch.inference_mode()
def divergence(model: PreTrainedModel, base: PreTrainedModel, replies: Path) -> float:
    """KL(base ‖ model) of the next token over the base model's own replies, nats a token.

    0 for the base model itself; a model that forgot what it would have said has more. It needs no
    labels, and is sensitive to changes that leave the most likely token as it was.
    """
    found = json.loads(replies.read_text(encoding="utf-8"))
    # Of like length together, so that little is padded.
    found.sort(key=lambda item: len(item["prompt"]) + len(item["reply"]))
    total, count = 0.0, 0
    for start in range(0, len(found), _REPLIES_TOGETHER):
        rows = found[start : start + _REPLIES_TOGETHER]
        lengths = [len(row["prompt"]) + len(row["reply"]) for row in rows]
        tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        is_reply = torch.zeros(len(rows), max(lengths), dtype=torch.bool)
        for index, row in enumerate(rows):  # Padding on the right is seen by nothing before it.
            tokens[index, : lengths[index]] = torch.tensor(row["prompt"] + row["reply"])
            is_reply[index, len(row["prompt"]) : lengths[index]] = True
        wanted = is_reply[:, 1:]
        ours, theirs = (
            of(input_ids=tokens).logits[:, :-1][wanted].double().log_softmax(-1)
            for of in (model, base)
        )
        total += float((theirs.exp() * (theirs - ours)).sum())
        count += int(wanted.sum())
    return total / count


def moved(base: Path, tuned: Path, other: Path | None) -> dict[str, float]:
    """How far ``tuned`` is from ``base``: ``{"norm", "changed", "cosine"}``.

    Args:
        base: A folder with ``model.safetensors``.
        tuned: Another.
        other: Another, with whose difference from ``base`` the cosine is taken; None for none.

    Returns:
        The L2 norm of the difference of all weights, the share of entries that differ, and the
        cosine.
    """
    squares = products = others = torch.zeros((), dtype=torch.float64)
    changed = entries = 0
    names = [folder / "model.safetensors" for folder in (base, tuned, *([other] if other else []))]
    files: list[Any] = [safe_open(name, framework="pt") for name in names]
    for key in files[0].keys():  # noqa: SIM118 - not a dictionary
        before, after, *beside = (file.get_tensor(key).double() for file in files)
        difference: Tensor = after - before
        squares = squares + difference.square().sum()
        changed += int((after != before).sum())
        entries += before.numel()
        if beside:
            reference = beside[0] - before
            products = products + (difference * reference).sum()
            others = others + reference.square().sum()
    result = {"norm": float(squares.sqrt()), "changed": changed / entries}
    if other:
        result["cosine"] = float(products / (squares.sqrt() * others.sqrt()))
    return result
