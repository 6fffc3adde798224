"""The command ``quickstart``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from axolotl_gmt.cli.console import PlainConsole, UserPath, printable, remarks
from axolotl_gmt.cli.score import score_models, score_table
from axolotl_gmt.tools import quickstart as qs
from axolotl_gmt.tools import scoring


@click.command()
@click.argument("folder", default="quickstart", type=UserPath(file_okay=False, path_type=Path))
@click.option("--prepare-only", is_flag=True, help="Write the folder, but do not train or score.")
@click.option(
    "--compare", is_flag=True, help="Also train without a mask (ratio 0), and score that too."
)
def quickstart(folder: Path, prepare_only: bool, compare: bool) -> None:
    """Teach a small language model to add, with GMT, offline and on a CPU.

    Writes into FOLDER (default: ./quickstart) the model SmolLM2-135M-Instruct, sums of two-digit
    numbers to train on and to hold out, and the recipes sft.yml and dpo.yml. Then trains sft.yml
    with Axolotl, and prints how many of the held-out sums the model gets right before and after.
    It takes about five minutes on two CPU cores, and 2 GB of disk. What Axolotl prints goes to
    sft.log.

    What training teaches is not GMT's doing: --compare trains the same recipe at a mask ratio of 0,
    which is the base optimizer alone, and puts it beside.

    What is in FOLDER already is kept, your edits of the recipes included; a second run only
    scores again.

    \b
    Examples:
      axolotl gmt quickstart
      axolotl gmt quickstart --compare
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
    models = [place.base_model, tuned]
    _train(place.sft_recipe, tuned)
    if compare:
        _train(qs.write_plain_recipe(place), place.plain_output)
        models.append(place.plain_output)
    problems = scoring.read_problems(place.held_out_data)
    scores = score_models(models, problems)
    kept = qs.kept_fraction(tuned)
    table = score_table("Sums of two-digit numbers, never trained on", scores)
    output = PlainConsole()
    output.print(table)
    if kept is not None:
        output.print(
            f"In each step of the training, GMT let {kept:.1%} of the gradient entries through."
        )
    _say_what_next(place, tuned, compare)


def _say_what_next(place: qs.Folder, tuned: Path, is_compared: bool) -> None:
    base, model = (shlex.quote(str(path)) for path in (place.base_model, tuned))
    again = f"gmt-tools quickstart {shlex.quote(str(place.path))}"
    suggestions = {
        "Look at the run in a browser": f"{model}/gmt_report/index.html",
        "See what tuning changed": f"gmt-tools inspect {base} {model}",
        "Train on preferences": _user_command(place.dpo_recipe),
    }
    if is_compared:
        plain = shlex.quote(str(place.plain_output))
        suggestions["Lay the curves of both over each other"] = f"gmt-tools compare {plain} {model}"
    else:
        suggestions["Compare with the same run without a mask"] = f"{again} --compare"
    suggestions["Try another ratio"] = f"edit sft.yml, remove {model}, then {again}"
    remarks.print()
    remarks.print("What next?")
    for what, how in suggestions.items():
        remarks.print(f"- {what}: {how}")


def _train(recipe: Path, model: Path) -> None:
    """Train ``recipe`` if ``model`` is not there, with a bar of steps and the loss."""
    if qs.is_trained(model):
        remarks.print(f"Kept {model}; remove it or name another folder to train again.")
        return
    remarks.print(f"Running {_user_command(recipe)}")
    remarks.print(f"What it prints goes to {qs.training_log(recipe)}")
    columns = (
        TextColumn("Training {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=remarks) as progress:
        task = progress.add_task(printable(recipe.name), total=None, loss="")

        def on_step(step: qs.TrainingStep) -> None:
            loss = "" if step.loss is None else f"loss {step.loss:.2f}"
            progress.update(task, completed=step.done, total=step.total, loss=loss)

        qs.train(recipe, on_step)


def _user_command(recipe: Path) -> str:
    train = ["axolotl", "train", recipe.name, "--launcher", "python"]
    return f"cd {shlex.quote(str(recipe.parent))} && {shlex.join(train)}"
