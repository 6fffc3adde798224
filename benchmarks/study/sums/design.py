"""What ``PLAN.md`` fixes: arms, learning rates, seeds, sums, and the YAML of a run.

Knows nothing of models, processes or results.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from axolotl_gmt.tools.quickstart import Sum

Yaml = dict[str, Any]

BATCH = 16  # sums in an optimizer step
STEPS = 20
TRAIN = BATCH * STEPS
TUNING, TEST = 500, 1000
TUNING_SEEDS = (101, 102)
SEEDS = tuple(range(1, 11))
REPLY_TOKENS = 64  # of each reply of the untrained model that forgetting is measured on, at most

# A step of the grid is a factor of 2.
_UNIT_RATE = 1.5e-4


@dataclass(frozen=True)
class Arm:
    """A way to train, with the learning rates that it is tuned over at first."""

    name: str
    settings: Yaml = field(hash=False)
    centre: int
    """The first grid has this exponent of 2, one below, and two above, see :func:`rate`."""
    is_primary: bool = False

    def grid(self) -> list[int]:
        """The exponents of the first four learning rates."""
        return [self.centre + offset for offset in (-1, 0, 1, 2)]


def _masked(ratio: float, criterion: str = "gradient", **settings: Any) -> Yaml:
    return {
        "plugins": ["axolotl_gmt"],
        "gmt_mask_ratio": ratio,
        "gmt_criterion": criterion,
        "gmt_log_overlap": True,
        **settings,
    }


FULL = Arm("full", {}, centre=0, is_primary=True)
GMT = Arm("GMT 0.5", _masked(0.5), centre=0, is_primary=True)
RANDOM = Arm("random 0.5", _masked(0.5, "random"), centre=0, is_primary=True)
ARMS = (
    FULL,
    GMT,
    RANDOM,
    Arm("GMT 0.9", _masked(0.9), centre=0),
    Arm("random 0.9", _masked(0.9, "random"), centre=1),
    Arm("fixed_random 0.9", _masked(0.9, "fixed_random"), centre=1),
    Arm("GMT 0.9 hold", _masked(0.9, gmt_hold=True), centre=1),
    Arm("smallest 0.5", _masked(0.5, "smallest"), centre=1),
)


def rate(exponent: int) -> float:
    """A learning rate of the grid: 0.00015 · 2ᵉ."""
    return _UNIT_RATE * 2.0**exponent


@dataclass(frozen=True)
class Run:
    """One training run."""

    arm: Arm
    exponent: int
    """Of the learning rate, see :func:`rate`."""
    seed: int

    @property
    def is_counted(self) -> bool:
        """Whether it is one of the runs that the arms are compared by, not one of tuning."""
        return self.seed in SEEDS

    @property
    def label(self) -> str:
        """What tells it from other runs of the study."""
        return f"{self.arm.name.replace(' ', '-')}-lr{rate(self.exponent):g}-seed{self.seed}"


def yaml_of(run: Run) -> Yaml:
    """The YAML of a run without the keys that are paths."""
    return {
        **run.arm.settings,
        "chat_template": "tokenizer_default",
        "sequence_len": 128,
        "pad_to_sequence_len": False,
        "optimizer": "adamw_torch_fused",
        "learning_rate": rate(run.exponent),
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.2,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "seed": run.seed,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "save_strategy": "no",
        "val_set_size": 0,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
    }


@dataclass(frozen=True)
class Sums:
    """Sums to judge by, to tune by, and those that seeds draw from; none in two of them."""

    test: list[Sum]
    tuning: list[Sum]
    pool: list[tuple[int, int]]

    def train(self, seed: int) -> list[Sum]:
        """The sums that a run of this seed is trained on, in order, whatever its arm."""
        rng = random.Random(seed)
        return [Sum(*rng.sample(pair, 2)) for pair in rng.sample(self.pool, TRAIN)]


def draw_sums() -> Sums:
    """All pairs of two-digit numbers, shuffled once and for all, and cut."""
    rng = random.Random(0)
    pairs = list(itertools.combinations_with_replacement(range(10, 100), 2))
    rng.shuffle(pairs)
    held_out = [Sum(*rng.sample(pair, 2)) for pair in pairs[: TEST + TUNING]]
    return Sums(held_out[:TEST], held_out[TEST:], pairs[TEST + TUNING :])


def best(losses: Mapping[int, Sequence[float]]) -> int:
    """The exponent whose tuning loss is lowest in the mean over seeds; of equals the lowest.

    A loss that is NaN never wins.

    Args:
        losses: For each exponent, a loss for each tuning seed.

    Raises:
        ValueError: If every exponent has a NaN.
    """
    means = {exponent: sum(found) / len(found) for exponent, found in losses.items()}
    numbers = {exponent: mean for exponent, mean in means.items() if mean == mean}
    if not numbers:
        raise ValueError("Every learning rate ended in NaN.")
    return min(sorted(numbers), key=numbers.__getitem__)


def beyond(losses: Mapping[int, Sequence[float]]) -> int | None:
    """The exponent to try next, since the best one lies at the edge of what was tried."""
    exponent = best(losses)
    if exponent == min(losses):
        return exponent - 1
    return exponent + 1 if exponent == max(losses) else None
