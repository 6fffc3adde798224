"""What tuning changed, written to a file that is as small as the change.

Knows two checkpoints and the form of a delta. Tensors are compared by their bits, a few megabytes
at a time.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from axolotl_gmt.errors import UserError
from axolotl_gmt.files import whole
from axolotl_gmt.report.log import find_state, read_log
from axolotl_gmt.tools.checkpoint import FLOATS, Stored, bytes_of, find_adapter, read_tensors
from axolotl_gmt.tools.delta.file import (
    CONFIG_FILES,
    FILES,
    FORMAT,
    INDICES,
    VALUES,
    VERSION,
    Entry,
    Spec,
    encoded_entries,
    encoded_header,
    in_order,
    index_dtype,
    is_delta,
    longest_header,
)

type Progress = Callable[[int, int], object]
"""Called with the number of bytes compared or written since the last call, and of all."""


@dataclass(frozen=True)
class Diff:
    """What differs between two checkpoints, and the size of the delta that says so.

    Entries of tensors whose dtype or shape changed, and of new ones, all count as changed.
    """

    entries: int
    """Of the tuned model."""
    changed: int
    in_part: list[str]
    """Tensors of which the delta holds the changed entries."""
    in_whole: list[str]
    """Tensors that it holds whole."""
    removed: list[str]
    """Tensors of the base that the tuned model does not have."""
    files: list[str]
    """Files of the tuned model that it holds, since the base has others."""
    settings: Mapping[str, object]
    """GMT's settings in the run; empty if they were not known."""
    nbytes: int
    """Size of the delta."""
    model_nbytes: int
    """Size of the tuned model's tensors."""

    @property
    def changed_fraction(self) -> float:
        """Changed entries over all entries."""
        return self.changed / self.entries if self.entries else 0.0


class _Compared(NamedTuple):
    """What a tensor was and is, None where there is none, and how many of its entries differ."""

    base: Entry | None
    tuned: Entry | None
    changed: int
    in_part: bool
    """Whether the delta has the changed entries alone."""


class _Piece(NamedTuple):
    """A tensor of the delta's file, and what reads it."""

    spec: Spec
    blocks: Callable[[], Iterator[np.ndarray]]


def diff(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Diff:
    """Write what differs between two checkpoints to a file, from which ``apply`` makes TUNED again.

    Args:
        base: Folder or file of the model before tuning.
        tuned: The same after tuning.
        output: The delta, which must not exist yet.
        force: Write it even if it is larger than the tuned model.
        on_progress: See :data:`Progress`.

    Raises:
        UserError: If one of them cannot be read, or the delta exists or would be too large.
        OSError: If the delta cannot be written.
    """
    if output.exists():
        raise UserError(f"{output} exists. Name another file, or remove it.")
    before, after = _read(base), _read(tuned)
    if _files(before) == _files(after):
        raise UserError(f"{base} and {tuned} are the same files: name two checkpoints.")
    to_compare = sum(stored.nbytes for stored in (*before.values(), *after.values()))
    compared = {}
    for name in sorted(before.keys() | after.keys()):
        pair = before.get(name), after.get(name)
        compared[name] = _compare(*pair)
        if on_progress is not None:
            on_progress(sum(stored.nbytes for stored in pair if stored), to_compare)
    files = _changed_files(base, tuned)
    pieces = _pieces(before, after, compared, files)
    settings = _settings(tuned)
    specs = in_order({key: piece.spec for key, piece in pieces.items()})
    header = encoded_header(specs, _metadata(compared, files, settings))
    to_write = sum(bytes_of(*spec) for spec in specs.values())
    changed = [name for name in after if compared[name].base != compared[name].tuned]
    result = Diff(
        entries=sum(stored.entries for stored in after.values()),
        changed=sum(compared[name].changed for name in changed),
        in_part=sorted(name for name in changed if compared[name].in_part),
        in_whole=sorted(name for name in changed if not compared[name].in_part),
        removed=sorted(before.keys() - after.keys()),
        files=sorted(files),
        settings=settings,
        nbytes=len(header) + to_write,
        model_nbytes=sum(stored.nbytes for stored in after.values()),
    )
    if len(header) > longest_header(before):
        raise UserError(
            f"{tuned} has so many tensors that {base} has not that no delta of it could be read."
        )
    if result.nbytes > result.model_nbytes and not force:
        raise UserError(
            f"The delta would take {result.nbytes:,} bytes, and {tuned} takes "
            f"{result.model_nbytes:,}: {result.changed_fraction:.2%} of its entries changed. Share "
            "the model itself, or write the delta with --force."
        )
    with whole(output) as part, part.open("wb") as file:
        file.write(header)
        for key, spec in specs.items():
            written = 0
            for block in pieces[key].blocks():
                file.write(block)
                written += block.nbytes
                if on_progress is not None:
                    on_progress(block.nbytes, to_compare + to_write)
            if written != bytes_of(*spec):
                raise UserError(f"{tuned} changed while it was read.")
    return result


def _read(path: Path) -> dict[str, Stored]:
    if adapter := find_adapter(path):
        raise UserError(
            f"{adapter} is an adapter, which is a small file already. For a delta of the merged "
            "model type axolotl merge-lora CONFIG.yml first, with the config that trained it, and "
            "name the folder merged in its output_dir."
        )
    tensors = read_tensors(path)
    if is_delta(path, tensors):
        raise UserError(f"{path} is a delta. Name the model that axolotl gmt apply makes of it.")
    return tensors


def _files(tensors: Mapping[str, Stored]) -> set[Path]:
    return {stored.file.resolve() for stored in tensors.values()}


def _compare(before: Stored | None, after: Stored | None) -> _Compared:
    if before is None or after is None or _spec(before) != _spec(after):
        changed = after.entries if after else 0
        return _Compared(before and _entry(before), after and _entry(after), changed, False)
    hashes = hashlib.sha256(), hashlib.sha256()
    changed, has_nan = 0, False
    for start, stop in before.windows():
        words = before.read_words(start, stop), after.read_words(start, stop)
        for each, read in zip(hashes, words, strict=True):
            each.update(read)
        new = words[1][words[0] != words[1]]
        changed += new.size
        if after.dtype in FLOATS:
            has_nan |= bool(np.isnan(new.view(FLOATS[after.dtype])).any())
    base, tuned = (_entry(after, each.hexdigest()) for each in hashes)
    if after.words != after.entries and changed:  # Bytes were compared that hold several entries.
        changed = after.entries
    in_part = changed * (_index_bytes(after) + after.word.itemsize) < after.nbytes
    # Serving engines take no NaN among the values: it stands there for what did not change.
    return _Compared(base, tuned, changed, in_part and after.dtype in FLOATS and not has_nan)


def _spec(stored: Stored) -> Spec:
    return stored.dtype, stored.shape


def _entry(stored: Stored, sha256: str | None = None) -> Entry:
    return Entry(dtype=stored.dtype, shape=stored.shape, sha256=sha256 or stored.sha256())


def _index_bytes(stored: Stored) -> int:
    return bytes_of(index_dtype(stored.entries), (1,))


def _pieces(
    before: Mapping[str, Stored],
    after: Mapping[str, Stored],
    compared: Mapping[str, _Compared],
    files: Mapping[str, Stored],
) -> dict[str, _Piece]:
    pieces = {}
    for name, stored in after.items():
        base, tuned, changed, in_part = compared[name]
        if base == tuned:
            continue
        if not in_part:
            pieces[VALUES + name] = _Piece(_spec(stored), stored.blocks)
            continue
        pair, dtype = (before[name], stored), index_dtype(stored.entries)
        pieces[INDICES + name] = _Piece((dtype, (changed,)), partial(_new_indices, *pair))
        pieces[VALUES + name] = _Piece((stored.dtype, (changed,)), partial(_new_values, *pair))
    for name, stored in files.items():
        pieces[FILES + name] = _Piece(_spec(stored), stored.blocks)
    return pieces


def _new_indices(before: Stored, after: Stored) -> Iterator[np.ndarray]:
    dtype = f"<i{_index_bytes(after)}"
    for start, stop in after.windows():
        differs = before.read_words(start, stop) != after.read_words(start, stop)
        yield (np.flatnonzero(differs) + start).astype(dtype)


def _new_values(before: Stored, after: Stored) -> Iterator[np.ndarray]:
    for start, stop in after.windows():
        words = after.read_words(start, stop)
        yield words[before.read_words(start, stop) != words]


def _metadata(
    compared: Mapping[str, _Compared],
    files: Mapping[str, Stored],
    settings: Mapping[str, object],
) -> dict[str, str]:
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "base": encoded_entries({name: c.base for name, c in compared.items() if c.base}),
        "tuned": encoded_entries({name: c.tuned for name, c in compared.items() if c.tuned}),
        "files": json.dumps({name: stored.sha256() for name, stored in files.items()}),
    }
    return metadata | ({"gmt": json.dumps(settings)} if settings else {})


def _changed_files(base: Path, tuned: Path) -> dict[str, Stored]:
    """The files of the tuned model, other than weights, that are not byte for byte the base's."""
    files = {}
    for name in CONFIG_FILES:
        old, new = base / name, tuned / name
        if new.is_file() and not (old.is_file() and filecmp.cmp(old, new, shallow=False)):
            files[name] = Stored(new, name, "U8", (new.stat().st_size,), 0)
    return files


def _settings(tuned: Path) -> dict[str, object]:
    try:
        return read_log(find_state(tuned)).settings if tuned.is_dir() else {}
    except UserError:  # Whatever is wrong with a log, the weights are those.
        return {}
