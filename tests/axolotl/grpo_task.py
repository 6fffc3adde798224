"""Prompts and a reward for GRPO over the KTO test data."""

from __future__ import annotations

from typing import Any


def prompt(cfg: Any, *args: Any, **kwargs: Any) -> Any:
    def transform(example: dict[str, Any], tokenizer: Any = None) -> dict[str, str]:
        return {"prompt": example["instruction"]}

    return transform, {"remove_columns": ["instruction", "completion", "label"]}


def digits(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(sum(map(str.isdigit, completion))) for completion in completions]
