"""Deltas in the slowest and plainest way: whole files in memory, one entry after the other.

A checkpoint is a mapping of names to what safetensors' own reader says: dtype, shape and bytes.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import deserialize, safe_open

BITS = {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "BF16": 16, "BOOL": 8}
BITS |= {
    f"{kind}{bits}": bits for kind in "IUF" for bits in (8, 16, 32, 64) if (kind, bits) != ("F", 8)
}
BITS |= {f"F8_{form}": 8 for form in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}
WEIGHTS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Raw(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def entries(self) -> list[bytes]:
        """The bytes of each entry, for dtypes whose entries take whole bytes."""
        size = BITS[self.dtype] // 8
        return [self.data[i : i + size] for i in range(0, len(self.data), size)]


Checkpoint = dict[str, Raw]


def write_file(file: Path, tensors: Checkpoint, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, in the order of its specification."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        end = len(data) + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [len(data), end],
        }
        data += tensor.data
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_file(file: Path) -> Checkpoint:
    return {
        name: Raw(each["dtype"], tuple(each["shape"]), bytes(each["data"]))
        for name, each in deserialize(file.read_bytes())
    }


def read_folder(folder: Path) -> Checkpoint:
    """All tensors of a folder's files, each of which has to be where its index says."""
    files = {file.name: read_file(file) for file in folder.glob("*.safetensors")}
    tensors = {name: raw for each in files.values() for name, raw in each.items()}
    assert len(tensors) == sum(map(len, files.values())), "a tensor is there twice"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = json.loads(index.read_text())["weight_map"]
        assert places == {name: file for file, each in files.items() for name in each}
    else:
        assert files.keys() == {"model.safetensors"}
    return tensors


def changed_entries(base: Raw, tuned: Raw) -> list[int]:
    """Flat indices of the entries whose bits differ; of tensors of one dtype and shape."""
    pairs = zip(base.entries, tuned.entries, strict=True)
    return [index for index, (before, after) in enumerate(pairs) if before != after]


def has_nan(dtype: str, data: bytes) -> bool:
    values = torch.frombuffer(bytearray(data), dtype=WEIGHTS[dtype]) if data else torch.zeros(0)
    return any(math.isnan(value) for value in values.tolist())


def expected_form(base: Raw | None, tuned: Raw) -> list[int] | None:
    """The indices that a delta has of a tensor that changed; None where it has the tensor whole."""
    if base is None or base[:2] != tuned[:2] or tuned.dtype not in WEIGHTS:
        return None
    indices = changed_entries(base, tuned)
    new = b"".join(tuned.entries[index] for index in indices)
    if len(new) + 4 * len(indices) >= len(tuned.data) or has_nan(tuned.dtype, new):
        return None
    return indices


def apply_delta(base: Checkpoint, delta: Path) -> Checkpoint:
    """The tuned model, by the description of the file alone."""
    tensors = read_file(delta)
    with safe_open(delta, framework="numpy") as file:
        names = json.loads(file.metadata()["tuned"])
    tuned = {}
    for name in names:
        if f"indices/{name}" in tensors:
            entries = base[name].entries
            indices = tensors[f"indices/{name}"]
            for index, value in zip(
                indices.entries, tensors[f"values/{name}"].entries, strict=True
            ):
                entries[int.from_bytes(index, "little")] = value
            tuned[name] = base[name]._replace(data=b"".join(entries))
        else:
            tuned[name] = tensors.get(f"values/{name}") or base[name]
    return tuned


class CheckpointWeightPatch(NamedTuple):
    """The fields of vLLM's class of this name, as its documentation has them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def load_checkpoint_weight_patches(
    model: torch.nn.Module, patches: list[CheckpointWeightPatch]
) -> set[str]:
    """What vLLM's function of this name asks of patches, and does, as its documentation says.

    One call has patches of one kind. Those with indices hold floats, of which none is NaN, at
    places that are in range and unlike.
    """
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    assert len({patch.indices is None for patch in patches}) <= 1
    for name, shape, dtype, values, indices in patches:
        old = parameters[name].data
        assert (old.shape, old.dtype) == (shape, dtype)
        assert values.ndim == 1
        if indices is None:
            old.copy_(values.to(dtype).view(shape))
            continue
        assert dtype.is_floating_point
        assert indices.dtype in (torch.int32, torch.int64)
        assert indices.shape == values.shape
        assert not values.isnan().any()
        places = indices.tolist()
        assert len(set(places)) == len(places)
        assert all(0 <= place < old.numel() for place in places)
        flat = old.view(-1)
        for place, value in zip(places, values, strict=True):
            flat[place] = value
    return {patch.name for patch in patches}
