"""The command ``check``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from axolotl_gmt.cli.console import PlainConsole, UserPath, printable, remarks, require_axolotl

if TYPE_CHECKING:
    from axolotl_gmt.tools.check.report import Plan, Report


@click.command()
@click.argument(
    "configs", nargs=-1, required=True, type=UserPath(path_type=Path), metavar="CONFIG..."
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="Check as for a run on so many GPUs.  [default: the fewest that the config asks for]",
)
@click.option(
    "--share", is_flag=True, help="Warn also of what should not be in a file that others get."
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON list, an object for each file, as the last line, after Axolotl's logo.",
)
def check(configs: Sequence[Path], gpus: int | None, share: bool, as_json: bool) -> None:
    """Say whether YAML files for Axolotl are good, and what GMT would do with them.

    Each CONFIG is checked as Axolotl does when a training starts, on a machine with Hopper GPUs.
    It needs no GPU and no network, and runs no code that a file names: neither plugins, nor reward
    functions, nor a model's own code. If the model's config.json is on this machine, the parameters
    under the mask are counted.

    Errors are what would stop the training. Warnings are keys that Axolotl ignores in silence, and
    with --share what should not be shared: tokens and keys, paths of this machine, repositories and
    accounts of your own. Whether a model or data set on the hub is private cannot be known offline.
    Remarks are not held against a file.

    Paths in a file are relative to the folder in which axolotl is run, so run it there. The exit
    status is 0 if all files are good, 1 if there are errors or warnings, 2 if a file is no YAML
    that can be read, or after wrong usage.

    \b
    Examples:
      axolotl gmt check sft.yml
      axolotl gmt check example_configs/*.yml
      axolotl gmt check grpo.yml --gpus 8 --share
      axolotl gmt check sft.yml --json | tail -n 1
    """  # noqa: D301
    require_axolotl()
    from axolotl_gmt.tools.check.child import Checker

    remarks.print(f"Checking {_counted(len(configs), 'file')}; to start takes some seconds.")
    columns = (
        TextColumn("Checking {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
    )
    reports = []
    with Checker() as checker, Progress(*columns, console=remarks, transient=True) as progress:
        task = progress.add_task("", total=len(configs))
        for config in configs:
            progress.update(task, description=printable(config.name))
            reports.append(checker.check(config, gpus, share))
            progress.advance(task)
    if as_json:
        click.echo(json.dumps([found.as_dict() for found in reports], allow_nan=False))
    else:
        _print_checked(reports)
    worst = 2 if not all(found.readable for found in reports) else 1
    click.get_current_context().exit(0 if all(found.ok for found in reports) else worst)


_VERDICTS = {"good": "green", "has problems": "red"}
_LEVELS = {"errors": ("error", "red"), "warnings": ("warning", "yellow"), "remarks": ("remark", "")}


def _print_checked(reports: Sequence[Report]) -> None:
    console = PlainConsole(soft_wrap=True)
    for found in reports:
        verdict = "good" if found.ok else "has problems"
        gpus = f", on {_counted(found.gpus, 'GPU')}" if found.gpus else ""
        console.print(
            Text.assemble(printable(found.path), ": ", (verdict, _VERDICTS[verdict]), gpus)
        )
        for line in _plan_lines(found.gmt):
            console.print(f"  {line}")
        for level, (label, style) in _LEVELS.items():
            for message in getattr(found, level):
                console.print(Text.assemble("  ", (f"{label:<8}", style), message))
    good = sum(found.ok for found in reports)
    counts = [
        _counted(sum(len(getattr(found, level)) for found in reports), label)
        for level, (label, _) in _LEVELS.items()
    ]
    console.print(f"{good} of {_counted(len(reports), 'file')} good: {', '.join(counts)}.")


def _plan_lines(plan: Plan | None) -> Iterator[str]:
    from axolotl_gmt.config import GMTConfig

    if plan is None:
        return
    if not plan.enabled:
        yield f"GMT is off: {plan.why}."
        return
    chosen = plan.settings
    summary = GMTConfig.model_construct(**chosen).summary
    yield f"GMT is on, since {plan.why}. Base optimizer {plan.base_optimizer or 'unset'}."
    yield f"{summary[0].upper()}{summary[1:]}."
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
