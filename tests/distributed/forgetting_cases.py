"""The loss on a held-out text in several processes: that of one, and the training as it is without.

Run by torchrun: ``forgetting_cases.py CASE``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_gmt import GMTCallback, GMTConfig, GradientMasker
from axolotl_gmt.gradients.shard import plain_name
from axolotl_gmt.integrations.forgetting import mean_loss
from axolotl_gmt.record import FORGETTING_LOSS
from tests.distributed.worker import full
from tests.reference import forgetting_reference

STEPS = 3
CPU = torch.device("cpu")
TEXT = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]


def toy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        attention_dropout=0.2,
    )
    return LlamaForCausalLM(config)


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randint(0, 32, (2, 6), generator=generator)


def expected_loss(weights: dict[str, Tensor]) -> float:
    with torch.random.fork_rng(devices=[]):  # The training draws what it would have drawn.
        model = toy().eval()
    model.load_state_dict(weights)
    return forgetting_reference.mean_loss(model, TEXT, 1024)


class Training:
    """Some steps of a model that is sharded in some way.

    Args:
        model: The model that a trainer's callbacks are given.
        step: Makes a whole step on a batch.
        weights: The whole weights by their plain names.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[[Tensor], None],
        weights: Callable[[], dict[str, Tensor]],
    ) -> None:
        self.model, self.step, self.weights = model, step, weights

    def run(self) -> dict[str, Tensor]:
        """Train without a look at the text."""
        torch.manual_seed(dist.get_rank())
        self.model.train()
        for step in range(STEPS):
            self.step(batch(step))
        return self.weights()

    def run_and_measure(self, precision: float) -> dict[str, Tensor]:
        """Train with a look at the text before, between and after steps, and check each loss."""
        torch.manual_seed(dist.get_rank())
        self.model.train()
        for step in range(STEPS + 1):
            for _ in range(1 + step % 2):
                loss = mean_loss(self.model, TEXT, CPU)
            losses: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(losses, loss)
            assert len(set(losses)) == 1, losses
            assert loss == pytest.approx(expected_loss(self.weights()), rel=precision), step
            assert self.model.training
            if step < STEPS:
                self.step(batch(step))
        return self.weights()


def check(make: Callable[[], Training], precision: float = 1e-6) -> None:
    expected, measured = make().run(), make().run_and_measure(precision)
    assert expected.keys() == measured.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, measured[name]), name


def masked_adamw(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    GradientMasker(model.named_parameters(), GMTConfig(mask_ratio=0.5)).attach(optimizer)
    return optimizer


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): full(parameter) for name, parameter in model.named_parameters()}


def ddp() -> None:
    def make() -> Training:
        model = toy()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = masked_adamw(model)

        def step(ids: Tensor) -> None:
            optimizer.zero_grad()
            wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        return Training(model, step, lambda: whole(model))

    check(make)


def fsdp2(precision: float = 1e-6, **settings: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def make() -> Training:
        model: Any = toy()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, **settings)
        fully_shard(model, mesh=mesh, **settings)
        optimizer = masked_adamw(model)

        def step(ids: Tensor) -> None:
            # A trainer may save the parameters here, or hand them to somebody.
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        return Training(model, step, lambda: whole(model))

    check(make, precision)


def fsdp2_mixed_precision() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    fsdp2(0.02, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def fsdp2_cpu_offload() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False))


def zero(stage: int, **of_zero: Any) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    def make() -> Training:
        model = toy()
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage, **of_zero},
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
            },
        )
        masker = GradientMasker(engine.module.named_parameters(), GMTConfig(mask_ratio=0.5))
        masker.attach(optimizer)

        def step(ids: Tensor) -> None:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()

        def weights() -> dict[str, Tensor]:
            return {
                name: safe_get_full_fp32_param(parameter).clone().view(shapes[name])
                for name, parameter in model.named_parameters()
            }

        return Training(engine.module, step, weights)

    check(make)


def trainer_with_zero_3() -> None:
    """Transformers' Trainer, whose callback measures on every rank, and resumes."""
    from datasets import Dataset
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    rows = [[1 + i % 7, 2 + i % 5, 3 + i % 3, 4] for i in range(32)]

    def trainer(folder: str, tokenizer: Any, **settings: Any) -> Any:
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        args = TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=3,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-2,
            deepspeed={
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )
        return Trainer(
            toy(),
            args,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            callbacks=[GMTCallback(mask_ratio=0.5, **settings)],
        )

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("a b c d e f")
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer(folder))
        losses = []
        for settings in ({}, {"forgetting": str(text)}):
            run = trainer(folder, tokenizer, **settings)
            run.train()
            history = run.state.log_history
            losses.append([log["loss"] for log in history if "loss" in log])
        assert losses[0] == losses[1]
        measured = [
            (log["step"], log[FORGETTING_LOSS]) for log in history if FORGETTING_LOSS in log
        ]
        assert [step for step, _ in measured] == [0, 1, 2, 3]
        assert len({loss for _, loss in measured}) == 4
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, measured)
        assert all(each == measured for each in everyones), everyones


def _tokenizer(folder: str) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"?": 0, **{c: i + 1 for i, c in enumerate("abcdef")}}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = f"{folder}/tokenizer-{dist.get_rank()}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="?").save_pretrained(path)
    return path


CASES: dict[str, Callable[[], None]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2_mixed_precision": fsdp2_mixed_precision,
    "fsdp2_cpu_offload": fsdp2_cpu_offload,
    "zero_2": lambda: zero(2),
    "zero_3": lambda: zero(3, sub_group_size=100, stage3_param_persistence_threshold=0),
    "zero_3_cpu_offload": lambda: zero(3, offload_optimizer={"device": "cpu"}),
    "trainer_with_zero_3": trainer_with_zero_3,
}


def main() -> None:
    torch.set_num_threads(1)
    name = sys.argv[1]
    if "zero" in name:
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    CASES[name]()
    if dist.get_rank() == 0:
        print(f"ok {name} forgetting", flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # As worker.py does.


if __name__ == "__main__":
    main()
