"""The command for a first day on a GPU, as a whole with tiny shapes, and what ends its parts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from axolotl_gmt.tools.quickstart import Folder as QuickstartFolder
from benchmarks.gpu_day import children, day, parts, training
from benchmarks.gpu_day.__main__ import main
from benchmarks.gpu_day.children import run_child
from benchmarks.gpu_day.parts import PARTS, Part, Place, Rows
from benchmarks.gpu_day.record import JSON_FILE, TABLE_FILE, Day, Line, Machine

H100 = Machine(
    gpu="NVIDIA H100 80GB HBM3",
    gpu_gib=79.1,
    driver="580.1",
    cpu="EPYC",
    cores=16,
    memory_gib=128,
    versions={"torch": "2.14.1"},
    commit="0123456789ab",
)
CPU = H100.model_copy(update={"gpu": None, "gpu_gib": 0.0, "driver": None})

WRITE_ROWS = "import sys; open(sys.argv[1], 'w').write('{\"rows\": [{\"ms\": 1.5}]}')"
HANG = "import time; print('entered', flush=True); time.sleep(600)"


def part(name: str, code: str, limit: float = 60, **needs: Any) -> Part:
    """A part whose child runs Python code, with the file for its rows as the argument."""

    def command(place: Place) -> list[str]:
        return [sys.executable, "-c", code, str(place.rows)]

    def lines(rows: Rows, _: Place) -> Iterable[Line]:
        yield Line(what="time", measured=f"{rows[0]['ms']} ms")

    return Part(name, f"what {name} shows", command, lines, limit, **needs)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(day, "find_machine", lambda *_: CPU)


def record(out: Path) -> Day:
    return Day.model_validate_json((out / JSON_FILE).read_text())


def table(out: Path) -> list[list[str]]:
    """The cells of the table's rows, without its heading."""
    text = (out / TABLE_FILE).read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_whole_day_runs_tiny_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "day"), "--tiny"]
    assert main(arguments) == 0, capsys.readouterr().err
    rows = table(tmp_path / "day")
    assert {len(row) for row in rows} == {6}
    assert list(dict.fromkeys(row[0] for row in rows)) == [part.name for part in PARTS]
    not_run = {row[0]: row[2] for row in rows if row[2].startswith("not run")}
    assert not_run.keys() == {part.name for part in PARTS if part.needs_gpu}
    assert set(not_run.values()) == {"not run: no GPU"}
    found = record(tmp_path / "day")
    assert found.tiny
    assert found.machine.gpu is None
    passed = {name for name, result in found.results.items() if result.outcome == "passed"}
    assert passed == {part.name for part in PARTS if not part.needs_gpu}
    for name in ("sft", "dpo"):
        assert found.results[name].rows[0]["kept fractions"] == pytest.approx([0.5] * 3, abs=1e-3)
    for row in found.results["exactness"].rows:
        assert row["error"] == ""
    ways = {row["what"] for row in found.results["mask_step_1b"].rows}
    assert {"GMT mask step", "copy of the gradients", "torch.topk", "fused AdamW step"} <= ways
    # Figures of tiny shapes on a CPU are held to no target of a GPU.
    assert all(row[3] == "" for row in rows if row[0].startswith(("mask_step", "memory", "step")))
    text = (tmp_path / "day" / TABLE_FILE).read_text()
    assert torch.__version__.partition("+")[0] in text
    assert str(tmp_path) not in text
    assert capsys.readouterr().out == text
    assert (tmp_path / "day" / "sft.log").stat().st_size > 0
    assert not list((tmp_path / "day").rglob("*-out/*.safetensors"))


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('a | planted fault')", "exit code 1: ValueError: a / planted fault"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9: nothing was printed"),
        ("print('no rows')", "its figures cannot be read: FileNotFoundError"),
        ("import sys; open(sys.argv[1], 'w').write('{\"rows\": [')", "cannot be read"),
        ("import sys; open(sys.argv[1], 'w').write('{\"rows\": []}')", "cannot be read"),
    ],
)
def test_a_part_that_fails_ends_no_other_and_the_exit_code_is_1(
    code: str, reason: str, tmp_path: Path
) -> None:
    some = [part("first", WRITE_ROWS), part("bad", code), part("last", WRITE_ROWS)]
    assert main(["--out", str(tmp_path)], some) == 1
    outcomes = [(row[0], row[2], row[4]) for row in table(tmp_path)]
    assert outcomes[0] == ("first", "1.5 ms", "")
    assert outcomes[2] == ("last", "1.5 ms", "")
    assert reason in outcomes[1][1]
    assert outcomes[1][2] == "no"
    assert record(tmp_path).results["bad"].outcome == "failed"


@pytest.mark.usefixtures("no_gpu")
def test_what_a_part_measured_before_it_broke_down_is_kept(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path)], [part("late", f"{WRITE_ROWS}; sys.exit(3)")]) == 1
    assert [row[2] for row in table(tmp_path)] == [
        "1.5 ms",
        "failed: exit code 3: nothing was printed (late.log)",
    ]


@pytest.mark.usefixtures("no_gpu")
def test_a_part_that_measured_nothing_has_not_passed(tmp_path: Path) -> None:
    silent = dataclasses.replace(part("silent", WRITE_ROWS), lines=lambda *_: ())
    assert main(["--out", str(tmp_path)], [silent]) == 1
    assert table(tmp_path)[0][2] == "failed: it measured nothing (silent.log)"


@pytest.mark.usefixtures("no_gpu")
def test_a_part_that_hangs_is_ended_at_its_limit(tmp_path: Path) -> None:
    start = time.monotonic()
    some = [part("hangs", HANG, limit=3), part("last", WRITE_ROWS)]
    assert main(["--out", str(tmp_path)], some) == 1
    assert time.monotonic() - start < 60
    result = record(tmp_path).results["hangs"]
    assert result.reason == "ended after 3 s; its last words: entered (hangs.log)"
    assert 3 <= result.seconds < 15
    assert record(tmp_path).results["last"].outcome == "passed"


def test_a_child_that_ignores_the_end_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "_GRACE_S", 0.5)
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    ended = run_child([sys.executable, "-c", code], {}, log, limit=5)
    assert ended.code is None
    pid = int(log.read_text())
    for _ in range(100):  # Until whoever inherited the grandchild has reaped it.
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the grandchild still runs")


@pytest.mark.usefixtures("no_gpu")
def test_the_total_limit_ends_a_part_and_starts_no_other(tmp_path: Path) -> None:
    some = [part("long", HANG), part("late", WRITE_ROWS)]
    # Less than the least time that a part is given is left then.
    assert main(["--out", str(tmp_path), "--minutes", "0.1"], some) == 1
    results = record(tmp_path).results
    assert results["long"].reason.startswith("ended after 6 s")
    assert results["late"].reason == "not started: the time for all parts was over"


@pytest.mark.usefixtures("no_gpu")
def test_the_same_command_again_runs_only_what_has_not_passed(tmp_path: Path) -> None:
    count = tmp_path / "count"
    counted = f"open({str(count)!r}, 'a').write('x')\n{WRITE_ROWS}"
    good, bad = part("good", counted), part("bad", "raise SystemExit(1)")
    arguments = ["--out", str(tmp_path / "day")]
    assert main(arguments, [good, bad]) == 1
    assert main(arguments, [good, part("bad", WRITE_ROWS)]) == 0
    assert count.read_text() == "x"
    assert main([*arguments, "--again", "--parts", "good"], [good, bad]) == 0
    assert count.read_text() == "xx"
    assert record(tmp_path / "day").results["bad"].outcome == "passed"


@pytest.mark.usefixtures("no_gpu")
def test_an_interrupted_day_keeps_what_it_has(tmp_path: Path) -> None:
    def interrupt(_: Place) -> list[str]:
        raise KeyboardInterrupt

    third = Part("third", "", interrupt, lambda *_: (), 60)
    assert main(["--out", str(tmp_path)], [part("first", WRITE_ROWS), third]) == 130
    assert [row[0] for row in table(tmp_path)] == ["first"]
    assert record(tmp_path).results["first"].outcome == "passed"


HANGING_DAY = """
import signal, sys
from benchmarks.gpu_day import __main__ as command, day
from tests.benchmarks.test_gpu_day import CPU, HANG, part
day.find_machine = lambda *_: CPU
signal.signal(signal.SIGTERM, command._end)
hangs = part("hangs", "import os; print(os.getpid(), flush=True); " + HANG)
sys.exit(command.main(["--out", sys.argv[1]], [hangs]))
"""


def test_a_signal_to_the_command_ends_the_child_that_runs(tmp_path: Path) -> None:
    log = tmp_path / "hangs.log"
    arguments = [sys.executable, "-c", HANGING_DAY, str(tmp_path)]
    with subprocess.Popen(arguments, cwd=children.ROOT) as command:
        for _ in range(600):
            if log.exists() and "entered" in log.read_text():
                break
            time.sleep(0.1)
        command.send_signal(signal.SIGTERM)
        assert command.wait(30) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split()[0]), 0)


def test_results_of_another_machine_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = [part("first", WRITE_ROWS), part("second", WRITE_ROWS)]
    arguments = ["--out", str(tmp_path)]
    monkeypatch.setattr(day, "find_machine", lambda *_: CPU)
    assert main(arguments, some) == 0
    monkeypatch.setattr(day, "find_machine", lambda *_: H100)
    assert main(arguments, some) == 2
    assert "Name another --out, or add --again" in capsys.readouterr().err
    assert record(tmp_path).machine == CPU
    assert main([*arguments, "--again", "--parts", "second"], some) == 0
    assert record(tmp_path).machine == H100
    assert record(tmp_path).results.keys() == {"second"}


def test_a_part_that_this_machine_cannot_run_says_why_and_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(day, "find_machine", lambda *_: H100)
    some = [
        part("large", "raise SystemExit(1)", needs_gpu=True, needs_gib=100),
        part("other", "raise SystemExit(1)", needs_packages=("no-such-package",)),
        part("fits", WRITE_ROWS, needs_gpu=True, needs_gib=66),
    ]
    assert main(["--out", str(tmp_path)], some) == 0
    assert [row[2] for row in table(tmp_path)] == [
        "not run: 79 GiB of GPU memory, 100 needed",
        "not run: no-such-package is not installed",
        "1.5 ms",
    ]
    assert main(["--out", str(tmp_path / "tiny"), "--tiny"], some[2:]) == 0
    assert table(tmp_path / "tiny")[0][2] == "not run: tiny shapes run on the CPU"


def test_an_unknown_part_is_refused_and_help_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--out", "unused", "--parts", "sft,fast"])
    assert "there is no fast" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for each in PARTS:
        assert f"  {each.name} " in text


def gpu(tmp_path: Path) -> Place:
    return Place("cuda", tmp_path / "rows.json", tmp_path)


@pytest.mark.parametrize(
    ("moves", "topk", "passed"), [(1.3, 20, True), (1.31, 20, False), (1.3, 19.9, False)]
)
def test_a_mask_step_is_held_to_its_targets_on_a_gpu(
    moves: float, topk: float, passed: bool, tmp_path: Path
) -> None:
    ways = ("GMT mask step", "torch.topk", "torch.topk, unsorted", "fused AdamW step")
    rows = [
        {
            "model": "Llama-1B",
            "dtype": "bf16",
            "what": what,
            "median ms": 4.0,
            "times the mask step": topk if what == "torch.topk" else 1.0,
            "times 3 moves of the bytes": moves,
        }
        for what in ways
    ]
    lines = list(parts.mask_step(rows, gpu(tmp_path)))
    judged = [line.passed for line in lines if line.target]
    assert len(judged) == 2
    assert all(judged) == passed


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"kept fractions": [0.5, 1.0]}, False),
        ({"kept fractions": [0.5, 0.25]}, False),
        ({"losses": [1.0, None]}, False),
        ({"parameters": ["Tensor"]}, False),
    ],
)
def test_a_training_is_held_to_what_its_log_should_say(
    changes: dict[str, Any], passed: bool, tmp_path: Path
) -> None:
    row = {
        "model": "some",
        "steps": 2,
        "kept fractions": [0.5, 0.502],
        "losses": [2.0, 1.5],
        "parameters": ["DTensor"],
        **changes,
    }
    lines = parts.training(parameters="DTensor")([row], gpu(tmp_path))
    assert all(line.passed for line in lines) == passed


def test_a_wait_for_the_device_and_a_wrong_mask_miss_their_targets(tmp_path: Path) -> None:
    waits = {"steps": 10, "what": "bf16, gradient", "synchronisations": "at least 1: called .item"}
    (line,) = parts.synchronisations([waits], gpu(tmp_path))
    assert line.passed is False
    right = {"kind": "kernels", "check": "bf16, one", "error": ""}
    wrong = {"kind": "kernels", "check": "bf16, ragged", "error": "AssertionError: 3 entries"}
    (line,) = parts.exact([right, wrong], gpu(tmp_path))
    assert line.passed is False
    assert line.measured == "1 of 2; bf16, ragged: AssertionError: 3 entries"
    (line,) = parts.exact([right, wrong, wrong, wrong], gpu(tmp_path))
    assert line.measured.endswith("AssertionError: 3 entries; and 2 more in the log")


def test_a_run_that_was_not_masked_or_lacks_steps_has_no_row(tmp_path: Path) -> None:
    (tmp_path / training.SEEN_FILE).write_text("{}")
    log = [{"step": step, "loss": 1.0, "gmt/kept_fraction": 0.5} for step in (1, 2)]

    def write(log: list[dict[str, float]]) -> None:
        state = {"log_history": log, "global_step": 2, "max_steps": 2}
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))

    write(log)
    assert training.row_of("sft", "some", tmp_path, 2)["kept fractions"] == [0.5, 0.5]
    with pytest.raises(ValueError, match="2 of 3 steps"):
        training.row_of("sft", "some", tmp_path, 3)
    write([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}])
    with pytest.raises(ValueError, match="GMT did not mask"):
        training.row_of("sft", "some", tmp_path, 2)


@pytest.mark.parametrize("name", training.RUNS)
def test_axolotl_and_gmt_take_the_config_of_each_training(name: str, tmp_path: Path) -> None:
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    folder = QuickstartFolder(tmp_path)
    folder.sft_recipe.write_text("base_model: x\ndatasets: [{path: x, type: chat_template}]")
    folder.dpo_recipe.write_text(
        "base_model: x\nrl: dpo\ndatasets: [{path: x, type: chat_template}]"
    )
    file, _ = training.write_config(name, folder, "cuda")
    config = DictDefault(yaml.safe_load(file.read_text()) | {"learning_rate": 1e-4})
    card = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
    version = {"torch_version": torch.__version__.partition("+")[0]}
    PluginManager.get_instance().plugins.clear()
    try:
        prepare_plugins(config)
        valid = validate_config(config, capabilities=card, env_capabilities=version)
    finally:
        PluginManager.get_instance().plugins.clear()
    assert valid.gmt_mask_ratio == training.MASK_RATIO
    assert valid.bf16


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no DeepSpeed")
def test_the_zero_part_is_exact_over_gloo(tmp_path: Path) -> None:
    (zero,) = (each for each in PARTS if each.name == "zero")
    place = Place("cpu", tmp_path / "rows.json", tmp_path)
    environment = day.variables(tiny=True) | {"GLOO_SOCKET_IFNAME": "lo"}
    ended = run_child(zero.command(place), environment, tmp_path / "log", limit=300)
    assert ended.code == 0, (tmp_path / "log").read_text()[-3000:]
    lines = list(zero.lines(json.loads(place.rows.read_text())["rows"], place))
    assert [line.measured for line in lines] == ["1 of 1", "4 of 4"]
