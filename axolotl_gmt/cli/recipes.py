"""The commands ``recipes`` and ``recipe``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.table import Table

from axolotl_gmt.cli.console import PlainConsole, UserPath, remarks


@click.command()
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
    from axolotl_gmt.tools.recipes import all_recipes

    found = all_recipes()
    if as_json:
        click.echo(json.dumps([recipe.as_dict() for recipe in found]))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("Recipe", "Model", "Method", "Hardware"):
        table.add_column(heading, no_wrap=True)
    for each in found:
        table.add_row(each.name, each.model, each.method, each.hardware)
    # A narrow terminal wraps whole lines: names are to be copied and searched for.
    console = PlainConsole()
    unbounded = console.options.update(max_width=sys.maxsize)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)


@click.command()
@click.argument("name", metavar="NAME")
@click.option(
    "-o",
    "--output",
    type=UserPath(dir_okay=False, path_type=Path),
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
    from axolotl_gmt.tools.recipes import find_recipe, write_recipe

    found = find_recipe(name)
    if output:
        write_recipe(found, output)
    if output:
        remarks.print(f"Wrote {output}")
    else:
        click.echo(found.text, nl=False)
