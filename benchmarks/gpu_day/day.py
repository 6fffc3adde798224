"""Runs the parts of a day one after the other, and keeps what each found as soon as it ends."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from benchmarks.gpu_day.children import ROOT, last_words, run_child
from benchmarks.gpu_day.parts import Part, Place
from benchmarks.gpu_day.record import (
    Day,
    Line,
    Machine,
    RecordError,
    Result,
    Row,
    load,
    read_rows,
    save,
)

_MACHINE_LIMIT_S = 120
# A part that would have less is not started: importing torch alone may take as long.
_LEAST_S = 5.0


@dataclass(frozen=True)
class Folder:
    """Where everything of a day lives; absolute, since children run elsewhere."""

    path: Path

    @property
    def shared(self) -> Path:
        """What parts share: a model, its data, and what Axolotl writes."""
        return self.path / "work"

    def log(self, name: str) -> Path:
        """What a part's child printed."""
        return self.path / f"{name}.log"

    def rows(self, name: str) -> Path:
        """What a part's child measured, until it is in the record."""
        return self.path / f"{name}.rows.json"


def find_machine(folder: Folder, environment: dict[str, str]) -> Machine:
    """Ask a child process, so that none of the GPU's memory is taken by this one.

    Raises:
        RecordError: If not even that runs.
    """
    log = folder.log("machine")
    command = (
        sys.executable,
        "-m",
        "benchmarks.gpu_day.machine",
        "--json",
        str(folder.rows("machine")),
    )
    ended = run_child(command, environment, log, _MACHINE_LIMIT_S)
    if ended.code != 0:
        raise RecordError(f"This machine cannot be described: {last_words(log)}. See {log}.")
    file = folder.rows("machine")
    machine = Machine.model_validate_json(file.read_text(encoding="utf-8"))
    file.unlink()
    return machine


def variables(tiny: bool) -> dict[str, str]:
    """Environment variables of every child: this copy of GMT, one GPU or none, and no network."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "CUDA_VISIBLE_DEVICES": "" if tiny else visible,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",  # A crash says in its log where it was.
    }


def take_up(folder: Folder, tiny: bool, again: bool) -> Day:
    """The day in ``folder`` if it was spent on the same machine and code, else a new one.

    Raises:
        RecordError: If it holds results of another machine or code, and ``again`` is not set.
    """
    machine = find_machine(folder, variables(tiny=False))
    tiny = tiny or machine.gpu is None
    new = Day(date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", tiny=tiny, machine=machine)
    old = load(folder.path)
    if old is None:
        return new
    if old.machine == machine and old.tiny == tiny:
        return old
    if again:
        return new
    raise RecordError(
        f"{folder.path} has results of another machine, other versions, another commit or other "
        "shapes. Name another --out, or add --again to replace them."
    )


def why_not(part: Part, day: Day) -> str:
    """Why this machine cannot run a part; empty if it can."""
    if part.needs_gpu and day.machine.gpu is None:
        return "no GPU"
    if part.needs_gpu and day.tiny:
        return "tiny shapes run on the CPU"
    if not day.tiny and part.needs_gib > day.machine.gpu_gib:
        return f"{day.machine.gpu_gib:.0f} GiB of GPU memory, {part.needs_gib:g} needed"
    for package in part.needs_packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            return f"{package} is not installed"
    return ""


def run_part(part: Part, day: Day, folder: Folder, seconds_left: float) -> Result:
    """Run one part; whatever goes wrong in it is in its result."""
    if seconds_left < _LEAST_S:
        return Result(outcome="failed", reason="not started: the time for all parts was over")
    rows, log = folder.rows(part.name), folder.log(part.name)
    rows.unlink(missing_ok=True)
    place = Place("cpu" if day.tiny else "cuda", rows, folder.shared)
    command = part.command(place)
    limit = min(part.limit, seconds_left)
    ended = run_child(command, variables(day.tiny), log, limit)
    lines: tuple[Line, ...] = ()
    found: tuple[Row, ...] = ()
    reason = ""
    try:
        found = read_rows(rows)
        lines = tuple(part.lines(found, place))
        if not lines:
            reason = f"it measured nothing ({log.name})"
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"its figures cannot be read: {type(error).__name__}: {error} ({log.name})"
    if ended.code is None:
        reason = f"ended after {limit:.0f} s; its last words: {last_words(log)} ({log.name})"
    elif ended.code != 0:  # What it wrote before is kept: it may have broken down at its exit.
        how = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
        reason = f"{how}: {last_words(log)} ({log.name})"
    rows.unlink(missing_ok=True)
    missed = reason or any(line.passed is False for line in lines)
    return Result(
        outcome="failed" if missed else "passed",
        reason=reason,
        seconds=ended.seconds,
        command=shlex.join(["python", *command[1:]]).replace(str(folder.path), "DIR"),
        lines=lines,
        rows=found,
    )


def run_day(
    day: Day,
    parts: Sequence[Part],
    order: Sequence[str],
    folder: Folder,
    seconds: float,
    again: bool,
    on_start: Callable[[Part, float], None],
    on_end: Callable[[Part, Result, bool], None],
) -> None:
    """Run those parts that have not passed, and write the record after each.

    Args:
        day: What is known; results are added to it.
        parts: Which.
        order: Names of all parts there are, in the table's order.
        folder: Where to.
        seconds: After which no part goes on.
        again: Whether parts that passed are run too.
        on_start: Called with a part that is about to run and its limit in seconds.
        on_end: Called with a part, its result, and whether that is from before.

    Raises:
        OSError: If the folder cannot be written.
    """
    end = time.monotonic() + seconds
    for part in parts:
        before = day.results.get(part.name)
        if before is not None and before.outcome == "passed" and not again:
            on_end(part, before, True)
            continue
        if reason := why_not(part, day):
            day.results[part.name] = Result(outcome="not run", reason=reason)
        else:
            left = max(0.0, end - time.monotonic())
            on_start(part, min(part.limit, left))
            day.results[part.name] = run_part(part, day, folder, left)
        save(day, order, folder.path)
        on_end(part, day.results[part.name], False)
