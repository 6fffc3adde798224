"""Runs one child process with a time limit, and ends all that it started. Knows no parts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What a process that is told to end may take for it, such as to end those that it started.
_GRACE_S = 5.0

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@dataclass(frozen=True)
class Ended:
    """How a child process ended.

    Attributes:
        code: Its exit code, negative for a signal; None if it was ended at its limit.
        seconds: How long it ran.
    """

    code: int | None
    seconds: float


def run_child(
    command: Sequence[str], environment: Mapping[str, str], log: Path, limit: float
) -> Ended:
    """Run ``command`` from the repository's root until it ends or ``limit`` seconds are over.

    Nothing that it started outlives the call, unless it left the child's process group.

    Args:
        command: Program and arguments.
        environment: Replaces this process's variables of the same names.
        log: What it prints replaces this file.
        limit: In seconds.

    Raises:
        OSError: If the program or the log cannot be opened.
    """
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            _end(process)
    return Ended(code, time.monotonic() - start)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group; a process that the kernel cannot end is left to it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None or number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)


def last_words(log: Path) -> str:
    """The last line of a log that says something, without colours; at most 300 characters."""
    with contextlib.suppress(OSError):
        text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
        for line in reversed(_COLOURS.sub("", text).splitlines()):
            if line.strip():
                return line.strip()[:300]
    return "nothing was printed"
