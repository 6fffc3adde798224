"""What the core loads in a fresh process, which the contracts on imports cannot see."""

from __future__ import annotations

import subprocess
import sys

STEP = """
import sys
import torch
import axolotl_gmt.masking
from axolotl_gmt import GMTConfig, GradientMasker

model = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters())
masker = GradientMasker(model.named_parameters(), GMTConfig(granularity="layer"))
masker.attach(optimizer)
model(torch.ones(8)).sum().backward()
optimizer.step()
assert masker.statistics()
"""
OUTSIDE = ["axolotl", "transformers", "matplotlib", "click", "rich", "jinja2", "deepspeed"]
LOADED = f"print([name for name in {OUTSIDE} + {{rooms}} if name in sys.modules])"


def loaded(code: str, rooms: list[str]) -> str:
    command = f"{code}\n{LOADED.format(rooms=rooms)}"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_a_mask_step_loads_no_trainer_no_picture_and_no_terminal() -> None:
    rooms = [f"axolotl_gmt.{room}" for room in ("integrations", "report", "tools", "cli")]
    assert loaded(STEP, [*rooms, "axolotl_gmt.gradients.zero"]) == "[]"


def test_a_config_loads_no_torch_until_a_criterion_is_looked_up() -> None:
    code = "import sys\nfrom axolotl_gmt import GMTConfig\nGMTConfig.model_json_schema()"
    assert loaded(code, ["torch"]) == "[]"
