"""A text that a model is not trained on: its file, its documents, and the tokens read of them.

Knows tokenizers, and neither models nor trainers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

BUILT_IN = Path(__file__).parent.parent / "texts" / "english.jsonl"
"""Short passages of plain English, written for this package."""
MAX_BYTES = 400_000
"""Of a file: about 100,000 tokens of English. Bytes can be counted before a tokenizer is there."""

type Document = str | list[dict[str, Any]]
"""A text, or the messages of a chat."""


@dataclass(frozen=True)
class HeldOutText:
    """The documents of a file.

    Attributes:
        name: What to call it in a message.
        documents: By the number of the line in which they begin.
        digest: SHA-256 of the file, in hexadecimal.
    """

    name: str
    documents: dict[int, Document]
    digest: str

    @classmethod
    def read(cls, setting: object) -> HeldOutText:
        """The documents of the file that a setting names.

        Args:
            setting: True for :data:`BUILT_IN`, or a path. In a file whose name ends in ``.jsonl``
                or ``.json`` each line is an object with a document under ``text``, or a chat under
                ``messages``. Any other file is plain text, one document.

        Raises:
            ValueError: Saying what is wrong with it, and what to set instead.
        """
        if setting is not True and (not isinstance(setting, str | Path) or not str(setting)):
            raise ValueError(
                f"{setting!r} is neither true nor a file. Set true for the English text that comes "
                "with GMT, or the path of a text or .jsonl file."
            )
        path = BUILT_IN if setting is True else Path(setting).expanduser()
        content = _read_bytes(path)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as "
                "UTF-8."
            ) from None
        if not text.strip():
            raise ValueError(f"{path} is empty. Name a file with text.")
        documents: dict[int, Document] = {1: text}
        if path.suffix.lower() in (".jsonl", ".json"):
            lines = enumerate(text.split("\n"), start=1)
            documents = {
                number: _document(f"{path}, line {number}", line)
                for number, line in lines
                if line.strip()
            }
        name = "the English text that comes with GMT" if path == BUILT_IN else str(path)
        return cls(name, documents, hashlib.sha256(content).hexdigest())

    def windows(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[list[int]]:
        """Token ids to show to a model, which predicts each but a document's first once.

        A document that is longer than a window goes on in the next one, which begins with the last
        token of the one before. A chat is put as the tokenizer's template puts it.

        Args:
            tokenizer: The model's own.
            longest: The most tokens of a window, 2 or more.

        Raises:
            ValueError: If the tokenizer cannot put a chat, or nothing is left to predict.
        """
        windows = []
        for line, document in self.documents.items():
            if isinstance(document, str):
                ids = tokenizer(document, verbose=False)["input_ids"]
            else:
                text = self._chat(tokenizer, line, document)
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            starts = range(0, len(ids) - 1, longest - 1)
            windows += [ids[start : start + longest] for start in starts]
        if not windows:
            raise ValueError(f"{self.name} has no document of two tokens or more. Add text to it.")
        return windows

    def _chat(
        self, tokenizer: PreTrainedTokenizerBase, line: int, messages: list[dict[str, Any]]
    ) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        # A template is a program, which ends as it likes in what it was not written for.
        except Exception as error:
            raise ValueError(
                f"{self.name}, line {line}: the tokenizer cannot put these messages as a chat "
                f"({error}). Set a chat template (chat_template in YAML), or write the document "
                "under `text`."
            ) from None


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        raise ValueError(
            f"{path} is not here; paths are relative to {Path.cwd()}. Name a text or .jsonl file, "
            "or set true for the English text that comes with GMT."
        )
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Name a text or .jsonl file.")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{path} has more than {MAX_BYTES:,} bytes (about 100,000 tokens of English), and each "
            "measurement reads all of it. Take a part of it."
        )
    return content


def _document(where: str, line: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}). Write one object a line.") from None
    if isinstance(row, dict):
        text, messages = row.get("text"), row.get("messages")
        if isinstance(text, str) and text.strip():
            return text
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return messages
    raise ValueError(
        f'{where} has no document. Write {{"text": "..."}}, or {{"messages": [{{"role": "user", '
        '"content": "..."}, ...]}.'
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()
