"""The command ``python -m benchmarks.study``: arguments, progress, and what it writes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from axolotl_gmt.errors import UserError
from benchmarks.study import plan as hours
from benchmarks.study.cell import PRELOAD
from benchmarks.study.data import DataError, write_text
from benchmarks.study.grid import SIZES, TOY
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
        help="small: two CPU cores, under two hours; full: one GPU of 80 GB, which was never tried",
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
        "--jobs",
        type=int,
        metavar="N",
        help="cells that run at a time; on a GPU at most (default: by size, and by GPU memory)",
    )
    parser.add_argument(
        "--base-model",
        type=Path,
        metavar="PATH",
        help="local folder of an unquantised model that chats, of 0.5 to 1.7 billion parameters "
        "(--size full needs one; default of small: the quickstart's)",
    )
    parser.add_argument(
        "--toy",
        action="store_true",
        help="every kind of cell of --size full with hardly any data, for models of any size: "
        "minutes on a CPU, and no result",
    )
    options = parser.parse_args(arguments)
    if options.size == "full" and options.base_model is None:
        parser.error("--size full needs --base-model PATH")
    if options.toy and options.size != "full":
        parser.error("--toy is for --size full")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the study; returns the exit code: 1 if a cell failed, 2 for bad input, 130 for Ctrl-C."""
    options = parse(arguments)
    size = TOY if options.toy else SIZES[options.size]
    on_gpu = _prepare_process()
    # On a GPU its memory decides.
    jobs = options.jobs or (os.cpu_count() or 1 if on_gpu else size.jobs)
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

        study = Study(size, options.data, options.out, plan, options.base_model, on_gpu)

        def on_end(job: Job, seconds: float, done: bool) -> None:
            progress.advance(bar, job.weight)
            outcome = "done" if done else f"FAILED, see {job.log}"
            progress.console.print(f"{job.label}: {outcome} ({seconds:.0f} s)")
            study.tidy()

        # A process that inherits an initialised CUDA cannot use it, and some of what is preloaded
        # initialises it.
        context = forkserver([] if on_gpu else PRELOAD)
        runner = Runner(jobs, max(1, (os.cpu_count() or 1) // jobs), context, on_end)
        try:
            study.prepare(progress.console.print)
            _check_versions(study)
            if size.parameters is not None and not options.toy:
                for line in hours.lines(size, (0.5e9, 1e9, 1.7e9, study.parameters)):
                    progress.console.print(line)
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
    from benchmarks.measuring import commit, machine
    from benchmarks.study.plots import draw

    rows = study.rows()
    write_csv(study.out / "study.csv", rows)
    tables = {task: summary(rows, task) for task in ("sft", "dpo")}
    text = "".join(
        f"## {task.upper()}\n\n{markdown(table)}\n" for task, table in tables.items() if table
    )
    timing = json.loads(study.timing.read_text()) if study.timing.is_file() else None
    if timing is not None:
        text += (
            f"## Time of a step\n\nGMT {timing['mask ratio']} takes "
            f"{timing['median ratio']:.3f} of the time of full fine-tuning, the median of "
            f"{timing['pairs']} pairs of steps in turns on one batch ({timing['device']}, "
            f"{timing['smallest ratio']:.3f} to {timing['largest ratio']:.3f}).\n\n"
        )
    remarks = study.remarks()
    if remarks:
        text += "## Remarks\n\n" + "".join(f"- {remark}\n" for remark in remarks) + "\n"
    cells = markdown(every_cell(rows))
    write_text(study.out / "study.md", f"{text}## Every cell\n\n{cells}")
    facts = {
        "size": asdict(study.size),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": _versions(),
        "commit": commit(),
        **study.hashes,
        "examples": study.examples,
        "parameters": study.parameters,
        "step time": timing,
        "remarks": remarks,
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


def _prepare_process() -> bool:
    """Set what child processes inherit; returns whether there is a GPU."""
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # One process would use every GPU.

    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
