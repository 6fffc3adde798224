"""The command ``python -m benchmarks.study``: arguments, progress, and what it writes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from axolotl_gmt.errors import UserError
from benchmarks.study.cell import PRELOAD
from benchmarks.study.data import DataError, write_text
from benchmarks.study.grid import SIZES
from benchmarks.study.running import Job, Runner, forkserver
from benchmarks.study.study import Study
from benchmarks.study.tables import every_cell, markdown, summary, write_csv

_REMARKS = Console(stderr=True, highlight=False, soft_wrap=True)
_PACKAGES = ("axolotl", "axolotl-gmt", "trl", "peft", "accelerate")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Train and score full fine-tuning, GMT, random masks, half fine-tuning and "
        "LoRA on GSM8K. A study that was interrupted goes on where it stopped.",
    )
    parser.add_argument(
        "--size",
        choices=sorted(SIZES),
        required=True,
        help="small: two CPU cores, under two hours; full: one H100-class GPU",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with train.jsonl, test.jsonl and preferences.jsonl",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("study"), metavar="DIR", help="default: ./study"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="cells that run at a time (default: by size)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the study; returns the exit code: 1 if a cell failed, 2 for bad input, 130 for Ctrl-C."""
    options = parse(arguments)
    size = SIZES[options.size]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Jobs take minutes, so the speed is a mean over hours.
    with Progress(*columns, console=_REMARKS, speed_estimate_period=1e5) as progress:
        bar = progress.add_task(f"Study {size.name}", total=0)

        def plan(weight: float) -> None:
            progress.update(bar, total=(progress.tasks[bar].total or 0) + weight)

        study = Study(size, options.data, options.out, plan)

        def on_end(job: Job, seconds: float, done: bool) -> None:
            progress.advance(bar, job.weight)
            outcome = "done" if done else f"FAILED, see {job.log}"
            progress.console.print(f"{job.label}: {outcome} ({seconds:.0f} s)")
            study.tidy()

        runner = _runner(options.jobs or size.jobs, on_end)
        try:
            study.prepare(progress.console.print)
            _check_versions(study)
            study.run(runner)
        except (DataError, UserError) as error:
            progress.console.print(f"Error: {error}")
            return 2
        except KeyboardInterrupt:
            progress.console.print("Interrupted. The same command goes on where this one stopped.")
            return 130
    write_report(study)
    for job in runner.failed:
        _REMARKS.print(f"Failed: {job.label}; the reason is at the end of {job.log}")
    return 1 if runner.failed else 0


def write_report(study: Study) -> None:
    """Write ``study.csv``, ``study.md``, ``study.json`` and the pictures, and print the tables."""
    from benchmarks.measuring import machine
    from benchmarks.study.plots import draw

    rows = study.rows()
    write_csv(study.out / "study.csv", rows)
    tables = {task: summary(rows, task) for task in ("sft", "dpo")}
    text = "".join(
        f"## {task.upper()}\n\n{markdown(table)}\n" for task, table in tables.items() if table
    )
    cells = markdown(every_cell(rows))
    write_text(study.out / "study.md", f"{text}## Every cell\n\n{cells}")
    facts = {
        "size": asdict(study.size),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": _versions(),
    }
    write_text(study.out / "study.json", json.dumps(facts, indent=1) + "\n")
    draw(rows, study.out)
    print(text, end="")
    _REMARKS.print(f"Tables, cells and pictures are in {study.out}")


def _versions() -> dict[str, str]:
    from benchmarks.measuring import versions

    return versions() | {name: version(name) for name in _PACKAGES}


def _check_versions(study: Study) -> None:
    """Keep cells of other versions apart: a table must not mix them.

    Raises:
        DataError: If the folder has cells of others.
    """
    file, found = study.out / "versions.json", _versions()
    if not file.is_file():
        write_text(file, json.dumps(found, indent=1) + "\n")
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [
        f"{name} {before.get(name)}, now {found[name]}"
        for name in found
        if found[name] != before.get(name)
    ]
    if changed:
        raise DataError(
            f"{study.out} has cells that were made with {'; '.join(changed)}. Name another --out."
        )


def _runner(jobs: int, on_end: Callable[[Job, float, bool], None]) -> Runner:
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # One process would use every GPU.

    import torch

    threads = max(1, (os.cpu_count() or 1) // jobs)
    # A process that inherits an initialised CUDA cannot use it, and some of these initialise it.
    preload = [] if torch.cuda.is_available() else PRELOAD
    return Runner(jobs, threads, forkserver(preload), on_end)


if __name__ == "__main__":
    sys.exit(main())
