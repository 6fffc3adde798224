"""A run that is killed and resumed ends with the weights of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distributed.test_sharding import said, torchrun


@pytest.mark.parametrize("processes", [1, 2], ids=["one-process", "ddp-on-2"])
def test_axolotl(processes: int, sft_yaml: dict[str, Any], tmp_path: Path) -> None:
    def train(name: str, kill_after: int = 0, **changes: Any) -> int:
        file = tmp_path / f"{name}.yml"
        settings = {
            **sft_yaml,
            "plugins": ["axolotl_gmt"],
            "gmt_granularity": "layer",
            "max_steps": 4,
            "save_steps": 2,
            "gradient_accumulation_steps": 1,
            "output_dir": str(tmp_path / name),
            # In two processes the run goes on with a mask of before it was killed, too.
            **({"gmt_mask_interval": 3, "gmt_hold": True} if processes == 2 else {}),
            **changes,
        }
        file.write_text(yaml.safe_dump(settings))
        options = ["--kill-after", str(kill_after)] if kill_after else []
        result = torchrun(processes, "tests.distributed.axolotl_on_cpu", str(file), *options)
        assert kill_after or result.returncode == 0, said(result)
        return result.returncode

    train("whole")
    assert train("killed", 3) != 0
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    train("killed", auto_resume_from_checkpoints=True)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(tmp_path / "killed" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


def test_fsdp2(tmp_path: Path) -> None:
    module = "tests.distributed.fsdp2_resume"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert torchrun(2, module, str(whole)).returncode == 0
    assert torchrun(2, module, str(killed), "3").returncode != 0
    assert not (killed / "final.pt").exists()
    assert torchrun(2, module, str(killed)).returncode == 0
    expected, resumed = torch.load(whole / "final.pt"), torch.load(killed / "final.pt")
    assert expected.keys() == resumed.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, resumed[name]), name
