"""The study in benchmarks/study: grid, splits, choice of learning rates, resuming and tables."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import cast

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_gmt.errors import UserError
from axolotl_gmt.tools import quickstart
from benchmarks import measuring
from benchmarks.study import __main__ as command
from benchmarks.study import cell as cells
from benchmarks.study import data, grid, plan, plots, tables
from benchmarks.study.data import DataError, split_preferences, split_problems
from benchmarks.study.grid import FULL, FULL_BF16, LORA, SIZES, TOY, Cell, Method, Size, Task
from benchmarks.study.running import Job, Runner, fitting, forkserver
from benchmarks.study.scoring import Scorer, encode, preference_scores, set_precision
from benchmarks.study.study import Study, check_base, token_counter
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


def test_the_whole_test_file_counts_where_that_is_asked_for_however_long(gsm8k: Path) -> None:
    splits = split_problems(gsm8k, lambda *_: 50, max_tokens=100, validation=5, test=None)
    assert len(splits.test) == 30

    def long_test(question: str, answer: str) -> int:
        return 50 if int(question.split()[2]) < 40 else 5000

    assert split_problems(gsm8k, long_test, 100, 5, None) == splits


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
            cells = grid.coarse_cells(task, size)
            assert len(set(cells)) == len(task.methods) * len(task.learning_rates)
            for method in task.methods:
                rates = [cell.learning_rate for cell in cells if cell.method == method]
                assert tuple(rates) == task.learning_rates
        assert len(size.seeds) >= 3


def test_the_full_size_never_counts_a_cell_that_tuned_and_has_eight_seeds_of_primary_arms() -> None:
    size = SIZES["full"]
    assert [method.label for method in size.primary] == ["full", "gmt 0.5", "random 0.5"]
    for task in (size.sft, size.dpo):
        assert set(size.primary) <= set(task.methods)
        best = [Cell(task.name, method, 1e-5, 101) for method in task.methods]
        seeds = [cell.seed for cell in grid.seed_cells(best, size)]
        assert not set(seeds) & set(size.tuning_seeds)
        assert len(seeds) == 3 * 8 + 3 * (len(task.methods) - 3)
        finer = [cell for cell in grid.finer_cells(best, size) if cell.method == FULL]
        assert sorted({cell.learning_rate for cell in finer}) == [5e-6, 1e-5, 2e-5]
        assert sorted({cell.seed for cell in finer}) == sorted(size.tuning_seeds)
        assert len(finer) == 6


def test_the_small_size_still_has_the_cells_whose_results_are_published() -> None:
    """Keys are hashes of a cell's YAML, data and scoring: what is published was made by these."""
    published = Path(plots.__file__).parents[1] / "results" / "study-small.csv"
    size, digest = SIZES["small"], "6122de9cb6f975be"  # Of GSM8K as it is split at this size.
    start = grid.key(Cell("sft", FULL, 1e-4, 0), size, digest)
    rows = [row for row in tables.read_csv(published) if row["method"] != "base"]
    assert len(rows) == 71
    for row in rows:
        task, ratio = row["task"], cast("float | None", row["ratio"])
        cell = Cell(
            cast(grid.TaskName, task),
            Method(str(row["method"]), ratio),
            cast(float, row["learning_rate"]),
            int(cast(float, row["seed"])),
        )
        depends_on = (digest,) if task == "sft" else (digest, start)
        assert grid.key(cell, size, *depends_on) == row["key"], row


def test_methods_differ_in_nothing_but_their_own_keys() -> None:
    plain = grid.settings(Cell("sft", FULL, 1e-3, 0), SIZE)
    for method in SIZES["full"].sft.methods:
        found = grid.settings(Cell("sft", method, 1e-3, 0), SIZE)
        own = method.settings()
        assert {k: v for k, v in found.items() if k not in own} == {
            k: v for k, v in plain.items() if k not in own
        }
        assert all(
            k.startswith(("gmt_", "lora_")) or k in ("plugins", "adapter", "bf16") for k in own
        )
    assert FULL.settings() == {}
    assert GMT.settings() == {
        "plugins": ["axolotl_gmt"],
        "gmt_criterion": "gradient",
        "gmt_mask_ratio": 0.5,
    }


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_axolotl_accepts_the_yaml_of_every_method_on_an_h100(size: Size, tmp_path: Path) -> None:
    """By its schema, which drops unknown keys, so what must arrive is looked for too."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import prepare_plugins, resolve_dtype, validate_config
    from axolotl.utils.dict import DictDefault

    card = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
    version = {"torch_version": torch.__version__.partition("+")[0]}
    study = Study(size, tmp_path, tmp_path / "out", lambda _: None)
    study._best["sft"] = {FULL: Cell("sft", FULL, 1e-4, 0)}
    for task in (size.sft, size.dpo):
        for method in task.methods:
            written = study.recipe(Cell(task.name, method, 1e-4, 1))
            config = DictDefault(yaml.safe_load(yaml.safe_dump(written)))
            PluginManager.get_instance().plugins.clear()
            try:
                prepare_plugins(config)
                valid = validate_config(config, capabilities=card, env_capabilities=version)
                arguments = PluginManager.get_instance().get_training_args(valid) or {}
            finally:
                PluginManager.get_instance().plugins.clear()
            for key, value in method.settings().items():
                if key != "plugins":
                    assert valid[key] == value, (method, key)
            assert (valid.rl == "dpo") == (task.name == "dpo")
            resolve_dtype(valid)
            in_bf16 = method == FULL_BF16
            assert valid.torch_dtype == (torch.bfloat16 if in_bf16 else torch.float32)
            assert arguments.get("bf16", False) == size.autocast
            assert not valid.tf32


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


def test_of_two_tuning_seeds_the_mean_decides_among_rates_that_both_were_tried_at() -> None:
    nan = float("nan")
    losses = {
        (FULL, 1e-4, 0): 1.0,  # The lowest of all, but only one seed was run.
        (FULL, 1e-3, 0): 1.5,
        (FULL, 1e-3, 1): 3.5,
        (FULL, 2e-3, 0): 2.0,
        (FULL, 2e-3, 1): 2.0,
        (GMT, 1e-3, 0): 1.0,
        (GMT, 1e-3, 1): nan,
        (GMT, 2e-3, 0): 9.0,
        (GMT, 2e-3, 1): 9.0,
        (LORA, 1e-3, 0): nan,
    }
    chosen = grid.choose({Cell("sft", *key): loss for key, loss in losses.items()})
    rates = {method: cell.learning_rate for method, cell in chosen.items()}
    assert rates == {FULL: 2e-3, GMT: 2e-3}


def test_the_plan_counts_the_cells_and_grows_with_the_model() -> None:
    size = SIZES["full"]
    assert [size.counts(task) for task in (size.sft, size.dpo)] == [(150, 60, 0), (45, 30, 0)]
    assert SIZES["small"].counts(SIZES["small"].sft) == (40, 24, 8)
    small, large = plan.hours(size, 0.5e9), plan.hours(size, 1.7e9)
    assert 0 < small < large
    text = " ".join(plan.lines(size, (0.5e9, 1.7e9)))
    assert "285 cells" in text
    assert "estimated and not measured" in text
    assert f"1.7B parameters: {large:.0f} h" in text


# The order of things


class PretendRunner(Runner):
    """Writes the results that jobs would have written: test loss falls where validation rises."""

    def __init__(self, study: Study, breaks: str = "nothing") -> None:
        super().__init__(1, 1, forkserver(["torch"]), lambda *_: study.tidy())
        self.breaks = breaks
        self.jobs: list[Job] = []
        self.memory: dict[str, float] = {}
        self.together: list[tuple[int, list[str]]] = []

    def run(self, jobs: Sequence[Job]) -> None:
        self.together.append((self.parallel, [job.label for job in jobs]))
        for job in jobs:
            self.jobs.append(job)
            done = not re.search(self.breaks, job.label)
            if not done:
                self.failed.append(job)
            elif job.label == "base model":
                self._write(job.result, {"test_loss": 9.0})
            elif job.label in ("reference of DPO", "replies of the untrained model"):
                self._write(job.result, {})
            elif job.label == "time of a step":
                ratios = {
                    f"{name} ratio": 1.01 for name in ("mask", "median", "smallest", "largest")
                }
                self._write(job.result, {"pairs": 1, "device": "cpu", **ratios})
            else:
                self._pretend(job)
            self.on_end(job, 0.0, done)

    def _pretend(self, job: Job) -> None:
        folder = job.arguments["folder"]
        rate = yaml.safe_load(folder.recipe.read_text())["learning_rate"]
        if job.arguments["train"]:
            folder.model.mkdir(exist_ok=True)
            self._write(
                folder.trained, {"validation_loss": rate, "train_cpu_seconds": 1.0, **self.memory}
            )
        if job.arguments["test"]:
            assert folder.model.is_dir(), "judged after its model was removed"
            scores = {"test_loss": 1 / rate, "test_accuracy": 0.0, "prose_loss": 3.0}
            self._write(folder.tested, scores)

    @staticmethod
    def _write(file: Path, result: Mapping[str, object]) -> None:
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


FINER = replace(
    SIZE,
    dpo=small_task("dpo", FULL, GMT),
    seeds=(1, 2),
    tuning_seeds=(101, 102),
    finer=(0.5, 1.0, 2.0),
    primary=(GMT,),
    primary_seeds=(1, 2, 3),
    reply_tokens=4,
    timed_pairs=1,
)


@pytest.mark.usefixtures("pretend_models")
def test_tuning_goes_finer_around_the_best_rate_and_its_seeds_and_models_count_for_nothing(
    tmp_path: Path,
) -> None:
    weights: list[float] = []
    study = Study(FINER, tmp_path, tmp_path / "out", weights.append)
    runner = PretendRunner(study)
    study.run(runner)
    tuned = [label for label in trained_labels(runner) if label.startswith("sft-gmt")]
    assert tuned == [
        "sft-gmt0.5-lr0.0001-seed101",
        "sft-gmt0.5-lr0.001-seed101",
        # In this pretence the lowest rate is best.
        "sft-gmt0.5-lr5e-05-seed101",
        "sft-gmt0.5-lr5e-05-seed102",
        "sft-gmt0.5-lr0.0001-seed102",
        "sft-gmt0.5-lr0.0002-seed101",
        "sft-gmt0.5-lr0.0002-seed102",
        *(f"sft-gmt0.5-lr5e-05-seed{seed}" for seed in (1, 2, 3)),
    ]
    assert not [label for label in judged_labels(runner) if "seed10" in label]
    assert sum("full-" in label for label in judged_labels(runner)) == 4
    models = [path.parent for path in study.out.glob("cells/*/model")]
    assert models == [study.folder(Cell("sft", FULL, 5e-5, 1)).path]
    assert sum(weights) == pytest.approx(sum(job.weight for job in runner.jobs))
    # Alone, before anything else.
    assert runner.together[0] == (1, ["time of a step"])
    assert [remark.split(", is")[0] for remark in study.remarks()] == [
        "The learning rate of sft full, 5e-05",
        "The learning rate of sft gmt 0.5, 5e-05",
        "The learning rate of dpo full, 0.0005",
        "The learning rate of dpo gmt 0.5, 0.0005",
    ]
    again = PretendRunner(study)
    study.run(again)
    assert again.jobs == []


# What breaks, what the report then says of it, and how many cells of DPO there are nevertheless.
FAULTS = {
    "time of a step": ("The time of a step was not measured", 17),
    "replies of the untrained model": ("KL from untrained was not measured", 17),
    "base model": ("The untrained model was not scored", 17),
    "sft-full-lr0.001-seed101": ("sft full has no learning rate", 0),
    "sft-full-lr5e-05-seed102": ("sft full has no learning rate", 0),
    "sft-full-lr5e-05-seed1$": ("DPO was not run", 0),
    "sft-full-lr5e-05-seed2": ("", 17),
    "sft-full": ("DPO was not run", 0),
    "sft-gmt0.5-lr0.0001-seed101": ("sft gmt 0.5 has no learning rate", 17),
    "sft-gmt0.5-lr5e-05-seed3": ("", 17),
    "sft": ("sft gmt 0.5 has no learning rate", 0),
    "reference of DPO": ("DPO was not run", 0),
    "dpo-full-lr0.001-seed101": ("dpo full has no learning rate", 10),
    "dpo-full": ("dpo full has no learning rate", 10),
    "dpo-gmt0.5-lr0.001-seed102": ("dpo gmt 0.5 has no learning rate", 14),
    "dpo-gmt0.5-lr0.0005-seed1$": ("", 17),
    "": ("The untrained model was not scored", 0),  # Everything.
}


@pytest.mark.usefixtures("pretend_models")
@pytest.mark.parametrize("breaks", FAULTS, ids=lambda breaks: breaks or "everything")
def test_whatever_fails_the_study_goes_on_and_reports(tmp_path: Path, breaks: str) -> None:
    remark, dpo_cells = FAULTS[breaks]
    study = Study(FINER, tmp_path, tmp_path / "out", lambda _: None)
    runner = PretendRunner(study, breaks)
    study.run(runner)
    assert any(re.search(breaks, job.label) for job in runner.failed)
    assert any(remark in found for found in study.remarks())
    assert sum(job.label.startswith("dpo") for job in runner.jobs) == dpo_cells
    command.write_report(study)
    facts = json.loads((study.out / "study.json").read_text())
    assert facts["remarks"] == study.remarks()
    assert (facts["step time"] is None) == (breaks in "time of a step")
    assert remark in (study.out / "study.md").read_text()
    # The same command again, and nothing fails: all that was missing is there.
    study.run(PretendRunner(study))
    assert not [found for found in study.remarks() if "edge" not in found]
    assert {row["status"] for row in study.rows()} == {"done"}


@pytest.mark.usefixtures("pretend_models")
def test_as_many_cells_run_at_a_time_as_the_gpu_has_memory_for(tmp_path: Path) -> None:
    gib = 2**30
    study = Study(SIZE, tmp_path, tmp_path / "out", lambda _: None, by_memory=True)
    runner = PretendRunner(study, breaks="sft-full-lr0.0001-seed0")
    runner.parallel, runner.memory = 8, {"gpu_reserved": 14 * gib, "gpu_total": 80 * gib}
    study.run(runner)
    assert runner.parallel == 8
    alone = [labels for parallel, labels in runner.together if parallel == 1 and labels]
    # The first of all, the first that fails, and then the first that says what it took.
    assert alone[:3] == [["base model"], ["sft-full-lr0.0001-seed0"], ["sft-full-lr0.001-seed0"]]
    assert len(alone) == 3
    assert {parallel for parallel, labels in runner.together if len(labels) > 1} == {4}
    # What failed is run again beside others, and the first cell of the next task alone.
    again = PretendRunner(study)
    again.parallel, again.memory = 3, {"gpu_reserved": 30 * gib, "gpu_total": 80 * gib}
    study.run(again)
    assert (3, ["sft-full-lr0.0001-seed0"]) in again.together
    assert (1, ["dpo-full-lr0.001-seed0"]) in again.together
    assert (2, [f"dpo-full-lr0.001-seed{seed}" for seed in SIZE.seeds]) in again.together


def test_what_fits_on_a_gpu_is_at_least_one_and_at_most_what_was_asked() -> None:
    gib = 2**30
    assert fitting(14 * gib, 80 * gib, 16) == 4  # 72 GiB for 15 each
    assert fitting(14 * gib, 80 * gib, 3) == 3
    assert fitting(79 * gib, 80 * gib, 8) == 1


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


# Time


def test_pairs_of_steps_take_turns_and_only_one_of_each_has_the_hook() -> None:
    hooks: list[object] = []
    seen: list[int] = []

    class Handle:
        def __init__(self) -> None:
            hooks.append(self)

        def remove(self) -> None:
            hooks.remove(self)

    def step() -> None:
        seen.append(len(hooks))
        time.sleep(0.02 * len(hooks))

    attach = cast("Callable[[], torch.utils.hooks.RemovableHandle]", Handle)
    pairs = measuring.in_pairs(step, attach, "cpu", 3, "steps")
    assert seen == [1, 0, 0, 1, 1, 0, 0, 1]
    assert len(pairs) == 3
    assert all(hooked > 0.02 > plain for hooked, plain in pairs)
    found = measuring.of_pairs([(3.0, 2.0), (1.0, 1.0), (4.0, 2.0)])
    assert (found["median ratio"], found["largest ratio"]) == (1.5, 2.0)
    assert found["median ms more"] == 1000


# The model


def test_a_base_model_that_cannot_be_used_is_refused_with_the_reason(
    toy_model: Path, tmp_path: Path
) -> None:
    assert check_base(toy_model, None) == check_base(toy_model, (1e4, 1e5)) == 35_104
    with pytest.raises(DataError, match=r"has 35,104 parameters.*needs 400,000,000 to 2,000,000,0"):
        check_base(toy_model, SIZES["full"].parameters)
    with pytest.raises(UserError, match="is not a folder"):
        check_base(tmp_path / "none", None)
    quantised = shutil.copytree(toy_model, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(DataError, match="is quantised"):
        check_base(quantised, None)
    packed = shutil.copytree(toy_model, tmp_path / "packed")
    save_file({"weight": torch.zeros(4, dtype=torch.uint8)}, packed / "model.safetensors")
    with pytest.raises(DataError, match=r"is quantised \(U8\)"):
        check_base(packed, None)
    silent = shutil.copytree(toy_model, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        token_counter(silent)


# Scores


def test_scores_are_computed_in_float32_whatever_training_left_behind(toy_model: Path) -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.fp32_precision = "tf32"
    try:
        found = Scorer(toy_model)
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cudnn.fp32_precision == "ieee"
        assert found.model.dtype == torch.float32
    finally:
        set_precision()


def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another(
    toy_model: Path, tmp_path: Path
) -> None:
    replies = tmp_path / "replies.json"
    cells.write_replies(toy_model, ["What is 1 + 1?", "Name a colour."], 4, replies)
    untrained = cells.Untrained(toy_model, replies)
    assert cells._divergence(toy_model, untrained) == pytest.approx(0, abs=1e-12)
    other = shutil.copytree(toy_model, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    model.save_pretrained(other)
    assert cells._divergence(other, untrained) > 1e-4


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "full"], "--size full needs --base-model PATH"),
        (["--size", "small", "--toy"], "--toy is for --size full"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.parse([*arguments, "--data", "."])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.timeout(1800)
def test_every_kind_of_cell_of_the_full_size_runs_and_one_that_fails_stops_no_other(
    gsm8k: Path, tmp_path: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Method("no_such_criterion", 0.5)
    toy = replace(TOY, sft=replace(TOY.sft, methods=(*TOY.sft.methods, broken)))
    monkeypatch.setattr(command, "TOY", toy)
    out = tmp_path / "out"
    given = ["--base-model", str(toy_model), "--data", str(gsm8k), "--out", str(out)]
    assert command.main(["--size", "full", "--toy", *given]) == 1
    rows = tables.read_csv(out / "study.csv")
    failed = [row for row in rows if row["status"] == "failed"]
    assert [row["method"] for row in failed] == ["no_such_criterion"]
    counted = [row for row in rows if row["chosen"] and row["method"] != "base"]
    assert [(row["task"], row["method"], row["seed"]) for row in counted] == [
        ("sft", "full", 1),
        ("sft", "gmt", 1),
        ("sft", "gmt", 2),
        ("sft", "lora", 1),
        ("sft", "full_bf16", 1),
        ("dpo", "full", 1),
        ("dpo", "gmt", 1),
        ("dpo", "gmt", 2),
    ]
    for row in counted:
        pure = row["method"] == "full_bf16"
        assert row["weights"] == ("bfloat16" if pure else "float32")
        assert row["autocast"] == "bf16"
        assert (row["kl"] is not None and cast(float, row["kl"]) > 0) == (row["task"] == "sft")
    facts = json.loads((out / "study.json").read_text())
    assert facts["step time"]["median ratio"] > 0
    assert facts["model"] == sha256((toy_model / "model.safetensors").read_bytes()).hexdigest()
    assert len(facts["data"]) == 16
    assert facts["examples"]["sft-test"] == 30  # All of the file.
    assert "sft no_such_criterion 0.5 has no learning rate" in " ".join(facts["remarks"])
    log = next(out.glob("cells/sft-no_such_criterion*/log.txt")).read_text()
    assert "no_such_criterion" in log
    assert not list(out.glob("cells/*seed10*/model"))


@pytest.mark.timeout(1800)
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
