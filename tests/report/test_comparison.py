"""Runs beside each other: their names, the table, the page, the command that makes them."""

from __future__ import annotations

import json
import math
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from axolotl_gmt.cli import gmt
from axolotl_gmt.errors import UserError
from axolotl_gmt.record import FORGETTING, GRAD_NORM_KEPT, KEPT_FRACTION, L1_KEPT
from axolotl_gmt.report import figures
from axolotl_gmt.report.comparison import MOST_RUNS, columns, read_runs, short_names
from axolotl_gmt.report.comparison_page import PAGE, pictures, write_comparison
from axolotl_gmt.report.log import parse_state
from axolotl_gmt.report.page import Picture, write_report
from tests.report.test_report import HOSTILE, Page, training_state, write_state

PLAIN = {
    "log_history": [
        {"step": 1, "loss": 3.0, "grad_norm": 1.5, "learning_rate": 1e-4},
        {"step": 2, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 5e-5},
        {"step": 2, "eval_loss": 1.5},
        {"step": 2, "train_runtime": 3725.4, "train_loss": 2.5},
    ],
    "global_step": 2,
    "max_steps": 2,
    "stateful_callbacks": {"TrainerControl": {}},
}


def state_with(steps: int = 6, **args: object) -> dict[str, Any]:
    """A state of a run with GMT and these settings."""
    attributes = {"base_optimizer": "AdamW", "masked_parameters": 10}
    callbacks = {"GMTCallback": {"args": args, "attributes": attributes}}
    return training_state(steps, stateful_callbacks=callbacks)


def write_runs(folder: Path, **states: object) -> list[Path]:
    """The folders of runs, named after the keywords."""
    for name, state in states.items():
        write_state(folder / name, state)
    return [folder / name for name in states]


def run_compare(*arguments: object) -> Result:
    return CliRunner().invoke(gmt, ["compare", *map(str, arguments)])


def table(*folders: Path) -> dict[str, list[str]]:
    return {column.label: column.cells for column in columns(read_runs(folders))}


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws everything, but on few pixels, which is several times as fast."""
    monkeypatch.setattr("axolotl_gmt.report.figures.DPI", 30)


# The table


def test_settings_are_shown_if_they_differ_and_only_then(tmp_path: Path) -> None:
    runs = write_runs(
        tmp_path,
        a=state_with(mask_ratio=0.5, criterion="gradient", exclude=["norm", "bias"], hold=True),
        b=state_with(mask_ratio=0.9, criterion="gradient", exclude=None, hold=True),
    )
    assert list(table(*runs).items())[:3] == [
        ("Mask ratio", ["0.5", "0.9"]),
        ("Exclude", ["norm, bias", "unset"]),
        ("Steps", ["6 of 10", "6 of 10"]),
    ]


def test_a_setting_that_an_earlier_version_did_not_know_has_its_default(tmp_path: Path) -> None:
    old, new = state_with(mask_ratio=0.5), state_with(mask_ratio=0.5, log_overlap=False)
    assert "Log overlap" not in table(*write_runs(tmp_path, old=old, new=new))
    held = state_with(mask_ratio=0.5, hold=True)
    assert table(*write_runs(tmp_path, old=old, held=held))["Hold"] == ["false", "true"]


def test_arguments_of_the_training_are_shown_if_they_differ(tmp_path: Path) -> None:
    one, other = training_state(), training_state(train_batch_size=8, epoch=3.0)
    for entry in other["log_history"]:
        entry |= {"learning_rate": 2e-4 / entry["step"]} if "loss" in entry else {}
    told = table(*write_runs(tmp_path, one=one, other=other))
    assert told["Highest learning rate"] == ["0.0001", "0.0002"]
    assert told["Batch size of a process"] == ["4", "8"]
    assert told["Epochs"] == ["0.6", "3"]
    assert not {"Base optimizer", "Mask ratio"} & told.keys()


def test_a_run_without_gmt_is_named_as_such(tmp_path: Path) -> None:
    zero = state_with(mask_ratio=0, granularity="layer")
    runs = write_runs(tmp_path, plain=PLAIN, zero=zero)
    assert [run.label for run in read_runs(runs)] == ["plain (no GMT)", "zero"]
    told = table(*runs)
    assert told["Mask ratio"] == ["no GMT", "0"]
    assert "Granularity" not in told  # There is no other granularity that it differs from.
    assert told["Run time"] == ["1:02:05", "-"]
    assert told["Steps"] == ["2", "6 of 10"]
    assert told["Kept fraction"][0] == "-"
    runs = write_runs(tmp_path, plain=PLAIN, again=PLAIN)
    assert table(*runs).keys() == {"Steps", "Final loss", "Best eval loss", "Run time"}


def test_results_are_those_of_the_log(tmp_path: Path) -> None:
    state = training_state()
    state["log_history"].append({"step": 7, "loss": math.nan, "eval_loss": 9.0})
    (run, _) = read_runs(write_runs(tmp_path, a=state, b=PLAIN))
    told = table(tmp_path / "a", tmp_path / "b")
    assert told["Final loss"] == ["NaN", "2"]
    assert told["Best eval loss"] == ["0.5", "1.5"]
    for label, key in [
        ("Kept fraction", KEPT_FRACTION),
        ("Gradient norm kept", GRAD_NORM_KEPT),
        ("L1 norm kept", L1_KEPT),
    ]:
        logged = [entry[key] for entry in state["log_history"] if key in entry]
        assert told[label] == [f"{np.mean(logged):.2%}", "-"]
        assert run.log.mean(key) == pytest.approx(np.mean(logged))


def test_forgetting_is_shown_in_nats(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 1.0, FORGETTING: -0.25}, {"step": 2, FORGETTING: 0.5}]
    runs = write_runs(tmp_path, a={"log_history": history}, b=PLAIN)
    assert table(*runs)["Forgetting"] == ["+0.5000", "-"]
    (picture,) = (each for each in pictures(read_runs(runs)) if each.title == "Forgetting")
    assert "from -0.25 to 0.5" in picture.alt
    assert drawn_lines(picture)[0].get_ylabel() == "nats a token"


def test_the_lowest_evaluation_loss_is_marked_if_there_is_another(tmp_path: Path) -> None:
    def lowest(**states: object) -> list[frozenset[int]]:
        found = columns(read_runs(write_runs(tmp_path, **states)))
        return [column.lowest for column in found if column.lowest]

    without = {**PLAIN, "log_history": PLAIN["log_history"][:2]}  # type: ignore[index]
    assert lowest(a=PLAIN, b=training_state(6), c=training_state(6)) == [frozenset({1, 2})]
    assert lowest(a=PLAIN, b=without) == []


# Which runs, and what they are called


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/x/a", "/x/b"], ["a", "b"]),
        (["/x/a/sft", "/x/b/sft", "/x/dpo"], ["a/sft", "b/sft", "dpo"]),
        (["/x/1/a/sft", "/x/2/a/sft"], ["1/a/sft", "2/a/sft"]),
        (["/x/a/checkpoint-9", "/x/b/checkpoint-9"], ["a/checkpoint-9", "b/checkpoint-9"]),
        (["/", "/sft", "/sft/sft"], ["/", "/sft", "sft/sft"]),
        (["/sft", "/a/sft"], ["/sft", "a/sft"]),
    ],
)
def test_names_are_as_long_as_it_takes(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(path) for path in paths]) == names


def test_a_run_is_named_after_the_folder_that_was_given(tmp_path: Path) -> None:
    write_state(tmp_path / "run" / "checkpoint-6", training_state(6))
    write_state(tmp_path / "run" / "checkpoint-4", training_state(4))
    write_state(tmp_path / "other", training_state(2))
    file = write_state(tmp_path / "third", training_state(3))
    os.utime(tmp_path / "run" / "checkpoint-4" / "trainer_state.json", (1, 1))
    given = [
        tmp_path / "run",
        tmp_path / "run" / "checkpoint-4",
        tmp_path / "third" / ".." / "other",
        file,
    ]
    runs = read_runs(given)
    assert [run.log.name for run in runs] == ["run", "run/checkpoint-4", "other", "third"]
    assert [run.log.step for run in runs] == [6, 4, 2, 3]


@pytest.mark.parametrize("twice", ["same", "link", "file", "checkpoint"])
def test_a_run_is_compared_with_others_only(tmp_path: Path, twice: str) -> None:
    (run,) = write_runs(tmp_path, run=PLAIN)
    again = {
        "same": tmp_path / "run" / ".." / "run",
        "link": tmp_path / "link",
        "file": run / "trainer_state.json",
        "checkpoint": run / "checkpoint-2",
    }[twice]
    if twice == "link":
        again.symlink_to(run)
    if twice == "checkpoint":
        (run / "checkpoint-2").mkdir()
        (run / "trainer_state.json").rename(again / "trainer_state.json")
    with pytest.raises(UserError, match=r"are the same run\. Name each run once"):
        read_runs([run, again])


def test_one_run_and_too_many_are_refused(tmp_path: Path) -> None:
    (run,) = write_runs(tmp_path, run=PLAIN)
    with pytest.raises(UserError, match="Name two or more, or use report for one"):
        read_runs([run])
    with pytest.raises(UserError, match="Name 10 at most"):
        read_runs([run] * 11)
    assert len(figures.STYLES) == MOST_RUNS
    assert CliRunner().invoke(gmt, ["compare"]).exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no trainer_state.json"),
        ("{", "is not JSON"),
        ('{"log_history": []}', "no training step was logged"),
        ('{"log_history": [{"step": 1, "loss": NaN}]}', "every value that was logged is NaN"),
    ],
)
def test_a_run_without_a_log_gets_the_line_that_report_gives(
    tmp_path: Path, content: str | None, message: str
) -> None:
    (run,) = write_runs(tmp_path, run=PLAIN)
    broken = tmp_path / "broken"
    broken.mkdir()
    if content is not None:
        (broken / "trainer_state.json").write_text(content)
    page = tmp_path / "page.html"
    result = run_compare(run, broken, "-o", page)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr == CliRunner().invoke(gmt, ["report", str(broken)]).stderr
    assert not page.exists()


# The page


def test_a_chart_has_a_line_for_each_run_that_logged_the_quantity(tmp_path: Path) -> None:
    runs = read_runs(write_runs(tmp_path, a=training_state(), b=PLAIN, c=training_state(9)))
    drawn = {picture.title: picture for picture in pictures(runs)}
    assert list(drawn) == [
        "Loss",
        "Evaluation loss",
        "Learning rate",
        "Gradient norm",
        "Kept fraction",
        "Gradient norm kept",
        "L1 norm kept",
    ]
    colours = {
        title: [line.get_color() for line in drawn_lines(picture)[1]]
        for title, picture in drawn.items()
    }
    everyone = [style.colour for style in figures.STYLES[:3]]
    assert colours["Loss"] == colours["Learning rate"] == everyone
    assert colours["Gradient norm"] == [everyone[1]]
    assert colours["Kept fraction"] == [everyone[0], everyone[2]]
    assert drawn["Gradient norm"].alt == (
        "Gradient norm of 1 run from step 1 to step 2. b (no GMT): from 1.5 to 1, between 1 and "
        "1.5."
    )
    assert "a: from 2 to 0.3333" in drawn["Loss"].alt


def drawn_lines(picture: Picture) -> tuple[Axes, list[Line2D]]:
    axes = Figure().subplots()
    picture.draw(axes)
    return axes, axes.get_lines()


@pytest.mark.parametrize(
    ("key", "values", "scale"),
    [
        ("loss", [3.0, 1.0], "linear"),
        ("loss", [3e4, 1.0], "log"),
        ("loss", [3e4, 0.0], "linear"),
        ("learning_rate", [1e-4, 1e-9], "linear"),
        (KEPT_FRACTION, [0.5, 1e-5], "linear"),
    ],
)
def test_a_run_that_diverged_does_not_flatten_the_others(
    tmp_path: Path, key: str, values: list[float], scale: str
) -> None:
    history = [{"step": step, key: value} for step, value in enumerate(values)]
    runs = read_runs(write_runs(tmp_path, a={"log_history": history}, b={"log_history": history}))
    (picture,) = pictures(runs)
    assert drawn_lines(picture)[0].get_yscale() == scale


def test_long_curves_are_faint_below_their_means(tmp_path: Path) -> None:
    runs = read_runs(write_runs(tmp_path, a=training_state(200), b=PLAIN))
    picture = pictures(runs)[0]
    assert "moving means of 3 logs" in picture.caption
    faint, mean, short = drawn_lines(picture)[1]
    assert faint.get_alpha() == 0.35
    assert faint.get_color() == mean.get_color() != short.get_color()
    ends = [np.mean(np.asarray(faint.get_ydata())[99:102]), np.asarray(mean.get_ydata())[100]]
    assert ends[0] == pytest.approx(ends[1])


@pytest.mark.usefixtures("small_pictures")
def test_the_page_needs_nothing_but_itself_and_says_what_differs(tmp_path: Path) -> None:
    states = {f"r{ratio}": state_with(mask_ratio=ratio / 10) for ratio in range(9)}
    runs = write_runs(tmp_path, plain=PLAIN, **states)
    result = run_compare(*runs, "-o", tmp_path / "new" / "page.html")
    assert result.exit_code == 0, result.output
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["page.html"]
    page = Page(tmp_path / "new" / "page.html")
    assert page.is_whole()
    assert not {"script", "iframe", "object", "embed", "form", "base"} & page.tags.keys()
    assert len({*page.pictures}) == len(page.pictures) == 7
    assert page.tags["html"] == [{"lang": "en"}]
    # Each run has its line twice: in the table and in the legend.
    lines = [(line["stroke"], line.get("stroke-dasharray")) for line in page.tags["line"]]
    assert lines[:10] == lines[10:]
    assert len(set(lines)) == 10
    text = " ".join(page.text.split())
    assert "GMT comparison of 10 runs" in text
    assert "plain (no GMT)" in text
    assert "Mask ratio" in text
    assert "Granularity" not in text
    assert str(tmp_path) not in page.text


def test_the_terminal_has_every_name_and_number_in_full(tmp_path: Path) -> None:
    long = "a-name-of-a-run-" * 5
    state = state_with(mask_ratio=0.123456, include=["x" * 300])
    runs = write_runs(tmp_path, **{long: state}, b=PLAIN, c=state_with(mask_ratio=0.5))
    result = run_compare(*runs, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    (row,) = (line.split() for line in result.stdout.splitlines() if long in line)
    cells = {column.label: column.cells[0] for column in columns(read_runs(runs))}
    numbers = [cells[label] for label in ("Final loss", "Best eval loss", "Kept fraction")]
    assert [cell for cell in row if cell in numbers] == numbers
    assert result.stdout.count("x") == 300


@pytest.mark.usefixtures("small_pictures")
def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    name = "<b>[red]\x1b[31m\u202erun"
    runs = write_runs(
        tmp_path, **{name: state_with(criterion=HOSTILE, include=[HOSTILE]), "b": training_state()}
    )
    result = run_compare(*runs, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "<b>[red]\\x1b[31m\\u202erun" in result.stdout
    assert "\x1b" not in result.output
    page = Page(tmp_path / "page.html")
    assert not {"script", "b"} & page.tags.keys()
    assert "<b>[red]\\x1b[31m" in page.text
    assert HOSTILE[:30] in page.text
    assert "\x07" not in page.text


@pytest.mark.usefixtures("small_pictures")
def test_json_holds_the_numbers_of_each_run(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, a=training_state(layers=1), b=PLAIN)
    result = run_compare(*runs, "--json", "-o", tmp_path / "page.html")
    found = json.loads(result.stdout)
    assert found["page"] == str(tmp_path / "page.html")
    for run, name, state in zip(
        found["runs"], "ab", (training_state(layers=1), PLAIN), strict=True
    ):
        source = {"source": str(tmp_path / name / "trainer_state.json")}
        assert run == json.loads(json.dumps({**parse_state(state, name).as_dict(), **source}))
    assert found["runs"][1]["gmt"] is False
    assert found["runs"][1]["train_runtime"] == 3725.4
    assert found["runs"][1]["best_eval_loss"] == 1.5


# Where it is written


@pytest.mark.usefixtures("small_pictures")
def test_an_older_comparison_is_replaced_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = write_runs(tmp_path, a=training_state(), b=PLAIN, c=training_state())
    monkeypatch.chdir(tmp_path)
    assert run_compare(runs[0], runs[1]).exit_code == 0
    first = (tmp_path / PAGE).read_bytes()
    assert run_compare(runs[0], runs[2]).exit_code == 0
    assert (tmp_path / PAGE).read_bytes() != first
    report, *_ = write_report(read_runs(runs[:2])[0].log, tmp_path / "report")
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    for file in (report, mine, runs[0] / "trainer_state.json"):
        before = file.read_bytes()
        result = run_compare(*runs, "-o", file)
        assert result.exit_code == 1
        assert "is not the page of a comparison. Name another file, or move it." in result.stderr
        assert file.read_bytes() == before
    assert run_compare(*runs, "-o", tmp_path).exit_code == 2
    # Nor does a report take the place of a comparison.
    folder = tmp_path / "folder"
    write_comparison(read_runs(runs), folder / "index.html")
    with pytest.raises(UserError, match="Name another folder"):
        write_report(read_runs(runs)[0].log, folder)


# Colours

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", 2009: linear RGB as those see it who lack one kind of cones, by that kind.
_SEEN = {
    "all cones": np.eye(3),
    "no long waves": np.array(
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    ),
    "no middle waves": np.array(
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    ),
    "no short waves": np.array(
        [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]
    ),
}
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB."""
    ratio = _XYZ @ rgb.clip(0, 1) / _XYZ.sum(axis=1)
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", _SEEN)
def test_the_colour_blind_tell_runs_apart(seen: str) -> None:
    for one, other in combinations(figures.STYLES, 2):
        ends = [lab(_SEEN[seen] @ linear(style.colour)) for style in (one, other)]
        # 2.3 is a difference that is just noticed.
        least = 35 if one.dashes == other.dashes else 12
        assert np.linalg.norm(ends[0] - ends[1]) > least, (one, other)


@pytest.mark.parametrize("page", ["#ffffff", "#15181c"])
def test_every_run_is_seen_on_light_and_dark_pages(page: str) -> None:
    for style in figures.STYLES:
        lights = sorted(float(_XYZ[1] @ linear(colour)) for colour in (style.colour, page))
        assert (lights[1] + 0.05) / (lights[0] + 0.05) > 2.2, style
