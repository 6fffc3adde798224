"""What a report of a bug needs to know of a machine, and nothing that is private.

That is: no path, no name of a user or a host, no variable of the environment. Another package's
error may quote one, so only its type is told.
"""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from axolotl_gmt import __version__
from axolotl_gmt.kernels.dispatch import passes
from axolotl_gmt.kernels.dtypes import COMPILED
from axolotl_gmt.kernels.scores import Kind, Magnitudes
from axolotl_gmt.kernels.self_check import SelfCheckError

PACKAGES = (
    "axolotl",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "numba",
    "triton",
)
"""The packages whose versions decide how masks are made, or who trains with them."""


@dataclass(frozen=True)
class Device:
    """A device that torch can use, and whose passes mask gradients on it.

    Attributes:
        name: As torch calls it, such as ``cuda:0``.
        model: The processor.
        memory: Its memory in bytes, or the machine's for a CPU; None if torch does not say.
        capability: The compute capability of a GPU, the instructions of a CPU that torch uses.
        passes: For each dtype of gradients whose passes mask them: ``Numba``, ``Triton`` or
            ``torch``. Compiled ones were compared with torch's on this machine, and were equal.
        error: Why compiled passes are not used, if there are any for this type of device; why
            there are no passes at all, if there are none.
    """

    name: str
    model: str
    memory: int | None
    capability: str | None
    passes: dict[str, str]
    error: str | None


@dataclass(frozen=True)
class Environment:
    """Versions, system and devices.

    Attributes:
        versions: Of Python and of packages; None for those that are not installed.
        system: The operating system, its version and the kind of machine.
        cores: Those of the CPU that the system shows.
        devices: The CPU, and the accelerators that torch finds.
    """

    versions: dict[str, str | None]
    system: str
    cores: int | None
    devices: list[Device]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def environment() -> Environment:
    """Look at this machine. Compiles mask passes, where no earlier process left them on the disk.

    Warnings of these passes, which have paths, are not shown meanwhile.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions["axolotl-gmt"] = __version__
    versions |= {package: _version(package) for package in PACKAGES}
    versions["torch"] = torch.__version__  # Which names the build, too.
    with _without_warnings():
        devices = list(_devices())
    return Environment(versions, _system(), os.cpu_count(), devices)


def cpu_name() -> str:
    """The model of the CPU, or its kind where the system does not name the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _system() -> str:
    # What follows the number of a kernel can be a name that someone gave it.
    number = re.match(r"[\d.]*", platform.release())
    return f"{platform.system()} {number[0] if number else ''} {platform.machine()}"


def _devices() -> Iterator[Device]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    instructions = torch.backends.cpu.get_cpu_capability()
    yield Device("cpu", cpu_name(), memory, instructions, *_passes("cpu"))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return
    made = _passes(accelerator.type)
    for index in range(torch.accelerator.device_count()):
        name = f"{accelerator.type}:{index}"
        try:
            facts = torch.get_device_module(accelerator).get_device_properties(index)
        except (AttributeError, RuntimeError) as error:  # Not every kind has them; a GPU may break.
            model = f"properties cannot be read ({type(error).__name__})"
            yield Device(name, model, None, None, *made)
        else:
            major, minor = getattr(facts, "major", None), getattr(facts, "minor", None)
            capability = None if major is None else f"{major}.{minor}"
            yield Device(name, facts.name, facts.total_memory, capability, *made)


def _passes(device: str) -> tuple[dict[str, str], str | None]:
    """Whose passes take the gradients of each dtype, and why these are not compiled."""
    found: dict[str, str] = {}
    why = None
    if device == "mps":
        return found, "no float64, so GMT refuses it"
    for dtype in sorted(COMPILED, key=str):
        backend, error = passes(device, Kind(Magnitudes, dtype, None, dtype))
        found[str(dtype).removeprefix("torch.")] = backend
        if error:
            why = type(error).__name__
            if isinstance(error, SelfCheckError):
                why = f"{why}: {error}"
    return found, why


@contextmanager
def _without_warnings() -> Iterator[None]:
    logger, nobody = logging.getLogger("axolotl_gmt.kernels"), logging.NullHandler()
    before = logger.propagate
    logger.propagate = False
    logger.addHandler(nobody)
    try:
        yield
    finally:
        logger.removeHandler(nobody)
        logger.propagate = before
