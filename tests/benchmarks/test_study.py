"""The study in benchmarks/study: grid, splits, choice of learning rates, resuming and tables."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_gmt.tools import quickstart
from benchmarks.study import __main__ as command
from benchmarks.study import data, grid, plots, tables
from benchmarks.study.data import DataError, split_preferences, split_problems
from benchmarks.study.grid import FULL, LORA, SIZES, Cell, Method, Size, Task
from benchmarks.study.running import Job, Runner, forkserver
from benchmarks.study.scoring import Scorer, encode, preference_scores
from benchmarks.study.study import Study
from tests.benchmarks import study_jobs

GMT = Method("gmt", 0.5)


def words(question: str, answer: str) -> int:
    return len(f"{question} {answer}".split())


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like GSM8K's: sums with steps, and preferences that share questions with test."""
    folder = tmp_path_factory.mktemp("gsm8k")

    def question(i: int) -> str:
        return f"Ann has {i} pens and buys {i + 1}. How many has she?"

    def answer(i: int, error: int = 0) -> str:
        total = 2 * i + 1 + error
        return f"{i} + {i + 1} = <<{i}+{i + 1}={total}>>{total}\n#### {total}"

    def write(name: str, rows: Sequence[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def problems(start: int, stop: int) -> list[dict[str, str]]:
        return [{"question": question(i), "answer": answer(i)} for i in range(start, stop)]

    write("train.jsonl", problems(0, 40))
    write("test.jsonl", problems(40, 70))
    write(
        "preferences.jsonl",
        [
            {"question": question(i), "chosen": answer(i), "rejected": answer(i, error)}
            for i in range(40, 60)
            for error in (1, 2)
        ],
    )
    return folder


def small_task(name: grid.TaskName, *methods: Method, rates: Sequence[float] = (1e-3,)) -> Task:
    return Task(name, methods, tuple(rates), steps=2, batch=2, max_tokens=300, validation=4, test=6)


SIZE = Size(
    name="test",
    sft=small_task("sft", FULL, GMT, rates=(1e-4, 1e-3)),
    dpo=small_task("dpo", FULL),
    seeds=(0, 1, 2),
    replies=2,
    max_new_tokens=4,
    prose_tokens=512,
    tf32=False,
    logging_steps=1,
    jobs=2,
)


# The data


def test_no_question_is_in_two_splits(gsm8k: Path) -> None:
    problems = split_problems(gsm8k, words, max_tokens=100, validation=5, test=20)
    pairs = split_preferences(gsm8k, words, max_tokens=100, validation=5, test=9)
    for splits in (problems, pairs):
        found = [
            {example.question for example in getattr(splits, name)}
            for name in ("train", "validation", "test")
        ]
        assert all(found)
        assert len(set.union(*found)) == sum(map(len, found))
    assert (len(problems.validation), len(problems.test)) == (5, 20)
    assert (len(pairs.validation), len(pairs.test)) == (5, 9)


def test_problems_to_train_on_are_never_those_of_the_test_file(gsm8k: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gsm8k, tmp_path / "overlapping")
    test = (folder / "test.jsonl").read_text()
    (folder / "train.jsonl").write_text((gsm8k / "train.jsonl").read_text() + test)
    splits = split_problems(folder, words, max_tokens=100, validation=5, test=30)
    held_out = {problem.question for problem in splits.test}
    assert not held_out & {problem.question for problem in [*splits.train, *splits.validation]}


def test_splits_are_the_same_in_every_process_and_long_problems_are_left_out(gsm8k: Path) -> None:
    first = split_problems(gsm8k, words, max_tokens=100, validation=5, test=20)
    assert first == split_problems(gsm8k, words, max_tokens=100, validation=5, test=20)

    def long_if_odd(question: str, answer: str) -> int:
        return 101 if "has 41 pens" in question else words(question, answer)

    splits = split_problems(gsm8k, long_if_odd, max_tokens=100, validation=5, test=20)
    assert [p for p in first.test if "has 41 pens" not in p.question] == splits.test[:19]


def test_calculator_notes_are_cut_out_of_answers(gsm8k: Path) -> None:
    problem = split_problems(gsm8k, words, max_tokens=100, validation=5, test=20).test[0]
    assert problem.answer == "40 + 41 = 81\n#### 81"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "test.jsonl").unlink(), "test.jsonl cannot be read"),
        (lambda folder: (folder / "train.jsonl").write_text("[]"), "train.jsonl, line 1: needs"),
        (lambda folder: (folder / "test.jsonl").write_text(""), "has 0 examples"),
    ],
)
def test_a_bad_data_folder_gets_one_line(
    gsm8k: Path, tmp_path: Path, change: object, message: str
) -> None:
    folder = shutil.copytree(gsm8k, tmp_path / "bad")
    assert callable(change)
    change(folder)
    with pytest.raises(DataError, match=message) as error:
        split_problems(folder, words, max_tokens=100, validation=5, test=20)
    assert "\n" not in str(error.value)


def test_prose_is_english_sentences_in_a_fixed_order() -> None:
    paragraphs = data.prose()
    assert paragraphs == data.prose()
    assert len(set(paragraphs)) == len(paragraphs) > 200
    assert all(text.endswith(".") and "::=" not in text for text in paragraphs)


# The grid


def test_every_method_is_tuned_over_the_same_learning_rates_with_one_seed() -> None:
    for size in SIZES.values():
        for task in (size.sft, size.dpo):
            cells = grid.tuning_cells(task, size.seeds[0])
            assert len(set(cells)) == len(task.methods) * len(task.learning_rates)
            for method in task.methods:
                rates = [cell.learning_rate for cell in cells if cell.method == method]
                assert tuple(rates) == task.learning_rates
        assert len(size.seeds) >= 3


def test_methods_differ_in_nothing_but_their_own_keys() -> None:
    plain = grid.settings(Cell("sft", FULL, 1e-3, 0), SIZE)
    for method in SIZES["full"].sft.methods:
        found = grid.settings(Cell("sft", method, 1e-3, 0), SIZE)
        own = method.settings()
        assert {k: v for k, v in found.items() if k not in own} == plain
        assert all(k.startswith(("gmt_", "lora_")) or k in ("plugins", "adapter") for k in own)
    assert FULL.settings() == {}
    assert GMT.settings() == {
        "plugins": ["axolotl_gmt"],
        "gmt_criterion": "gradient",
        "gmt_mask_ratio": 0.5,
    }


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_axolotl_and_gmt_accept_the_settings_of_every_method(size: Size) -> None:
    from axolotl_gmt.config import GMTConfig

    for method in (*size.sft.methods, *size.dpo.methods):
        own = method.settings()
        GMTConfig(**{k.removeprefix("gmt_"): v for k, v in own.items() if k.startswith("gmt_")})


def test_a_cell_s_key_changes_with_all_that_its_result_depends_on() -> None:
    cell = Cell("sft", GMT, 1e-3, 0)
    keys = [
        grid.key(cell, SIZE, "data"),
        grid.key(cell, SIZE, "other data"),
        grid.key(replace(cell, seed=1), SIZE, "data"),
        grid.key(replace(cell, method=Method("gmt", 0.6)), SIZE, "data"),
        grid.key(cell, replace(SIZE, sft=replace(SIZE.sft, steps=3)), "data"),
        grid.key(cell, replace(SIZE, replies=3), "data"),
    ]
    assert len(set(keys)) == len(keys)
    assert grid.key(cell, replace(SIZE, jobs=7, name="other"), "data") == keys[0]


def test_the_learning_rate_of_lowest_validation_loss_is_chosen_for_each_method() -> None:
    losses = {
        Cell("sft", FULL, 1e-4, 0): 2.0,
        Cell("sft", FULL, 1e-3, 0): 1.0,
        Cell("sft", GMT, 1e-4, 0): 1.5,
        Cell("sft", GMT, 1e-3, 0): float("nan"),
        Cell("sft", LORA, 1e-3, 0): 1.5,
        Cell("sft", LORA, 1e-4, 0): 1.5,
    }
    chosen = {method: cell.learning_rate for method, cell in grid.choose(losses).items()}
    assert chosen == {FULL: 1e-3, GMT: 1e-4, LORA: 1e-4}


# The order of things


class PretendRunner(Runner):
    """Writes the results that jobs would have written: test loss falls where validation rises."""

    def __init__(self, study: Study, breaks: str = "nothing") -> None:
        super().__init__(1, 1, forkserver(["torch"]), lambda *_: study.tidy())
        self.breaks = breaks
        self.jobs: list[Job] = []

    def run(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.jobs.append(job)
            done = self.breaks not in job.label
            if not done:
                self.failed.append(job)
            elif job.label == "base model":
                self._write(job.result, {"test_loss": 9.0})
            elif job.label == "reference of DPO":
                self._write(job.result, {})
            else:
                self._pretend(job)
            self.on_end(job, 0.0, done)

    def _pretend(self, job: Job) -> None:
        folder = job.arguments["folder"]
        rate = yaml.safe_load(folder.recipe.read_text())["learning_rate"]
        if job.arguments["train"]:
            folder.model.mkdir(exist_ok=True)
            self._write(folder.trained, {"validation_loss": rate, "train_cpu_seconds": 1.0})
        if job.arguments["test"]:
            assert folder.model.is_dir(), "judged after its model was removed"
            self._write(folder.tested, {"test_loss": 1 / rate, "test_accuracy": 0.0})

    @staticmethod
    def _write(file: Path, result: dict[str, float]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))


@pytest.fixture
def pretend_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is trained if its folder is there."""
    monkeypatch.setattr(quickstart, "is_trained", lambda folder: folder.is_dir())


def trained_labels(runner: PretendRunner) -> list[str]:
    return [job.label for job in runner.jobs if job.arguments.get("train")]


def judged_labels(runner: PretendRunner) -> list[str]:
    return [job.label for job in runner.jobs if job.arguments.get("test")]


@pytest.mark.usefixtures("pretend_models")
def test_only_chosen_cells_are_judged_and_validation_alone_chooses(tmp_path: Path) -> None:
    weights: list[float] = []
    study = Study(SIZE, tmp_path, tmp_path / "out", weights.append)
    runner = PretendRunner(study)
    study.run(runner)
    assert sorted(judged_labels(runner)) == sorted(
        [f"sft-{m}-lr0.0001-seed{s}" for m in ("full", "gmt0.5") for s in SIZE.seeds]
        + [f"dpo-full-lr0.001-seed{s}" for s in SIZE.seeds]
    )
    assert len(trained_labels(runner)) == len(set(trained_labels(runner))) == 2 * 2 + 2 * 2 + 3
    assert sum(weights) == pytest.approx(sum(job.weight for job in runner.jobs))


@pytest.mark.usefixtures("pretend_models")
def test_models_are_removed_once_judged_but_for_the_one_that_dpo_starts_from(
    tmp_path: Path,
) -> None:
    study = Study(SIZE, tmp_path, tmp_path / "out", lambda _: None)
    study.run(PretendRunner(study))
    models = [path.parent.name for path in study.out.glob("cells/*/model")]
    assert models == [study.folder(Cell("sft", FULL, 1e-4, 0)).path.name]


@pytest.mark.usefixtures("pretend_models")
def test_a_finished_study_runs_nothing_and_other_settings_run_everything(tmp_path: Path) -> None:
    study = Study(SIZE, tmp_path, tmp_path / "out", lambda _: None)
    first = PretendRunner(study)
    study.run(first)
    again = PretendRunner(study)
    study.run(again)
    assert again.jobs == []
    longer = replace(SIZE, sft=replace(SIZE.sft, steps=3), dpo=replace(SIZE.dpo, steps=3))
    other = Study(longer, tmp_path, tmp_path / "out", lambda _: None)
    changed = PretendRunner(other)
    other.run(changed)
    assert len(changed.jobs) == len(first.jobs) - 1  # All but the untrained model.


@pytest.mark.usefixtures("pretend_models")
def test_an_interrupted_study_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    class Interrupted(PretendRunner):
        def run(self, jobs: Sequence[Job]) -> None:
            if len(self.jobs) + len(jobs) > 6:
                raise KeyboardInterrupt
            super().run(jobs)

    study = Study(SIZE, tmp_path, tmp_path / "out", lambda _: None)
    first = Interrupted(study)
    with pytest.raises(KeyboardInterrupt):
        study.run(first)
    again = PretendRunner(study)
    study.run(again)
    assert not set(trained_labels(first)) & set(trained_labels(again))
    assert len(trained_labels(first) + trained_labels(again)) == 11


@pytest.mark.usefixtures("pretend_models")
def test_a_failed_cell_is_in_the_rows_and_the_others_go_on(tmp_path: Path) -> None:
    study = Study(SIZE, tmp_path, tmp_path / "out", lambda _: None)
    runner = PretendRunner(study, breaks="sft-gmt0.5-lr0.0001-seed2")
    study.run(runner)
    assert [job.label for job in runner.failed] == ["sft-gmt0.5-lr0.0001-seed2"]
    rows = study.rows()
    assert sum("gmt (failed)" in line for line in tables.every_cell(rows)) == 1
    failed = [row for row in rows if row["status"] == "failed"]
    assert [(row["method"], row["seed"]) for row in failed] == [("gmt", 2)]
    assert len(rows) == 1 + 8 + 3
    assert tables.settings_of(rows, "sft")["gmt 0.5"].spread("test_loss").values == (1e4, 1e4)


@pytest.mark.usefixtures("pretend_models")
def test_a_method_of_which_a_tuning_cell_failed_is_not_chosen(tmp_path: Path) -> None:
    study = Study(SIZE, tmp_path, tmp_path / "out", lambda _: None)
    study.run(PretendRunner(study, breaks="sft-gmt0.5-lr0.001-seed0"))
    settings = tables.settings_of(study.rows(), "sft")
    assert settings["gmt 0.5"].learning_rate is None
    assert not settings["gmt 0.5"].final
    assert settings["full"].final


def test_cells_of_other_versions_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(SIZE, tmp_path, tmp_path, lambda _: None)
    command._check_versions(study)
    command._check_versions(study)
    monkeypatch.setattr(command, "_versions", lambda: {"torch": "0.1"})
    with pytest.raises(DataError, match=r"torch .*, now 0\.1.*Name another --out"):
        command._check_versions(study)


# Processes


def job(work: object, folder: Path, name: str) -> Job:
    assert callable(work)
    result = folder / f"{name}.json"
    return Job(name, work, {"result": result}, result, folder / f"{name}.txt")


def test_each_job_has_a_process_and_a_log_and_one_that_fails_stops_no_other(
    tmp_path: Path,
) -> None:
    ended: dict[str, bool] = {}
    runner = Runner(
        2, 1, forkserver(["torch"]), lambda job, _, done: ended.update({job.label: done})
    )
    runner.run(
        [
            job(study_jobs.fail, tmp_path, "bad"),
            *(job(study_jobs.succeed, tmp_path, n) for n in ("one", "two")),
        ]
    )
    assert ended == {"bad": False, "one": True, "two": True}
    assert [job.label for job in runner.failed] == ["bad"]
    assert "bad.json will never be" in (tmp_path / "bad.txt").read_text()
    assert (tmp_path / "one.txt").read_text() == "all is well\n"
    pids = {(tmp_path / f"{name}.json").read_text() for name in ("one", "two")}
    assert len(pids - {str(os.getpid())}) == 2


def test_a_result_that_was_there_before_does_not_hide_a_failure(tmp_path: Path) -> None:
    bad = job(study_jobs.fail, tmp_path, "bad")
    bad.result.write_text("{}")
    runner = Runner(1, 1, forkserver(["torch"]), lambda *_: None)
    runner.run([bad])
    assert runner.failed == [bad]


def test_running_jobs_are_killed_when_the_study_is_interrupted(tmp_path: Path) -> None:
    pid = tmp_path / "slow.pid"

    def interrupt(*_: object) -> None:
        while not pid.is_file() or not pid.read_text():
            time.sleep(0.1)
        raise KeyboardInterrupt

    runner = Runner(2, 1, forkserver(["torch"]), interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run(
            [job(study_jobs.sleep, tmp_path, "slow"), job(study_jobs.succeed, tmp_path, "fast")]
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# Scores


def chats(count: int) -> list[list[dict[str, str]]]:
    rng = random.Random(0)
    return [
        [
            {"role": "user", "content": "What is " + "1 + " * rng.randrange(1, 9) + "1?"},
            {"role": "assistant", "content": str(rng.randrange(10**9))},
        ]
        for _ in range(count)
    ]


def test_padding_and_batches_change_no_likelihood(toy_model: Path) -> None:
    """Against one chat at a time, the loss of Transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    total, tokens = 0.0, 0
    found = Scorer(toy_model).answers(chats(19))
    for chat, (value, count) in zip(chats(19), found, strict=True):
        prompt, answer = encode(tokenizer, chat)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item()
        assert count == len(answer) == len(chat[-1]["content"]) + 1  # And the end of the turn.
        assert value == pytest.approx(-loss * count, rel=1e-5)
        total, tokens = total + loss * count, tokens + count
    assert Scorer(toy_model).answer_loss(chats(19)) == pytest.approx(total / tokens, rel=1e-5)


def test_the_loss_on_prose_is_that_of_windows_one_by_one(toy_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    text = tokenizer("\n\n".join(data.prose()), add_special_tokens=False)["input_ids"]
    windows = [torch.tensor([text[start : start + 256]]) for start in range(0, 2560, 256)]
    losses = [model(input_ids=window, labels=window).loss.item() for window in windows]
    found = Scorer(toy_model).prose_loss(data.prose(), 2600)
    assert found == pytest.approx(sum(losses) / 10, rel=1e-5)


def test_preferences_are_scored_by_the_implicit_reward() -> None:
    policy = [(-1.0, -5.0), (-3.0, -2.0), (-900.0, -1.0), (-4.0, -4.0)]
    reference = [(-2.0, -5.0), (-3.0, -3.0), (-1.0, -900.0), (-4.0, -4.0)]
    accuracy, loss = preference_scores(policy, reference, beta=0.5)
    margins = torch.tensor([0.5, -0.5, -899.0, 0.0])
    assert accuracy == 0.25
    assert loss == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()))


# Tables and pictures


def made_up_rows() -> list[tables.Row]:
    rng = random.Random(0)
    rows: list[tables.Row] = [
        {
            "task": "sft",
            "method": "base",
            "chosen": True,
            "status": "done",
            "test_loss": 1.4,
            "prose_loss": 3.1,
            "test_accuracy": 0.02,
        }
    ]
    for size, name in ((SIZES["small"].sft, "sft"), (SIZES["small"].dpo, "dpo")):
        for method in size.methods:
            for rate, seed in [*((r, 0) for r in size.learning_rates), (1e-4, 1), (1e-4, 2)]:
                chosen = rate == 1e-4
                row: tables.Row = {
                    "task": name,
                    "method": method.name,
                    "ratio": method.ratio,
                    "learning_rate": rate,
                    "seed": seed,
                    "chosen": chosen,
                    "status": "done",
                    "validation_loss": 1.2 + rng.random() / 10,
                    "train_seconds": 60 + rng.random(),
                    "train_cpu_seconds": 60 + rng.random(),
                }
                if chosen:
                    row |= {
                        "test_loss": 1.2 + rng.random() / 10,
                        "prose_loss": 3.1 + rng.random() / 10,
                        "test_accuracy": rng.random() / 10,
                    }
                rows.append(row)
    return rows


def test_the_csv_has_every_cell_and_gives_the_same_tables_again(tmp_path: Path) -> None:
    rows = made_up_rows()
    tables.write_csv(tmp_path / "study.csv", rows)
    again = tables.read_csv(tmp_path / "study.csv")
    assert len(again) == len(rows)
    assert tables.every_cell(again) == tables.every_cell(rows)
    assert len(tables.every_cell(rows)) == 1 + len(rows)
    for task in ("sft", "dpo"):
        assert tables.summary(again, task) == tables.summary(rows, task)


def test_a_table_s_figures_are_mean_and_sample_deviation_over_seeds() -> None:
    rows: list[tables.Row] = [
        {
            "task": "sft",
            "method": "full",
            "learning_rate": rate,
            "seed": seed,
            "chosen": rate == 0.1,
            "status": "done",
            "test_loss": loss,
            "test_accuracy": 0.5,
            "prose_loss": 3.0,
        }
        for rate, seed, loss in ((0.1, 0, 1.0), (0.1, 1, 2.0), (0.2, 0, 7.0))
    ]
    heading, line = tables.summary(rows, "sft")
    found = dict(zip(heading, line, strict=True))
    assert found["answer loss"] == "1.500 ± 0.707"
    assert found["answers right"] == "50.0% ± 0.0%"
    assert found["learning rate"] == "0.1"
    assert tables.markdown([heading, line]).count("\n") == 3


def test_differences_from_full_fine_tuning_are_taken_seed_by_seed() -> None:
    losses = {"full": (1.0, 2.0, 4.0), "gmt": (1.5, 2.0, 4.1), "base": (3.0,)}
    rows: list[tables.Row] = [
        {
            "task": "sft",
            "method": method,
            "ratio": 0.5 if method == "gmt" else None,
            "seed": None if method == "base" else seed,
            "chosen": True,
            "status": "done",
            "test_loss": loss,
        }
        for method, found in losses.items()
        for seed, loss in enumerate(found)
    ]
    settings = tables.settings_of(rows[::-1], "sft")  # Whatever the order of the rows is.
    found = settings["gmt 0.5"].difference("test_loss", settings["full"])
    assert sorted(found.values) == pytest.approx([0.0, 0.1, 0.5])
    assert found.text("+.3f") == "+0.200 ± 0.265"
    # 4.303 is the quantile of Student's t for three values: 4.303 * 0.26458 / sqrt(3) = 0.657.
    assert found.interval("+.3f") == "+0.200 [-0.457, +0.857]"
    assert tables.Spread((1.0,)).interval(".1f") == "1.0 [nan, nan]"
    assert settings["base"].difference("test_loss", settings["full"]).text("+.3f") == "-"


def test_pictures_are_drawn_of_whatever_is_there(tmp_path: Path) -> None:
    names = [file.name for file in plots.draw(made_up_rows(), tmp_path)]
    assert len(names) == 4
    assert all((tmp_path / name).stat().st_size < 300_000 for name in names)
    only_sft = [row for row in made_up_rows() if row["task"] == "sft"]
    assert len(plots.draw(only_sft, tmp_path)) == 3
    assert plots.draw([], tmp_path) == []


# The command


def test_the_command_says_what_is_wrong_with_the_data_in_one_line(
    tmp_path: Path,
    toy_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        quickstart, "_write_base_model", lambda target: shutil.copytree(toy_model, target) and None
    )
    out = tmp_path / "out"
    code = command.main(["--size", "small", "--data", str(tmp_path), "--out", str(out)])
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-2:]
    assert any(f"{tmp_path}/test.jsonl cannot be read" in line for line in error)


@pytest.mark.timeout(900)
def test_a_small_study_trains_and_judges_with_axolotl(
    gsm8k: Path, tmp_path: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        quickstart, "_write_base_model", lambda target: shutil.copytree(toy_model, target) and None
    )
    size = replace(SIZE, sft=small_task("sft", FULL, LORA), dpo=small_task("dpo", GMT), seeds=(0,))
    study = Study(size, gsm8k, tmp_path / "out", lambda _: None)
    study.prepare(lambda _: None)
    ended: list[str] = []

    def on_end(job: Job, seconds: float, done: bool) -> None:
        ended.append(job.label)
        study.tidy()
        assert done, job.log.read_text()

    runner = Runner(1, 1, forkserver(["torch"]), on_end)
    study.run(runner)
    rows = study.rows()
    assert {row["status"] for row in rows} == {"done"}
    assert [row["method"] for row in rows] == ["base", "full", "lora", "gmt"]
    for row in rows[1:]:
        assert row["steps"] == 2
        assert cast(float, row["train_cpu_seconds"]) > 0
        assert 0 <= cast(float, row["test_accuracy"]) <= 1
        assert cast(float, row["test_loss"]) > 0
    # Below a half: of an embedding's rows only those of tokens in the batch have a gradient.
    assert 0.3 < cast(float, rows[3]["kept_fraction"]) < 0.55
    plain = yaml.safe_load(study.folder(Cell("sft", FULL, 1e-3, 0)).recipe.read_text())
    assert "plugins" not in plain
    # No cell can find the tokens of another one's data.
    assert not list((tmp_path / "out").rglob("prepared"))
    assert plain["dataset_prepared_path"].endswith("/prepared")
    command.write_report(study)
    assert "| full | 0.001 |" in (study.out / "study.md").read_text()
