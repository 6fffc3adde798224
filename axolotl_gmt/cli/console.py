"""What the commands share: the consoles that they print to, and the group that they are in."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from axolotl_gmt.errors import UserError


def printable(text: str) -> str:
    """``text`` on one line, in which escapes stand for what a terminal would obey.

    Names of files, tensors and models can hold anything.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


class PlainConsole(Console):
    """A console that prints texts as they are: without markup, and made printable.

    Args:
        stderr: Print to stderr. Otherwise to stdout.
        soft_wrap: Leave long lines to the terminal.
    """

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(
            stderr=stderr, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does, of the printable text. Printed strings and cells of tables come by."""
        return super().render_str(printable(text), **options)


class UserPath(click.Path):
    """A path, in which a NUL byte is wrong usage and not an error of the system's."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See :meth:`click.ParamType.convert`."""
        if "\0" in str(value):
            self.fail("has a NUL byte, which no path can have.", param, ctx)
        return super().convert(value, param, ctx)


def require_axolotl() -> None:
    """Refuse a command that needs Axolotl where it is not installed."""
    if importlib.util.find_spec("axolotl") is None:
        raise click.UsageError("Axolotl is not installed. Install axolotl-gmt[axolotl].")


# Progress and remarks go to stderr, so that what stdout holds can be piped.
remarks = PlainConsole(stderr=True, soft_wrap=True)


@contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[int, int], object]]:
    """A progress bar on stderr, if that is a terminal; it is gone when the block ends.

    Yields:
        What to call with the amount that was done since the last call, and the amount in all.
    """
    columns = (TextColumn(doing), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # Without a terminal nothing can be taken back, and an empty line would be left.
    shown = remarks.is_terminal
    with Progress(*columns, console=remarks, transient=True, disable=not shown) as progress:
        task = progress.add_task(doing)
        yield lambda new, all_: progress.update(task, advance=new, total=all_)


@contextmanager
def _interruptible(ctx: click.Context) -> Iterator[None]:
    """Exit with 130, as shells say of a process that SIGINT ended, after Ctrl-C.

    Interrupted imports can end in any error: NumPy's is a RuntimeError. So the signal is recorded.
    """
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:  # Not if the signal is ignored, as under nohup.
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException:
        if interrupted:
            ctx.exit(130)
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


class Commands(click.Group):
    """Says in one line why a command could not do its work, as click does of a bad argument."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            with _interruptible(ctx):
                return super().invoke(ctx)
        except click.UsageError as error:
            raise click.UsageError(printable(error.format_message()), error.ctx) from error
        except UserError as error:
            raise click.ClickException(printable(str(error))) from error
        except BrokenPipeError:
            raise  # Which click knows: whoever reads our output has seen enough.
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            reason = printable(f"{place}{error.strerror or error}.")
            raise click.ClickException(reason) from error
