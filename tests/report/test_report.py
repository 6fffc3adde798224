"""The report of a run: what its log says, the page and pictures, the command that makes them."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from axolotl_gmt.cli import gmt
from axolotl_gmt.errors import UserError
from axolotl_gmt.record import (
    EVER_KEPT,
    FOLDER,
    FORGETTING,
    FORGETTING_LOSS,
    GRAD_NORM_KEPT,
    KEPT_FRACTION,
    L1_KEPT,
    MASK_OVERLAP,
    MASK_OVERLAP_BY_CHANCE,
    STATISTICS,
)
from axolotl_gmt.report import page as report_module
from axolotl_gmt.report.log import TrainingLog, find_state, parse_state
from axolotl_gmt.report.page import PAGE, facts, write_report

KINDS = ("self_attn.q_proj", "mlp.down_proj")
HOSTILE = "</title><script>alert(1)</script>$\\frac{[red]\x07\ud800"
NO_NUMBERS: list[object] = [None, "2.0", True, [1], {}]

Log = dict[str, Any]


def training_state(steps: int = 6, layers: int = 0, **changes: Any) -> dict[str, Any]:
    """A trainer's state after ``steps`` logs, with statistics of the modules of ``layers``."""
    rng = random.Random(0)
    history: list[Log] = []
    for step in range(1, steps + 1):
        log: Log = {
            "step": step,
            "loss": 2 / step,
            "learning_rate": 1e-4,
            KEPT_FRACTION: rng.uniform(0.3, 0.5),
            GRAD_NORM_KEPT: rng.uniform(0.9, 1),
            L1_KEPT: rng.uniform(0.8, 0.9),
        }
        names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS]
        for name in [*names, "lm_head"] if layers else []:
            log[f"{KEPT_FRACTION}/{name}"] = rng.uniform(0.3, 0.5)
            log[f"{GRAD_NORM_KEPT}/{name}"] = rng.uniform(0.9, 1)
            log[f"{L1_KEPT}/{name}"] = rng.uniform(0.8, 0.9)
        history += [log, {"step": step, "eval_loss": 3 / step}]
    record = {
        "args": {"mask_ratio": 0.5, "granularity": "tensor", "exclude": ["norm"], "include": None},
        "attributes": {"base_optimizer": "AdamW", "masked_parameters": 1234567},
    }
    return {
        "log_history": history,
        "global_step": steps,
        "max_steps": 10,
        "train_batch_size": 4,
        "epoch": 0.6,
        "stateful_callbacks": {"GMTCallback": record},
        **changes,
    }


def write_state(folder: Path, state: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "trainer_state.json"
    file.write_text(json.dumps(state))
    return file


def run_report(*arguments: object) -> Result:
    return CliRunner().invoke(gmt, ["report", *map(str, arguments)])


class Page(HTMLParser):
    """Collects what a page loads, links to, runs and says of its pictures."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: dict[str, list[dict[str, str]]] = defaultdict(list)
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag].append({key: value or "" for key, value in attrs})

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def references(self) -> list[str]:
        """What it loads."""
        keys = ("src", "srcset", "href", "xlink:href", "data", "action", "background", "poster")
        return [
            found[key]
            for tag, tags in self.tags.items()
            for found in tags
            for key in keys
            if key in found and tag != "a"
        ]

    @property
    def pictures(self) -> list[str]:
        """What it says of each to those who do not see it."""
        return [tag["aria-label"] for tag in self.tags["svg"] if tag.get("role") == "img"]

    def is_whole(self) -> bool:
        """Whether it needs no other file, and each of its links within leads somewhere."""
        ids = [f"#{tag['id']}" for tags in self.tags.values() for tag in tags if "id" in tag]
        assert len(ids) == len(set(ids))
        within = [link["href"] for link in self.tags["a"] if link["href"].startswith("#")]
        within += [use["xlink:href"] for use in self.tags["use"]]
        every = [value for tags in self.tags.values() for tag in tags for value in tag.values()]
        within += [match[1] for value in every for match in re.finditer(r"url\((.*?)\)", value)]
        assert within
        return {*within} <= {*ids} and all(
            reference.startswith(("data:", "#")) for reference in self.references
        )


# What the log says


def test_the_numbers_are_those_of_the_log() -> None:
    state = training_state()
    log = parse_state(state, "sft")
    kept = [entry[KEPT_FRACTION] for entry in state["log_history"] if KEPT_FRACTION in entry]
    assert log.as_dict() == {
        "run": "sft",
        "gmt": True,
        "settings": {"mask_ratio": 0.5, "granularity": "tensor", "exclude": ["norm"]},
        "base_optimizer": "AdamW",
        "masked_parameters": 1234567,
        "step": 6,
        "max_steps": 10,
        "epoch": 0.6,
        "train_batch_size": 4,
        "train_runtime": None,
        "tokens_per_second": None,
        "trained_tokens_per_second": None,
        "model": None,
        "data": [],
        "began": None,
        "highest_learning_rate": 1e-4,
        "final_loss": 2 / 6,
        "final_eval_loss": 3 / 6,
        "best_eval_loss": 3 / 6,
        "final_forgetting": None,
        "final_forgetting_loss": None,
        "mean_kept_fraction": pytest.approx(fmean(kept)),
        "mean_grad_norm_kept": pytest.approx(log.curves[GRAD_NORM_KEPT].values.mean()),
        "mean_l1_kept": pytest.approx(log.curves[L1_KEPT].values.mean()),
        "mean_mask_overlap": None,
        "mean_mask_overlap_by_chance": None,
        "final_ever_kept": None,
        "modules": {},
    }
    assert dict(facts(log))["Kept fraction, mean"] == f"{fmean(kept):.2%}"
    assert dict(facts(log))["L1 norm kept, mean"] == f"{log.mean(L1_KEPT):.2%}"


@pytest.mark.parametrize(
    ("args", "ratio"),
    [
        ({"mask_ratio": 0.3}, 0.3),
        ({"mask_ratio": 0}, 0.0),
        ({"mask_ratio": 0.3, "criterion": "random"}, 0.3),
        ({"mask_ratio": 0.3, "criterion": "half"}, None),
        ({"mask_ratio": 1}, None),
        ({"mask_ratio": "0.3"}, None),
        ({}, None),
    ],
)
def test_the_target_is_that_of_a_ratio_in_use(args: Log, ratio: float | None) -> None:
    record = {"GMTCallback": {"args": args, "attributes": {}}}
    log = parse_state(training_state(stateful_callbacks=record), "run")
    assert log.mask_ratio == ratio
    assert ("Mask ratio" in dict(facts(log))) == (ratio is not None)


@pytest.mark.parametrize(
    ("history", "steps", "losses"),
    [
        ([{"step": 0, "loss": 3.0}, {"step": 2, "loss": 2}], [0, 2], [3.0, 2.0]),
        # A resumed run may log a step again, and starts earlier than the last log.
        (
            [{"step": 1, "loss": 3}, {"step": 2, "loss": 9}, {"step": 2, "loss": 2}],
            [1, 2],
            [3.0, 2.0],
        ),
        ([{"step": 5, "loss": 1}, {"step": 4, "loss": 2}], [4, 5], [2.0, 1.0]),
        (
            [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 1}],
            [1, 2, 3],
            [math.nan, math.nan, 1.0],
        ),
        ([{"step": 1, "loss": 10**400}, {"step": 2, "loss": 1}], [1, 2], [math.nan, 1.0]),
        (
            [
                *({"step": 1, "loss": loss} for loss in NO_NUMBERS),
                *(
                    {"step": step, "loss": 7}
                    for step in (None, "1", True, -1, 1.5, math.nan, 2**60)
                ),
                {"loss": 7},
                "step",
                None,
                {"step": 9.0, "loss": 1},
            ],
            [9],
            [1.0],
        ),
    ],
    ids=["plain", "logged twice", "out of order", "NaN", "huge", "no numbers"],
)
def test_a_curve_has_the_last_value_of_each_step(
    history: list[Log], steps: list[int], losses: list[float]
) -> None:
    curve = parse_state({"log_history": history}, "run").curves["loss"]
    assert curve.steps.tolist() == steps
    np.testing.assert_array_equal(curve.values, losses)


@pytest.mark.parametrize("steps", [5, 120, 121, 1000])
def test_module_means_equal_those_of_a_slow_sum(steps: int) -> None:
    state = training_state(steps, layers=3)
    modules = parse_state(state, "run").modules[KEPT_FRACTION]
    logs = [entry for entry in state["log_history"] if "loss" in entry]

    def value(log: Log, layer: int, kind: str) -> float:
        found: float = log[f"{KEPT_FRACTION}/model.layers.{layer}.{kind}"]
        return found

    by_layer = modules.by_layer()
    assert (by_layer.rows, by_layer.columns) == (list(KINDS), [0, 1, 2])
    for row, kind in enumerate(by_layer.rows):
        for layer in range(3):
            expected = fmean(value(log, layer, kind) for log in logs)
            assert by_layer.values[row, layer] == pytest.approx(expected)

    by_step = modules.by_step()
    assert by_step.rows == [*KINDS, "lm_head"]
    assert len(by_step.columns) <= 120
    ends = [*by_step.columns[1:], steps + 1]
    for column, (start, end) in enumerate(zip(by_step.columns, ends, strict=True)):
        assert 1 <= end - start <= modules.logs_a_column
        inside = [log for log in logs if start <= log["step"] < end]
        for row, kind in enumerate(KINDS):
            expected = fmean(value(entry, layer, kind) for entry in inside for layer in range(3))
            assert by_step.values[row, column] == pytest.approx(expected)
        head = fmean(log[f"{KEPT_FRACTION}/lm_head"] for log in inside)
        assert by_step.values[-1, column] == pytest.approx(head)

    every = [value(entry, layer, KINDS[0]) for entry in logs for layer in range(3)]
    assert modules.means()[KINDS[0]] == pytest.approx(fmean(every))


def test_a_module_that_was_not_logged_everywhere_is_no_zero() -> None:
    key = f"{KEPT_FRACTION}/model.layers.{{}}.mlp.up_proj"
    history = [
        {"step": 1, "loss": 1, key.format(0): 0.4},
        {"step": 2, "loss": 1, key.format(0): 0.2, key.format(1): 0.6, key.format(2): None},
    ]
    modules = parse_state({"log_history": history}, "run").modules[KEPT_FRACTION]
    np.testing.assert_allclose(modules.by_step().values, [[0.4, 0.4]])
    np.testing.assert_allclose(modules.by_layer().values, [[0.3, 0.6]])


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (
            ["model.layers.0.mlp.experts.3.w1", "model.layers.0.mlp.experts.7.w1"],
            ["mlp.experts.*.w1"],
        ),
        (
            ["vision.blocks.0.mlp", "text.layers.0.mlp"],
            ["text.layers.*.mlp", "vision.blocks.*.mlp"],
        ),
        (["model.layers.99999999999999999999.mlp", "h.0.mlp"], ["mlp", "model.layers.*.mlp"]),
    ],
    ids=["experts are one kind", "two stacks stay apart", "a layer beyond belief"],
)
def test_kinds_of_modules(names: list[str], rows: list[str]) -> None:
    logged = {f"{KEPT_FRACTION}/{name}": 0.5 for name in names}
    log = parse_state({"log_history": [{"step": 1, "loss": 1, **logged}]}, "run")
    assert sorted(log.modules[KEPT_FRACTION].by_step().rows) == rows


# Which file it is read from


def test_the_newest_state_of_a_run_is_read(tmp_path: Path) -> None:
    for age, folder in enumerate(["checkpoint-2", "checkpoint-10", "checkpoint-9", "."]):
        file = write_state(tmp_path / folder, training_state(global_step=age))
        os.utime(file, (1000 - age, 1000 - age))
    assert find_state(tmp_path).parent.name == "checkpoint-2"
    os.utime(tmp_path / "checkpoint-9" / "trainer_state.json", (2000, 2000))
    assert find_state(tmp_path).parent.name == "checkpoint-9"
    assert find_state(tmp_path / "checkpoint-10").parent.name == "checkpoint-10"
    assert find_state(file) == file
    for file in tmp_path.rglob("trainer_state.json"):  # As after a copy without times.
        os.utime(file, (3000, 3000))
    assert find_state(tmp_path).parent == tmp_path
    (tmp_path / "trainer_state.json").unlink()
    assert find_state(tmp_path).parent.name == "checkpoint-10"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('{"log_history": [', "If the run was killed while it wrote the file"),
        ("[" * 100_000, "is not JSON"),
        ("\ufeff{}", "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ("[]", "not the state of a trainer"),
        ("null", "not the state of a trainer"),
        ('{"log_history": {"loss": 1}}', "not the state of a trainer"),
        ('{"log_history": []}', "no training step was logged"),
        ('{"log_history": [{"step": 1, "train_runtime": 3}]}', "no training step was logged"),
        ('{"log_history": [{"step": 1, "loss": NaN}]}', "every value that was logged is NaN"),
    ],
)
def test_a_broken_log_gets_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "trainer_state.json"
    file.write_text(content, encoding="utf-8")
    result = run_report(tmp_path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {file}")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / FOLDER).exists()


def test_a_folder_without_a_log_gets_one_line(tmp_path: Path) -> None:
    for folder, message in [
        (tmp_path, "has no trainer_state.json"),
        (tmp_path / "no", "not exist"),
    ]:
        result = run_report(folder)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr


# The report


@pytest.fixture(scope="module")
def report_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it."""
    run = tmp_path_factory.mktemp("run")
    write_state(run, training_state(40, layers=3))
    result = run_report(run)
    assert result.exit_code == 0, result.output
    return run / FOLDER


def test_the_pictures_are_pngs_and_are_named(report_folder: Path) -> None:
    names = {"loss", "learning_rate"}
    for statistic in ("kept_fraction", "grad_norm_kept", "l1_kept"):
        names |= {statistic, f"{statistic}_by_step", f"{statistic}_by_layer"}
    assert {file.stem for file in report_folder.glob("*.png")} == names
    for file in report_folder.glob("*.png"):
        height, width, _ = imread(file).shape
        assert width > 1000
        assert height > 200
    assert {file.suffix for file in report_folder.iterdir()} == {".png", ".html"}


def test_the_page_needs_nothing_but_itself(report_folder: Path) -> None:
    page = Page(report_folder / PAGE)
    assert page.is_whole()
    assert not {"script", "iframe", "object", "embed", "form", "base"} & page.tags.keys()
    assert "url(" not in page.text
    assert "@import" not in page.text
    assert len({*page.pictures}) == len(page.pictures) == 11
    assert all(len(text) > 40 for text in page.pictures)
    assert "optimizer step" in page.text  # Also the text in a picture is text.
    assert page.tags["html"] == [{"lang": "en"}]


def test_the_page_says_what_the_run_was(report_folder: Path) -> None:
    text = " ".join(Page(report_folder / PAGE).text.split())
    for shown in ("0.5 (kept 0.5)", "AdamW", "1,234,567", "40 of 10", "gmt_exclude: - norm"):
        assert shown in text
    assert str(report_folder.parent) not in (report_folder / PAGE).read_text()


def test_the_page_says_of_what_the_run_was_made(tmp_path: Path) -> None:
    state = training_state(2)
    state["log_history"] += [
        {"step": 1, "tokens/train_per_sec_per_gpu": 1000.0},
        {"step": 2, "tokens/train_per_sec_per_gpu": 2000.0},
        {"step": 2, "train_runtime": 3725.4, "train_tokens_per_second": 12.34},
    ]
    state["stateful_callbacks"]["GMTCallback"]["attributes"] |= {
        "model_name": "org/model",
        "data_names": ["org/chats", "mine.jsonl"],
        "began": "2026-11-28T12:30:00+02:00",
        "config_text": "base_model: org/model\n# <script>\x1b ",
    }
    write_state(tmp_path, state)
    found = dict(facts(parse_state(state, "run")))
    assert found["Model"] == "org/model"
    assert found["Data"] == "org/chats, mine.jsonl"
    assert found["Began"] == "2026-11-28 10:30 UTC"
    assert found["Run time"] == "1:02:05"
    assert found["Tokens a second"] == "12.34"
    assert found["Trained tokens a second, per device, mean"] == "1,500"
    assert run_report(tmp_path).exit_code == 0
    page = Page(tmp_path / FOLDER / PAGE)
    assert "base_model: org/model\n# <script> " in page.text
    assert "script" not in page.tags
    answer = json.loads(run_report(tmp_path, "--json").stdout)
    assert answer["began"] == "2026-11-28T10:30:00+00:00"


@pytest.mark.parametrize(
    "began", ["yesterday", "", "2026-11-28T10:30:00", "9999-12-31T23:59:59-23:59", "2026-13-01"]
)
def test_a_time_that_is_none_is_left_out(began: str) -> None:
    state = training_state(1)
    state["stateful_callbacks"]["GMTCallback"]["attributes"]["began"] = began
    assert "Began" not in dict(facts(parse_state(state, "run")))


def test_a_picture_takes_the_colours_of_its_page() -> None:
    pictures = report_module.pictures(parse_state(training_state(2, layers=2), "run"))
    assert {picture.is_map for picture in pictures} == {False, True}
    for picture in pictures:
        svg = report_module.Drawn.of(picture).svg
        assert "currentColor" in svg
        assert "var(--page)" in svg
        for sentinel in ("#010203", "#fdfeff", "<style", "<metadata"):
            assert sentinel not in svg
        assert report_module.Drawn.of(picture).svg == svg


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    state = training_state(
        stateful_callbacks={
            "GMTCallback": {
                "args": {"criterion": HOSTILE, "include": [HOSTILE]},
                "attributes": {"base_optimizer": HOSTILE},
            }
        }
    )
    for step, log in enumerate(state["log_history"]):
        log[f"{GRAD_NORM_KEPT}/{HOSTILE}"] = 1 / (step + 1)
        log[f"{GRAD_NORM_KEPT}/model.layers.0.{HOSTILE * 40}"] = 0.1
    write_state(tmp_path / "<b>[red]run", state)
    result = run_report(tmp_path / "<b>[red]run")
    assert result.exit_code == 0, result.output
    assert HOSTILE[:30] in result.stdout
    page = Page(tmp_path / "<b>[red]run" / FOLDER / PAGE)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert HOSTILE[:30] in page.text
    assert "\x07" not in page.text


def test_a_map_of_one_colour_is_a_sentence_instead() -> None:
    state = training_state(3, layers=2)
    for log in state["log_history"]:
        log.update({key: 0.5 for key in log if key.startswith(f"{KEPT_FRACTION}/")})
    log = parse_state(state, "run")
    assert [p.file for p in report_module.pictures(log) if "_by_" in p.file] == [
        "grad_norm_kept_by_step.png",
        "grad_norm_kept_by_layer.png",
        "l1_kept_by_step.png",
        "l1_kept_by_layer.png",
    ]


def test_the_overlap_of_masks_is_drawn_with_what_chance_would_give() -> None:
    state = training_state(4, layers=2)
    for log in state["log_history"]:
        step = log["step"]
        if "loss" not in log:
            continue
        log[EVER_KEPT] = 1 - 0.5**step
        log[f"{EVER_KEPT}/model.layers.0.mlp.down_proj"] = 0.1 * step
        if step > 1:  # There is none before the second log.
            log |= {MASK_OVERLAP: 0.5 + step / 100, MASK_OVERLAP_BY_CHANCE: 1 / 3}
            log[f"{MASK_OVERLAP}/model.layers.0.mlp.down_proj"] = 0.1 * step
            log[f"{MASK_OVERLAP_BY_CHANCE}/model.layers.0.mlp.down_proj"] = 1 / 3
    log = parse_state(state, "run")
    pictures = {picture.file: picture for picture in report_module.pictures(log)}
    assert {name for name in pictures if "overlap" in name or "ever" in name} == {
        "mask_overlap.png",
        "mask_overlap_by_step.png",
        "ever_kept.png",
        "ever_kept_by_step.png",
    }
    assert pictures["mask_overlap.png"].alt == (
        "Mask overlap from step 2 to step 4. Measured: from 52.00% to 54.00%, between 52.00% and "
        "54.00%. By chance: from 33.33% to 33.33%, between 33.33% and 33.33%."
    )
    assert "from 50.00% to 93.75%" in pictures["ever_kept.png"].alt
    told = dict(facts(log))
    assert told["Mask overlap, mean"] == "53.00%"
    assert told["Mask overlap by chance, mean"] == "33.33%"
    assert told["Ever kept, final"] == "93.75%"
    assert log.as_dict()["final_ever_kept"] == 0.9375


def test_what_was_forgotten_has_a_picture_of_its_own(tmp_path: Path) -> None:
    state = training_state(4)
    state["log_history"] = [
        {"step": 0, FORGETTING: 0.0, FORGETTING_LOSS: 3.0},
        *state["log_history"],
        {"step": 2, FORGETTING: -0.125, FORGETTING_LOSS: 2.875},
        {"step": 4, FORGETTING: 0.25, FORGETTING_LOSS: 3.25},
    ]
    log = parse_state(state, "run")
    (picture,) = (p for p in report_module.pictures(log) if "forgetting" in p.file)
    assert picture.alt == (
        "Forgetting from step 0 to step 4. Forgetting: from 0 to 0.25, between -0.125 and 0.25."
    )
    told = dict(facts(log))
    assert told["Forgetting, final"] == "+0.2500"
    assert told["Held-out loss, final"] == "3.25"
    assert log.as_dict()["final_forgetting"] == 0.25
    assert log.as_dict()["final_forgetting_loss"] == 3.25
    for _ in range(2):  # A report with this picture is replaced as any other.
        write_report(log, tmp_path / "report")
    assert (tmp_path / "report" / "forgetting.png").is_file()
    assert not any(
        "forgetting" in p.file
        for p in report_module.pictures(parse_state(training_state(4), "run"))
    )


def test_a_run_without_gmt_says_so_and_shows_its_loss(tmp_path: Path) -> None:
    history = [{"step": step, "loss": 1 / step} for step in (1, 2)]
    write_state(tmp_path, {"log_history": history, "stateful_callbacks": {"TrainerControl": {}}})
    result = run_report(tmp_path)
    assert result.exit_code == 0, result.output
    assert "not in the log" in result.stdout
    assert "trained without it" in Page(tmp_path / FOLDER / PAGE).text
    assert [file.name for file in (tmp_path / FOLDER).glob("*.png")] == ["loss.png"]


def test_the_norm_of_the_gradient_is_drawn_if_the_trainer_logs_it() -> None:
    history = [{"step": step, "loss": 1.0, "grad_norm": 2.0 / step} for step in (1, 2, 4)]
    pictures = report_module.pictures(parse_state({"log_history": history}, "run"))
    assert [picture.file for picture in pictures] == ["loss.png", "grad_norm.png"]
    assert "from 2 to 0.5" in pictures[1].alt


def test_numbers_that_are_not_finite_are_told_of() -> None:
    history = [{"step": step, "loss": math.nan if step > 3 else 1.0} for step in range(1, 6)]
    (picture,) = report_module.pictures(parse_state({"log_history": history}, "run"))
    assert "2 of 5 values (training) were NaN or infinite" in picture.caption


def test_json_holds_the_numbers_and_the_files(tmp_path: Path) -> None:
    state = write_state(tmp_path, training_state(3))
    result = run_report(tmp_path, "--json", "-o", tmp_path / "deep" / "er")
    found = json.loads(result.stdout)
    assert found["final_loss"] == 2 / 3
    assert found["source"] == str(state)
    assert {Path(file) for file in found["files"]} == set((tmp_path / "deep" / "er").iterdir())


# Where it is written


@pytest.fixture
def small_log() -> TrainingLog:
    return parse_state({"log_history": [{"step": 1, "loss": 1}]}, "run")


def test_an_older_report_is_replaced_whole(tmp_path: Path, small_log: TrainingLog) -> None:
    folder = tmp_path / FOLDER
    write_report(parse_state(training_state(2), "old"), folder)
    assert (folder / "kept_fraction.png").exists()
    page, *_ = write_report(small_log, folder)
    assert {file.name for file in folder.iterdir()} == {PAGE, "loss.png"}
    assert "old" not in Page(page).text
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("kept", ["notes.txt", "index.html", "loss.png"])
def test_nothing_but_a_report_is_written_over(
    tmp_path: Path, small_log: TrainingLog, kept: str
) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    write_report(small_log, folder)  # An empty folder is nobody's.
    if kept != "notes.txt":
        shutil.rmtree(folder)
        folder.mkdir()
    (folder / kept).write_text("mine")
    with pytest.raises(UserError, match="Name another folder"):
        write_report(small_log, folder)
    assert (folder / kept).read_text() == "mine"
    with pytest.raises(UserError, match="is a file"):
        write_report(small_log, folder / kept)


def test_a_failure_leaves_the_older_report_and_no_rest(
    tmp_path: Path, small_log: TrainingLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / FOLDER
    page, *_ = write_report(small_log, folder)
    before = page.read_bytes()

    def no_space(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(UserError, match=r"gmt_report cannot be written: No space left"):
        write_report(parse_state(training_state(2), "new"), folder)
    assert page.read_bytes() == before
    assert list(tmp_path.iterdir()) == [folder]


# Whatever is in the file

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=8,
)
numbers = st.floats(0, 1) | st.floats() | st.integers() | json_values
log_keys = st.sampled_from(
    [
        *("loss", "eval_loss", "learning_rate", "grad_norm", *STATISTICS),
        *("train_runtime", "train_tokens_per_second", "tokens/train_per_sec_per_gpu"),
    ]
)
module_keys = st.builds(
    "{}/{}".format,
    st.sampled_from(STATISTICS),
    st.sampled_from(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "h.7.x", ""])
    | st.text(max_size=30),
)
logs = st.builds(
    lambda step, values: {"step": step, **values},
    st.integers(0, 30) | numbers,
    st.dictionaries(log_keys | module_keys | st.text(max_size=5), numbers, max_size=6),
)
records = st.fixed_dictionaries(
    {},
    optional={
        "args": st.dictionaries(
            st.sampled_from(["mask_ratio", "granularity", "include", "seed", "x"]), json_values
        )
        | json_values,
        "attributes": st.dictionaries(
            st.sampled_from(
                [
                    *("base_optimizer", "masked_parameters"),
                    *("model_name", "data_names", "began", "config_text"),
                ]
            ),
            json_values,
        )
        | json_values,
    },
)
states = st.fixed_dictionaries(
    {"log_history": st.lists(logs | json_values, max_size=12)},
    optional={
        "stateful_callbacks": st.fixed_dictionaries({"GMTCallback": records | json_values})
        | json_values,
        "global_step": json_values,
        "max_steps": json_values,
        "epoch": json_values,
    },
)


@settings(max_examples=300, deadline=None)
@given(states | json_values)
@example({"log_history": [{"step": 0, "learning_rate": 0.0, "gmt/kept_fraction": 1e30}]})
def test_any_json_gives_a_log_or_an_error(state: object) -> None:
    try:
        log = parse_state(json.loads(json.dumps(state)), "run")
    except UserError:
        return
    assert facts(log)
    json.dumps(log.as_dict(), allow_nan=False)
    for modules in log.modules.values():
        for grid in (modules.by_step(), modules.by_layer()):
            assert grid.values.shape == (len(grid.rows), len(grid.columns))


@pytest.fixture(scope="module")
def small_pictures() -> Iterator[None]:
    """Draws everything, but on few pixels, which is several times as fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("axolotl_gmt.report.figures.DPI", 30)
        yield


@pytest.mark.usefixtures("small_pictures")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(states)
def test_any_json_gives_a_report_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, state: object
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    write_state(folder, state)
    result = run_report(folder)
    if result.exit_code == 0:
        page = Page(folder / FOLDER / PAGE)
        assert page.is_whole()
        assert page.pictures
    else:
        assert result.exit_code == 1, result.exception
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
    shutil.rmtree(folder)


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_opens_in_chromium_without_a_console_message(
    report_folder: Path, tmp_path: Path, dark: bool
) -> None:
    assert CHROMIUM is not None
    picture = tmp_path / "page.png"
    result = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--v=0",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--window-size=1280,3000",
            f"--screenshot={picture}",
            (report_folder / PAGE).as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert picture.is_file(), result.stderr
    assert "CONSOLE" not in result.stderr
    pixels = imread(picture)[..., :3]
    assert (pixels[5, 5].max() < 0.2) == dark
    # The pictures are shown: viridis has a yellow and a dark violet, which no text has.
    yellow = (pixels[..., 0] > 0.9) & (pixels[..., 1] > 0.85) & (pixels[..., 2] < 0.3)
    assert yellow.sum() > 1000
