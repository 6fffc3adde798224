"""The command ``report``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from axolotl_gmt.cli.console import PlainConsole, UserPath, remarks


@click.command()
@click.argument("run_dir", type=UserPath(path_type=Path), metavar="RUN_DIR")
@click.option(
    "-o",
    "--output",
    type=UserPath(path_type=Path),
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
    that works offline, index.html, and its pictures as PNG files: loss, learning rate, norm of the
    gradient, kept fraction and gradient norm kept, and with gmt_log_modules heat maps of the last
    two by module, step and layer. A training with GMT leaves it in RUN_DIR/gmt_report when it ends;
    this command makes it for a run that is still going on or was stopped.

    An older report in the folder is replaced, anything else there is not.

    \b
    Examples:
      axolotl gmt report outputs/sft
      axolotl gmt report outputs/sft/checkpoint-500 -o /tmp/report --json
    """  # noqa: D301
    from axolotl_gmt.record import FOLDER
    from axolotl_gmt.report.log import find_state, read_log
    from axolotl_gmt.report.page import facts, write_report

    columns = (TextColumn("Drawing"), BarColumn(), MofNCompleteColumn())
    state = find_state(run_dir)
    log = read_log(state)
    remarks.print(f"Read {state}")
    folder = output or (state.parent if run_dir.is_file() else run_dir) / FOLDER
    with Progress(*columns, console=remarks) as progress:
        files = write_report(log, folder, progress.track)
    for file in files:
        remarks.print(f"Wrote {file}")
    if as_json:
        numbers = {**log.as_dict(), "source": str(state), "files": list(map(str, files))}
        click.echo(json.dumps(numbers, allow_nan=False))
        return
    table = Table.grid(padding=(0, 2))
    for label, value in [("Run", log.name), *facts(log)]:
        table.add_row(label, value)
    PlainConsole().print(table)
