"""Runs jobs, each in a fresh process; a job is done when its result file is there.

Knows nothing of what the jobs do.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from benchmarks.study.cell import isolate


@dataclass(frozen=True)
class Job:
    """One call in a process of its own.

    Attributes:
        label: What the user reads.
        work: What to call; importable by its name, and returns nothing.
        arguments: Its arguments by name.
        result: The file that it writes, whole, when all went well.
        log: What it prints goes to the end of this file.
        weight: How long it takes beside others, for the progress bar.
    """

    label: str
    work: Callable[..., None]
    arguments: dict[str, Any]
    result: Path
    log: Path
    weight: float = 1.0


# Of what CUDA and its libraries keep beside torch's own memory in each process, and of the whole
# GPU that stays free. Both are guesses on the safe side.
_CONTEXT, _FREE = 2**30, 0.1


def fitting(reserved: int, total: int, most: int) -> int:
    """How many processes fit on a GPU, at least one.

    Args:
        reserved: Bytes that torch reserves in one of them.
        total: Bytes of the GPU.
        most: No more than this.
    """
    return max(1, min(most, int((1 - _FREE) * total / (reserved + _CONTEXT))))


@dataclass
class Runner:
    """Runs jobs and remembers which failed.

    Attributes:
        parallel: Jobs that run at a time.
        threads: CPU threads of each.
        context: How processes start.
        on_end: Called after each job with the seconds it took and whether its result is there.
    """

    parallel: int
    threads: int
    context: ForkServerContext
    on_end: Callable[[Job, float, bool], None]
    failed: list[Job] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs; one that fails does not stop the others. Kills them if interrupted."""
        waiting = deque(jobs)
        running: dict[int, tuple[Job, ForkServerProcess, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.parallel:
                    job = waiting.popleft()
                    job.result.unlink(missing_ok=True)
                    process = self.context.Process(target=_call, args=(job, self.threads))
                    process.start()
                    running[process.sentinel] = (job, process, time.monotonic())
                for sentinel in wait(list(running)):
                    assert isinstance(sentinel, int)
                    job, process, start = running.pop(sentinel)
                    process.join()
                    done = job.result.is_file()
                    if not done:
                        self.failed.append(job)
                    self.on_end(job, time.monotonic() - start, done)
        finally:
            for _, process, _ in running.values():
                process.kill()
                process.join()


def _call(job: Job, threads: int) -> None:
    isolate(job.log, threads)
    job.work(**job.arguments)


def forkserver(preload: Sequence[str]) -> ForkServerContext:
    """A server whose children inherit modules that take long to import, and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context
