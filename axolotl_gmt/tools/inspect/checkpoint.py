"""Saved weights in safetensors, read a few entries at a time without torch.

Knows files and their tensors, nothing of how two checkpoints are compared.
"""

from __future__ import annotations

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

_SINGLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_MAPPED_BYTES = 1 << 24


type Reader = Callable[[str, int, int], np.ndarray]
"""Reads the entries of the tensor of a name from start to stop, exclusive, as if laid out flat."""


class Stored(NamedTuple):
    """A tensor's file, its name there, its dtype in safetensors' words, and its shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def computed(self) -> np.dtype[Any]:
        """The dtype to compute in: float64 if that is the tensor's, else float32."""
        return np.promote_types(np.float32, FLOATS[self.dtype])


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


def read_checkpoint(path: Path) -> Checkpoint:
    """Read which tensors a checkpoint holds, but not yet the tensors.

    Args:
        path: A folder with ``model.safetensors`` or with shards and their index; or one
            ``.safetensors`` file.

    Raises:
        UserError: If there is none, or it is incomplete, damaged or quantised.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is not a .safetensors file. Other formats must be converted first: load "
                "the model with Transformers and save it with save_pretrained."
            )
        return checkpoint_of(path, read_header(path))
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist. A model of the hub must be downloaded first: "
            "hf download NAME prints its folder."
        )
    if (path / _SINGLE_FILE).is_file():
        return checkpoint_of(path, read_header(path / _SINGLE_FILE))
    if (path / _INDEX_FILE).is_file():
        return checkpoint_of(path, _read_shards(path))
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(_why_no_weights(path, files))
    return checkpoint_of(path, read_header(files[0]))


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
    opened = _open(file)
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    return {
        name: Stored(file, name, each.get_dtype(), (*each.get_shape(),))
        for name, each in slices.items()
    }


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is incomplete, damaged or not readable ({error}).") from error


def _why_no_weights(folder: Path, files: list[Path]) -> str:
    if files:
        return (
            f"{folder} has {len(files)} safetensors files and no {_INDEX_FILE} that says which "
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
    index = folder / _INDEX_FILE
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
