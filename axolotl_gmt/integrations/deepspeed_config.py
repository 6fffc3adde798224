"""Which DeepSpeed configs GMT can be exact under. Knows the keys of DeepSpeed's JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# They send something else than gradients between ranks, or turn them into updates beforehand.
_REFUSED_OPTIMIZERS = {"onebitadam", "zerooneadam", "onebitlamb", "muon"}


def check_deepspeed_config(config: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed config under which GMT cannot be exact.

    Args:
        config: What DeepSpeed's JSON file holds.

    Raises:
        ValueError: Naming the key in that file, its value and what to set instead.
    """
    zero = config.get("zero_optimization") or {}
    optimizer = str((config.get("optimizer") or {}).get("type", "")).lower()
    offload = (zero.get("offload_optimizer") or {}).get("device")
    if zero.get("stage") not in (1, 2, 3):
        key, value, fix = "zero_optimization.stage", zero.get("stage"), "Set 1, 2 or 3."
    elif offload == "nvme":
        key, value, fix = "zero_optimization.offload_optimizer.device", offload, "Set cpu."
    elif optimizer in _REFUSED_OPTIMIZERS:
        key, value, fix = "optimizer.type", optimizer, "Set AdamW, or remove optimizer."
    elif zero.get("mics_shard_size", -1) > 0:
        key, value, fix = "zero_optimization.mics_shard_size", zero["mics_shard_size"], "Remove it."
    elif config.get("tensor_parallel") or config.get("expert_parallel"):
        key = "tensor_parallel" if config.get("tensor_parallel") else "expert_parallel"
        value, fix = config[key], "Remove it."
    elif zero.get("round_robin_gradients"):
        key, value, fix = "zero_optimization.round_robin_gradients", True, "Set false."
    elif (zero.get("offload_optimizer") or {}).get("super_offload"):
        key = "zero_optimization.offload_optimizer.super_offload"
        value, fix = True, "Set false."
    elif zero.get("zenflow"):
        key, value, fix = "zero_optimization.zenflow", zero["zenflow"], "Remove it."
    elif (config.get("compile") or {}).get("deepcompile"):
        key, value, fix = "compile.deepcompile", True, "Set false."
    else:
        return
    raise ValueError(
        f"deepspeed: GMT cannot choose its mask exactly with {key}: {value!r} of the DeepSpeed "
        f"config. {fix}"
    )
