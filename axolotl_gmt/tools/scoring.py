"""How many problems of a chat data set a saved model answers correctly, decoded greedily.

Knows chat-turn JSONL and saved model folders, nothing of GMT, Axolotl or how a model was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, cast

from axolotl_gmt.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Turn = dict[str, str]
"""One turn of a chat: ``{"role": "user", "content": "What is 12 + 30?"}``."""

BATCH_SIZE = 32
# Enough for a model that explains its sum in two sentences; one that has learned to answer with
# the number alone stops after a few.
MAX_NEW_TOKENS = 48

# A minus sign counts unless it follows a word, as in 12-30; commas separate thousands.
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A chat that waits for an answer, and the answer that is right."""

    turns: list[Turn]
    answer: str


@dataclass(frozen=True)
class Score:
    """What a model answered to ``problems`` problems."""

    model: str
    problems: int
    exact: int
    """Replies that are the right answer and nothing else."""
    last_number: int
    """Replies whose last number is that of the right answer; includes the exact numbers."""

    def as_dict(self) -> dict[str, str | int | float]:
        """The counts, and both as fractions of the problems."""
        return {
            **asdict(self),
            "exact_accuracy": self.exact / self.problems,
            "last_number_accuracy": self.last_number / self.problems,
        }


def last_number(text: str) -> Decimal | None:
    """The last number in ``text``, None if there is none: 42 in "12 + 30 = 42."."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def is_exact(reply: str, answer: str) -> bool:
    """Whether ``reply`` is the answer and nothing else."""
    return reply.strip() == answer.strip()


def has_last_number(reply: str, answer: str) -> bool:
    """Whether the last number of ``reply`` is the last number of ``answer``."""
    expected = last_number(answer)
    return expected is not None and last_number(reply) == expected


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Problems of a chat-turn JSONL: the last turn of each line is the right answer.

    Args:
        path: Lines such as ``{"messages": [{"role": "user", "content": "What is 12 + 30?"},
            {"role": "assistant", "content": "42"}]}``; blank lines are skipped.
        limit: Read no more than this many problems.

    Raises:
        UserError: If the file cannot be read, a line is malformed, or there is no problem.
    """
    problems: list[Problem] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(problems) == limit:
                    break
                if line.strip():
                    problems.append(_parse_problem(line, f"{path}, line {number}"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}).") from error
    if not problems:
        raise UserError(f"{path} contains no problem.")
    return problems


def _parse_problem(line: str, place: str) -> Problem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error}).") from error
    turns = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise UserError(
            f'{place}: needs "messages", a list of turns with a "role" and a "content" in text.'
        )
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise UserError(
            f"{place}: the last of at least two turns must be the right answer, with the role "
            '"assistant".'
        )
    return Problem(turns[:-1], turns[-1]["content"])


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and all(
        isinstance(turn.get(key), str) for key in ("role", "content")
    )


def check_model_folder(folder: Path) -> None:
    """Check that ``folder`` holds a whole model: config, and weights that were written to the end.

    Raises:
        UserError: Saying what is missing or broken.
    """
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a saved model: it has no config.json.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder} has no weights (*.safetensors).")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):  # Reads the header and compares it to the size.
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is incomplete or damaged ({error}).") from error


def score_model(
    folder: Path,
    problems: Sequence[Problem],
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_progress: Callable[[int], object] | None = None,
) -> Score:
    """Answer each problem greedily with the model saved in ``folder``, on a GPU if there is one.

    Args:
        folder: A saved model and its tokenizer with a chat template.
        problems: At least one.
        max_new_tokens: Longest reply, in tokens.
        on_progress: Called with the number of newly answered problems after each batch.

    Raises:
        UserError: If the folder holds no model that can be loaded and asked.
    """
    model, tokenizer = _load(folder)
    exact = last = 0
    for start in range(0, len(problems), BATCH_SIZE):
        batch = problems[start : start + BATCH_SIZE]
        replies = _answer(model, tokenizer, [problem.turns for problem in batch], max_new_tokens)
        for problem, reply in zip(batch, replies, strict=True):
            exact += is_exact(reply, problem.answer)
            last += has_last_number(reply, problem.answer)
        if on_progress is not None:
            on_progress(len(batch))
    return Score(str(folder), len(problems), exact, last)


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    # A damaged folder makes Transformers raise errors of nearly every kind.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{folder} cannot be loaded as a language model: {reason}") from error
    if tokenizer.chat_template is None:
        raise UserError(f"{folder}: its tokenizer has no chat template to ask questions with.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # Every prompt must end where its reply begins.
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[list[Turn]],
    max_new_tokens: int,
) -> list[str]:
    from jinja2 import TemplateError

    try:
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
    except TemplateError as error:
        raise UserError(f"The model's chat template refuses these turns: {error}") from error
    tokens = model.generate(
        **prompts,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    replies = tokens[:, prompts["input_ids"].size(1) :]
    return cast(list[str], tokenizer.batch_decode(replies, skip_special_tokens=True))
