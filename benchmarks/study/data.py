"""The study's data: GSM8K and preferences from a folder, split by question, and prose from Python.

Knows how long a problem is through a function that it is given, and nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from axolotl_gmt.files import whole

Turn = dict[str, str]
Row = dict[str, object]
CountTokens = Callable[[str, str], int]
"""``(question, answer) -> tokens`` of the chat."""

FILES = ("train.jsonl", "test.jsonl", "preferences.jsonl")

# GSM8K's calculator notes, as in "48/2 = <<48/2=24>>24", repeat what stands beside them.
_ANNOTATION = re.compile(r"<<[^<>]*>>")


class DataError(Exception):
    """A data folder that cannot be used; the message says which file, why, and what to do."""


@dataclass(frozen=True)
class Problem:
    """A question and its answer, which ends with ``#### N``."""

    question: str
    answer: str

    def row(self) -> Row:
        """As chat turns."""
        return {"messages": [_turn("user", self.question), _turn("assistant", self.answer)]}


@dataclass(frozen=True)
class Preference:
    """A question with a correct and an incorrect reply."""

    question: str
    chosen: str
    rejected: str

    def row(self) -> Row:
        """As chat turns."""
        return {
            "messages": [_turn("user", self.question)],
            "chosen": _turn("assistant", self.chosen),
            "rejected": _turn("assistant", self.rejected),
        }


@dataclass(frozen=True)
class Splits[Example: (Problem, Preference)]:
    """Examples to train on, to choose the learning rate by, and to judge by.

    No question is in two of them.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _read(file: Path, *fields: str) -> list[list[str]]:
    """The fields of each line, in the order of the file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read ({error}). --data must name a folder with {', '.join(FILES)}."
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append([_ANNOTATION.sub("", row[field]).strip() for field in fields])
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{file}, line {number}: needs a JSON object with the texts {', '.join(fields)}."
            ) from None
    return rows


def split_problems(
    folder: Path, count: CountTokens, max_tokens: int, validation: int, test: int | None
) -> Splits[Problem]:
    """The problems of at most ``max_tokens``; validation is taken out of ``train.jsonl``.

    Args:
        folder: Has ``train.jsonl`` and ``test.jsonl``.
        count: Counts the tokens of a problem.
        max_tokens: Longer problems are left out.
        validation: Problems to choose the learning rate by.
        test: Problems to judge by, the first ones of ``test.jsonl`` that are short enough; None for
            all of that file, of any length.

    Raises:
        DataError: If a file cannot be read or has too few problems.
    """

    def problems(name: str) -> list[Problem]:
        return [Problem(*row) for row in _read(folder / name, "question", "answer")]

    def short(name: str) -> list[Problem]:
        found = problems(name)
        return [each for each in found if count(each.question, each.answer) <= max_tokens]

    held_out = problems("test.jsonl") if test is None else short("test.jsonl")
    known = {problem.question for problem in held_out}
    rest = [problem for problem in short("train.jsonl") if problem.question not in known]
    _require(len(rest) - validation, 1, folder / "train.jsonl", max_tokens)
    _require(len(held_out), test or 1, folder / "test.jsonl", max_tokens)
    questions = _shuffled({problem.question for problem in rest})
    for_validation = set(questions[:validation])
    return Splits(
        [problem for problem in rest if problem.question not in for_validation],
        [problem for problem in rest if problem.question in for_validation],
        held_out[:test],
    )


def split_preferences(
    folder: Path, count: CountTokens, max_tokens: int, validation: int, test: int
) -> Splits[Preference]:
    """The pairs whose longer reply makes at most ``max_tokens``, split by question.

    Questions are drawn until validation and test have the pairs they need; all others train.

    Raises:
        DataError: If the file cannot be read or has too few pairs.
    """
    file = folder / "preferences.jsonl"
    pairs = [
        Preference(*row)
        for row in _read(file, "question", "chosen", "rejected")
        if max(count(row[0], row[1]), count(row[0], row[2])) <= max_tokens
    ]
    _require(len(pairs), validation + test + 1, file, max_tokens)
    parts: dict[str, list[Preference]] = {"validation": [], "test": [], "train": []}
    wanted = {"validation": validation, "test": test, "train": len(pairs)}
    for question in _shuffled({pair.question for pair in pairs}):
        part = next(name for name in parts if len(parts[name]) < wanted[name])
        parts[part] += [pair for pair in pairs if pair.question == question]
    _require(len(parts["train"]), 1, file, max_tokens)
    return Splits(parts["train"], parts["validation"][:validation], parts["test"][:test])


def _require(found: int, wanted: int, file: Path, max_tokens: int) -> None:
    if found < wanted:
        raise DataError(
            f"{file} has {found} examples of at most {max_tokens} tokens to spare, but {wanted} "
            "are needed. Use the whole data set, or a smaller --size."
        )


def _shuffled(questions: Iterable[str]) -> list[str]:
    # Sorted first: the order of a set changes from process to process.
    ordered = sorted(questions)
    random.Random(0).shuffle(ordered)
    return ordered


def prose() -> list[str]:
    """Paragraphs of the Python language reference that every installation carries.

    English that has nothing to do with word problems, of a kind that language models have seen, so
    its loss rises when a model forgets; and nothing has to be downloaded. Indented blocks (code,
    grammar) and short paragraphs are left out. The order is shuffled once and for all.
    """
    from pydoc_data.topics import topics

    paragraphs = {
        " ".join(re.sub(r"(?<=\w)-\s+", "-", block).split())
        for text in topics.values()
        for block in text.split("\n\n")
        if len(block) >= 200 and block[:1].isalpha() and block.rstrip().endswith(".")
    }
    return _shuffled(paragraphs)


def write_jsonl(file: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file, whole or not at all."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as part:
        part.write_text(text, encoding="utf-8")


def sha256(files: Sequence[Path]) -> str:
    """The SHA-256 of the files' contents, in the order given, in hexadecimal digits."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                found.update(block)
    return found.hexdigest()


def digest(files: Sequence[Path]) -> str:
    """The first 16 digits of :func:`sha256`."""
    return sha256(files)[:16]
