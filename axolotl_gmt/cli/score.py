"""The command ``score``, and what ``quickstart`` shares with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from axolotl_gmt.cli.console import PlainConsole, UserPath, printable, remarks
from axolotl_gmt.tools import scoring


@click.command()
@click.argument(
    "models", nargs=-1, required=True, type=UserPath(path_type=Path), metavar="MODEL..."
)
@click.option(
    "--data",
    required=True,
    type=UserPath(path_type=Path),
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
    problems = scoring.read_problems(data, limit)
    for model in models:  # Before the first is scored, which takes a while.
        scoring.check_model_folder(model)
    scores = score_models(models, problems, max_new_tokens)
    if as_json:
        click.echo(json.dumps([result.as_dict() for result in scores]))
    else:
        PlainConsole().print(score_table(str(data), scores))


def score_models(
    models: Iterable[Path],
    problems: Sequence[scoring.Problem],
    max_new_tokens: int = scoring.MAX_NEW_TOKENS,
) -> list[scoring.Score]:
    """Score one model after the other, with a progress bar for each."""
    columns = (
        TextColumn("Scoring {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=remarks) as progress:
        tasks = {
            model: progress.add_task(printable(model.name), total=len(problems)) for model in models
        }
        return scoring.score_models(
            list(tasks),
            problems,
            max_new_tokens,
            lambda model, answered: progress.advance(tasks[model], answered),
        )


def score_table(title: str, scores: Iterable[scoring.Score]) -> Table:
    """A row for each model."""
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
