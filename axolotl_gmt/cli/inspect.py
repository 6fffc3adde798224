"""The command ``inspect``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from axolotl_gmt.cli.console import PlainConsole, UserPath, progress_bar, remarks
from axolotl_gmt.errors import UserError
from axolotl_gmt.files import whole

if TYPE_CHECKING:
    from axolotl_gmt.tools.inspect.compare import Comparison


@click.command()
@click.argument("base", type=UserPath(path_type=Path), metavar="BASE")
@click.argument("tuned", type=UserPath(path_type=Path), metavar="TUNED")
@click.option(
    "--png",
    type=UserPath(dir_okay=False, path_type=Path),
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
    files. TUNED can also be a LoRA adapter of BASE, or a delta that "diff" wrote; and both can be
    adapters of one model. They are read piece by piece: models larger than the memory are fine, and
    no GPU is used.

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
    from axolotl_gmt.tools.inspect.compare import compare

    if png is not None and png.exists():
        raise UserError(f"{png} exists. Name another file, or remove it.")
    with ExitStack() as stack:
        try:
            # Entered first, since a comparison can take minutes.
            part = stack.enter_context(whole(png)) if png is not None else None
        except OSError as error:
            raise UserError(f"{png} cannot be written: {error.strerror}.") from error
        with progress_bar("Comparing") as on_progress:
            comparison = compare(base, tuned, on_progress)
        for remark in comparison.remarks():
            remarks.print(remark)
        if as_json:
            click.echo(json.dumps(comparison.as_dict(), allow_nan=False))
        else:
            PlainConsole().print(_change_table(comparison))
        if part is not None:
            from axolotl_gmt.tools.inspect.picture import draw_png

            part.write_bytes(draw_png(comparison))
    if png is not None:
        remarks.print(f"Wrote {png}")


def _change_table(comparison: Comparison) -> Table:
    """Module types, layers and the sum, one below the other."""
    title = f"What tuning changed, from {comparison.base} to {comparison.tuned}"
    table = Table(title=title, title_justify="left")
    table.add_column("Part", overflow="fold")
    for heading in ("Entries", "Changed", "Norm of change", "Relative norm"):
        table.add_column(heading, justify="right")
    layers = {f"layer {name}": change for name, change in comparison.by_layer().items()}
    for parts in (comparison.by_module(), layers, {"all": comparison.total}):
        for name, change in parts.items():
            relative = change.relative_norm
            table.add_row(
                name,
                f"{change.entries:,}",
                f"{change.changed_fraction:.2%}",
                f"{change.norm:.4g}",
                "-" if relative is None else f"{relative:.3%}",
            )
        table.add_section()
    return table
