"""What the commands share: the console for remarks, and the group that they are in."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

from axolotl_gmt.errors import UserError

# Progress and remarks go to stderr, so that what stdout holds can be piped.
remarks = Console(stderr=True, highlight=False, soft_wrap=True)


class Commands(click.Group):
    """Says in one line why a command could not do its work, as click does of a bad argument."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # Which click knows: whoever reads our output has seen enough.
        except UserError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror or error}.") from error
