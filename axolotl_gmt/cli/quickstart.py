"""The command ``quickstart``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from axolotl_gmt.cli.console import PlainConsole, UserPath, remarks
from axolotl_gmt.cli.score import score_models, score_table
from axolotl_gmt.tools import quickstart as qs
from axolotl_gmt.tools import scoring


@click.command()
@click.argument("folder", default="quickstart", type=UserPath(file_okay=False, path_type=Path))
@click.option("--prepare-only", is_flag=True, help="Write the folder, but do not train or score.")
def quickstart(folder: Path, prepare_only: bool) -> None:
    """Teach a small language model to add, with GMT, offline and on a CPU.

    Writes into FOLDER (default: ./quickstart) the model SmolLM2-135M-Instruct, sums of two-digit
    numbers to train on and to hold out, and the recipes sft.yml and dpo.yml. Then trains sft.yml
    with Axolotl, and prints how many of the held-out sums the model gets right before and after.
    It takes a few minutes on two CPU cores, and 2 GB of disk.

    What is in FOLDER already is kept, your edits of the recipes included; a second run only
    scores again.

    \b
    Examples:
      axolotl gmt quickstart
      axolotl gmt quickstart /tmp/gmt --prepare-only
      cd quickstart && axolotl train dpo.yml --launcher python
    """  # noqa: D301
    place = qs.Folder(folder)
    qs.prepare(place, remarks.print)
    if prepare_only:
        for recipe in (place.sft_recipe, place.dpo_recipe):
            remarks.print(f"Train with: {_user_command(recipe)}")
        return
    tuned = qs.tuned_model(place)
    if qs.is_trained(tuned):
        remarks.print(f"Kept {tuned}; remove it or name another folder to train again.")
    else:
        remarks.print(f"Running {_user_command(place.sft_recipe)}")
        qs.train(place.sft_recipe)
    problems = scoring.read_problems(place.held_out_data)
    before, after = score_models([place.base_model, tuned], problems)
    kept = qs.kept_fraction(tuned)
    table = score_table("Sums of two-digit numbers, never trained on", [before, after])
    output = PlainConsole()
    output.print(table)
    if kept is not None:
        output.print(
            f"In each step of the training, GMT let {kept:.1%} of the gradient entries through."
        )


def _user_command(recipe: Path) -> str:
    train = ["axolotl", "train", recipe.name, "--launcher", "python"]
    return f"cd {shlex.quote(str(recipe.parent))} && {shlex.join(train)}"
