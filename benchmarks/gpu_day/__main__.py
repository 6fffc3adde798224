"""The command ``python -m benchmarks.gpu_day``: arguments, progress and exit code."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.gpu_day.day import Folder, run_day, take_up
from benchmarks.gpu_day.parts import PARTS, Part
from benchmarks.gpu_day.record import TABLE_FILE, RecordError, Result, markdown

_REMARKS = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def parse(arguments: Sequence[str] | None, parts: Sequence[Part]) -> argparse.Namespace:
    """The command's arguments."""
    width = max(len(part.name) for part in parts)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day",
        description="Everything for a first day on a GPU: is GMT exact there, how fast is it, and "
        "does Axolotl train with it? Each part is a process of its own with a time limit and a "
        "log; one that fails ends no other. Without a GPU the parts that can run do so with tiny "
        "shapes. Nothing is downloaded.",
        epilog="parts:\n"
        + "\n".join(f"  {part.name:{width}}  {part.what}" for part in parts)
        + "\n\n"
        "exit code: 0 if all parts passed that can run here, 1 if one failed or missed its target, "
        "2 for bad input, 130 for Ctrl-C",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="for gpu_day.md (the table), gpu_day.json (all figures) and the logs; the same DIR "
        "again runs only what has not passed yet",
    )
    parser.add_argument(
        "--parts", metavar="A,B", help="only these, with commas between (default: all)"
    )
    parser.add_argument("--again", action="store_true", help="run what has passed too")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes on the CPU, though there is a GPU"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=20,
        metavar="N",
        help="the parts together get no longer than this (default: 20)",
    )
    options = parser.parse_args(arguments)
    known = {part.name: part for part in parts}
    names = list(known) if options.parts is None else options.parts.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--parts: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    options.parts = [part for part in parts if part.name in names]
    return options


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the day; returns the exit code.

    Args:
        arguments: Those of the command line if None.
        parts: The parts there are.
    """
    options = parse(arguments, parts)
    folder = Folder(options.out.resolve())
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    order = [part.name for part in parts]
    with Progress(*columns, console=_REMARKS, transient=True) as progress:
        bars: list[TaskID] = []

        def on_start(part: Part, limit: float) -> None:
            _REMARKS.print(f"{part.name}: {part.what}; at most {limit:.0f} s")
            bars.append(progress.add_task(part.name))

        def on_end(part: Part, result: Result, from_before: bool) -> None:
            for bar in bars:
                progress.remove_task(bar)
            bars.clear()
            _REMARKS.print(f"{part.name}: {_outcome(result, from_before)}")

        try:
            folder.shared.mkdir(parents=True, exist_ok=True)
            day = take_up(folder, options.tiny, options.again)
            on_which = day.machine.gpu or "no GPU"
            _REMARKS.print(f"On {on_which}" + (", tiny shapes on the CPU" if day.tiny else ""))
            limits = options.minutes * 60, options.again
            run_day(day, options.parts, order, folder, *limits, on_start, on_end)
        except (RecordError, OSError) as error:
            _REMARKS.print(f"Error: {error}")
            return 2
        except KeyboardInterrupt:
            _REMARKS.print("Interrupted. The same command goes on where this one stopped.")
            return 130
    print(markdown(day, order), end="")
    _REMARKS.print(f"The table is in {folder.path / TABLE_FILE}")
    results = [day.results[part.name] for part in options.parts]
    return 1 if any(result.outcome == "failed" for result in results) else 0


def _outcome(result: Result, from_before: bool) -> str:
    words = f"{result.outcome}: {result.reason}" if result.reason else result.outcome
    if result.outcome == "not run":
        return words
    if result.outcome == "failed" and not result.reason:
        missed = [line.what for line in result.lines if line.passed is False]
        words = f"failed, target missed: {'; '.join(missed)}"
    return f"{words} before" if from_before else f"{words} ({result.seconds:.0f} s)"


def _end(number: int, _: object) -> None:
    """End as after Ctrl-C, so that the child that runs is ended too."""
    raise KeyboardInterrupt(f"signal {number}")


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _end)
    sys.exit(main())
