"""What a day leaves behind: one typed record, its JSON file, and its table in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from axolotl_gmt.files import whole

JSON_FILE, TABLE_FILE = "gpu_day.json", "gpu_day.md"

Row = dict[str, Any]
"""A row of figures as a child process wrote it."""


class RecordError(Exception):
    """A folder whose record cannot be used; the message says why and what to do."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Line(_Record):
    """One line of the table: a figure and what it should be.

    Attributes:
        what: What was measured.
        measured: The figure, with its unit.
        target: What it should be; empty if nothing is asked of it.
        passed: Whether it is so; None without a target.
    """

    what: str
    measured: str
    target: str = ""
    passed: bool | None = None


class Result(_Record):
    """What became of one part.

    Attributes:
        outcome: ``not run`` says that the part cannot run on this machine, which is no failure.
        reason: Why it failed or was not run; empty if it passed.
        seconds: How long it took.
        command: What was run from the repository's root; DIR is the folder of the day.
        lines: What it measured.
        rows: The figures behind the lines, as the child process wrote them.
    """

    outcome: Literal["passed", "failed", "not run"]
    reason: str = ""
    seconds: float = 0
    command: str = ""
    lines: tuple[Line, ...] = ()
    rows: tuple[Row, ...] = ()


class Machine(_Record):
    """Where the day was spent, apart from its date.

    Attributes:
        gpu: Name of the GPU; None without one.
        gpu_gib: Its memory.
        driver: Version of its driver.
        cpu: Name of the processor.
        cores: How many the operating system shows.
        memory_gib: Of the machine.
        versions: Of each package, and of Python.
        commit: Of the repository, with ``-dirty`` if files were changed; None outside git.
    """

    gpu: str | None
    gpu_gib: float
    driver: str | None
    cpu: str
    cores: int
    memory_gib: int
    versions: dict[str, str]
    commit: str | None


class Day(BaseModel):
    """Everything that a day found.

    Attributes:
        date: When it began.
        tiny: Whether shapes were small and on the CPU, so that no speed means anything.
        machine: Where.
        results: By the name of the part.
    """

    model_config = ConfigDict(extra="forbid")

    date: str
    tiny: bool
    machine: Machine
    results: dict[str, Result] = {}


class _Rows(BaseModel):
    """What a child process writes; the benchmarks add how and where they measured."""

    rows: tuple[Row, ...]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write what a child process found, whole or not at all."""
    with whole(file) as part:
        part.write_text(_Rows(rows=tuple(rows)).model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_rows(file: Path) -> tuple[Row, ...]:
    """The rows that a child process wrote.

    Raises:
        OSError: If there is no such file.
        ValueError: If it holds something else.
    """
    return _Rows.model_validate_json(file.read_text(encoding="utf-8")).rows


def load(folder: Path) -> Day | None:
    """The day that ``folder`` holds; None if there is none yet.

    Raises:
        RecordError: If its file is not a record of this version of the command.
    """
    file = folder / JSON_FILE
    try:
        return Day.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise RecordError(f"{file} cannot be read ({error}). Name another --out.") from error


def save(day: Day, names: Sequence[str], folder: Path) -> None:
    """Write the record and its table, each whole or not at all.

    Args:
        day: What was found so far.
        names: The order of the parts in the table.
        folder: Where to; it must exist.
    """
    texts = {JSON_FILE: day.model_dump_json(indent=1) + "\n", TABLE_FILE: markdown(day, names)}
    for name, text in texts.items():
        with whole(folder / name) as file:
            file.write_text(text, encoding="utf-8")


def markdown(day: Day, names: Iterable[str]) -> str:
    """The table, with a header that says where and when its figures are from."""
    machine = day.machine
    gpu = "no GPU"
    if machine.gpu:
        gpu = f"{machine.gpu} ({machine.gpu_gib:.0f} GiB, driver {machine.driver or 'unknown'})"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    facts = {
        "Date": day.date,
        "Commit": machine.commit or "unknown, since this is no git checkout",
        "GPU": gpu,
        "CPU": f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB",
        "Versions": versions,
    }
    if day.tiny:
        facts["Shapes"] = "tiny, on the CPU: this shows that the parts run, and no speed"
    header = [f"- {name}: {fact}" for name, fact in facts.items()]
    table = [
        "| part | what | measured | target | passed | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        if name in day.results:
            table += map(_row, _cells(name, day.results[name]))
    return "\n".join([*header, "", *table, ""])


def _cells(name: str, result: Result) -> Iterable[tuple[str, ...]]:
    seconds = f"{result.seconds:.0f}" if result.outcome != "not run" else ""
    words = {True: "yes", False: "no", None: ""}
    for line in result.lines:
        yield name, line.what, line.measured, line.target, words[line.passed], seconds
        seconds = ""  # The part's, so it stands in its first line alone.
    if result.reason:
        passed = "no" if result.outcome == "failed" else ""
        yield name, "", f"{result.outcome}: {result.reason}", "", passed, seconds


def _row(cells: Iterable[str]) -> str:
    """A row of a Markdown table; what a child printed may hold anything."""
    return f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |"
