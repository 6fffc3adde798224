"""Time in turns what is to be compared; print it as a table and keep it as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.hooks import RemovableHandle

from axolotl_gmt.tools.environment import cpu_name

Row = dict[str, Any]
Case = tuple[Any, ...]

TRIAL = "trial"
"""A model that is only measured when it is asked for: it shows in seconds that a script runs."""

console = Console()


def devices() -> list[str]:
    """The CPU, and the GPU if there is one; says so if there is none."""
    if torch.cuda.is_available():
        return ["cpu", "cuda"]
    console.print("GPU rows: not measured: no GPU")
    return ["cpu"]


def arguments(description: str, models: Iterable[str] = (), **defaults: int) -> argparse.Namespace:
    """Arguments that all benchmarks have, the models to choose from, and whole numbers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only this device")
    if models:
        parser.add_argument("--model", choices=list(models), help="only this model")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser.parse_args()


def chosen(cases: Mapping[str, Sequence[Case]], options: argparse.Namespace) -> Iterator[Case]:
    """The cases that ``--device`` and ``--model`` leave, each with its device before it.

    Args:
        cases: By device; each starts with its model.
        options: What :func:`arguments` returned.
    """
    for device in [options.device] if options.device else devices():
        for case in cases[device]:
            if case[0] == (options.model or case[0]) and (options.model or case[0] != TRIAL):
                yield (device, *case)


def in_turns(
    contenders: Mapping[str, Callable[[], object]],
    device: str,
    runs: int,
    before: Callable[[], object] = lambda: None,
    label: str = "",
) -> dict[str, list[float]]:
    """Seconds that each contender takes, ``runs`` times, after one run that does not count.

    They take turns, so that whatever else happens on the machine happens to all of them.

    Args:
        contenders: What to time.
        device: ``cuda`` waits for the GPU before and after.
        runs: How often.
        before: Called, untimed, before each.
        label: What the progress bar says.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=(runs + 1) * len(contenders))
        for run in range(runs + 1):
            for name, contender in contenders.items():
                progress.update(task, description=f"{label}: {name}")
                before()
                _wait(device)
                start = time.perf_counter()
                contender()
                _wait(device)
                if run > 0:
                    seconds[name].append(time.perf_counter() - start)
                progress.advance(task)
    return seconds


def in_pairs(
    step: Callable[[], object],
    attach: Callable[[], RemovableHandle],
    device: str,
    runs: int,
    label: str,
) -> list[tuple[float, float]]:
    """Seconds of a step with a hook and of one without, in pairs of neighbours.

    Which of the two comes first alternates, so that whatever slows the machine down slows both. One
    pair before, in which kernels are compiled, does not count.

    Args:
        step: What to time.
        attach: Attaches the hook, untimed; what it returns removes it.
        device: ``cuda`` waits for the GPU before and after.
        runs: Pairs that count.
        label: What the progress bar says.
    """

    def seconds(is_hooked: bool) -> float:
        handle = attach() if is_hooked else None
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        taken = time.perf_counter() - start
        if handle is not None:
            handle.remove()
        return taken

    pairs: list[tuple[float, float]] = []
    for run in steps(runs + 1, label):
        order = (False, True) if run % 2 else (True, False)
        taken = {is_hooked: seconds(is_hooked) for is_hooked in order}
        if run:
            pairs.append((taken[True], taken[False]))
    return pairs


def of_pairs(pairs: Sequence[tuple[float, float]]) -> Row:
    """Medians over pairs, and the range of the ratios of two neighbours.

    Args:
        pairs: What :func:`in_pairs` returned.
    """
    ratios = [hooked / plain for hooked, plain in pairs]
    return {
        "median ms without": statistics.median(plain for _, plain in pairs) * 1e3,
        "median ms more": statistics.median(hooked - plain for hooked, plain in pairs) * 1e3,
        "median ratio": statistics.median(ratios),
        "smallest ratio": min(ratios),
        "largest ratio": max(ratios),
    }


def steps(count: int, label: str) -> Iterator[int]:
    """``range(count)`` with a progress bar."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(range(count), description=label)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(seconds: Sequence[float]) -> float:
    """The median, in milliseconds."""
    return statistics.median(seconds) * 1e3


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows that have the same keys as a table; what all have in common is in the title."""
    table = Table(title=title)
    keys = [key for key in rows[0] if key not in ("model", "dtype", "device")]
    for key in keys:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(_written(row[key]) for key in keys))
    console.print(table)


def _written(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def save(file: Path | None, rows: Sequence[Row]) -> None:
    """Write rows as JSON with what is needed to judge them."""
    if file is None:
        return
    command = " ".join(["python", *sys.orig_argv[1:]])
    found = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "rows": list(rows),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Processor, cores and memory, and the GPU if there is one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str | None:
    """The commit of the code, with ``-dirty`` if files were changed; None outside git."""
    if shutil.which("git") is None:
        return None
    described = ["git", "describe", "--always", "--abbrev=12", "--dirty"]
    found = subprocess.run(
        described, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of what decides the speed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numba", "numpy", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
