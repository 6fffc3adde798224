"""The process in which files are checked, and how it is spoken to: a line of JSON each way a file.

It has an environment of its own, so that Axolotl finds neither GPUs nor a network, and limits, so
that no file can stop the check of the rest.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from axolotl_gmt.errors import UserError
from axolotl_gmt.tools.check.report import Report

# For a file, after the imports.
SECONDS = 60
# Of memory that is written to; the imports take 2 of them.
GIBIBYTES = 8

_OUT_OF_MEMORY = 3
_HAS_GPU = "AXOLOTL_GMT_CHECK_HAS_GPU"  # The child itself is to find none.
ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    # Nothing is computed, and each thread takes memory.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Variables of a process that imports Axolotl: no GPU, no network, few threads."""
_REPORT = TypeAdapter(Report)


class Checker:
    """Checks files in a child process: one for all files, and a new one after a file that ends it.

    Use it in a ``with`` block, which ends the child, also when it is left by Ctrl-C.

    Args:
        seconds: How long the check of a file may take, without the imports.
    """

    command = (sys.executable, "-P", "-m", "axolotl_gmt.tools.check.child")

    def __init__(self, seconds: int = SECONDS) -> None:
        self._seconds = seconds
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child:
            self._end(self._child)

    def check(self, path: Path, gpus: int | None = None, share: bool = False) -> Report:
        """Check one file, whatever it holds, as :func:`axolotl_gmt.tools.check.check.check` does.

        Raises:
            UserError: If Axolotl cannot be imported.
        """
        child = self._child or self._start()
        assert child.stdin
        assert child.stdout
        with suppress(BrokenPipeError):  # Its end is told below.
            print(json.dumps([str(path), gpus, share]), file=child.stdin, flush=True)
        try:
            return _REPORT.validate_python(json.loads(child.stdout.readline()))
        except (json.JSONDecodeError, ValidationError):
            return Report(str(path), errors=[self._why(self._end(child, patience=10))])

    def _start(self) -> subprocess.Popen[str]:
        # Modules are imported from where this process finds them, and from no other folder.
        environment = {
            **os.environ,
            **ENVIRONMENT,
            _HAS_GPU: "yes" if _has_gpu() else "no",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        with tempfile.TemporaryFile("w+", errors="replace") as messages:
            child = self._child = subprocess.Popen(
                [*self.command, str(self._seconds)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
            )
            assert child.stdout
            if not child.stdout.readline():
                self._end(child, patience=10)
                messages.seek(0)
                last = next(reversed(messages.read().splitlines()), "it says nothing")
                raise UserError(f"Axolotl cannot be imported: {last}")
        return child

    def _end(self, child: subprocess.Popen[str], patience: float = 0) -> int:
        """End the child, if it has not ended within ``patience`` seconds; returns its status."""
        self._child = None
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
        with suppress(BrokenPipeError), child:  # Closes the pipes and waits.
            pass
        return child.returncode

    def _why(self, status: int) -> str:
        if status == -signal.SIGALRM:
            reason = f"took more than {self._seconds} seconds"
        elif status == _OUT_OF_MEMORY:
            reason = f"took more than {GIBIBYTES} GiB of memory"
        elif status < 0:
            reason = f"was ended by {signal.Signals(-status).name}"
        else:
            reason = f"ended with status {status}"
        return (
            f"the check of it {reason}. Look for huge numbers and for patterns that match in "
            "endless ways, in it and in the config of its model."
        )


def _has_gpu() -> bool:
    """Whether a training here would find a GPU, as device files say; importing torch takes long."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    devices = ("nvidia[0-9]*", "kfd", "dxg", "davinci[0-9]*")  # NVIDIA, AMD, WSL, Ascend.
    return sys.platform == "darwin" or any(any(Path("/dev").glob(name)) for name in devices)


def serve(seconds: int) -> None:
    """Check the files that are named on stdin, until it ends; each for so long at most."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Axolotl and others print there.
    from axolotl_gmt.tools.check.check import check
    from axolotl_gmt.tools.check.validation import build_schema_once

    has_gpu = os.environ.get(_HAS_GPU) == "yes"
    build_schema_once()
    print("ready", file=answers, flush=True)
    os.dup2(1, 2)
    with suppress(OSError, ValueError):  # Not every system has this limit.
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (GIBIBYTES << 30, hard))
    for line in sys.stdin:
        path, gpus, share = json.loads(line)
        signal.alarm(seconds)  # Which ends this process, whatever it is in.
        try:
            report = check(Path(path), gpus, share, has_gpu)
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except Exception as error:  # Its text may quote a secret.
            report = Report(path, errors=[f"the check of it stops with {type(error).__name__}."])
        signal.alarm(0)
        print(json.dumps(asdict(report)), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
