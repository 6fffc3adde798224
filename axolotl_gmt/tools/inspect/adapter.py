"""What a PEFT adapter changes in its base: which weights, and what they are once it is merged.

Knows the names that PEFT gives to tensors. The merging is PEFT's own, in a process of its own: see
:mod:`axolotl_gmt.tools.inspect.merge`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, cast

import numpy as np

from axolotl_gmt.errors import UserError
from axolotl_gmt.tools.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    Checkpoint,
    Reader,
    Stored,
    checkpoint_of,
    read_header,
    read_json,
)

PREFIX = "base_model.model."  # Of the tensors' names in an adapter's file.
# What PEFT's wrappers add to the name of a tensor that is stored whole.
_WRAPPER = re.compile(
    rf"^{re.escape(PREFIX)}|\.base_layer(?=\.)|\.modules_to_save(\.default)?(?=\.)"
)
# With these a tensor's name does not say which weight it changes.
_RENAMED = ("layer_replication", "target_parameters")
# The process that merges neither asks the hub for anything nor touches a GPU.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Adapter:
    """An adapter: its config, and all its tensors under the names of the model's parameters."""

    path: Path
    config: dict[str, object]
    tensors: dict[str, Stored]

    @cached_property
    def weights(self) -> Checkpoint:
        """The tensors that are floats."""
        return checkpoint_of(self.path, self.tensors)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's config, and which tensors it holds.

    Raises:
        UserError: If it is incomplete or damaged, or not in safetensors.
    """
    config, file = read_json(folder / ADAPTER_CONFIG), folder / ADAPTER_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} has an {ADAPTER_CONFIG} but no {ADAPTER_FILE}. An adapter in another "
            "format must be loaded with PEFT and saved with save_pretrained."
        )
    tensors = {_WRAPPER.sub("", key): stored for key, stored in read_header(file).items()}
    return Adapter(folder, config, tensors)


@dataclass(frozen=True)
class AdaptedModel:
    """A model and an adapter of it, seen as one checkpoint of merged weights."""

    base: Checkpoint
    adapter: Adapter
    layers: Mapping[str, Sequence[Stored]]
    """The layers that the adapter changes, and its tensors for each."""
    whole: Mapping[str, Stored]
    """Weights that the adapter holds whole. It can change them as well."""

    @property
    def path(self) -> Path:
        """The adapter's folder."""
        return self.adapter.path

    @property
    def buffers(self) -> frozenset[str]:
        """The base's tensors that are no weights."""
        return self.base.buffers

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """The weights; a merged one has the dtype and the shape that it had before."""
        return {**self.base.tensors, **self.whole}

    def unmerged(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The entries of a weight before the adapter changes it, as Checkpoint.read has them."""
        checkpoint = self.adapter.weights if name in self.whole else self.base
        return checkpoint.read(name, start, stop)

    @contextmanager
    def reader(self, names: Sequence[str]) -> Iterator[Reader]:
        """What reads the entries of the tensors of these names, in their order, each once."""
        parts = {f"{layer}.{part}" for layer in self.layers for part in ("weight", "bias")}
        merged = [name for name in names if name in parts]
        if not merged:
            yield self.unmerged
            return
        with tempfile.TemporaryFile() as request, tempfile.TemporaryFile() as errors:
            request.write(json.dumps(merged).encode())
            request.seek(0)
            # Without -P, a file in the working directory could take a library's place.
            command = [sys.executable, "-P", "-m", "axolotl_gmt.tools.inspect.merge"]
            with subprocess.Popen(
                [*command, str(self.base.path), str(self.path)],
                stdin=request,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | _OFFLINE,
            ) as process:
                stream = cast("IO[bytes]", process.stdout)

                def read(name: str, start: int, stop: int) -> np.ndarray:
                    if name not in parts:
                        return self.unmerged(name, start, stop)
                    dtype = self.tensors[name].computed
                    data = stream.read((stop - start) * dtype.itemsize)
                    if len(data) < (stop - start) * dtype.itemsize:
                        raise UserError(self._why_not_merged(process.wait(), errors))
                    return np.frombuffer(data, dtype)

                try:
                    yield read
                finally:
                    process.kill()

    def _why_not_merged(self, status: int, errors: IO[bytes]) -> str:
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().split("\n")
        why = lines[-1] if status == 1 else f"it ended with the status {status}."
        return f"PEFT cannot merge {self.path} layer by layer: {why} {_merge_first(self.path)}"


def adapt(base: Checkpoint, adapter: Adapter) -> AdaptedModel:
    """Say which weights of ``base`` an adapter changes.

    Raises:
        UserError: If it changes one that ``base`` does not have.
    """
    for key in _RENAMED:
        if adapter.config.get(key):
            raise UserError(
                f"{adapter.path / ADAPTER_CONFIG}: {key} is set, so that the names of the "
                f"adapter's tensors do not say what they change. {_merge_first(adapter.path)}"
            )
    saved = adapter.config.get("modules_to_save")
    new = [f".{module}." for module in saved] if isinstance(saved, list) else []
    layers: dict[str, list[Stored]] = {}
    whole: dict[str, Stored] = {}
    for name, stored in adapter.tensors.items():
        if name in adapter.weights.tensors and (
            name in base.tensors or any(module in f".{name}" for module in new)
        ):
            whole[name] = stored
        else:
            layers.setdefault(_layer(name, base, adapter), []).append(stored)
    return AdaptedModel(base, adapter, layers, whole)


def _layer(name: str, base: Checkpoint, adapter: Adapter) -> str:
    layer = name
    while layer := layer.rpartition(".")[0]:
        if f"{layer}.weight" in base.tensors:
            return layer
    raise UserError(
        f"{adapter.path} has {name}, and {base.path} has no weight that it could change. Is it "
        f"the adapter's base model? {_merge_first(adapter.path)}"
    )


def _merge_first(adapter: Path) -> str:
    return (
        f"Merge {adapter} into its base, with axolotl merge-lora, and name the merged model "
        "instead."
    )
