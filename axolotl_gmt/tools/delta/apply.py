"""A tuned model made again of its base and a delta, bit for bit.

Trusts neither: every tensor is hashed on its way, and nothing appears unless all of them fit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from axolotl_gmt.errors import UserError
from axolotl_gmt.files import whole
from axolotl_gmt.tools.checkpoint import INDEX_FILE, SINGLE_FILE, Stored, read_tensors
from axolotl_gmt.tools.delta.file import (
    CONFIG_FILES,
    Delta,
    encoded_header,
    in_order,
    other_base,
    read_delta,
)

type Progress = Callable[[int, int], object]
"""Called with the number of bytes that were checked since the last call, and of all."""


@dataclass(frozen=True)
class Applied:
    """What a delta made of its base."""

    tensors: int
    nbytes: int
    """Of all tensors."""
    files: list[str]
    """Files other than weights that come with the delta."""
    copied: list[str]
    """Files other than weights that are the base's."""
    settings: Mapping[str, object]
    """GMT's settings in the run, as the delta says; empty if it does not."""


def apply(
    base: Path, delta: Path, output: Path | None, on_progress: Progress | None = None
) -> Applied:
    """Make the tuned model of a base and a delta; or only check that it can be made.

    Args:
        base: Folder or file of the model before tuning.
        delta: What ``diff`` wrote. Anyone may have written it.
        output: The folder to write, which must not exist yet; None to check only.
        on_progress: See :data:`Progress`.

    Raises:
        UserError: If one of them cannot be read, they do not belong together, or the folder exists.
        OSError: If the folder cannot be written.
    """
    if output is not None and output.exists():
        raise UserError(f"{output} exists. Name another folder, or remove it.")
    tensors = read_tensors(base)
    change = read_delta(delta, tensors)
    copied = _files_to_copy(base, change)
    with whole(output) if output is not None else nullcontext() as part:
        if part is not None:
            part.mkdir()
            for file in copied:
                shutil.copyfile(file, part / file.name)
            for name, stored in change.files.items():
                with (part / name).open("wb") as new:
                    new.writelines(stored.blocks())
        check(tensors, change, part, on_progress)
    return Applied(
        tensors=len(change.tuned),
        nbytes=sum(change.stored(name, tensors).nbytes for name in change.tuned),
        files=sorted(change.files),
        copied=sorted(file.name for file in copied),
        settings=change.settings,
    )


def check(
    base: Mapping[str, Stored],
    delta: Delta,
    folder: Path | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Check every tensor of a base and of the tuned model, and files, against a delta's hashes.

    Args:
        base: The tensors of the base.
        delta: A delta of it.
        folder: Where to write the tuned model's weights; None to write nothing.
        on_progress: See :data:`Progress`.

    Raises:
        UserError: If a hash is another one.
        OSError: If the weights cannot be written.
    """
    # What is not read on the way to the tuned model.
    unused = [name for name in base if name in delta.values and name not in delta.indices]
    unused += [name for name in base if name not in delta.tuned]
    tuned = {name: delta.stored(name, base) for name in delta.tuned}
    total = sum(stored.nbytes for stored in tuned.values()) + sum(base[n].nbytes for n in unused)

    def checked(nbytes: int) -> None:
        if on_progress is not None:
            on_progress(nbytes, total)

    for name, stored in delta.files.items():
        if stored.sha256() != delta.file_hashes[name]:
            raise _damaged(delta, name)
    for name in unused:
        if base[name].sha256() != delta.base[name].sha256:
            raise other_base(delta.path, f"{name} has other values")
        checked(base[name].nbytes)
    shards = _shards(base, tuned)
    for file, names in shards.items():
        specs = in_order({name: (tuned[name].dtype, tuned[name].shape) for name in names})
        with (folder / file).open("wb") if folder is not None else nullcontext() as new:
            _write(new, encoded_header(specs, {"format": "pt"}))
            for name in specs:
                for block in _tuned_bits(name, base, delta):
                    _write(new, block)
                    checked(block.nbytes)
    if folder is not None and len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(stored.nbytes for stored in tuned.values())},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(file: IO[bytes] | None, block: bytes | np.ndarray) -> None:
    if file is not None:
        file.write(block)


def _shards(base: Mapping[str, Stored], tuned: Mapping[str, Stored]) -> dict[str, list[str]]:
    """The files of the tuned model and their tensors: together as the base has them.

    New tensors go into the last file. The files have names of our own, since an index can name any
    path.
    """
    shards: dict[Path, list[str]] = {
        file: [] for file in sorted({base[name].file for name in tuned if name in base})
    }
    last = [*shards][-1] if shards else Path()
    for name in tuned:
        shards.setdefault(base[name].file if name in base else last, []).append(name)
    if len(shards) <= 1:
        return {SINGLE_FILE: [*tuned]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": names
        for number, names in enumerate(shards.values(), start=1)
    }


def _tuned_bits(name: str, base: Mapping[str, Stored], delta: Delta) -> Iterator[np.ndarray]:
    """The bits of a tensor of the tuned model, in blocks.

    Raises:
        UserError: After the last of them, if they are not those that the delta's hashes are of.
    """
    stored = delta.stored(name, base)
    before, after = hashlib.sha256(), hashlib.sha256()
    for start, stop in stored.windows():
        words = stored.read_words(start, stop)
        before.update(words)
        if name in delta.indices:
            positions, values = delta.changes(name, start, stop)
            words[positions] = values
        after.update(words)
        yield words
    if stored.file != delta.path and before.hexdigest() != delta.base[name].sha256:
        raise other_base(delta.path, f"{name} has other values")
    if after.hexdigest() != delta.tuned[name].sha256:
        raise _damaged(delta, name)


def _damaged(delta: Delta, name: str) -> UserError:
    return UserError(f"{delta.path} is damaged: {name} would not be as it was. Fetch it again.")


def _files_to_copy(base: Path, delta: Delta) -> list[Path]:
    """The base's configuration, tokenizer and code, but for what the delta carries."""
    names = [name for name in CONFIG_FILES if name not in delta.files]
    return [file for file in (*(base / n for n in names), *base.glob("*.py")) if file.is_file()]
