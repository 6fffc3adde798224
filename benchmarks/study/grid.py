"""What the study runs: methods, sizes, cells, their YAML, and how a learning rate is chosen.

Knows nothing of models, files of data or processes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

TaskName = Literal["sft", "dpo"]
Yaml = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: all weights, a criterion of GMT at a mask ratio, or LoRA."""

    name: str
    ratio: float | None = None
    """Fraction of gradient entries that is masked; None where a method has no such setting."""

    @property
    def label(self) -> str:
        """Name and ratio, as in ``gmt 0.5``."""
        return self.name if self.ratio is None else f"{self.name} {self.ratio:g}"

    def settings(self) -> Yaml:
        """The YAML keys that make this method of plain fine-tuning."""
        if self.name == "full":
            return {}
        if self.name == "lora":
            return {
                "adapter": "lora",
                "lora_r": 16,
                "lora_alpha": 32,
                "lora_dropout": 0.0,
                "lora_target_linear": True,
                # Unset, Axolotl takes kernels that only a GPU has.
                "lora_mlp_kernel": False,
                "lora_qkv_kernel": False,
                "lora_o_kernel": False,
            }
        criterion = "gradient" if self.name == "gmt" else self.name
        ratio = {} if self.ratio is None else {"gmt_mask_ratio": self.ratio}
        return {"plugins": ["axolotl_gmt"], "gmt_criterion": criterion, **ratio}


FULL, HALF, LORA = Method("full"), Method("half"), Method("lora")


@dataclass(frozen=True)
class Task:
    """How all methods are trained and scored at one task."""

    name: TaskName
    methods: tuple[Method, ...]
    learning_rates: tuple[float, ...]
    """Each method is tuned over all of them."""
    steps: int
    batch: int
    """Problems, or pairs of replies, in an optimizer step."""
    max_tokens: int
    """Problems that are longer as a chat, answer included, are left out."""
    validation: int
    """Problems, or pairs, that the learning rate is chosen by."""
    test: int
    """Problems, or pairs, that the tuned methods are judged by."""


@dataclass(frozen=True)
class Size:
    """Everything that is fixed before the study starts."""

    name: str
    sft: Task
    dpo: Task
    seeds: tuple[int, ...]
    """The learning rate is tuned with the first."""
    replies: int
    """Test problems that a model is asked to answer."""
    max_new_tokens: int
    prose_tokens: int
    """Tokens of text outside the task."""
    tf32: bool
    """Whether a GPU may multiply float32 matrices in TF32. Weights are float32 at every size: in
    bf16 most of a step of Adam's would be lost to rounding, whatever the method."""
    logging_steps: int
    jobs: int
    """Cells that run at a time."""

    def task(self, name: TaskName) -> Task:
        """The task of that name."""
        return self.sft if name == "sft" else self.dpo


@dataclass(frozen=True)
class Cell:
    """One training run."""

    task: TaskName
    method: Method
    learning_rate: float
    seed: int

    @property
    def label(self) -> str:
        """What tells it from other cells of the study."""
        method = self.method.label.replace(" ", "")
        return f"{self.task}-{method}-lr{self.learning_rate:g}-seed{self.seed}"


def settings(cell: Cell, size: Size) -> Yaml:
    """The YAML of a cell without the keys that are paths."""
    task = size.task(cell.task)
    preference = {"rl": "dpo", "rl_beta": DPO_BETA} if cell.task == "dpo" else {}
    return {
        **cell.method.settings(),
        **preference,
        "chat_template": "tokenizer_default",
        # The template may count a token or two otherwise than the filter on the data did.
        "sequence_len": task.max_tokens + 16,
        "pad_to_sequence_len": False,
        # The order is then the sampler's, which depends on nothing but the seed.
        "shuffle_merged_datasets": False,
        "optimizer": "adamw_torch_fused",
        "learning_rate": cell.learning_rate,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.0,
        "micro_batch_size": task.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": task.steps,
        "seed": cell.seed,
        "bf16": False,
        "fp16": False,
        "tf32": size.tf32,
        "attn_implementation": "sdpa",
        "logging_steps": size.logging_steps,
        "save_strategy": "no",
        "val_set_size": 0,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
    }


DPO_BETA = 0.1


def key(cell: Cell, size: Size, *depends_on: str) -> str:
    """A short hash of all that a cell's results depend on.

    Args:
        cell: The cell.
        size: The study's size, for its settings of training and scoring.
        depends_on: Keys or digests of what the cell starts from: the data, another cell.
    """
    scoring = (size.replies, size.max_new_tokens, size.prose_tokens)
    written = json.dumps([asdict(cell), settings(cell, size), scoring, depends_on], sort_keys=True)
    return short_hash(written)


def short_hash(*texts: str) -> str:
    """Eight hexadecimal digits that stand for these texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]


def tuning_cells(task: Task, seed: int) -> list[Cell]:
    """Every method at every learning rate."""
    return [
        Cell(task.name, method, rate, seed)
        for method in task.methods
        for rate in task.learning_rates
    ]


def seed_cells(best: Iterable[Cell], seeds: Iterable[int]) -> list[Cell]:
    """The chosen cells with each seed."""
    return [
        Cell(cell.task, cell.method, cell.learning_rate, seed) for cell in best for seed in seeds
    ]


def choose(validation_losses: Mapping[Cell, float]) -> dict[Method, Cell]:
    """For each method the cell of lowest validation loss; a loss that is NaN never wins.

    Of equal losses the lower learning rate wins. A method whose losses are all NaN is left out.
    """
    best: dict[Method, Cell] = {}
    for cell in sorted(validation_losses, key=lambda cell: cell.learning_rate):
        loss = validation_losses[cell]
        rival = best.get(cell.method)
        if not math.isnan(loss) and (rival is None or loss < validation_losses[rival]):
            best[cell.method] = cell
    return best


def _at(name: str, *ratios: float) -> tuple[Method, ...]:
    return tuple(Method(name, ratio) for ratio in ratios)


_RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)

SIZES = {
    "small": Size(
        name="small",
        sft=Task(
            name="sft",
            methods=(FULL, *_at("gmt", 0.1, 0.5, 0.9), *_at("random", 0.5, 0.9), HALF, LORA),
            learning_rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
            steps=12,
            batch=4,
            max_tokens=128,
            validation=32,
            test=64,
        ),
        dpo=Task(
            name="dpo",
            methods=(FULL, *_at("gmt", 0.5), *_at("random", 0.5)),
            learning_rates=(1e-5, 3e-5, 1e-4),
            steps=8,
            batch=4,
            max_tokens=160,
            validation=24,
            test=40,
        ),
        seeds=(0, 1, 2),
        replies=32,
        max_new_tokens=72,
        prose_tokens=4096,
        tf32=False,
        logging_steps=1,
        jobs=2,
    ),
    "full": Size(
        name="full",
        sft=Task(
            name="sft",
            methods=(
                FULL,
                *_at("gmt", *_RATIOS),
                *_at("random", *_RATIOS),
                *_at("gradient_weight", 0.5),
                HALF,
                LORA,
            ),
            learning_rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
            steps=100,
            batch=16,
            max_tokens=384,
            validation=256,
            test=512,
        ),
        dpo=Task(
            name="dpo",
            methods=(FULL, *_at("gmt", 0.5), *_at("random", 0.5), HALF, LORA),
            learning_rates=(1e-5, 3e-5, 1e-4),
            steps=24,
            batch=8,
            max_tokens=384,
            validation=64,
            test=160,
        ),
        seeds=(0, 1, 2),
        replies=256,
        max_new_tokens=192,
        prose_tokens=16384,
        tf32=True,
        logging_steps=10,
        jobs=8,
    ),
}
