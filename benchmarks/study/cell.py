"""What happens in a cell's own process: Axolotl trains its YAML, then the saved model is scored.

Each function is one job, run in a process of its own, and leaves one JSON file, written whole. It
knows files and settings, not the grid.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks.study.data import Turn, write_text
from benchmarks.study.grid import DPO_BETA

if TYPE_CHECKING:
    import torch

    from benchmarks.study.scoring import Scorer

Result = dict[str, Any]

PRELOAD = [
    "axolotl.cli.train",
    "axolotl.cli.config",
    "axolotl.train",
    "axolotl.common.datasets",
    "axolotl.core.builders",
    "transformers.models.llama.modeling_llama",
    "axolotl_gmt.integrations.axolotl.plugin",
]
"""What every cell imports for some twenty seconds, if its process does not inherit it."""


@dataclass(frozen=True)
class DataFiles:
    """The files that the study writes once and every cell reads."""

    folder: Path

    def sft(self, split: str) -> Path:
        """Chats; ``split`` is train, validation or test."""
        return self.folder / f"sft-{split}.jsonl"

    def dpo(self, split: str) -> Path:
        """Pairs of replies; ``split`` is train, validation or test."""
        return self.folder / f"dpo-{split}.jsonl"

    @property
    def prose(self) -> Path:
        """A JSON list of paragraphs."""
        return self.folder / "prose.json"

    def all(self) -> list[Path]:
        """Every file, in a fixed order."""
        splits = ("train", "validation", "test")
        return [*map(self.sft, splits), *map(self.dpo, splits), self.prose]


@dataclass(frozen=True)
class CellFolder:
    """Where a cell's files live."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The YAML that Axolotl trains."""
        return self.path / "cell.yml"

    @property
    def log(self) -> Path:
        """All that Axolotl and scoring printed."""
        return self.path / "log.txt"

    @property
    def model(self) -> Path:
        """The tuned model, until it has been scored."""
        return self.path / "model"

    @property
    def prepared(self) -> Path:
        """The tokens that Axolotl makes of the data.

        Each cell makes its own: Axolotl finds those of other data again if the paths are the same.
        """
        return self.path / "prepared"

    @property
    def state(self) -> Path:
        """The trainer's log, step by step."""
        return self.path / "trainer_state.json"

    @property
    def trained(self) -> Path:
        """Result of training and of validation."""
        return self.path / "train.json"

    @property
    def tested(self) -> Path:
        """Result on test data."""
        return self.path / "test.json"


def isolate(log: Path, threads: int) -> None:
    """Make this process the cell's own: its output goes to ``log``, and Ctrl-C to its parent."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = ["axolotl"]  # Axolotl reads it.

    import torch

    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Scoring:
    """How much a model is asked."""

    replies: int | None
    """Test problems to answer; None for all."""
    max_new_tokens: int
    prose_tokens: int


@dataclass(frozen=True)
class Untrained:
    """What forgetting is measured against."""

    model: Path
    replies: Path
    """What :func:`write_replies` wrote."""


def _end_with_parent() -> None:
    """A parent that was killed must not leave cells that write beside those of its successor."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def run_cell(
    folder: CellFolder,
    data: DataFiles,
    scoring: Scoring,
    reference: Path | None,
    train: bool,
    test: bool,
    untrained: Untrained | None = None,
) -> None:
    """Train a cell and validate it, judge it on test data, or both.

    Args:
        folder: The cell's, with its YAML; if it is not trained here, also with its model.
        data: The study's data.
        scoring: How much the model is asked.
        reference: For DPO, what :func:`score_reference` wrote; None for SFT.
        train: Whether to train it and write ``train.json``.
        test: Whether to write ``test.json``.
        untrained: For SFT, what forgetting is measured against; None not to measure it.
    """
    if train:
        folder.tested.unlink(missing_ok=True)
        result = train_cell(folder)
        if reference is None:
            chats = read_chats(data.sft("validation"))
            result["validation_loss"] = _scorer(folder.model).answer_loss(chats)
        else:
            scores = _preference_scores(folder.model, data, "validation", reference)
            result["validation_accuracy"], result["validation_loss"] = scores
        _write(folder.trained, result | gpu_memory())
        _free()
    if test and reference is None:
        test_sft(folder.model, data, scoring, folder.tested, untrained)
    elif test and reference is not None:
        accuracy, loss = _preference_scores(folder.model, data, "test", reference)
        _write(folder.tested, {"test_loss": loss, "test_accuracy": accuracy})


def test_sft(
    model: Path,
    data: DataFiles,
    scoring: Scoring,
    file: Path,
    untrained: Untrained | None,
) -> None:
    """Write a model's scores on the test problems and on prose, and how far it is from untrained.

    Everything is computed in float32, see :func:`benchmarks.study.scoring.set_precision`.
    """
    from axolotl_gmt.tools.scoring import read_problems, score_model
    from benchmarks.study.scoring import DTYPE

    scorer = _scorer(model)
    paragraphs = json.loads(data.prose.read_text(encoding="utf-8"))
    result: Result = {
        "test_loss": scorer.answer_loss(read_chats(data.sft("test"))),
        "prose_loss": scorer.prose_loss(paragraphs, scoring.prose_tokens),
    }
    del scorer
    _free()
    problems = read_problems(data.sft("test"), scoring.replies)
    score = score_model(model, problems, scoring.max_new_tokens, dtype=DTYPE)
    result["test_accuracy"] = score.last_number / score.problems
    # If the replies could not be written, the study goes on without this measure.
    if untrained is not None and untrained.replies.is_file():
        _free()
        result["kl"] = _divergence(model, untrained)
    _write(file, result)


def _divergence(model: Path, untrained: Untrained) -> float:
    """KL(untrained ‖ model) over the untrained model's replies, in nats a token."""
    from benchmarks.study.sums.judging import divergence, load

    with _device():
        return divergence(load(model), load(untrained.model), untrained.replies)


def write_replies(model: Path, prompts: Sequence[str], new_tokens: int, file: Path) -> None:
    """Write what the untrained model replies, as ``sums.judging`` does, on a GPU if there is one.

    Args:
        model: The untrained model.
        prompts: Of general kind, one turn each.
        new_tokens: Longest reply, in tokens.
        file: A JSON list, see :func:`benchmarks.study.sums.judging.write_replies`.
    """
    from benchmarks.study.scoring import set_precision
    from benchmarks.study.sums import judging

    set_precision()
    with _device():
        judging.write_replies(model, prompts, new_tokens, file)


def _device() -> torch.device:
    """As a context, it has models and tensors made on the GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _free() -> None:
    """Give memory back that other cells can use."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def gpu_memory() -> dict[str, int]:
    """Bytes that this process had reserved at most, and those of the GPU; nothing without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "gpu_reserved": torch.cuda.max_memory_reserved(),
        "gpu_total": torch.cuda.get_device_properties(0).total_memory,
    }


def score_reference(model: Path, data: DataFiles, file: Path) -> None:
    """Write the log-likelihoods of all held-out pairs under the model that DPO starts from."""
    scorer = _scorer(model)
    _write(
        file,
        {split: _pair_likelihoods(scorer, data.dpo(split)) for split in ("validation", "test")},
    )


def _scorer(model: Path) -> Scorer:
    from benchmarks.study.scoring import Scorer

    return Scorer(model)


def _preference_scores(
    model: Path, data: DataFiles, split: str, reference: Path
) -> tuple[float, float]:
    from benchmarks.study.scoring import preference_scores

    policy = _pair_likelihoods(_scorer(model), data.dpo(split))
    return preference_scores(policy, json.loads(reference.read_text())[split], DPO_BETA)


def _pair_likelihoods(scorer: Scorer, file: Path) -> list[tuple[float, float]]:
    chosen, rejected = (
        [value for value, _ in scorer.answers(read_chats(file, field))]
        for field in ("chosen", "rejected")
    )
    return list(zip(chosen, rejected, strict=True))


def read_chats(file: Path, reply: str | None = None) -> list[list[Turn]]:
    """The chats of a JSONL, with the turn in the field ``reply`` at their end."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row["messages"] + ([row[reply]] if reply else []) for row in rows]


def train_cell(folder: CellFolder) -> Result:
    """Train the cell's YAML as ``axolotl train`` does, and leave an ordinary model folder."""
    from axolotl.cli.train import do_cli

    for left_behind in (folder.model, folder.prepared):  # By a run that was interrupted.
        shutil.rmtree(left_behind, ignore_errors=True)
    result = _watch_training(folder.state)
    do_cli(str(folder.recipe))
    shutil.rmtree(folder.prepared)
    gc.collect()
    if (folder.model / "adapter_config.json").is_file():
        _merge_adapter(folder.model)
    return result


def _watch_training(state: Path) -> Result:
    """Have the trainer clock itself and save its log; returns what it will have found."""
    import torch
    from transformers import Trainer, TrainerCallback

    original = cast(Callable[..., Any], Trainer.train)
    result: Result = {}

    class Clock(TrainerCallback):
        """Clocks the steps: GMT's report at the end is no part of what a step costs."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._start = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wall, cpu = self._start
            result["train_seconds"] = time.perf_counter() - wall
            # All threads of this process: unlike the time on the wall, not longer on a busy
            # machine. Of a GPU's work it says nothing.
            if not torch.cuda.is_available():
                result["train_cpu_seconds"] = time.process_time() - cpu

    def train(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        trainer.add_callback(Clock())
        output = original(trainer, *args, **kwargs)
        result["steps"] = trainer.state.global_step
        # What was really trained in, whatever the YAML says.
        kinds = {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()}
        result["weights"] = "+".join(sorted(kinds))
        result["autocast"] = trainer.accelerator.mixed_precision
        trainer.state.save_to_json(str(state))
        return output

    Trainer.train = train
    return result


def _merge_adapter(folder: Path) -> None:
    """Replace a LoRA adapter by the whole model that it makes."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    merged = folder.with_name("merged")
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32").merge_and_unload()
    model.save_pretrained(merged)
    AutoTokenizer.from_pretrained(folder).save_pretrained(merged)
    shutil.rmtree(folder)
    merged.rename(folder)


def _write(file: Path, result: Result | dict[str, Sequence[tuple[float, float]]]) -> None:
    write_text(file, json.dumps(result, indent=1) + "\n")
