"""The real ``axolotl train`` in several gloo processes on a CPU, for torchrun.

``axolotl_on_cpu.py CONFIG [--kill-after STEP] [--record FILE]``: trains, kills itself by SIGKILL
after STEP steps, and writes rank 0's gradients, as they are before each optimizer step, to FILE.
Axolotl 0.21 takes for granted that processes mean GPUs; all that is changed for that stands here.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

os.environ.update(
    AXOLOTL_DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    ACCELERATE_USE_CPU="1",
    NCCL_P2P_DISABLE="1",
    CUDA_VISIBLE_DEVICES="",
)

import torch


def no_gpu(*args: Any, **kwargs: Any) -> bool:
    raise AssertionError("no GPU")


torch.set_num_threads(1)
torch.cuda.can_device_access_peer = no_gpu
torch.cuda.is_available = lambda: False

import axolotl.train  # noqa: E402
from axolotl.cli.train import do_cli  # noqa: E402
from axolotl.loaders.model import ModelLoader  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

set_device_map = ModelLoader._set_device_map_config


def set_device_map_to_cpu(loader: Any) -> None:
    set_device_map(loader)
    loader.model_kwargs["device_map"] = {"": "cpu"}


ModelLoader._set_device_map_config = set_device_map_to_cpu


class Kill(TrainerCallback):
    """Ends this process as a lost machine would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Record(TrainerCallback):
    """Writes the gradients of the last step, under their names in the unwrapped model."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            gradients = {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in model.named_parameters()
            }
            torch.save(gradients, self.file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--kill-after", type=int)
    parser.add_argument("--record")
    options = parser.parse_args()
    sys.argv = ["axolotl"]
    setup = axolotl.train.setup_model_and_trainer

    def setup_and_add(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        if options.kill_after:
            result[0].add_callback(Kill(options.kill_after))
        if options.record:
            result[0].add_callback(Record(options.record))
        return result

    axolotl.train.setup_model_and_trainer = setup_and_add
    do_cli(options.config)


if __name__ == "__main__":
    main()
