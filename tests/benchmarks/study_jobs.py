"""What the tests of the study have processes of their own do; imports nothing that takes long."""

from __future__ import annotations

import os
import time
from pathlib import Path


def succeed(result: Path) -> None:
    print("all is well")
    result.write_text(str(os.getpid()))


def fail(result: Path) -> None:
    raise ValueError(f"{result.name} will never be")


def sleep(result: Path) -> None:
    result.with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(600)
