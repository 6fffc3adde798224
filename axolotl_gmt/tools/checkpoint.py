"""Saved weights in safetensors, read a few entries at a time without torch.

Knows files and their tensors, nothing of how two checkpoints are compared.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from axolotl_gmt.errors import UserError

# Safetensors' floats that are weights; the others hold quantised weights.
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_BUFFERS = frozenset({"I64", "BOOL"})  # Position ids and counters.
_BITS = {  # Of an entry; of complex numbers, both parts.
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_MAPPED_BYTES = 1 << 24
_WINDOW_BYTES = 1 << 22


type Reader = Callable[[str, int, int], np.ndarray]
"""Reads the entries of the tensor of a name from start to stop, exclusive, as if laid out flat."""


class Stored(NamedTuple):
    """A tensor's file, its name there, its dtype in safetensors' words, and its shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Where its bytes begin in the file."""

    @property
    def entries(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def computed(self) -> np.dtype[Any]:
        """The dtype to compute in: float64 if that is the tensor's, else float32."""
        return np.promote_types(np.float32, FLOATS[self.dtype])

    @property
    def word(self) -> np.dtype[Any]:
        """The unsigned integer with an entry's bits; a byte where several entries share one.

        Raises:
            UserError: If the dtype is not one of safetensors' that this version knows.
        """
        bits = bits_of(self.dtype)
        return np.dtype(f"<u{bits // 8}" if bits % 8 == 0 else "u1")

    @property
    def words(self) -> int:
        """The number of words: of entries, or of bytes where several entries share one."""
        return self.nbytes // self.word.itemsize

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return bytes_of(self.dtype, self.shape)

    def read_words(self, start: int, stop: int) -> np.ndarray:
        """The bits of the entries from ``start`` to ``stop``, exclusive, as if laid out flat.

        Raises:
            UserError: If the file cannot be read any more.
        """
        offset = self.offset + start * self.word.itemsize
        try:
            read: np.ndarray = np.fromfile(self.file, self.word, stop - start, offset=offset)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read: {error.strerror}.") from error
        if read.size != stop - start:
            raise UserError(f"{self.file} changed while it was read: it is shorter now.")
        return read

    def windows(self) -> Iterator[tuple[int, int]]:
        """First and last word, exclusive, of the parts in which the bits are read."""
        step = _WINDOW_BYTES // self.word.itemsize
        for start in range(0, self.words, step):
            yield start, min(start + step, self.words)

    def blocks(self) -> Iterator[np.ndarray]:
        """All bits, a part after the other."""
        for start, stop in self.windows():
            yield self.read_words(start, stop)

    def sha256(self) -> str:
        """The SHA-256 of the tensor's bytes, in hexadecimal digits."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


def bits_of(dtype: str) -> int:
    """The number of bits of an entry.

    Raises:
        UserError: If the dtype is not one of safetensors' that this version knows.
    """
    if dtype not in _BITS:
        raise UserError(f"{dtype} is a dtype of safetensors that this version does not know.")
    return _BITS[dtype]


def bytes_of(dtype: str, shape: Sequence[int]) -> int:
    """The number of bytes of a tensor.

    Raises:
        UserError: As :func:`bits_of` does.
    """
    return math.prod(shape) * bits_of(dtype) // 8


@dataclass
class _MappedFile:
    """An open file. What is read of it counts as memory of this process until it is closed."""

    path: Path | None = None
    tensors: Any = None
    bytes_read: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """The floating-point tensors of one checkpoint by name, and the names of its other tensors.

    A tied weight is stored, and therefore listed, under one of its names only.
    """

    path: Path
    tensors: Mapping[str, Stored]
    buffers: frozenset[str]
    _mapped: _MappedFile = field(default_factory=_MappedFile, compare=False, repr=False)

    def reader(self, _: Sequence[str]) -> AbstractContextManager[Reader]:
        """What reads the entries of tensors."""
        return nullcontext(self.read)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The entries from ``start`` to ``stop``, exclusive, of a tensor laid out flat.

        Returns:
            Float64 if that is the tensor's dtype, else float32, which holds the others exactly.

        Raises:
            UserError: If the file cannot be read any more.
        """
        stored = self.tensors[name]
        stop = stored.entries if stop is None else stop
        if start >= stop:
            return np.empty(0, stored.computed)
        mapped = self._mapped
        if mapped.path != stored.file or mapped.bytes_read > _MAPPED_BYTES:
            mapped.path, mapped.tensors, mapped.bytes_read = stored.file, None, 0
            mapped.tensors = _open(stored.file)
        try:
            tensor = mapped.tensors.get_slice(stored.key)
            pieces = [tensor[index].reshape(-1) for index in _indices(stored.shape, start, stop)]
        except Exception as error:
            raise UserError(f"{stored.file} changed while it was read ({error}).") from error
        values: np.ndarray = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        mapped.bytes_read += values.nbytes
        return values.astype(stored.computed, copy=False)


def _indices(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices of a tensor whose parts, one after the other, are its flat entries start to stop."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from ((first, *index) for index in _indices(shape[1:], head, tail))
        return
    if head:
        yield from ((first, *index) for index in _indices(shape[1:], head, row))
        first += 1
    if first < last:
        yield (slice(first, last),)
    if tail:
        yield from ((last, *index) for index in _indices(shape[1:], 0, tail))


def find_adapter(path: Path) -> Path | None:
    """The folder of the PEFT adapter that ``path`` names; None if that is no adapter."""
    folder = path.parent if path.name == ADAPTER_FILE else path
    return folder if (folder / ADAPTER_CONFIG).is_file() else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read which weights a checkpoint holds, but not yet the weights.

    Args:
        path: As for :func:`read_tensors`.

    Raises:
        UserError: If there is none, or it is incomplete, damaged or quantised.
    """
    return checkpoint_of(path, read_tensors(path))


def read_tensors(path: Path) -> dict[str, Stored]:
    """Read which tensors of any dtype a checkpoint holds, but not yet the tensors.

    Args:
        path: A folder with ``model.safetensors`` or with shards and their index; or one
            ``.safetensors`` file.

    Raises:
        UserError: If there is none, or it is incomplete or damaged.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is not a .safetensors file. Other formats must be converted first: load "
                "the model with Transformers and save it with save_pretrained."
            )
        return read_header(path)
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist. A model of the hub must be downloaded first: "
            "hf download NAME prints its folder."
        )
    if (path / SINGLE_FILE).is_file():
        return read_header(path / SINGLE_FILE)
    if (path / INDEX_FILE).is_file():
        return _read_shards(path)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(_why_no_weights(path, files))
    return read_header(files[0])


def checkpoint_of(path: Path, tensors: Mapping[str, Stored]) -> Checkpoint:
    """A checkpoint of these tensors, if none is quantised and some are weights.

    Raises:
        UserError: If there is nothing to compare.
    """
    for name, stored in tensors.items():
        if stored.dtype not in FLOATS.keys() | _BUFFERS:
            raise UserError(
                f"{path}: {name} is stored as {stored.dtype}: quantised weights have no entries "
                "to compare. Name a checkpoint in BF16, FP16 or FP32."
            )
    floats = {name: stored for name, stored in tensors.items() if stored.dtype in FLOATS}
    if not floats:
        raise UserError(f"{path} holds no floating-point tensor.")
    return Checkpoint(path, floats, frozenset(tensors.keys() - floats.keys()))


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name.

    Raises:
        UserError: If the file cannot be read, or is not what its header says.
    """
    opened = _open(file)  # Which checks that the bytes of the tensors fill the file.
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is incomplete, damaged or not readable ({error}).") from error
    return {
        name: Stored(
            file,
            name,
            each.get_dtype(),
            (*each.get_shape(),),
            8 + length + header[name]["data_offsets"][0],
        )
        for name, each in slices.items()
    }


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two tensors of one name, readers differ in which they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in its header twice")
    return found


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is incomplete, damaged or not readable ({error}).") from error


def _why_no_weights(folder: Path, files: list[Path]) -> str:
    if files:
        return (
            f"{folder} has {len(files)} safetensors files and no {INDEX_FILE} that says which "
            "belong together. Name one of them, or restore the index."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            f"{folder} has weights in PyTorch's pickle format only. Convert them first: load the "
            "model with Transformers and save it with save_pretrained."
        )
    inner = sorted(child.name for child in folder.glob("checkpoint-*") if child.is_dir())
    if inner:
        return (
            f"{folder} has no weights of its own (*.safetensors). Name one of its checkpoints: "
            + (", ".join(inner) + ".")
        )
    return f"{folder} has no weights (*.safetensors)."


def _read_shards(folder: Path) -> dict[str, Stored]:
    index = folder / INDEX_FILE
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index} has no weight_map from tensor names to file names.")
    files = {file: folder / file for file in sorted(set(places.values()))}
    if missing := [file for file, shard in files.items() if not shard.is_file()]:
        raise UserError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}."
        )
    headers = {file: read_header(shard) for file, shard in files.items()}
    for name, file in places.items():
        if name not in headers[file]:
            raise UserError(f"{index} says that {file} holds {name}, but it does not.")
    return {name: headers[file][name] for name, file in places.items()}


def read_json(file: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        UserError: If it cannot be read, or is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object.")
    return content
