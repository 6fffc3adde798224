"""Merges a PEFT adapter into its base one layer at a time: a program for a process of its own.

Importing PEFT takes hundreds of megabytes, looks for kernels on the hub and prints; here it does so
offline, into a file, and only where there is an adapter. No model's code is imported: each layer is
made from the shape of its weight, and the adapter's config says nothing of which class to load.

    python -m axolotl_gmt.tools.inspect.merge BASE ADAPTER < names.json > weights

The names are those of weights and biases; the output is their merged values, laid out flat, one
after the other. What is wrong is the last line of stderr.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from axolotl_gmt.tools.checkpoint import read_checkpoint
from axolotl_gmt.tools.inspect.adapter import PREFIX, AdaptedModel, adapt, read_adapter


def main() -> None:
    """Read names from stdin, and write what they are once merged to stdout."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Whatever a library prints must not be taken for weights.
    model = adapt(read_checkpoint(Path(sys.argv[1])), read_adapter(Path(sys.argv[2])))
    try:
        for layer, names in groupby(json.load(sys.stdin), lambda name: name.rpartition(".")[0]):
            merged = merge(model, layer)
            for name in names:
                output.write(memoryview(merged.get_parameter(name).detach().numpy().reshape(-1)))
            output.flush()
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


def merge(model: AdaptedModel, layer: str) -> Any:
    """A module of nothing but one layer, at its place in the model, with the adapter merged.

    Raises:
        ValueError: If the adapter's tensors are not those of its config, or need other layers.
    """
    import torch
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, get_peft_model_state_dict
    from peft import set_peft_model_state_dict as load
    from safetensors import safe_open

    method = str(model.adapter.config.get("peft_type"))
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING.get(method)
    if getattr(tuner_class, "uses_shared_state", True):
        raise ValueError(f"peft_type is {method!r}, which does not change each weight by itself.")
    config = PeftConfig.from_pretrained(str(model.path))
    state = {}
    for stored in model.layers[layer]:
        with safe_open(stored.file, framework="pt") as tensors:
            state[stored.key.removeprefix(PREFIX)] = tensors.get_tensor(stored.key)
    module = _new_layer(model, layer, state, getattr(config, "fan_in_fan_out", False))
    _aim(config, layer, state)
    for part in reversed(layer.split(".")):
        parent = torch.nn.Module()
        parent.add_module(part, module)
        module = parent
    tuner = tuner_class(module, config, "default")
    by_config = get_peft_model_state_dict(tuner.model, save_embedding_layers=False)
    expected, given = _shapes(by_config, layer), _shapes(state, layer)
    if given != expected:
        raise ValueError(f"{layer} has {given}, which would be {expected} by the config.")
    load(tuner.model, state)
    with torch.no_grad():
        return tuner.merge_and_unload()


def _new_layer(model: AdaptedModel, layer: str, state: dict[str, Any], transposed: bool) -> Any:
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    parameters = {}
    for part in ("weight", "bias"):
        if stored := model.tensors.get(f"{layer}.{part}"):
            values = torch.from_numpy(model.unmerged(f"{layer}.{part}"))
            parameters[part] = nn.Parameter(values.reshape(stored.shape), requires_grad=False)
    shape = parameters["weight"].shape
    if len(shape) != 2:
        raise ValueError(f"{layer} is neither linear nor an embedding: its shape is {[*shape]}.")
    with torch.device("meta"):
        if any("embedding" in key[len(layer) :] or "tokens" in key[len(layer) :] for key in state):
            new: nn.Module = nn.Embedding(*shape)
        elif transposed:
            new = Conv1D(shape[1], shape[0])
            parameters.setdefault("bias", nn.Parameter(torch.zeros(shape[1])))
        else:
            new = nn.Linear(shape[1], shape[0], bias="bias" in parameters)
    for part, parameter in parameters.items():
        setattr(new, part, parameter)
    return new


def _aim(config: Any, layer: str, state: dict[str, Any]) -> None:
    """Let a config name the one layer, by its full name and without patterns."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    of_tokens = ["trainable_tokens" in key for key in state]
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, dict):
        tokens = next((tokens[key] for key in tokens if f".{layer}".endswith(f".{key}")), None)
    none = ("modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern")
    settings = dict.fromkeys((*none, "megatron_config")) | {
        "target_modules": DUMMY_TARGET_MODULES if tokens and all(of_tokens) else [layer],
        "trainable_token_indices": {layer: tokens} if tokens and any(of_tokens) else None,
    }
    vars(config).update({key: settings[key] for key in settings.keys() & vars(config).keys()})


def _shapes(state: dict[str, Any], layer: str) -> dict[str, list[int]]:
    return {key.removeprefix(f"{layer}."): [*tensor.shape] for key, tensor in state.items()}


if __name__ == "__main__":
    main()
