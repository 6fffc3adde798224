"""What the command ``env`` says of a machine, and what it must not say."""

from __future__ import annotations

import getpass
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from axolotl_gmt import __version__
from axolotl_gmt.cli import gmt
from axolotl_gmt.kernels import dispatch, self_check
from axolotl_gmt.kernels.self_check import SelfCheckError
from axolotl_gmt.tools import environment as tool
from axolotl_gmt.tools.environment import environment

pytest.importorskip("axolotl_gmt.kernels.numba_cpu")

DTYPES = ["bfloat16", "float16", "float32"]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Forget before and after a test which compiled passes there are."""
    dispatch.forget_backends()
    yield
    dispatch.forget_backends()


def test_versions_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "PACKAGES", ("torch", "pytest", "there-is-no-such-package"))
    assert environment().versions == {
        "python": platform.python_version(),
        "axolotl-gmt": __version__,
        "torch": torch.__version__,
        "pytest": pytest.__version__,
        "there-is-no-such-package": None,
    }


def test_a_cpu_masks_by_compiled_passes_that_were_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    compare = self_check.compare

    def compare_and_tell(*arguments: object) -> None:
        checked.append(arguments)
        compare(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(self_check, "compare", compare_and_tell)
    (cpu,) = environment().devices
    assert cpu.name == "cpu"
    assert cpu.memory
    assert cpu.memory > 1 << 30
    assert cpu.passes == dict.fromkeys(DTYPES, "Numba")
    assert cpu.error is None
    assert len(checked) == len(DTYPES)


def test_a_failed_self_check_is_told_with_the_pass_that_differs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def differs(*_: object) -> None:
        raise SelfCheckError("its mask differs from torch's")

    monkeypatch.setattr(self_check, "compare", differs)
    (cpu,) = environment().devices
    assert cpu.passes == dict.fromkeys(DTYPES, "torch")
    assert cpu.error == "SelfCheckError: its mask differs from torch's"
    assert not caplog.records
    assert logging.getLogger("axolotl_gmt.kernels").propagate
    result = CliRunner().invoke(gmt, ["env"])
    assert "bfloat16, float16, float32 masked by torch; compiled passes cannot be" in result.stdout
    assert "(SelfCheckError: its mask differs from torch's)" in result.stdout


def test_accelerators_are_listed_with_memory_and_capability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is none here, so torch's answers are made up; the passes are those of any device."""

    def properties(index: int) -> object:
        if index == 1:
            raise RuntimeError("/home/somebody: an error of the driver")
        return SimpleNamespace(name="A GPU", total_memory=80 << 30, major=9, minor=0)

    module = SimpleNamespace(get_device_properties=properties)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    _, first, second = environment().devices
    assert (first.name, first.model, first.memory, first.capability) == (
        "xpu:0",
        "A GPU",
        80 << 30,
        "9.0",
    )
    assert first.passes == second.passes == dict.fromkeys(DTYPES, "torch")
    assert first.error is None  # Nobody compiles for it.
    assert (second.name, second.model) == ("xpu:1", "properties cannot be read (RuntimeError)")
    lines = [line.strip() for line in CliRunner().invoke(gmt, ["env"]).stdout.splitlines()]
    assert "xpu:0         A GPU, 80.0 GiB, capability 9.0" in lines


def test_mps_is_said_to_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    _, mps = environment().devices
    assert mps.passes == {}
    assert "no masks: no float64, so GMT refuses it" in CliRunner().invoke(gmt, ["env"]).stdout


SECRET = "S3cr3tW0rd"


@pytest.mark.parametrize("arguments", [["env"], ["env", "--json"]])
def test_nothing_private_is_printed(arguments: list[str], tmp_path: Path) -> None:
    """Not even where the compiled passes break with an error that quotes a path."""
    broken = tmp_path / SECRET / "numba"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError(f'cannot open {__file__}')")
    names = ("HOME", "USER", "LOGNAME", "HOSTNAME", "HF_TOKEN", "WANDB_API_KEY")
    private = {name: f"/{SECRET}/{name}" for name in names}
    path = os.pathsep.join([str(broken.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-m", "axolotl_gmt", *arguments],
        env={**os.environ, **private, "PYTHONPATH": path},
        cwd=broken.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    said = result.stdout + result.stderr
    assert "OSError" in said
    for word in (SECRET, "/", "\\", socket.gethostname(), getpass.getuser()):
        assert word not in said


def test_json_has_what_the_text_has() -> None:
    text = CliRunner().invoke(gmt, ["env"]).stdout
    found = json.loads(CliRunner().invoke(gmt, ["env", "--json"]).stdout)
    assert found == json.loads(json.dumps(environment().as_dict()))
    for package, version in found["versions"].items():
        assert f"{package:<14}{version or 'not installed'}" in text
    assert f"{found['system']}, {found['cores']} cores" in text
    assert found["devices"][0]["model"] in text
