"""What GMT adds to a training step: full and GMT steps in turns, in one process, on one batch.

Knows a model folder and chats. The times of cells say nothing about cost: several cells run at a
time, and what a process spends on the host is not what a GPU spends.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_gmt import GMTConfig, GradientMasker
from benchmarks.measuring import in_pairs, of_pairs
from benchmarks.study.cell import read_chats
from benchmarks.study.data import write_text
from benchmarks.study.scoring import encode

RATIO = 0.5


def time_steps(
    model: Path, chats: Path, batch: int, autocast: bool, pairs: int, result: Path
) -> None:
    """Write medians of the steps' times, and of the ratios of neighbours, as JSON.

    Args:
        model: An untrained model, which is trained in float32.
        chats: The first of them make the batch.
        batch: Chats in it.
        autocast: Whether the forward pass runs in bf16.
        pairs: How many pairs of steps count.
        result: The file to write.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype="float32").to(device).train()
    encoded = [encode(tokenizer, chat) for chat in read_chats(chats)[:batch]]
    rows = [prompt + answer for prompt, answer in encoded]
    columns = itertools.zip_longest(*rows, fillvalue=-100)  # -100 is no label.
    labels = torch.tensor(list(zip(*columns, strict=True)), device=device)
    tokens, mask = labels.clamp(min=0), (labels >= 0).long()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    masker = GradientMasker(trained.named_parameters(), GMTConfig(mask_ratio=RATIO))

    def step() -> None:
        trained.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = trained(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()

    def attach() -> RemovableHandle:
        return masker.attach(optimizer)

    found = of_pairs(in_pairs(step, attach, device, pairs, "steps"))
    facts = {"device": device, "mask ratio": RATIO, "pairs": pairs, "batch": list(labels.shape)}
    write_text(result, json.dumps(facts | found, indent=1) + "\n")
