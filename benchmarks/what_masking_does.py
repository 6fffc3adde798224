"""Draw ``docs/masking.png``: a gradient, what GMT keeps of it, and where the threshold lies.

``python benchmarks/what_masking_does.py FOLDER`` takes the model and the first sums of a quickstart
folder (``gmt-tools quickstart FOLDER --prepare-only``) and masks the gradient of one matrix at the
first step, with the masker itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_gmt import GMTConfig, GradientMasker

BLUE, GREY = "#1f6fb2", "#9aa4ad"
MATRIX = "model.layers.15.self_attn.q_proj.weight"
SUMS = 16
CORNER = 48  # Rows and columns that are shown.


def gradients(folder: Path) -> tuple[Tensor, Tensor]:
    """The gradient of the matrix before and after the mask."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    rows = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:SUMS]
    for row in rows:
        chat = json.loads(row)["messages"]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
        (model(input_ids=ids, labels=ids).loss / SUMS).backward()
    gradient = model.get_parameter(MATRIX).grad
    before = gradient.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.5)).attach(optimizer)
    optimizer.step()
    return before.abs(), gradient.abs()


def main() -> None:
    """Draw and write the picture."""
    before, after = gradients(Path(sys.argv[1]))
    threshold = float(after[after > 0].min())
    left_out = before[after == 0]
    figure, (whole, kept, counts) = plt.subplots(
        1, 3, figsize=(11, 3.3), width_ratios=(1, 1, 1.5), layout="constrained"
    )
    norm = LogNorm(threshold / 30, float(before.max()))
    for axes, values, title in (
        (whole, before, "gradient"),
        (kept, after, "what the optimizer sees"),
    ):
        corner = np.ma.masked_equal(values[:CORNER, :CORNER].numpy(), 0)
        axes.imshow(corner, norm=norm, cmap="viridis")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    bins = np.geomspace(threshold / 1000, float(before.max()), 90)
    counts.hist(
        before[before >= threshold].numpy(), bins, color=BLUE, label="kept: half of the entries"
    )
    share = float(left_out.square().sum() / before.square().sum())
    sums = float(left_out.sum() / before.sum())
    counts.hist(
        left_out.numpy(),
        bins,
        color=GREY,
        label=f"masked: {share:.1%} of the sum of squares,\n{sums:.0%} of the sum of magnitudes",
    )
    counts.axvline(threshold, color="black", lw=1)
    counts.set_xscale("log")
    counts.set_ylim(0, counts.get_ylim()[1] * 1.35)
    counts.set_title("entries by magnitude, and the threshold", fontsize=10)
    counts.set_xlabel("magnitude")
    counts.set_yticks([])
    counts.legend(frameon=False, fontsize=8, loc="upper left")
    counts.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(Path(__file__).parent.parent / "docs" / "masking.png", dpi=110)


if __name__ == "__main__":
    main()
