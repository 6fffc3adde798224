"""Masks that stay and weights that hold still, sharded in some way, against one process.

Run by torchrun: ``sparse_cases.py CASE``. The set-ups are those of ``worker.py``. Each step begins
with a new masker that has loaded the state of the last, as a resumed run does.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from axolotl_gmt import GMTConfig, GradientMasker
from axolotl_gmt.gradients.shard import plain_name
from axolotl_gmt.masking.masker import group_name
from tests.distributed import worker
from tests.distributed.worker import CASES, Toy, batch, full, loss_of
from tests.reference.gmt_reference import SparseTraining

STEPS = 5
SETTINGS: tuple[dict[str, Any], ...] = (
    {"mask_interval": 3, "warmup_steps": 1, "hold": True, "granularity": "layer"},
    {"mask_interval": "once", "hold": True, "granularity": "tensor", "mask_ratio": 0.9},
    {"mask_interval": 2, "granularity": "global"},
)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2.0**-7, weight_decay=0.1, foreach=False)


def reference(weights: dict[str, Tensor], config: GMTConfig) -> SparseTraining:
    groups: dict[str, list[str]] = {}
    for name in sorted(weights):
        groups.setdefault(group_name(name, config.granularity), []).append(name)
    return SparseTraining(
        weights,
        list(groups.values()),
        adamw,
        config.mask_ratio,
        config.mask_interval,
        config.warmup_steps,
        config.hold,
    )


def check_steps(
    model: nn.Module, config: Any, granularity: object, backward: Callable[[int], None]
) -> None:
    """In the place of :func:`worker.check_steps`; ``config`` comes in that of a mask ratio."""
    del granularity
    named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    slow = reference({name: full(parameter) for name, parameter in named.items()}, config)
    optimizer = adamw(model.parameters())
    masker = GradientMasker(model.named_parameters(), config)
    for step in range(STEPS):
        state = copy.deepcopy(masker.state_dict())
        masker = GradientMasker(model.named_parameters(), config)
        handle = masker.attach(optimizer)
        masker.load_state_dict(state)
        optimizer.zero_grad()
        backward(step)
        gradients = {name: full(p.grad) for name, p in named.items() if p.grad is not None}
        expected = slow.step(gradients)
        optimizer.step()
        handle.remove()
        for name, parameter in named.items():
            assert parameter.grad is not None
            assert torch.equal(full(parameter.grad), expected[name]), (config, step, name)
            assert torch.equal(full(parameter), slow.weights[name]), (config, step, name)


def every_setting(check: Callable[[Any, Any], None]) -> None:
    for settings in SETTINGS:
        check(GMTConfig(**settings), None)


def zero(stage: int, **of_zero: Any) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    for settings in SETTINGS:
        config = GMTConfig(**settings)
        model, plain = Toy(), Toy()
        names = list(model.named_parameters())
        slow = reference({name: p.detach().clone() for name, p in names}, config)
        groups = [
            {"params": [p for _, p in names if p.dim() > 1]},
            {"params": [p for _, p in names if p.dim() == 1]},
        ]
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=adamw(groups),
            config={
                "train_micro_batch_size_per_gpu": 4,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": stage, **of_zero},
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
            },
        )
        masker = GradientMasker(engine.module.named_parameters(), config)
        for step in range(STEPS):
            state = copy.deepcopy(masker.state_dict())
            masker = GradientMasker(engine.module.named_parameters(), config)
            handle = masker.attach(optimizer)
            masker.load_state_dict(state)
            with torch.no_grad():
                for name, parameter in plain.named_parameters():
                    parameter.copy_(slow.weights[name])
            plain.zero_grad()
            loss_of(plain(batch(step, dist.get_rank()))).backward()
            gradients = {}
            for name, parameter in plain.named_parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                gradients[name] = parameter.grad / dist.get_world_size()
            slow.step(gradients)
            engine.backward(loss_of(engine(batch(step, dist.get_rank()))))
            engine.step()
            handle.remove()
            for name, parameter in names:
                weight = safe_get_full_fp32_param(parameter).view_as(slow.weights[name])
                assert torch.equal(weight, slow.weights[name]), (config, step, name)
        engine.destroy()


ZERO: dict[str, Callable[[], None]] = {
    "zero_1": lambda: zero(1),
    "zero_2": lambda: zero(2),
    "zero_3": lambda: zero(3, sub_group_size=100, stage3_param_persistence_threshold=0),
    "zero_2_cpu_offload": lambda: zero(2, offload_optimizer={"device": "cpu"}),
    "zero_3_cpu_offload": lambda: zero(3, sub_group_size=100, offload_optimizer={"device": "cpu"}),
}


def main() -> None:
    torch.set_num_threads(1)
    name = sys.argv[1]
    if name in ZERO:
        import deepspeed

        deepspeed.init_distributed("gloo")
        ZERO[name]()
    else:
        dist.init_process_group("gloo")
        for attribute, function in (("check_steps", check_steps), ("every_setting", every_setting)):
            setattr(worker, attribute, function)
        CASES[name]()
    if dist.get_rank() == 0:
        print(f"ok {name} sparse", flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # As worker.py does.


if __name__ == "__main__":
    main()
