"""Saved weights, read a few rows at a time: whole models and PEFT's LoRA adapters in safetensors.

Knows files and their tensors, nothing of how two checkpoints are compared. Numpy alone reads them:
importing torch takes more memory than all the rest, and safe_open either maps what it reads into
memory or reads whole tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, BeforeValidator, ValidationError

from axolotl_gmt.errors import UserError

# Safetensors' dtypes and how numpy reads them; it has no bfloat16.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BUFFERS = frozenset({"I64", "BOOL"})  # Position ids and counters; quantised weights use others.

_SINGLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_ADAPTER_CONFIG, _ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"

# What PEFT's wrappers add to the name of a parameter.
_WRAPPER = re.compile(
    r"^base_model\.model\.|\.base_layer(?=\.)|\.modules_to_save(\.default)?(?=\.)"
)
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<matrix>[AB])(\.weight)?$")
# Settings under which the change of a weight is not scale * B @ A.
_OTHER_METHODS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "lora_bias": "LoRA with a bias",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on parameters",
    "trainable_token_indices": "trainable tokens",
}
# These start from another base: what they take out of it is not in the adapter.
_REPLACES_BASE = re.compile("pissa|olora|corda|loftq|lora_ga")


class Stored(NamedTuple):
    """Where a tensor is, its dtype in safetensors' words (``BF16``), and its shape."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Of the tensor seen as a matrix: its last dimension, and 1 if it is a vector."""
        return self.shape[-1] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Checkpoint:
    """The floating-point tensors of one checkpoint by name, and the names of its other tensors."""

    path: Path
    tensors: Mapping[str, Stored]
    buffers: frozenset[str]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of a tensor, seen as a matrix of shape [entries / columns, columns].

        Returns:
            Float64 if that is the tensor's dtype, else float32, which holds the others exactly.
        """
        stored = self.tensors[name]
        count = stored.entries if stop is None else (stop - start) * stored.columns
        dtype = np.dtype(_FLOATS[stored.dtype])
        offset = stored.offset + start * stored.columns * dtype.itemsize
        try:
            raw = np.fromfile(stored.file, dtype, count, offset=offset)
        except OSError as error:
            raise UserError(f"{stored.file} cannot be read: {error.strerror}.") from error
        if raw.size < count:
            raise UserError(f"{stored.file} became shorter while it was read.")
        if stored.dtype == "BF16":  # The upper half of a float32.
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        precise = np.promote_types(raw.dtype, np.float32)
        return raw.astype(precise, copy=False).reshape(-1, stored.columns)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 or float64 to the numbers of one of safetensors' dtypes, ties to even.

    What is too large becomes infinite, as it does in torch; numpy may warn of it.

    Returns:
        Float64 if that is ``dtype``, else float32.
    """
    if dtype == "F64":
        return values.astype(np.float64)
    values = values.astype(np.float16 if dtype == "F16" else np.float32).astype(np.float32)
    if dtype != "BF16":
        return values
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(values), values, rounded.view(np.float32))


# PEFT's rule: a pattern is a regular expression for the end of the module's path.
_EndOfPath = Annotated[
    re.Pattern[str],
    BeforeValidator(lambda text: rf"(.*\.)?({text})$" if isinstance(text, str) else text),
]


class _LoraSettings(BaseModel):
    """The part of adapter_config.json that says how large the change of a weight is."""

    peft_type: str
    lora_alpha: float
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    alpha_pattern: dict[_EndOfPath, float] = {}
    init_lora_weights: bool | str | None = True


class Lora(NamedTuple):
    """The two matrices that change one weight by scale * B @ A, or by its transpose."""

    a: str
    b: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its own tensors, under the names of the model's parameters, and its config.

    Modules that were saved whole (``modules_to_save``) are tensors beside the LoRA matrices.
    """

    matrices: Checkpoint
    config: dict[str, object]

    @property
    def path(self) -> Path:
        """The adapter's folder."""
        return self.matrices.path

    @cached_property
    def loras(self) -> dict[str, Lora]:
        """The LoRA matrices of each weight that has some, by the weight's name.

        Raises:
            UserError: If the adapter's method is not LoRA as Hu et al. wrote it.
        """
        settings = self._settings()
        pairs: dict[str, dict[str, re.Match[str]]] = {}
        for name in self.matrices.tensors:
            if match := _LORA.match(name):
                pairs.setdefault(match["module"], {})[match["matrix"]] = match
            elif ".lora_" in name or ".token_adapter." in name:
                raise UserError(
                    f"{self.path}: {name} is not part of plain LoRA. {_merge_first(self.path)}"
                )
        loras = {}
        for module, pair in pairs.items():
            if len(pair) != 2:
                raise UserError(f"{self.path}: {module} has one LoRA matrix of its two.")
            loras[f"{module}.weight"] = self._lora(module, pair["A"], pair["B"], settings)
        return loras

    def _lora(
        self, module: str, a: re.Match[str], b: re.Match[str], settings: _LoraSettings
    ) -> Lora:
        shapes = [self.matrices.tensors[match.string].shape for match in (a, b)]
        if [len(shape) for shape in shapes] != [2, 2] or not 0 < shapes[0][0] == shapes[1][1]:
            raise UserError(
                f"{self.path}: the LoRA matrices of {module} have the shapes {list(shapes[0])} and "
                f"{list(shapes[1])}, not [r, in] and [out, r]. Adapters saved under DeepSpeed "
                "ZeRO-3 or FSDP without gathering their shards look like this."
            )
        rank = shapes[0][0]
        patterns = (
            alpha for pattern, alpha in settings.alpha_pattern.items() if pattern.match(module)
        )
        alpha = next(patterns, settings.lora_alpha)
        scale = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
        return Lora(a.string, b.string, scale, settings.fan_in_fan_out or bool(a["embedding"]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight that a pair of LoRA matrices changes."""
        lora = self.loras[name]
        shape = self.matrices.tensors[lora.b].shape[0], self.matrices.tensors[lora.a].shape[1]
        return shape[::-1] if lora.transposed else shape

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Two matrices in float32 and a scale: their scaled product is the change of a weight."""
        lora = self.loras[name]
        a, b = self.matrices.rows(lora.a), self.matrices.rows(lora.b)
        return (a.T, b.T, lora.scale) if lora.transposed else (b, a, lora.scale)

    def _settings(self) -> _LoraSettings:
        file = self.path / _ADAPTER_CONFIG
        peft_type = self.config.get("peft_type")
        if peft_type != "LORA":
            raise UserError(
                f"{file}: peft_type is {peft_type!r}, and only LORA can be added to a base "
                f"entry by entry. {_merge_first(self.path)}"
            )
        try:
            settings = _LoraSettings.model_validate(self.config)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{file}: {key}: {first['msg']}.") from error
        for key, method in _OTHER_METHODS.items():
            if self.config.get(key):
                raise UserError(
                    f"{file}: {key} is set: {method} is not plain LoRA. {_merge_first(self.path)}"
                )
        start = settings.init_lora_weights
        if isinstance(start, str) and _REPLACES_BASE.match(start.lower()):
            raise UserError(
                f"{file}: init_lora_weights is {start!r}, which changes the base model before "
                f"training. {_merge_first(self.path)}"
            )
        return settings


def _merge_first(adapter: Path) -> str:
    return (
        f"Merge {adapter} into its base, with axolotl merge-lora, and name the merged model "
        "instead."
    )


def read_checkpoint(path: Path) -> Checkpoint | Adapter:
    """Read which tensors a checkpoint holds, but not yet the tensors.

    Args:
        path: A folder with ``model.safetensors``, with shards and their index, or with a PEFT
            adapter; or one ``.safetensors`` file.

    Raises:
        UserError: If there is none, or it is incomplete, damaged or quantised.
    """
    if path.name == _ADAPTER_FILE and (path.parent / _ADAPTER_CONFIG).is_file():
        path = path.parent
    if path.is_file():
        return _checkpoint(path, _read_file(path))
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist. A model of the hub must be downloaded first: "
            "hf download NAME prints its folder."
        )
    if (path / _ADAPTER_CONFIG).is_file():
        return _read_adapter(path)
    if (path / _SINGLE_FILE).is_file():
        return _checkpoint(path, _read_header(path / _SINGLE_FILE))
    if (path / _INDEX_FILE).is_file():
        return _checkpoint(path, _read_shards(path))
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(_why_no_weights(path, files))
    return _checkpoint(path, _read_header(files[0]))


def _read_file(path: Path) -> dict[str, Stored]:
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is not a .safetensors file. Other formats must be converted first: load the "
            "model with Transformers and save it with save_pretrained."
        )
    return _read_header(path)


def _read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # Checks the header, and that the file is whole.
            pass
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(size))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is incomplete, damaged or not readable ({error}).") from error
    header.pop("__metadata__", None)
    return {
        name: Stored(file, 8 + size + entry["data_offsets"][0], entry["dtype"], (*entry["shape"],))
        for name, entry in header.items()
    }


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
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index} has no weight_map from tensor names to file names.")
    files = {file: folder / file for file in sorted(set(places.values()))}
    if missing := [file for file, shard in files.items() if not shard.is_file()]:
        raise UserError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}."
        )
    headers = {file: _read_header(shard) for file, shard in files.items()}
    for name, file in places.items():
        if name not in headers[file]:
            raise UserError(f"{index} says that {file} holds {name}, but it does not.")
    return {name: headers[file][name] for name, file in places.items()}


def _read_adapter(folder: Path) -> Adapter:
    config = _read_json(folder / _ADAPTER_CONFIG)
    file = folder / _ADAPTER_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} has an {_ADAPTER_CONFIG} but no {_ADAPTER_FILE}. An adapter in another "
            "format must be loaded with PEFT and saved with save_pretrained."
        )
    tensors = {_WRAPPER.sub("", key): stored for key, stored in _read_header(file).items()}
    return Adapter(_checkpoint(folder, tensors), config)


def _read_json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object.")
    return content


def _checkpoint(path: Path, tensors: Mapping[str, Stored]) -> Checkpoint:
    for name, stored in tensors.items():
        if stored.dtype not in _FLOATS.keys() | _BUFFERS:
            raise UserError(
                f"{path}: {name} is stored as {stored.dtype}: quantised weights have no entries "
                "to compare. Name a checkpoint in BF16, FP16 or FP32."
            )
    floats = {name: stored for name, stored in tensors.items() if stored.dtype in _FLOATS}
    if not floats:
        raise UserError(f"{path} holds no floating-point tensor.")
    return Checkpoint(path, floats, frozenset(tensors.keys() - floats.keys()))
