"""What the study runs: methods, sizes, cells, their YAML, and how a learning rate is chosen.

Knows nothing of models, files of data or processes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
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
        if self.name == "full_bf16":
            return {"bf16": True}
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
FULL_BF16 = Method("full_bf16")
"""Full fine-tuning whose weights, gradients and AdamW's state are bf16."""


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
    test: int | None
    """Problems, or pairs, that the tuned methods are judged by; None for a whole file of problems,
    however long they are."""


@dataclass(frozen=True)
class Size:
    """Everything that is fixed before the study starts."""

    name: str
    sft: Task
    dpo: Task
    seeds: tuple[int, ...]
    """Of the cells that count. DPO starts from a model of the first."""
    replies: int | None
    """Test problems that a model is asked to answer; None for all."""
    max_new_tokens: int
    prose_tokens: int
    """Tokens of text outside the task."""
    tf32: bool
    """Whether a GPU may multiply float32 matrices in TF32 in training. Weights are float32 at every
    size, but for an arm that says otherwise: in bf16 most of a step of Adam's would be lost to
    rounding, whatever the method."""
    logging_steps: int
    jobs: int
    """Cells that run at a time on a CPU."""
    autocast: bool = False
    """Whether the forward pass of training runs in bf16."""
    tuning_seeds: tuple[int, ...] = (0,)
    """The first goes over all learning rates, all of them over the finer ones."""
    finer: tuple[float, ...] = (1.0,)
    """Multiples of the best learning rate that are tuned in a second stage."""
    primary: tuple[Method, ...] = ()
    """Methods that have ``primary_seeds`` in place of ``seeds``."""
    primary_seeds: tuple[int, ...] = ()
    reply_tokens: int = 0
    """Of each reply of the untrained model that forgetting is measured on; 0 not to measure it."""
    timed_pairs: int = 0
    """Pairs of steps, full and GMT, that are timed; 0 for none."""
    parameters: tuple[float, float] | None = None
    """Of the model that must be named, at least and at most; None for the quickstart's model."""

    def task(self, name: TaskName) -> Task:
        """The task of that name."""
        return self.sft if name == "sft" else self.dpo

    def seeds_of(self, method: Method) -> tuple[int, ...]:
        """Those of the method's cells that count."""
        return self.primary_seeds if method in self.primary else self.seeds

    def counts(self, task: Task) -> tuple[int, int, int]:
        """How many cells of a task tune if none fails, are judged, and are both."""
        finer = len(self.finer) * len(self.tuning_seeds) - (1.0 in self.finer)
        tuning = len(task.methods) * (len(task.learning_rates) + finer)
        judged = [seed for method in task.methods for seed in self.seeds_of(method)]
        return tuning, len(judged), sum(seed in self.tuning_seeds for seed in judged)


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
    own = cell.method.settings()
    if size.autocast:
        own = {"plugins": [PRECISION, *own.pop("plugins", [])], **own}
    preference = {"rl": "dpo", "rl_beta": DPO_BETA} if cell.task == "dpo" else {}
    return {
        **own,
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
        **own,  # Once more, since a method may set what is set above.
    }


DPO_BETA = 0.1
PRECISION = "benchmarks.study.precision.Precision"


def key(cell: Cell, size: Size, *depends_on: str) -> str:
    """A short hash of all that a cell's results depend on.

    Args:
        cell: The cell.
        size: The study's size, for its settings of training and scoring.
        depends_on: Keys or digests of what the cell starts from: the data, another cell.
    """
    scoring = [size.replies, size.max_new_tokens, size.prose_tokens]
    if size.reply_tokens:
        scoring.append(size.reply_tokens)
    written = json.dumps([asdict(cell), settings(cell, size), scoring, depends_on], sort_keys=True)
    return short_hash(written)


def short_hash(*texts: str) -> str:
    """Eight hexadecimal digits that stand for these texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]


def coarse_cells(task: Task, size: Size) -> list[Cell]:
    """Every method at every learning rate, with the first tuning seed."""
    seed = size.tuning_seeds[0]
    return [
        Cell(task.name, method, rate, seed)
        for method in task.methods
        for rate in task.learning_rates
    ]


def finer_cells(best: Iterable[Cell], size: Size) -> list[Cell]:
    """The best cells at the learning rates around theirs, with every tuning seed."""
    return [
        replace(cell, learning_rate=cell.learning_rate * factor, seed=seed)
        for cell in best
        for factor in size.finer
        for seed in size.tuning_seeds
    ]


def seed_cells(best: Iterable[Cell], size: Size) -> list[Cell]:
    """The chosen cells with each seed that counts."""
    return [replace(cell, seed=seed) for cell in best for seed in size.seeds_of(cell.method)]


def choose(validation_losses: Mapping[Cell, float]) -> dict[Method, Cell]:
    """For each method a cell of the learning rate whose validation loss is lowest.

    The loss is the mean over seeds, of those rates that were run with the most seeds. One that is
    NaN never wins, and of equal losses the lower learning rate wins. A method whose losses are all
    NaN is left out.
    """
    tried: dict[Method, dict[float, list[Cell]]] = {}
    for cell in sorted(validation_losses, key=lambda cell: cell.learning_rate):
        tried.setdefault(cell.method, {}).setdefault(cell.learning_rate, []).append(cell)
    best: dict[Method, Cell] = {}
    for method, rates in tried.items():
        most = max(map(len, rates.values()))
        losses = {
            cells[0]: math.fsum(validation_losses[cell] for cell in cells) / most
            for cells in rates.values()
            if len(cells) == most
        }
        numbers = [cell for cell, loss in losses.items() if not math.isnan(loss)]
        if numbers:
            best[method] = min(numbers, key=losses.__getitem__)
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
                FULL_BF16,
            ),
            learning_rates=(2.5e-6, 1e-5, 4e-5, 1.6e-4, 6.4e-4),
            steps=400,
            batch=16,
            max_tokens=384,
            validation=256,
            test=None,
        ),
        dpo=Task(
            name="dpo",
            methods=(FULL, *_at("gmt", 0.5), *_at("random", 0.5), HALF, LORA),
            learning_rates=(6.25e-7, 2.5e-6, 1e-5, 4e-5),
            steps=24,
            batch=8,
            max_tokens=384,
            validation=64,
            test=160,
        ),
        seeds=(1, 2, 3),
        replies=None,
        max_new_tokens=320,
        prose_tokens=16384,
        tf32=False,
        logging_steps=10,
        jobs=1,
        autocast=True,
        tuning_seeds=(101, 102),
        finer=(0.5, 1.0, 2.0),
        primary=(FULL, *_at("gmt", 0.5), *_at("random", 0.5)),
        primary_seeds=(1, 2, 3, 4, 5, 6, 7, 8),
        reply_tokens=64,
        timed_pairs=30,
        parameters=(0.4e9, 2e9),
    ),
}


def _toy(full: Size) -> Size:
    """Every kind of cell that ``full`` has, in minutes on a CPU; its results mean nothing."""
    (gmt,) = _at("gmt", 0.5)
    small = {"learning_rates": (1e-3,), "steps": 2, "batch": 2, "validation": 2}
    return replace(
        full,
        name="full-toy",
        sft=replace(full.sft, methods=(FULL, gmt, LORA, FULL_BF16), **small),
        dpo=replace(full.dpo, methods=(FULL, gmt), **small, test=4),
        seeds=(1,),
        max_new_tokens=4,
        prose_tokens=512,
        logging_steps=1,
        jobs=2,
        finer=(2.0,),
        primary=(gmt,),
        primary_seeds=(1, 2),
        reply_tokens=4,
        timed_pairs=3,
        parameters=(0, 1e12),
    )


TOY = _toy(SIZES["full"])
