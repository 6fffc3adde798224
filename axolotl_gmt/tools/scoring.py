"""How many problems of a chat data set a saved model answers correctly, decoded greedily.

Knows chat-turn JSONL and saved model folders, nothing of GMT, Axolotl or how a model was trained.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from axolotl_gmt.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

Turn = dict[str, str]
"""One turn of a chat: ``{"role": "user", "content": "What is 12 + 30?"}``."""

BATCH_SIZE = 32
# Enough for a model that explains its sum in two sentences; one that has learned to answer with
# the number alone stops after a few.
MAX_NEW_TOKENS = 48
# Of a data file. One that has no end, such as /dev/zero, would be read for ever.
MAX_CHARACTERS = 200_000_000
# Of a model's own template, tokenizer and config, which can ask for endless work.
MAX_SECONDS = 60
MAX_MEMORY = 4_000_000_000

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
    number, left = 0, MAX_CHARACTERS
    try:
        with path.open(encoding="utf-8") as file:
            while len(problems) != limit and (line := file.readline(left + 1)):
                number, left = number + 1, left - len(line)
                if left < 0:
                    raise UserError(
                        f"{path} has more than {MAX_CHARACTERS:,} characters. Name a smaller file, "
                        "or set --limit."
                    )
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
        json.dumps(row, ensure_ascii=False).encode()  # Half of a surrogate pair is no text.
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
            if not file.is_file():
                raise UserError(f"{file} is not a file.")
            with safe_open(file, framework="np"):  # Reads the header and compares it to the size.
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is incomplete or damaged ({error}).") from error


def score_models(
    folders: Sequence[Path],
    problems: Sequence[Problem],
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_progress: Callable[[Path, int], object] | None = None,
) -> list[Score]:
    """As :func:`score_model`, for each folder, in a child process.

    What a model brings along can crash a process, or keep it busy for ever. There, its tokenizer,
    chat template and config have :data:`MAX_SECONDS` and :data:`MAX_MEMORY` at a time.

    Args:
        folders: Saved models and their tokenizers.
        problems: At least one.
        max_new_tokens: Longest reply, in tokens.
        on_progress: Called with the folder and the number of newly answered problems after each
            batch.

    Raises:
        UserError: If a model cannot be loaded and asked, or ends the child process.
    """
    request = {
        "folders": list(map(str, folders)),
        "problems": list(map(asdict, problems)),
        "max_new_tokens": max_new_tokens,
        "limits": (MAX_SECONDS, MAX_MEMORY),
    }
    scores: list[Score] = []
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "axolotl_gmt.tools.scoring"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # Libraries quote there what a model's files say.
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError), child.stdin:  # A dead child is reported below.
                json.dump(request, child.stdin)
            for line in child.stdout:
                match json.loads(line):
                    case {"answered": number}:
                        if on_progress is not None:
                            on_progress(folders[len(scores)], number)
                    case {"score": fields}:
                        scores.append(Score(**fields))
                    case {"error": message}:
                        raise UserError(message)
            code = child.wait()
        finally:
            child.kill()
    if len(scores) < len(folders):
        raise UserError(f"{folders[len(scores)]} cannot be scored: {_why_it_ended(code)}.")
    return scores


def _why_it_ended(code: int) -> str:
    """What the exit code of the child process says to the user."""
    if code == -signal.SIGALRM:
        return (
            f"its tokenizer, chat template or config takes more than {MAX_SECONDS} seconds of work"
        )
    if code == -signal.SIGKILL:
        return "the process was killed, probably because memory ran out"
    return f"the process ended with {signal.Signals(-code).name if code < 0 else code}"


def _serve() -> None:
    """Score what stdin asks for. Each line of stdout is a message in JSON."""
    request = json.load(sys.stdin)
    problems = [Problem(**problem) for problem in request["problems"]]
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever libraries print is no message.
    # Before the limits, since this takes seconds.
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    def send(**message: object) -> None:
        print(json.dumps(message), file=messages, flush=True)

    for folder in request["folders"]:
        try:
            score = score_model(
                Path(folder),
                problems,
                request["max_new_tokens"],
                lambda number: send(answered=number),
                partial(_limits, *request["limits"]),
            )
        except UserError as error:
            return send(error=str(error))
        send(score=asdict(score))
    return None


@contextmanager
def _limits(seconds: int, memory: int) -> Iterator[None]:
    """Limit time and memory by the means of Linux. When the time is up, the process ends."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    bounds = (bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (min([used + memory, *bounds]), hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def score_model(
    folder: Path,
    problems: Sequence[Problem],
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_progress: Callable[[int], object] | None = None,
    limits: Callable[[], AbstractContextManager[None]] = nullcontext,
    dtype: str = "auto",
) -> Score:
    """Answer each problem greedily with the model saved in ``folder``, on a GPU if there is one.

    Args:
        folder: A saved model and its tokenizer with a chat template.
        problems: At least one.
        max_new_tokens: Longest reply, in tokens.
        on_progress: Called with the number of newly answered problems after each batch.
        limits: Entered whenever the model's tokenizer, chat template or config is at work.
        dtype: Of the weights, such as ``float32``; ``auto`` is that of the file.

    Raises:
        UserError: If the folder holds no model that can be loaded and asked.
    """
    check_model_folder(folder)
    with limits():
        tokenizer = _load_tokenizer(folder)
        _build_without_weights(folder)
    model = _load_model(folder, tokenizer, dtype)
    exact = last = 0
    for start in range(0, len(problems), BATCH_SIZE):
        batch = problems[start : start + BATCH_SIZE]
        with limits(), _reason(f"{folder}: its chat template fails on these turns"):
            prompts = tokenizer.apply_chat_template(
                [problem.turns for problem in batch],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
        length = prompts["input_ids"].size(1)
        context = getattr(model.config, "max_position_embeddings", length)
        if length > context:
            raise UserError(
                f"{folder}: a prompt has {length:,} tokens, but the model's context {context:,}."
            )
        with _reason(f"{folder} cannot answer"):
            replies = _answer(model, tokenizer, prompts, max_new_tokens)
        for problem, reply in zip(batch, replies, strict=True):
            exact += is_exact(reply, problem.answer)
            last += has_last_number(reply, problem.answer)
        if on_progress is not None:
            on_progress(len(batch))
    return Score(str(folder), len(problems), exact, last)


@contextmanager
def _reason(failure: str) -> Iterator[None]:
    """Turn any error into one for the user, since a damaged model can raise nearly all kinds."""
    try:
        yield
    except Exception as error:
        lines = filter(None, str(error).splitlines())
        raise UserError(f"{failure}: {next(lines, type(error).__name__)}") from error


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _reason(f"{folder} cannot be loaded as a language model"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if tokenizer.chat_template is None:
        raise UserError(f"{folder}: its tokenizer has no chat template to ask questions with.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # Every prompt must end where its reply begins.
    return cast("PreTrainedTokenizerBase", tokenizer)


def _build_without_weights(folder: Path) -> None:
    """Build the model of the config without memory for weights, which fails if it has no end."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _reason(f"{folder} cannot be loaded as a language model"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _load_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: str = "auto"
) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with _reason(f"{folder} cannot be loaded as a language model"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        # All but the tokens that end a reply is ours: a model can ask for beams or penalties.
        model.generation_config = GenerationConfig(
            eos_token_id=model.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        return cast(
            "PreTrainedModel", model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        )


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: BatchEncoding,
    max_new_tokens: int,
) -> list[str]:
    prompts = prompts.to(model.device)
    tokens = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False)
    replies = tokens[:, prompts["input_ids"].size(1) :]
    return cast(list[str], tokenizer.batch_decode(replies, skip_special_tokens=True))


if __name__ == "__main__":
    _serve()
