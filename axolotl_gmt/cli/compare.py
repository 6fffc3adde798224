"""The command ``compare``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from axolotl_gmt.cli.console import PlainConsole, UserPath, printable, remarks

if TYPE_CHECKING:
    from axolotl_gmt.report.comparison import Run


_WIDEST_SETTING = 30


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath(path_type=Path), metavar="RUN...")
@click.option(
    "-o",
    "--output",
    type=UserPath(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File for the page.  [default: gmt_compare.html]",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON object as the last line, after Axolotl's logo.",
)
def compare(runs: Sequence[Path], output: Path | None, as_json: bool) -> None:
    """Put runs beside each other: a table, and a web page of curves that lie over each other.

    Each RUN is the output_dir of a training, or one of its checkpoints; two to ten of them, with
    GMT or without. The table has GMT's settings and the training's arguments that differ between
    the runs, losses, means of the mask's statistics, and how long each run took. The page has also
    the curves; it is one file that works offline.

    An older comparison at FILE is replaced, anything else there is not.

    \b
    Examples:
      axolotl gmt compare outputs/plain outputs/ratio-0.5 outputs/ratio-0.9
      axolotl gmt compare outputs/* -o /tmp/sweep.html
      axolotl gmt compare outputs/* --json | tail -n 1 | jq '.runs[] | [.run, .best_eval_loss]'
    """  # noqa: D301
    from axolotl_gmt.report.comparison import read_runs
    from axolotl_gmt.report.comparison_page import PAGE, write_comparison

    found = read_runs(runs)
    for run in found:
        remarks.print(f"Read {run.source}")
    columns = (TextColumn("Drawing"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=remarks) as progress:
        page = write_comparison(found, output or Path(PAGE), progress.track)
    remarks.print(f"Wrote {page}")
    if as_json:
        numbers = {"runs": [run.as_dict() for run in found], "page": str(page)}
        click.echo(json.dumps(numbers, allow_nan=False))
    else:
        _print_table(found)


def _print_table(runs: Sequence[Run]) -> None:
    from axolotl_gmt.report.comparison import columns

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("Run", no_wrap=True)
    shown = columns(runs)
    for column in shown:
        # Headings wrap between words, and no cell does but a long setting.
        width = max(map(len, [*column.label.split(), *column.cells]))
        if column.is_setting:
            table.add_column(column.label, overflow="fold", width=min(width, _WIDEST_SETTING))
        else:
            table.add_column(column.label, justify="right", width=width)
    for number, run in enumerate(runs):
        cells = [
            Text(printable(column.cells[number]), "bold" if number in column.lowest else "")
            for column in shown
        ]
        table.add_row(run.log.name, *cells)
    # A narrow terminal wraps whole lines: a number that is cut is another number.
    console = PlainConsole()
    unbounded = console.options.update(max_width=sys.maxsize)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)
