"""The child process in which ``axolotl gmt check`` checks files, with a check that misbehaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from axolotl_gmt.errors import UserError
from axolotl_gmt.tools.check.child import GIBIBYTES, Checker
from axolotl_gmt.tools.check.report import Mask, Plan, Report

# Stands for the modules that import Axolotl, which takes long. The check does what the file's name
# says.
SCRIPT = f"""
import json, os, signal, sys, time, types
from axolotl_gmt.tools.check import child
from axolotl_gmt.tools.check.report import Mask, Plan, Report

def check(path, gpus, share, has_gpu):
    print("a banner")
    os.system("echo another")
    match path.name:
        case "hang": time.sleep(100)
        case "backtrack": __import__("re").match("(a+)+$", "a" * 50 + "b")
        case "eat": bytearray({GIBIBYTES} + 1 << 30)
        case "crash": os.kill(os.getpid(), signal.SIGSEGV)
        case "leave": sys.exit(5)
        case "raise": raise ValueError("a secret")
    plan = Plan(True, "why", "adamw", {{"include": ("a", "b")}}, Mask(1, 2, 3, 4))
    facts = [json.dumps((os.getpid(), gpus, share, os.environ["HF_HUB_OFFLINE"],
                  os.environ["CUDA_VISIBLE_DEVICES"]))]
    return Report(str(path), remarks=facts, gmt=plan)

for name, content in {{"check": check, "validation": None}}.items():
    stub = types.SimpleNamespace(check=content, build_schema_once=lambda: None)
    sys.modules["axolotl_gmt.tools.check." + name] = stub
child.serve(int(sys.argv[1]))
"""


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checker]:
    monkeypatch.setattr(Checker, "command", (sys.executable, "-c", SCRIPT))
    with Checker(seconds=1) as checker:
        yield checker


def facts(report: Report) -> tuple[int, int | None, bool, str, str]:
    assert not report.errors
    pid, *rest = json.loads(report.remarks[0])
    return pid, *rest


def test_a_report_comes_back_whole_and_one_child_serves_many_files(checker: Checker) -> None:
    name = Path("good \n\udc80 name")
    report = checker.check(name, 8, True)
    pid, gpus, share, offline, devices = facts(report)
    assert (gpus, share, offline, devices) == (8, True, "1", "")
    assert pid != os.getpid()
    assert report.path == str(name)
    assert report.gmt == Plan(
        True, "why", "adamw", {"include": ["a", "b"]}, Mask(1, 2, 3, 4), not_counted=None
    )
    assert facts(checker.check(Path("next"))) == (pid, None, False, "1", "")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("hang", "the check of it took more than 1 seconds."),
        ("backtrack", "the check of it took more than 1 seconds."),
        ("eat", f"the check of it took more than {GIBIBYTES} GiB of memory."),
        ("crash", "the check of it was ended by SIGSEGV."),
        ("leave", "the check of it ended with status 5."),
        ("raise", "the check of it stops with ValueError."),
    ],
)
def test_a_file_that_ends_the_child_has_an_error_and_the_rest_go_on(
    name: str, error: str, checker: Checker
) -> None:
    report = checker.check(Path(name))
    assert len(report.errors) == 1
    assert report.errors[0].startswith(error)
    assert "secret" not in report.errors[0]
    facts(checker.check(Path("good")))


def test_a_child_that_is_killed_between_files_is_an_error_of_the_next(checker: Checker) -> None:
    os.kill(facts(checker.check(Path("good")))[0], signal.SIGKILL)
    assert "was ended by SIGKILL" in checker.check(Path("good")).errors[0]
    facts(checker.check(Path("good")))


def test_a_child_that_cannot_import_axolotl_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    command = (sys.executable, "-c", "import no_such_module")
    monkeypatch.setattr(Checker, "command", command)
    with Checker() as checker, pytest.raises(UserError, match="No module named 'no_such_module'"):
        checker.check(Path("good"))


def test_ctrl_c_ends_the_child_too(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    script = SCRIPT.replace(
        '"hang":', f'"hang": open({str(marker)!r}, "w").write(str(os.getpid()));'
    )
    code = (
        "import sys; from pathlib import Path; from axolotl_gmt.tools.check.child import Checker\n"
        f"Checker.command = (sys.executable, '-c', {script!r})\n"
        "with Checker() as checker: checker.check(Path('hang'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (marker.exists() and marker.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    _, messages = parent.communicate(timeout=20)
    assert b"KeyboardInterrupt" in messages
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_what_a_child_sends_is_data_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"path": "x", "errors": "not a list"}, {"gmt": {"enabled": "perhaps"}}, []]
    for answer in answers:
        code = f"print('ready', flush=True); input(); print({json.dumps(json.dumps(answer))})"
        monkeypatch.setattr(Checker, "command", (sys.executable, "-c", code))
        with Checker() as checker:
            assert checker.check(Path("x")).errors[0].startswith("the check of it ended with")
