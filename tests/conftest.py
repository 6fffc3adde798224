"""A toy model, its tokenizer and data, and one Axolotl run over them in this process."""

from __future__ import annotations

import json
import os

# Before axolotl or transformers are imported: no telemetry, no hub, no GPU.
os.environ.update(AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.gpu_day.toy_model import write_toy_model


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama of two layers with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("toy_model")
    write_toy_model(folder, hidden=32, tied=False)
    return folder


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture(scope="session")
def sft_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "sft.jsonl"
    rows = [
        {"messages": [_turn("user", f"What is {i} + {i + 1}?"), _turn("assistant", f"{2 * i + 1}")]}
        for i in range(64)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="session")
def preference_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    rows = [
        {
            "messages": [_turn("user", f"What is {i} + {i + 1}?")],
            "chosen": _turn("assistant", f"{2 * i + 1}"),
            "rejected": _turn("assistant", f"{2 * i}"),
        }
        for i in range(64)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="session")
def sft_yaml(
    toy_model: Path, sft_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A plain SFT config without a word of GMT; prepared data is shared, to save time."""
    return {
        "dataset_prepared_path": str(tmp_path_factory.mktemp("prepared")),
        "base_model": str(toy_model),
        "datasets": [
            {
                "path": str(sft_data),
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
            }
        ],
        "sequence_len": 64,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "warmup_steps": 0,
        "logging_steps": 1,
        "seed": 7,
        "bf16": False,
        "tf32": False,
        "save_strategy": "steps",
        "save_steps": 100,
        "eval_strategy": "no",
        "val_set_size": 0,
        "dataset_num_proc": 1,
        "attn_implementation": "eager",
    }


@pytest.fixture(scope="session")
def dpo_yaml(sft_yaml: dict[str, Any], preference_data: Path) -> dict[str, Any]:
    """A plain DPO config without a word of GMT."""
    return {
        **sft_yaml,
        "rl": "dpo",
        "datasets": [
            {
                "path": str(preference_data),
                "ds_type": "json",
                "type": "chat_template.default",
                "field_messages": "messages",
                "field_chosen": "chosen",
                "field_rejected": "rejected",
            }
        ],
    }


@pytest.fixture(scope="session")
def orpo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "orpo.jsonl"
    rows = [
        {
            "chosen": [_turn("user", f"{i} + 1?"), _turn("assistant", f"{i + 1}")],
            "rejected": [_turn("user", f"{i} + 1?"), _turn("assistant", f"{i}")],
        }
        for i in range(64)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="session")
def kto_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "kto.jsonl"
    rows = [
        {"instruction": f"{i} + 1?", "completion": f"{i + i % 2}", "label": bool(i % 2)}
        for i in range(64)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@dataclass
class Run:
    """What an Axolotl run left behind."""

    output: Path
    weights: dict[str, Tensor]
    logs: list[dict[str, float]]
    optimizer: Optimizer
    callbacks: list[object]
    config: Any
    gradients: list[dict[str, Tensor]]
    """Of each step, before the optimizer and so GMT saw them."""
    masked: list[dict[str, Tensor]]
    """Of each step, as the optimizer left them."""

    @property
    def kept_fractions(self) -> list[float]:
        return [log["gmt/kept_fraction"] for log in self.logs if "gmt/kept_fraction" in log]


RunAxolotl = Callable[..., Run]


@pytest.fixture
def run_axolotl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunAxolotl]:
    """Runs ``axolotl train`` on a config in this process; keys given as keywords replace its."""
    import axolotl.train
    from axolotl.cli.train import do_cli
    from axolotl.integrations.base import PluginManager
    from transformers import TrainerCallback

    monkeypatch.setattr("sys.argv", ["axolotl"])
    runs = 0
    gradients: list[dict[str, Tensor]] = []
    masked: list[dict[str, Tensor]] = []
    trainers: list[Any] = []

    class Recorder(TrainerCallback):
        """Copies each step's gradients before and after the optimizer sees them."""

        def on_pre_optimizer_step(
            self, *args: Any, model: torch.nn.Module, optimizer: Optimizer, **kwargs: Any
        ) -> None:
            gradients.append(self.copy(model, optimizer))

        def on_optimizer_step(
            self, *args: Any, model: torch.nn.Module, optimizer: Optimizer, **kwargs: Any
        ) -> None:
            masked.append(self.copy(model, optimizer))

        @staticmethod
        def copy(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
            # Axolotl's muon leaves the norms out.
            stepped = {p for group in optimizer.param_groups for p in group["params"]}
            return {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter in stepped and parameter.grad is not None
            }

    original = axolotl.train.setup_model_and_trainer

    def setup(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        trainers.append(result[0])
        trainers[-1].add_callback(Recorder())
        return result

    monkeypatch.setattr(axolotl.train, "setup_model_and_trainer", setup)

    def run(config: dict[str, Any], **changes: Any) -> Run:
        from safetensors.torch import load_file

        nonlocal runs
        runs += 1
        folder = tmp_path / f"run{runs}"
        folder.mkdir()
        settings = {
            **config,
            "output_dir": str(folder / "out"),
            **changes,
        }
        file = folder / "config.yml"
        file.write_text(
            yaml.safe_dump({key: value for key, value in settings.items() if value is not None})
        )
        gradients.clear()
        masked.clear()
        PluginManager.get_instance().plugins.clear()
        torch.manual_seed(0)
        do_cli(str(file))
        trainer = trainers.pop()
        output = Path(settings["output_dir"])
        weights = {
            name: tensor
            for part in output.glob("*.safetensors")
            for name, tensor in load_file(part).items()
        }
        optimizer = trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return Run(
            output=output,
            weights=weights,
            logs=trainer.state.log_history,
            optimizer=optimizer,
            callbacks=list(trainer.callback_handler.callbacks),
            config=PluginManager.get_instance().cfg,
            gradients=list(gradients),
            masked=list(masked),
        )

    yield run
    PluginManager.get_instance().plugins.clear()
