"""What one mask step sends between ranks for a 7B Llama under FSDP2: collectives and bytes.

The payload depends on the number of thresholds and on the dtype, not on the size of the tensors,
so each tensor of the model stands here as a small one of the same name.

    torchrun --nproc-per-node 2 benchmarks/collective_bytes.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from axolotl_gmt import GMTConfig, GradientMasker

LAYER = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{index}.{name}" for index in range(32) for name in LAYER),
    "model.norm.weight",
    "lm_head.weight",
]


def measure(granularity: str, dtype: torch.dtype) -> tuple[int, int]:
    """Collectives and payload bytes of one step on this rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = {}
    for name in NAMES:
        values = distribute_tensor(torch.randn(16).to(dtype), mesh, [Shard(0)])
        parameters[name] = nn.Parameter(values)
        parameters[name].grad = values.clone()
    optimizer = torch.optim.SGD(parameters.values())
    config = GMTConfig.model_validate({"granularity": granularity})
    GradientMasker(parameters.items(), config).attach(optimizer)
    payloads: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, **settings: object) -> object:
        payloads.append(tensor.nbytes)
        return all_reduce(tensor, **settings)

    dist.all_reduce = counted
    try:
        optimizer.step()
    finally:
        dist.all_reduce = all_reduce
    return len(payloads), sum(payloads)


def main() -> None:
    """Print the table on rank 0."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dist.init_process_group("gloo")
    table = Table(
        "Granularity",
        "Gradients",
        "All-reduces",
        "Payload (bytes)",
        title=f"One mask step, 7B Llama ({len(NAMES)} tensors), FSDP2 on {dist.get_world_size()}",
    )
    for granularity in ("tensor", "layer", "global"):
        for dtype in (torch.bfloat16, torch.float32):
            calls, size = measure(granularity, dtype)
            table.add_row(granularity, str(dtype).removeprefix("torch."), str(calls), f"{size:,}")
    if dist.get_rank() == 0:
        Console(width=90).print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
