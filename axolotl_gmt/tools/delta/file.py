"""The form of a delta's file, read without trust: ``docs/delta-format.md`` has it field by field.

Knows one file and the headers of its base, nothing of what is done with them.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from axolotl_gmt.errors import UserError
from axolotl_gmt.report.log import known_settings
from axolotl_gmt.tools.checkpoint import FLOATS, Stored, bits_of, bytes_of, read_header

FORMAT, VERSION = "gmt_delta", "1"
VALUES, INDICES, FILES = "values/", "indices/", "files/"
"""Prefixes of the tensors' names in the file; the rest is a name in the checkpoint, or a file's."""

CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""The files of a model, other than its weights, that a delta may carry. None of them is code."""

_METADATA = "__metadata__"  # A key of safetensors' headers that is no tensor.
_LARGEST_INT32 = 2**31 - 1
_CHECKED_AT_ONCE = 1 << 20
_LONGEST_REASON = 500


_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class HeaderTooLongError(UserError):
    """The file is not read any further."""


class Entry(BaseModel):
    """What a tensor is, and the SHA-256 of its bytes."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    sha256: _Sha256


_ENTRIES = TypeAdapter(dict[str, Entry])
_HASHES = TypeAdapter(dict[str, _Sha256])
_SETTINGS = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Delta:
    """What a delta's file holds, but for the tensors' bytes. All of it fits its base and itself.

    Every tensor of TUNED is stored whole (a name in ``values`` alone), in part (in ``indices`` as
    well), or not at all, where it is the base's.
    """

    path: Path
    base: Mapping[str, Entry]
    """All tensors of the model that was tuned."""
    tuned: Mapping[str, Entry]
    """All tensors of the tuned model."""
    values: Mapping[str, Stored]
    indices: Mapping[str, Stored]
    files: Mapping[str, Stored]
    file_hashes: Mapping[str, str]
    """The SHA-256 of each of the files."""
    settings: Mapping[str, object]
    """GMT's settings in the run; empty if they were not known."""

    def stored(self, name: str, base: Mapping[str, Stored]) -> Stored:
        """A tensor of the tuned model if it is stored whole, else the base's that it is made of."""
        is_whole = name in self.values and name not in self.indices
        return self.values[name] if is_whole else base[name]

    def changes(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """What is new among the entries from ``start`` to ``stop``, exclusive, of a tensor.

        Returns:
            Positions relative to ``start``, in int64, and the bits of the new values there.
        """
        indices, values = self.indices[name], self.values[name]

        def index(position: int) -> int:
            return int(_signed(indices, position, position + 1)[0])

        first = bisect_left(range(indices.entries), start, key=index)
        last = bisect_left(range(indices.entries), stop, lo=first, key=index)
        return _signed(indices, first, last) - start, values.read_words(first, last)


def _signed(indices: Stored, start: int, stop: int) -> np.ndarray:
    words = indices.read_words(start, stop)
    return words.view(f"<i{words.itemsize}").astype(np.int64)


def longest_header(base: Mapping[str, Stored]) -> int:
    """The number of bytes that the header of a delta may take, by the number of base tensors.

    It takes some 600 per tensor. A header is read as a whole, so without a bound it could fill the
    memory.
    """
    return (1 << 20) + 2048 * len(base)


type Spec = tuple[str, tuple[int, ...]]
"""A tensor's dtype in safetensors' words, and its shape."""


def in_order(tensors: Mapping[str, Spec]) -> dict[str, Spec]:
    """Tensors in the order of safetensors' own files: by the size of their entries, then by name.

    The largest come first, so that each begins at a multiple of the size of its entries.
    """
    return dict(sorted(tensors.items(), key=lambda item: (-bits_of(item[1][0]), item[0])))


def encoded_header(tensors: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file, behind which the tensors' bytes follow in their order.

    Safetensors' own functions write tensors that are in memory, and nothing else.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + bytes_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def encoded_entries(entries: Mapping[str, Entry]) -> str:
    """The text of ``base`` and ``tuned`` in the metadata."""
    return _ENTRIES.dump_json(dict(entries)).decode()


def is_delta(path: Path, base: Mapping[str, Stored]) -> bool:
    """Whether a file is to be read as a delta: if it calls itself one, or has too long a header."""
    try:
        return path.is_file() and _metadata(path, longest_header(base)).get("format") == FORMAT
    except HeaderTooLongError:
        return True
    except UserError:
        return False


def read_delta(path: Path, base: Mapping[str, Stored]) -> Delta:
    """Read a delta, and check all that can be checked without the bytes of weights.

    Args:
        path: The file, which anyone may have written.
        base: The tensors of the model that it is to be applied to.

    Raises:
        UserError: If it is none, is damaged, does not agree with itself, or is that of another
            base.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file. Name a delta that axolotl gmt diff wrote.")
    metadata = _metadata(path, longest_header(base))
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no delta. axolotl gmt diff writes them.")
    if metadata.get("format_version") != VERSION:
        raise UserError(
            f"{path} is a delta of the version {metadata.get('format_version')!r}, and this "
            f"axolotl-gmt reads version {VERSION} only. Try a newer one."
        )
    before = _parsed(path, metadata, "base", _ENTRIES)
    after = _parsed(path, metadata, "tuned", _ENTRIES)
    hashes = _parsed(path, metadata, "files", _HASHES)
    settings = _parsed(path, metadata, "gmt", _SETTINGS) if "gmt" in metadata else {}
    _check_base(path, before, base)
    parts = _parts(path)
    delta = Delta(
        path=path,
        base=before,
        tuned=after,
        values=parts[VALUES],
        indices=parts[INDICES],
        files=parts[FILES],
        file_hashes=hashes,
        settings=known_settings(settings),
    )
    _check_tensors(delta)
    for name in delta.indices:
        _check_indices(delta, name)
    return delta


def _metadata(path: Path, longest: int) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        # Where the file is shorter than that, safetensors says so.
        if longest < length <= path.stat().st_size:
            raise HeaderTooLongError(
                f"{path} is no delta of this base: its header takes {length:,} bytes, and at most "
                f"{longest:,} are read for one of so many tensors."
            )
        with safe_open(path, framework="numpy") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is incomplete, damaged or not readable ({error}).") from error


def _parsed(path: Path, metadata: Mapping[str, str], key: str, form: TypeAdapter[Any]) -> Any:
    try:
        return form.validate_json(metadata.get(key, ""))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "/".join(map(str, first["loc"]))
        raise _damaged(
            path, f"{key} in its metadata is not valid: {place} {first['msg']}"
        ) from None


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged, or not written by axolotl gmt diff: {_short(why)}.")


def _check_base(path: Path, expected: Mapping[str, Entry], base: Mapping[str, Stored]) -> None:
    for name in sorted(expected.keys() | base.keys()):
        if name not in base:
            why = f"{name} is missing here"
        elif name not in expected:
            why = f"{name} is not one of its tensors"
        elif (expected[name].dtype, expected[name].shape) != (base[name].dtype, base[name].shape):
            why = (
                f"{name} is {_kind(base[name])} here, and {_kind(expected[name])} in the base that "
                "was tuned"
            )
        else:
            continue
        raise other_base(path, why)


def other_base(path: Path, why: str) -> UserError:
    """The error for a delta whose base is another one than the user named."""
    return UserError(f"{path} is the delta of another base: {_short(why)}.")


def _short(text: str) -> str:
    """Names and numbers in a file can fill it."""
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} [...]"


def _kind(tensor: Stored | Entry) -> str:
    return f"{tensor.dtype} {[*tensor.shape]}"


def _parts(path: Path) -> dict[str, dict[str, Stored]]:
    parts: dict[str, dict[str, Stored]] = {VALUES: {}, INDICES: {}, FILES: {}}
    for key, stored in read_header(path).items():
        kind, slash, name = key.partition("/")
        if kind + slash not in parts:
            raise _damaged(path, f"a tensor has the name {key}")
        parts[kind + slash][name] = stored
    return parts


def _check_tensors(delta: Delta) -> None:
    path, base, tuned = delta.path, delta.base, delta.tuned
    for name, entry in tuned.items():
        if name == _METADATA:
            raise _damaged(path, "no tensor can have the name of safetensors' metadata")
        if name not in delta.values and base.get(name) != entry:
            raise _damaged(path, f"{name} is not as in the base, and has no values")
    for name, indices in delta.indices.items():
        if name not in delta.values or name not in base or name not in tuned:
            raise _damaged(path, f"{name} has indices, and is not in the base or has no values")
        if _kind(base[name]) != _kind(tuned[name]) or base[name].dtype not in FLOATS:
            raise _damaged(
                path,
                f"{name} has indices, and is {_kind(base[name])}, then {_kind(tuned[name])}",
            )
        if indices.dtype not in ("I32", "I64") or len(indices.shape) != 1:
            raise _damaged(path, f"the indices of {name} are {_kind(indices)}")
    for name, values in delta.values.items():
        if name not in tuned:
            raise _damaged(path, f"{name} is not a tensor of the tuned model")
        shape = (delta.indices[name] if name in delta.indices else tuned[name]).shape
        if (values.dtype, values.shape) != (tuned[name].dtype, shape):
            expected = f"{tuned[name].dtype} {[*shape]}"
            raise _damaged(path, f"the values of {name} are {_kind(values)}, not {expected}")
    for name, stored in delta.files.items():
        if name not in CONFIG_FILES or stored.dtype != "U8" or len(stored.shape) != 1:
            raise _damaged(path, f"it carries {name}, {_kind(stored)}")
    if delta.files.keys() != delta.file_hashes.keys():
        raise _damaged(path, "the files that it carries are not those that its metadata names")


def _check_indices(delta: Delta, name: str) -> None:
    """In range and ascending, one block after the other."""
    indices, before = delta.indices[name], -1
    for start in range(0, indices.entries, _CHECKED_AT_ONCE):
        block = _signed(indices, start, min(start + _CHECKED_AT_ONCE, indices.entries))
        if block[0] <= before or (block[1:] <= block[:-1]).any():
            raise _damaged(delta.path, f"the indices of {name} do not ascend")
        before = int(block[-1])
    entries = math.prod(delta.base[name].shape)
    if before >= entries:
        raise _damaged(delta.path, f"{name} has {entries:,} entries, and an index {before:,}")


def index_dtype(entries: int) -> str:
    """The dtype of the indices of a tensor: int32 wherever its last entry's index is one."""
    return "I32" if entries - 1 <= _LARGEST_INT32 else "I64"
