"""The command ``axolotl gmt``: reads its arguments and prints; the work is done elsewhere.

Torch and Transformers are imported by the modules that use them, when they use them, so that help
texts come at once.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.files import whole
from axolotl_gmt.tools import quickstart as qs
from axolotl_gmt.tools import scoring
from axolotl_gmt.tools.check import check as checking

if TYPE_CHECKING:
    from axolotl_gmt.tools.inspect.compare import Comparison

# Progress and remarks go to stderr, so that what stdout holds can be piped.
_REMARKS = Console(stderr=True, highlight=False, soft_wrap=True)


class _Commands(click.Group):
    """Says in one line, as of any bad argument, that a file cannot be reached."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # Which click knows: whoever reads our output has seen enough.
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror or error}.") from error


@click.group(cls=_Commands)
def gmt() -> None:
    """Gradient-Mask Tuning: recipes to start from, checks before, and pictures after a training."""


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


@gmt.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the report.  [default: RUN_DIR/gmt_report]",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON object as the last line, after Axolotl's logo.",
)
def report(run_dir: Path, output: Path | None, as_json: bool) -> None:
    """Turn a run's log into a web page and pictures.

    RUN_DIR is the output_dir of a training, or one of its checkpoints. The report is one page
    that works offline, index.html, and its pictures as PNG files: loss, learning rate, kept
    fraction and gradient norm kept, and with gmt_log_modules heat maps of both by module, step
    and layer. A training with GMT leaves it in RUN_DIR/gmt_report when it ends; this command makes
    it for a run that is still going on or was stopped.

    An older report in the folder is replaced, anything else there is not.

    \b
    Examples:
      axolotl gmt report outputs/sft
      axolotl gmt report outputs/sft/checkpoint-500 -o /tmp/report --json
    """  # noqa: D301
    from axolotl_gmt.record import FOLDER
    from axolotl_gmt.report.log import LogError, find_state, read_log
    from axolotl_gmt.report.page import ReportError, facts, write_report

    columns = (TextColumn("Drawing"), BarColumn(), MofNCompleteColumn())
    try:
        state = find_state(run_dir)
        log = read_log(state)
        _REMARKS.print(f"Read {state}", markup=False)
        folder = output or (state.parent if run_dir.is_file() else run_dir) / FOLDER
        with Progress(*columns, console=_REMARKS) as progress:
            files = write_report(log, folder, progress.track)
    except (LogError, ReportError) as error:
        raise click.ClickException(str(error)) from error
    for file in files:
        _REMARKS.print(f"Wrote {file}", markup=False)
    if as_json:
        numbers = {**log.as_dict(), "source": str(state), "files": list(map(str, files))}
        click.echo(json.dumps(numbers, allow_nan=False))
        return
    table = Table.grid(padding=(0, 2))
    for label, value in [("Run", log.name), *facts(log)]:
        table.add_row(label, Text(value))
    Console().print(table)


@gmt.command()
@click.argument(
    "configs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CONFIG..."
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="Check as for a run on so many GPUs.  [default: the fewest that the config asks for]",
)
@click.option(
    "--private", is_flag=True, help="The files stay with you: no warnings about sharing them."
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON list, an object for each file, as the last line, after Axolotl's logo.",
)
def check(configs: Sequence[Path], gpus: int | None, private: bool, as_json: bool) -> None:
    """Say whether YAML files for Axolotl are good, and what GMT would do with them.

    Each CONFIG is checked as Axolotl does when a training starts, on a machine with Hopper GPUs.
    It needs no GPU and no network, and runs no code that a file names: neither plugins, nor reward
    functions, nor a model's own code. If the model's config.json is on this machine, the parameters
    under the mask are counted.

    Errors are what would stop the training. Warnings are keys that Axolotl ignores in silence, and
    what should not be shared: tokens and keys, paths of this machine, repositories and accounts of
    your own. Whether a model or data set on the hub is private cannot be known offline. Remarks
    are not held against a file.

    Paths in a file are relative to the folder in which axolotl is run, so run it there. The exit
    status is 0 if all files are good, 1 if there are errors or warnings, 2 if a file is no YAML
    that can be read, or after wrong usage.

    \b
    Examples:
      axolotl gmt check sft.yml
      axolotl gmt check example_configs/*.yml
      axolotl gmt check grpo.yml --gpus 8 --private
      axolotl gmt check sft.yml --json | tail -n 1
    """  # noqa: D301
    if importlib.util.find_spec("axolotl") is None:
        raise click.UsageError("Axolotl is not installed. Install axolotl-gmt[axolotl].")
    columns = (TextColumn("Checking {task.description}"), BarColumn(), MofNCompleteColumn())
    reports = []
    with Progress(*columns, console=_REMARKS, transient=True) as progress:
        task = progress.add_task("", total=len(configs))
        for config in configs:
            progress.update(task, description=config.name)
            reports.append(checking.check(config, gpus, private))
            progress.advance(task)
    if as_json:
        click.echo(json.dumps([found.as_dict() for found in reports], allow_nan=False))
    else:
        _print_checked(reports)
    worst = 2 if not all(found.readable for found in reports) else 1
    click.get_current_context().exit(0 if all(found.ok for found in reports) else worst)


_VERDICTS = {"good": "green", "has problems": "red"}
_LEVELS = {"errors": ("error", "red"), "warnings": ("warning", "yellow"), "remarks": ("remark", "")}


def _print_checked(reports: Sequence[checking.Report]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for found in reports:
        verdict = "good" if found.ok else "has problems"
        gpus = f", on {_counted(found.gpus, 'GPU')}" if found.gpus else ""
        console.print(Text.assemble(found.path, ": ", (verdict, _VERDICTS[verdict]), gpus))
        for line in _plan_lines(found.gmt):
            console.print(Text(f"  {line}"))
        for level, (label, style) in _LEVELS.items():
            for message in getattr(found, level):
                console.print(Text.assemble("  ", (f"{label:<8}", style), message))
    good = sum(found.ok for found in reports)
    counts = [
        _counted(sum(len(getattr(found, level)) for found in reports), label)
        for level, (label, _) in _LEVELS.items()
    ]
    console.print(f"{good} of {_counted(len(reports), 'file')} good: {', '.join(counts)}.")


def _plan_lines(plan: checking.Plan | None) -> Iterator[str]:
    if plan is None:
        return
    if not plan.enabled:
        yield f"GMT is off: {plan.why}."
        return
    chosen = plan.settings
    selection = GMTConfig.model_construct(**chosen).selection
    yield f"GMT is on, since {plan.why}. Base optimizer {plan.base_optimizer or 'unset'}."
    yield f"{selection[0].upper()}{selection[1:]}."
    for key in ("include", "exclude"):
        if chosen[key]:
            yield f"{key.capitalize()}: {', '.join(chosen[key])}."
    if plan.mask is None:
        yield f"Parameters under the mask: not counted, since {plan.not_counted}."
    else:
        yield (
            f"Under the mask: {plan.mask.masked_parameters:,} of "
            f"{plan.mask.trained_parameters:,} trained parameters, in "
            f"{plan.mask.masked_tensors:,} of {plan.mask.trained_tensors:,} tensors."
        )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@gmt.command()
@click.argument("base", type=click.Path(path_type=Path), metavar="BASE")
@click.argument("tuned", type=click.Path(path_type=Path), metavar="TUNED")
@click.option(
    "--png",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw heat maps over modules and layers into FILE, which must not exist yet.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON object, every tensor in it, as the last line, after Axolotl's logo.",
)
def inspect(base: Path, tuned: Path, png: Path | None, as_json: bool) -> None:
    """Compare two checkpoints and say what tuning changed.

    BASE and TUNED are folders with weights in safetensors (sharded or not), or single .safetensors
    files. TUNED can be a LoRA adapter of BASE, and both can be adapters of one model. They are read
    piece by piece: models larger than the memory are fine, and no GPU is used.

    For each module type, for each layer and in all, the table has the share of entries that
    changed, the Euclidean norm of the change, and that norm relative to the norm of BASE. Where the
    dtypes differ, BASE is converted to that of TUNED first, so that rounding alone changes nothing.
    For an adapter the change is that of its matrices, before it is rounded to a merged weight.

    \b
    Examples:
      axolotl gmt inspect quickstart/base quickstart/sft
      axolotl gmt inspect quickstart/base quickstart/sft --png changes.png
      axolotl gmt inspect quickstart/base outputs/lora --json | tail -n 1 | jq .total
    """  # noqa: D301
    from axolotl_gmt.tools.inspect.checkpoint import CheckpointError
    from axolotl_gmt.tools.inspect.compare import compare, draw_png

    if png is not None and png.exists():
        raise click.ClickException(f"{png} exists. Name another file, or remove it.")
    columns = (TextColumn("Comparing"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        try:
            # Entered first, since a comparison can take minutes.
            part = stack.enter_context(whole(png)) if png is not None else None
        except OSError as error:
            raise click.ClickException(f"{png} cannot be written: {error.strerror}.") from error
        try:
            with Progress(*columns, console=_REMARKS, transient=True) as progress:
                task = progress.add_task("Comparing")
                comparison = compare(
                    base, tuned, lambda new, all_: progress.update(task, advance=new, total=all_)
                )
            for remark in comparison.remarks():
                _REMARKS.print(remark, markup=False)
            if as_json:
                click.echo(json.dumps(comparison.as_dict(), allow_nan=False))
            else:
                Console().print(_change_table(comparison))
            if part is not None:
                part.write_bytes(draw_png(comparison))
        except CheckpointError as error:
            raise click.ClickException(str(error)) from error
    if png is not None:
        _REMARKS.print(f"Wrote {png}", markup=False)


def _change_table(comparison: Comparison) -> Table:
    """Module types, layers and the sum, one below the other."""
    title = f"What tuning changed, from {comparison.base} to {comparison.tuned}"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("Part", overflow="fold")
    for heading in ("Entries", "Changed", "Norm of change", "Relative norm"):
        table.add_column(heading, justify="right")
    layers = {f"layer {name}": change for name, change in comparison.by_layer().items()}
    for parts in (comparison.by_module(), layers, {"all": comparison.total}):
        for name, change in parts.items():
            relative = change.relative_norm
            table.add_row(
                Text(name),
                f"{change.entries:,}",
                f"{change.changed_fraction:.2%}",
                f"{change.norm:.4g}",
                "-" if relative is None else f"{relative:.3%}",
            )
        table.add_section()
    return table


@gmt.command()
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON list as the last line, after Axolotl's logo.",
)
def recipes(as_json: bool) -> None:
    """List the recipes that come with axolotl-gmt: YAML files for Axolotl.

    Those of the paper's systems, each for one GPU, for FSDP2 and for DeepSpeed ZeRO-3, and others
    for smaller models and GPUs. "recipe" writes one of them.

    \b
    Examples:
      axolotl gmt recipes
      axolotl gmt recipes --json | tail -n 1
    """  # noqa: D301
    from axolotl_gmt.tools.recipes import RecipeError, all_recipes

    try:
        found = all_recipes()
    except RecipeError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps([recipe.as_dict() for recipe in found]))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("Recipe", "Model", "Method", "Hardware"):
        table.add_column(heading, no_wrap=True)
    for each in found:
        table.add_row(each.name, each.model, each.method, each.hardware)
    # A narrow terminal wraps whole lines: names are to be copied and searched for.
    console = Console(highlight=False)
    unbounded = console.options.update(max_width=sys.maxsize)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)


@gmt.command()
@click.argument("name", metavar="NAME")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File to write, which must not exist.  [default: stdout]",
)
def recipe(name: str, output: Path | None) -> None:
    """Write the recipe NAME, of those that "recipes" lists.

    Its head says what it reproduces, the hardware that it needs, the command that runs it, and the
    licences of the model and the data. A file that exists is never overwritten. Without -o the
    recipe is printed, after Axolotl's logo; python -m axolotl_gmt prints the recipe alone.

    \b
    Examples:
      axolotl gmt recipe math-qwen3-0.6b
      axolotl gmt recipe math-qwen3-0.6b -o maths.yml
      python -m axolotl_gmt recipe math-qwen3-0.6b > maths.yml
    """  # noqa: D301
    from axolotl_gmt.tools.recipes import RecipeError, find_recipe, write_recipe

    try:
        found = find_recipe(name)
        if output:
            write_recipe(found, output)
    except RecipeError as error:
        raise click.ClickException(str(error)) from error
    if output:
        _REMARKS.print(f"Wrote {output}", markup=False)
    else:
        click.echo(found.text, nl=False)


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
