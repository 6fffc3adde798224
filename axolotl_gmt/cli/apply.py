"""The command ``apply``."""

from __future__ import annotations

from pathlib import Path

import click

from axolotl_gmt.cli.console import PlainConsole, UserPath, progress_bar, remarks
from axolotl_gmt.cli.diff import settings_text


@click.command()
@click.argument("base", type=UserPath(path_type=Path), metavar="BASE")
@click.argument("delta", type=UserPath(path_type=Path), metavar="DELTA")
@click.option(
    "-o",
    "--output",
    type=UserPath(path_type=Path),
    metavar="FOLDER",
    help="The folder to write, which must not exist yet.",
)
@click.option("--check", is_flag=True, help="Check that DELTA fits BASE, and write nothing.")
def apply(base: Path, delta: Path, output: Path | None, check: bool) -> None:
    """Make a tuned model of its base and a delta that "diff" wrote, bit for bit.

    Every tensor of BASE and of the tuned model is checked against a hash in DELTA, so another base
    or a damaged delta is refused. Configuration and tokenizer files are those in DELTA, and BASE's
    where it has none. Models larger than the memory are fine. No GPU is used, and nothing that a
    file names is run.

    \b
    Examples:
      axolotl gmt apply base delta.safetensors -o tuned
      axolotl gmt apply base delta.safetensors --check
    """  # noqa: D301
    from axolotl_gmt.tools.delta import apply as work

    if check == (output is not None):
        raise click.UsageError("Name a folder to write with -o, or --check to write nothing.")
    with progress_bar("Checking") as on_progress:
        result = work.apply(base, delta, output, on_progress)
    PlainConsole(soft_wrap=True).print(
        f"{result.tensors:,} tensors, {result.nbytes:,} bytes: every hash is right."
    )
    for whose, names in {"the delta": result.files, "BASE": result.copied}.items():
        if names:
            remarks.print(f"Files of {whose}: {', '.join(names)}")
    if result.settings:
        remarks.print(f"GMT's settings: {settings_text(result.settings)}")
    if output is not None:
        remarks.print(f"Wrote {output}")
