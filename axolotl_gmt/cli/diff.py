"""The command ``diff``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from axolotl_gmt.cli.console import PlainConsole, UserPath, progress_bar, remarks

if TYPE_CHECKING:
    from axolotl_gmt.tools.delta.diff import Diff


@click.command()
@click.argument("base", type=UserPath(path_type=Path), metavar="BASE")
@click.argument("tuned", type=UserPath(path_type=Path), metavar="TUNED")
@click.option(
    "-o",
    "--output",
    type=UserPath(dir_okay=False, path_type=Path),
    metavar="FILE",
    required=True,
    help="The delta to write, which must not exist yet: delta.safetensors.",
)
@click.option("--force", is_flag=True, help="Write the delta even if it is larger than TUNED.")
def diff(base: Path, tuned: Path, output: Path, force: bool) -> None:
    """Write what tuning changed to a file, from which "apply" makes TUNED again, bit for bit.

    BASE and TUNED are folders with weights in safetensors (sharded or not), or single .safetensors
    files. The delta has the entries whose bits differ, with their places; tensors that are new, or
    changed in most entries, are in it whole. So are configuration and tokenizer files that differ.
    Both models are read piece by piece, and no GPU is used.

    An adapter must be merged first, with axolotl merge-lora.

    \b
    Examples:
      axolotl gmt diff base tuned -o delta.safetensors
      axolotl gmt inspect base delta.safetensors
      axolotl gmt apply base delta.safetensors -o tuned-again
    """  # noqa: D301
    from axolotl_gmt.tools.delta import diff as work

    with progress_bar("Comparing") as on_progress:
        result = work.diff(base, tuned, output, force=force, on_progress=on_progress)
    PlainConsole().print(_summary(result))
    remarks.print(f"Wrote {output}")


def _summary(result: Diff) -> Table:
    entries = f"{result.changed:,} of {result.entries:,} ({result.changed_fraction:.2%})"
    tensors = {
        "changed in part": len(result.in_part),
        "stored whole": len(result.in_whole),
        "only in BASE": len(result.removed),
    }
    size = f"{result.nbytes:,} bytes, TUNED {result.model_nbytes:,}"
    rows = {
        "Entries changed": entries,
        "Tensors": ", ".join(f"{count:,} {what}" for what, count in tensors.items()),
        "Size of the delta": f"{size} ({result.nbytes / max(result.model_nbytes, 1):.2%})",
        "Files of TUNED": ", ".join(result.files) or "none",
        "GMT's settings": settings_text(result.settings),
    }
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows.items():
        table.add_row(*row)
    return table


def settings_text(settings: Mapping[str, object]) -> str:
    """GMT's settings on one line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "not recorded"
