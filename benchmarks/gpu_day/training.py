"""One run of Axolotl with GMT, and a row on what its log says.

``python -m benchmarks.gpu_day.training RUN --device cuda --folder DIR --json FILE``. The model is
the quickstart's SmolLM2-135M if its package is installed, else a random one; the data are the
quickstart's sums. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from axolotl_gmt.errors import UserError
from axolotl_gmt.files import whole
from axolotl_gmt.record import KEPT_FRACTION
from axolotl_gmt.report.log import find_state, read_log
from axolotl_gmt.tools.quickstart import MODEL_NAME, Folder, find_gguf, prepare
from benchmarks.gpu_day.record import Row, write_rows
from benchmarks.gpu_day.toy_model import write_toy_model

MASK_RATIO = 0.5
STEPS = {"cpu": 3, "cuda": 20}
SEEN_FILE = "seen.json"
"""What :mod:`benchmarks.gpu_day.seen` writes into a run's output folder."""


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        recipe: The quickstart's recipe that it starts from: ``sft`` or ``dpo``.
        distributed: Whether Axolotl is the one rank of a process group.
        changes: Keys of the recipe that are set besides.
    """

    recipe: str
    distributed: bool = False
    changes: Mapping[str, object] = field(default_factory=dict)


RUNS = {
    "sft": Run("sft"),
    "dpo": Run("dpo"),
    "fsdp2": Run(
        "sft",
        distributed=True,
        changes={
            "fsdp_version": 2,
            "fsdp_config": {
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
                "reshard_after_forward": True,
                "state_dict_type": "FULL_STATE_DICT",
            },
        },
    ),
    "zero3": Run(
        "sft",
        distributed=True,
        changes={
            "deepspeed": {
                # DeepSpeed's own CPU optimizer would be compiled first, for which a rented machine
                # may lack what it takes.
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "pin_memory": True},
                    "stage3_gather_16bit_weights_on_model_save": True,
                },
                "bf16": {"enabled": "auto"},
                "gradient_clipping": "auto",
                "gradient_accumulation_steps": "auto",
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
            },
        },
    ),
}


def prepare_folder(parent: Path, device: str) -> tuple[Folder, str]:
    """Write model, data and recipes that are not there yet; returns their folder, the model's name.

    Each model has a folder of its own, so that none is taken for another.
    """
    if device == "cuda":
        try:
            find_gguf()
            folder = Folder(parent / MODEL_NAME)
            prepare(folder)
            return folder, MODEL_NAME
        except UserError as error:
            print(f"A random model takes the place of {MODEL_NAME}: {error}")
    hidden = 512 if device == "cuda" else 64
    folder = Folder(parent / f"random-{hidden}")
    folder.path.mkdir(parents=True, exist_ok=True)
    if not folder.base_model.exists():
        with whole(folder.base_model) as part:
            write_toy_model(part, hidden)
    prepare(folder)  # Leaves the model alone that is there.
    return folder, f"random Llama, {hidden} wide"


def write_config(name: str, folder: Folder, device: str) -> tuple[Path, Path]:
    """Write the YAML of a run; returns the file and the folder that Axolotl will write to."""
    run = RUNS[name]
    recipe = {"sft": folder.sft_recipe, "dpo": folder.dpo_recipe}[run.recipe]
    config: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    output = folder.path / f"{name}-out"
    config |= {
        "plugins": ["axolotl_gmt", "benchmarks.gpu_day.seen.SeenPlugin"],
        "gmt_mask_ratio": MASK_RATIO,
        "max_steps": STEPS[device],
        "micro_batch_size": 8 if device == "cuda" else 2,
        "bf16": device == "cuda",
        "save_strategy": "no",
        "dataset_prepared_path": str(folder.path / f"{name}-prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(output),
        **run.changes,
    }
    file = folder.path / f"{name}.gpu-day.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file, output


def join_group() -> None:
    """Say what a launcher says to the only rank of a process group.

    No launcher is used, since it would start Axolotl beyond the reach of the day's time limit.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= one_rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def row_of(name: str, model: str, output: Path, max_steps: int) -> Row:
    """What the log of a finished run says.

    Raises:
        UserError: If there is none.
        ValueError: If a step is missing, or was logged without GMT's statistics.
    """
    log = read_log(find_state(output))
    if KEPT_FRACTION not in log.curves:
        raise ValueError(f"{output} has no {KEPT_FRACTION}: GMT did not mask.")
    kept = log.curves[KEPT_FRACTION].values.tolist()
    losses = log.curves["loss"].values.tolist()
    if not len(kept) == len(losses) == log.step == max_steps:
        raise ValueError(
            f"{output}: {log.step} of {max_steps} steps, {len(kept)} with {KEPT_FRACTION}."
        )
    seen = json.loads((output / SEEN_FILE).read_text(encoding="utf-8"))
    return {
        "run": name,
        "model": model,
        "steps": log.step,
        "kept fractions": kept,
        "losses": [loss if math.isfinite(loss) else None for loss in losses],
        **seen,
    }


def main() -> None:
    """Train, judge and tidy up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", choices=sorted(RUNS))
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the model and the data")
    parser.add_argument("--json", type=Path, required=True, help="where the row goes")
    options = parser.parse_args()
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    sys.argv = ["axolotl"]  # Axolotl reads it.
    folder, model = prepare_folder(options.folder, options.device)
    config, output = write_config(options.run, folder, options.device)
    shutil.rmtree(output, ignore_errors=True)
    if RUNS[options.run].distributed:
        join_group()

    from axolotl.cli.train import do_cli

    rows = options.json.resolve()
    os.chdir(folder.path)  # The recipes' paths are relative to it.
    do_cli(str(config))

    write_rows(rows, [row_of(options.run, model, output, STEPS[options.device])])
    for weights in output.rglob("*.safetensors"):
        weights.unlink()


if __name__ == "__main__":
    main()
