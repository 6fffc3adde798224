"""What GMT adds to a whole training step: steps with and without it in turns, on one batch.

A ratio of 1.01 is 1% more. Each pair of neighbouring steps gives one, and which of the two comes
first alternates, so that whatever slows the machine down slows both. CPU: SmolLM2-135M in fp32 with
random weights and tokens, fused AdamW.
"""

from __future__ import annotations

import torch
from gradients import MODELS
from measuring import TRIAL, Row, arguments, chosen, in_pairs, of_pairs, save, show
from step_share import model_of
from torch.utils.hooks import RemovableHandle

from axolotl_gmt import GMTConfig, GradientMasker

CASES = {"cpu": [("SmolLM2-135M",), (TRIAL,)]}
TOKENS = (128, 480, 2000)


def measure(name: str, device: str, tokens: int, runs: int) -> Row:
    """The median of the ratios, and their range."""
    model = model_of(name, device).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    masker = GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.5))
    batch = torch.randint(0, MODELS[name].vocabulary, (1, tokens), device=device)

    def step() -> None:
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()

    def attach() -> RemovableHandle:
        return masker.attach(optimizer)

    pairs = in_pairs(step, attach, device, runs, f"{name} {tokens} tokens")
    return {"model": name, "device": device, "tokens": tokens, **of_pairs(pairs)}


def main() -> None:
    """Measure at every length."""
    options = arguments(__doc__, MODELS, runs=9)
    rows = []
    for device, name in chosen(CASES, options):
        found = [measure(name, device, tokens, options.runs) for tokens in TOKENS]
        show(f"{name}, fp32, {device}: {options.runs} pairs of steps", found)
        rows += found
    save(options.json, rows)


if __name__ == "__main__":
    main()
