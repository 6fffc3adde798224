"""Writes down the machine that a day is spent on. A process of its own, since it opens the GPU."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import measuring
from benchmarks.gpu_day.record import Machine

_PACKAGES = ("axolotl", "axolotl-gmt", "trl", "accelerate", "deepspeed")


def machine() -> Machine:
    """What stands in the header of the table."""
    facts = measuring.machine()
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if facts["gpu"] else 0
    return Machine(
        gpu=facts["gpu"],
        gpu_gib=gpu_bytes / 2**30,
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cpu=facts["cpu"],
        cores=facts["cores"],
        memory_gib=facts["memory_gib"],
        versions=measuring.versions() | _versions(),
        commit=measuring.commit(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _output(program: str, *arguments: str) -> str | None:
    """The first line that a program prints; None if it is missing or fails."""
    if shutil.which(program) is None:
        return None
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    return lines[0].strip() if result.returncode == 0 and lines else None


def main() -> None:
    """Write the machine to the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.parse_args().json.write_text(machine().model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
