"""What share of a whole training step is the mask step: forward, backward, mask, fused AdamW.

CPU: SmolLM2-135M and 4,096 tokens. GPU: a Llama of 1B and 8,192 tokens. Both in bf16, with random
weights and tokens.
"""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from gradients import MODELS, NoStep
from measuring import TRIAL, Row, arguments, chosen, median_ms, save, show, steps
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_gmt import GMTConfig, GradientMasker

CASES = {
    "cpu": [("SmolLM2-135M", 4, 1024), (TRIAL, 2, 64)],
    "cuda": [("Llama-1B", 8, 1024)],
}
HEADS = {"SmolLM2-135M": (9, 3), "Llama-1B": (32, 8), TRIAL: (4, 2)}


def model_of(name: str, device: str) -> LlamaForCausalLM:
    """A Llama of these shapes with random weights, in bf16."""
    shape = MODELS[name]
    heads, key_value_heads = HEADS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    return LlamaForCausalLM(config).to(device=device, dtype=torch.bfloat16)


def measure(device: str, name: str, batch: int, length: int, runs: int) -> list[Row]:
    """One row for each part of the step, and one for all of it."""
    model = model_of(name, device)
    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    mask = NoStep(parameters)
    GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.5)).attach(mask)
    tokens = torch.randint(0, MODELS[name].vocabulary, (batch, length), device=device)

    def forward_and_backward() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    seconds: dict[str, list[float]] = defaultdict(list)
    for run in steps(runs + 1, f"{name} {device}"):
        parts = {
            "forward and backward": forward_and_backward,
            "GMT mask step": mask.step,
            "fused AdamW step": adamw.step,
        }
        whole = 0.0
        for what, part in parts.items():
            start = time.perf_counter()
            part()
            if device == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            whole += took
            if run > 0:
                seconds[what].append(took)
        if run > 0:
            seconds["whole step"].append(whole)
    step = median_ms(seconds["whole step"])
    return [
        {
            "model": name,
            "tokens": batch * length,
            "dtype": "bf16",
            "device": device,
            "what": what,
            "median ms": median_ms(times),
            "share of the step, %": 100 * median_ms(times) / step,
        }
        for what, times in seconds.items()
    ]


def main() -> None:
    """Measure on every device there is."""
    options = arguments(__doc__, MODELS, runs=5)
    rows = []
    for device, name, batch, length in chosen(CASES, options):
        found = measure(device, name, batch, length, options.runs)
        show(f"{name}, bf16, {batch * length:,} tokens, {device}", found)
        rows += found
    save(options.json, rows)


if __name__ == "__main__":
    main()
