"""The loops in docs/trl.md train what a plain loop does whose gradients are masked by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.reference.gmt_reference import masked
from tests.test_docs import snippets

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"


def run_snippet(word: str, steps: list[Tensor] | None = None) -> dict[str, Any]:
    """What the snippet that imports ``word`` leaves."""
    (text,) = [text for text in snippets(PAGE, "python") if f"import {word}\n" in text]
    found: dict[str, Any] = {"__name__": "snippet"}
    exec(text, found)
    return found


def trained_by_hand(layer: torch.nn.Linear, batches: Iterable[list[Tensor]]) -> None:
    """A step of AdamW for each list of batches, whose mean gradient is masked by sorting."""
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.0)
    for some in batches:
        for batch in some:
            (layer(batch).square().mean() / len(some)).backward()
        for parameter in layer.parameters():
            assert parameter.grad is not None
            (parameter.grad,) = masked([parameter.grad], 0.5)
        optimizer.step()
        optimizer.zero_grad()


def as_it_began(seed: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(8, 8)


def test_accelerate_accumulates_and_masks_once() -> None:
    expected = as_it_began(3)
    torch.manual_seed(0)
    batches = [torch.randn(4, 8) for _ in range(4)]
    trained_by_hand(expected, [batches[:2], batches[2:]])
    torch.manual_seed(3)
    model = run_snippet("Accelerator")["model"]
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_lightning_s_closure_makes_the_gradients_that_are_masked() -> None:
    expected = as_it_began(3)
    torch.manual_seed(3)
    found = run_snippet("lightning")
    trained_by_hand(expected, [[batch] for batch in found["data"].split(4)])
    for mine, theirs in zip(found["module"].layer.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert found["trainer"].callback_metrics["gmt/kept_fraction"] == 0.5
