"""FSDP2 training with checkpoints, for torchrun: ``fsdp2_resume.py FOLDER [STEP]``.

Trains to 6 steps from the newest whole checkpoint in FOLDER, if any, and writes the whole model to
FOLDER/final.pt. Rank 0 is killed by SIGKILL after STEP steps if given.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from axolotl_gmt import GMTConfig, GradientMasker
from tests.distributed.worker import Toy, batch, full, loss_of

STEPS, SAVE_EVERY = 6, 2


def train(folder: Path, kill_after: int | None) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Toy()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = GMTConfig(mask_ratio=0.7, granularity="layer", mask_interval=4, hold=True)
    masker = GradientMasker(model.named_parameters(), config)
    masker.attach(optimizer)
    state_file = f"masker-{dist.get_rank()}.pt"
    start = 0
    if checkpoints := sorted(folder.glob("step-*")):
        weights, moments = get_state_dict(model, optimizer)
        state_dict_loader.load(
            {"model": weights, "optimizer": moments}, checkpoint_id=checkpoints[-1]
        )
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        masker.load_state_dict(torch.load(checkpoints[-1] / state_file))
        start = int(checkpoints[-1].name.removeprefix("step-"))
    for step in range(start + 1, STEPS + 1):
        optimizer.zero_grad()
        loss_of(model(batch(step, dist.get_rank()))).backward()
        optimizer.step()
        if step == kill_after and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if step % SAVE_EVERY == 0:
            weights, moments = get_state_dict(model, optimizer)
            unfinished = folder / f"unfinished-{step}"
            state_dict_saver.save(
                {"model": weights, "optimizer": moments}, checkpoint_id=unfinished
            )
            torch.save(masker.state_dict(), unfinished / state_file)
            dist.barrier()
            if dist.get_rank() == 0:
                unfinished.rename(folder / f"step-{step}")
            dist.barrier()
    whole = {name: full(parameter) for name, parameter in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(whole, folder / "final.pt")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, *step = sys.argv[1:]
    train(Path(folder), int(step[0]) if step else None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
