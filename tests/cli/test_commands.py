"""What holds for every command: start-up, Ctrl-C, and names that a terminal would obey."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from axolotl_gmt.cli import gmt

ROOT = Path(__file__).parents[2]


def test_help_texts_import_nothing_heavy() -> None:
    program = (
        "import sys, axolotl_gmt.cli\n"
        "axolotl_gmt.cli.gmt(['score', '--help'], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'transformers', 'axolotl', 'pydantic'} & sys.modules.keys()))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(gmt.commands))])
def test_every_command_has_a_help_text(command: list[str]) -> None:
    result = CliRunner().invoke(gmt, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_the_program_of_its_own_starts_the_commands_without_axolotl() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["gmt-tools"].split(":")
    # What pip writes into the program, but for the modules that it may have imported.
    program = (
        f"import sys; from {module} import {function}; sys.argv = ['gmt-tools', *sys.argv[1:]]\n"
        f"try: {function}()\n"
        "finally: assert not {'torch', 'transformers', 'axolotl'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", program, "recipes", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("Usage: gmt-tools recipes ")
    command = [sys.executable, "-m", "axolotl_gmt", "recipes", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("Usage: python -m axolotl_gmt recipes ")


# Ctrl-C


def interrupted(arguments: list[str], ready: Path, **environment: str) -> tuple[int, str]:
    """Exit status and stderr of a command that gets SIGINT once the file ``ready`` is there."""
    with subprocess.Popen(
        [sys.executable, "-m", "axolotl_gmt", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while not ready.exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            # Python drops an exception that a signal's handler raises while a finalizer runs, of
            # which imports have many. So a user, and this, may have to press Ctrl-C again.
            for _ in range(3):
                process.send_signal(signal.SIGINT)
                try:
                    _, stderr = process.communicate(timeout=40)
                    break
                except subprocess.TimeoutExpired:
                    continue
            else:
                raise AssertionError(f"{arguments} goes on after Ctrl-C")
        finally:
            process.kill()
    return process.returncode, stderr


def package(folder: Path, name: str, text: str) -> str:
    """A package of this name that takes the place of the real one; returns the path to import."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "RuntimeError"])
@pytest.mark.parametrize(
    ("imported", "command"), [("click", []), ("ml_dtypes", ["inspect", "a", "b"])]
)
def test_ctrl_c_during_imports_exits_with_130(
    error: str, imported: str, command: list[str], tmp_path: Path
) -> None:
    """Some libraries answer with an error of their own."""
    if (imported, error) == ("click", "RuntimeError"):
        pytest.skip("before click there is no library that does")
    ready = tmp_path / "ready"
    path = package(
        tmp_path / "path",
        imported,
        f"import pathlib, time\npathlib.Path({str(ready)!r}).touch()\n"
        f"try:\n    time.sleep(300)\nexcept KeyboardInterrupt:\n    raise {error} from None\n",
    )
    code, stderr = interrupted(command, ready, PYTHONPATH=path)
    assert code == 130
    assert "Traceback" not in stderr


def test_ctrl_c_during_the_training_ends_axolotl_too(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    (folder / "base").mkdir(parents=True)  # What is there is kept.
    ready = tmp_path / "ready"
    path = package(tmp_path / "path", "axolotl", "")
    package(
        tmp_path / "path" / "axolotl",
        "cli",
        "",
    )
    (tmp_path / "path" / "axolotl" / "cli" / "main.py").write_text(
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"part = pathlib.Path({str(tmp_path / 'part')!r})\n"
        "part.write_text(str(os.getpid()))\n"
        f"part.rename({str(ready)!r})\n"
        "time.sleep(300)\n"
    )
    code, stderr = interrupted(["quickstart", str(folder)], ready, PYTHONPATH=path)
    assert code == 130
    assert "Traceback" not in stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(ready.read_text()), 0)


def test_ctrl_c_ends_the_process_that_scores(toy_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    data.write_text(json.dumps({"messages": turns}))
    ready = tmp_path / "ready"
    path = package(
        tmp_path / "path",
        "transformers",
        "import os, pathlib, time\n"
        f"part = pathlib.Path({str(tmp_path / 'part')!r})\n"
        "part.write_text(str(os.getpid()))\n"
        f"part.rename({str(ready)!r})\n"
        "time.sleep(300)\n",
    )
    arguments = ["score", str(toy_model), "--data", str(data)]
    code, stderr = interrupted(arguments, ready, PYTHONPATH=path)
    assert code == 130
    assert "Traceback" not in stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(ready.read_text()), 0)


# Names


ESCAPE = "[/b]\x1b[31m\n\u202e"


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", ESCAPE],
        ["inspect", ESCAPE, "b"],
        ["diff", ESCAPE, "b", "-o", "c"],
        ["apply", ESCAPE, "b", "--check"],
        ["quickstart", "/dev/null/" + ESCAPE],
        ["recipe", ESCAPE],
        ["recipe", "math-qwen3-0.6b", "-o", "/dev/null/" + ESCAPE],
        ["report", ESCAPE],
        ["compare", ESCAPE, "b"],
        ["score", ESCAPE, "--data", ESCAPE],
        ["score", "a", "--data", "b", "--limit", ESCAPE],
        [ESCAPE],
    ],
)
def test_names_that_a_terminal_would_obey_are_printed_with_escapes(arguments: list[str]) -> None:
    result = CliRunner().invoke(gmt, arguments)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert r"\x1b[31m" in result.output
    assert "\x1b" not in result.output
    assert "\u202e" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "a\0", "b"],
        ["inspect", "a", "b", "--png", "c\0.png"],
        ["diff", "a", "b\0", "-o", "c"],
        ["diff", "a", "b", "-o", "c\0"],
        ["apply", "a", "b\0", "--check"],
        ["apply", "a", "b", "-o", "c\0"],
        ["report", "a\0"],
        ["report", "a", "-o", "b\0"],
        ["compare", "a", "b\0"],
        ["compare", "a", "b", "-o", "c\0"],
        ["check", "a\0.yml"],
        ["recipe", "math-qwen3-0.6b", "-o", "b\0.yml"],
        ["score", "a\0", "--data", "b"],
        ["quickstart", "a\0"],
    ],
)
def test_a_path_with_a_nul_byte_is_wrong_usage(arguments: list[str]) -> None:
    result = CliRunner().invoke(gmt, arguments)
    assert result.exit_code == 2
    assert "has a NUL byte" in result.output
