"""The command ``axolotl gmt``: reads arguments and prints; ``tools`` and ``report`` do the work.

Each command has a module of its name. What takes long to import is imported by the functions that
use it, so that help texts come at once.
"""

from __future__ import annotations

import click

from axolotl_gmt.cli import (
    apply,
    check,
    compare,
    diff,
    env,
    inspect,
    quickstart,
    recipes,
    report,
    schema,
    score,
)
from axolotl_gmt.cli.console import Commands


@click.group(cls=Commands)
def gmt() -> None:
    """Gradient-Mask Tuning: recipes to start from, checks before, and pictures after a training."""


for command in (
    apply.apply,
    check.check,
    compare.compare,
    diff.diff,
    env.env,
    inspect.inspect,
    quickstart.quickstart,
    recipes.recipe,
    recipes.recipes,
    report.report,
    schema.schema,
    score.score,
):
    gmt.add_command(command)
