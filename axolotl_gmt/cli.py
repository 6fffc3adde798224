"""The command ``axolotl gmt``: reads its arguments and prints; the work is done elsewhere.

Torch and Transformers are imported by the modules that use them, when they use them, so that help
texts come at once.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from axolotl_gmt import quickstart as qs
from axolotl_gmt import scoring

# Progress and remarks go to stderr, so that what stdout holds can be piped.
_REMARKS = Console(stderr=True, highlight=False, soft_wrap=True)


@click.group()
def gmt() -> None:
    """Gradient-Mask Tuning: try it out, and score what it trained."""


@gmt.command()
@click.argument("folder", default="quickstart", type=click.Path(file_okay=False, path_type=Path))
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
      axolotl train quickstart/dpo.yml --launcher python
    """  # noqa: D301
    place = qs.Folder(folder)
    try:
        qs.prepare(place, _REMARKS.print)
        if prepare_only:
            for recipe in (place.sft_recipe, place.dpo_recipe):
                _REMARKS.print(f"Train with: {shlex.join(_user_command(recipe))}")
            return
        tuned = qs.tuned_model(place)
        if qs.is_trained(tuned):
            _REMARKS.print(f"Kept {tuned}; remove it or name another folder to train again.")
        else:
            _REMARKS.print(f"Running {shlex.join(_user_command(place.sft_recipe))}")
            qs.train(place.sft_recipe)
        problems = scoring.read_problems(place.held_out_data)
        before, after = _score([place.base_model, tuned], problems)
        kept = qs.kept_fraction(tuned)
    except (qs.QuickstartError, scoring.ScoringError) as error:
        raise click.ClickException(str(error)) from error
    table = _table("Sums of two-digit numbers, never trained on", [before, after])
    Console().print(table)
    if kept is not None:
        Console(highlight=False).print(
            f"In each step of the training, GMT let {kept:.1%} of the gradient entries through."
        )


@gmt.command()
@click.argument(
    "models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL..."
)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help='Chats in JSONL: {"messages": [turns]}, the last turn being the right answer.',
)
@click.option("--limit", type=click.IntRange(min=1), help="Score only the first LIMIT problems.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=scoring.MAX_NEW_TOKENS,
    show_default=True,
    help="Longest reply; raise it for problems that take long explanations.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON list as the last line, after Axolotl's logo.",
)
def score(
    models: Sequence[Path], data: Path, limit: int | None, max_new_tokens: int, as_json: bool
) -> None:
    """Score saved models by the problems that they answer correctly.

    Each MODEL is a folder with a saved model and its tokenizer. Replies are decoded greedily. An
    exact reply is the right answer and nothing else; a model that explains itself can still get
    the last number right.

    \b
    Examples:
      axolotl gmt score quickstart/base quickstart/sft --data quickstart/heldout.jsonl
      axolotl gmt score quickstart/sft --data quickstart/heldout.jsonl --limit 20 --json
    """  # noqa: D301
    try:
        problems = scoring.read_problems(data, limit)
        for model in models:  # Before the first is scored, which takes a while.
            scoring.check_model_folder(model)
        scores = _score(models, problems, max_new_tokens)
    except scoring.ScoringError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps([result.as_dict() for result in scores]))
    else:
        Console().print(_table(str(data), scores))


def _user_command(recipe: Path) -> list[str]:
    return ["axolotl", "train", str(recipe), "--launcher", "python"]


def _score(
    models: Iterable[Path],
    problems: Sequence[scoring.Problem],
    max_new_tokens: int = scoring.MAX_NEW_TOKENS,
) -> list[scoring.Score]:
    columns = (
        TextColumn("Scoring {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_REMARKS) as progress:
        tasks = {model: progress.add_task(model.name, total=len(problems)) for model in models}
        return [
            scoring.score_model(model, problems, max_new_tokens, partial(progress.advance, task))
            for model, task in tasks.items()
        ]


def _table(title: str, scores: Iterable[scoring.Score]) -> Table:
    table = Table("Model", title=title, title_justify="left")
    for heading in ("Problems", "Exact reply", "Last number right"):
        table.add_column(heading, justify="right")
    for result in scores:
        table.add_row(
            result.model,
            str(result.problems),
            f"{result.exact} ({result.exact / result.problems:.0%})",
            f"{result.last_number} ({result.last_number / result.problems:.0%})",
        )
    return table
