"""What happens in a process of its own: a run is trained by Axolotl and judged.

Knows files and settings, not the design.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl_gmt.tools.quickstart import Sum
from benchmarks.study.cell import CellFolder, train_cell
from benchmarks.study.data import write_text

CURVES = {
    "grad_norm_kept": "gmt/grad_norm_kept",
    "l1_kept": "gmt/l1_kept",
}


@dataclass(frozen=True)
class Files:
    """What all runs share, in one folder."""

    folder: Path

    @property
    def sums(self) -> Path:
        """``{"tuning": [[first, second], ...], "test": [...]}``."""
        return self.folder / "sums.json"

    @property
    def replies(self) -> Path:
        """What the untrained model replies to prompts."""
        return self.folder / "replies.json"

    def train(self, seed: int) -> Path:
        """The chats that runs of this seed are trained on."""
        return self.folder / f"train-{seed}.jsonl"

    def read_sums(self, split: str) -> list[Sum]:
        """Those of ``tuning`` or ``test``."""
        return [Sum(*pair) for pair in json.loads(self.sums.read_text(encoding="utf-8"))[split]]

    def write_sums(self, tuning: list[Sum], test: list[Sum]) -> None:
        """Write what :meth:`read_sums` reads."""
        found = {"tuning": tuning, "test": test}
        pairs = {name: [[s.first, s.second] for s in sums] for name, sums in found.items()}
        write_text(self.sums, json.dumps(pairs))


def run(
    folder: CellFolder, base: Path, files: Files, splits: list[str], full: Path | None, facts: Any
) -> None:
    """Train a run, judge it, and write ``train.json``.

    Args:
        folder: The run's, with its YAML. Its model is left there.
        base: The untrained model.
        files: What all runs share.
        splits: What to judge by: ``tuning``, or ``tuning`` and ``test``; with ``test`` goes what
            is measured of forgetting and of the way that the weights went.
        full: The model of full fine-tuning with the same seed, if that is there.
        facts: Goes into the result as it is.
    """
    result: dict[str, Any] = {**facts, **train_cell(folder)}
    logs = json.loads(folder.state.read_text(encoding="utf-8"))["log_history"]
    result["curve"] = [log["loss"] for log in logs if "loss" in log]
    for name, logged in CURVES.items():
        found = [log[logged] for log in logs if logged in log]
        if found:
            result[name] = sum(found) / len(found)
    ever = [log["gmt/ever_kept"] for log in logs if "gmt/ever_kept" in log]
    if ever:
        result["ever_kept"] = ever[-1]
    result |= judge_folder(folder.model, base, files, splits)
    if "test" in splits:
        from benchmarks.study.sums.judging import moved

        result |= moved(base, folder.model, full)
    write_text(folder.trained, json.dumps(result) + "\n")


def judge_folder(model: Path, base: Path, files: Files, splits: list[str]) -> dict[str, Any]:
    """A saved model's scores: for each split ``{split: asdict(Judged)}``, and ``kl``."""
    from transformers import AutoTokenizer

    from benchmarks.study.sums.judging import divergence, judge, load

    loaded, tokenizer = load(model), AutoTokenizer.from_pretrained(base)
    result: dict[str, Any] = {
        split: asdict(judge(loaded, tokenizer, files.read_sums(split))) for split in splits
    }
    if "test" in splits:
        result["kl"] = divergence(loaded, load(base), files.replies)
    del loaded
    gc.collect()
    return result


def judge_base(base: Path, files: Files, result: Path) -> None:
    """Write the scores of the untrained model."""
    write_text(result, json.dumps(judge_folder(base, base, files, ["tuning", "test"])) + "\n")
