"""The study on sums in benchmarks/study/sums: design, order of runs, measures, and analysis."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_gmt import GMTConfig
from axolotl_gmt.tools import quickstart
from benchmarks.study.running import Job, Runner, forkserver
from benchmarks.study.scoring import encode
from benchmarks.study.sums import analysis, design
from benchmarks.study.sums.__main__ import Study
from benchmarks.study.sums.design import ARMS, FULL, GMT, RANDOM, Run
from benchmarks.study.sums.judging import divergence, judge, load, moved, write_replies

# The design


def test_no_sum_is_in_two_lists_in_either_order() -> None:
    sums = design.draw_sums()
    lists = [
        [sorted((one.first, one.second)) for one in sums.test],
        [sorted((one.first, one.second)) for one in sums.tuning],
        [sorted(pair) for pair in sums.pool],
    ]
    together = [tuple(pair) for found in lists for pair in found]
    assert [len(found) for found in lists] == [1000, 500, 2595]
    assert len(set(together)) == len(together) == 4095
    for seed in (*design.TUNING_SEEDS, *design.SEEDS):
        drawn = [tuple(sorted((one.first, one.second))) for one in sums.train(seed)]
        assert len(set(drawn)) == len(drawn) == design.TRAIN
        assert set(drawn) <= set(map(tuple, lists[2]))
    assert sums.train(1) != sums.train(2)
    assert design.draw_sums() == sums
    assert not set(design.TUNING_SEEDS) & set(design.SEEDS)


def test_arms_differ_in_nothing_but_gmt_s_settings() -> None:
    plain = design.yaml_of(Run(FULL, 0, 1))
    assert not any("gmt" in key or key == "plugins" for key in plain)
    for arm in ARMS:
        found = design.yaml_of(Run(arm, 0, 1))
        assert {key: value for key, value in found.items() if key in plain} == plain
        own = {key: value for key, value in found.items() if key not in plain}
        settings = {k.removeprefix("gmt_"): v for k, v in own.items() if k != "plugins"}
        GMTConfig(**settings)
    assert [arm.name for arm in ARMS if arm.is_primary] == ["full", "GMT 0.5", "random 0.5"]


@pytest.mark.parametrize(("arm", "control"), analysis.CONTROLS)
def test_an_arm_and_its_control_differ_in_one_setting(arm: str, control: str) -> None:
    mine, its = ({a.name: a for a in ARMS}[name].settings for name in (arm, control))
    assert len([key for key in mine | its if mine.get(key) != its.get(key)]) == 1


def test_an_optimum_at_the_edge_asks_for_the_rate_beyond() -> None:
    losses = {0: [0.5, 0.7], 1: [0.4, 0.6], 2: [0.5, 0.6]}
    assert (design.best(losses), design.beyond(losses)) == (1, None)
    assert design.beyond({0: [0.1], 1: [0.2]}) == -1
    assert design.beyond({0: [0.2], 1: [0.1]}) == 2
    assert design.best({0: [math.nan, 0.1], 1: [9.0, 9.0]}) == 1
    assert design.best({1: [0.1], 0: [0.1]}) == 0
    with pytest.raises(ValueError, match="NaN"):
        design.best({0: [math.nan]})


# The order of runs


class PretendRunner(Runner):
    """Writes what runs would have found: the best rate is that of the exponent named."""

    def __init__(self, study: Study, best: int, stop_after: int | None = None) -> None:
        super().__init__(1, 1, forkserver(["torch"]), lambda *_: study.tidy())
        self.best, self.stop_after = best, stop_after
        self.labels: list[str] = []

    def run(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self.stop_after == len(self.labels):
                raise KeyboardInterrupt
            self.labels.append(job.label)
            folder = job.arguments["folder"]
            full = job.arguments["full"]
            assert full is None or full.is_dir(), "compared with a model that is not there"
            rate = yaml.safe_load(folder.recipe.read_text())["learning_rate"]
            loss = abs(math.log2(rate / design.rate(self.best)))
            judged = {"is_right": [True], "losses": [loss], "tokens": 1}
            found = dict.fromkeys(job.arguments["splits"], judged)
            folder.model.mkdir(parents=True)
            folder.trained.write_text(json.dumps({**found, "curve": [1.0], "kl": 0.0}))
            self.on_end(job, 0.0, True)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "out", [FULL, GMT, RANDOM])


def test_a_grid_grows_until_its_best_rate_is_inside_and_then_seeds_run(study: Study) -> None:
    runner = PretendRunner(study, best=3)
    study.run(runner)
    tuned = [label for label in runner.labels if label.endswith(("seed101", "seed102"))]
    # -1, 0, 1 and 2 at first; 3 and 4 since the best was at the edge.
    assert len(tuned) == len(set(tuned)) == 3 * 6 * 2
    counted = runner.labels[len(tuned) :]
    assert counted[:10] == [f"full-lr0.0012-seed{seed}" for seed in design.SEEDS]
    assert counted[10:12] == ["GMT-0.5-lr0.0012-seed1", "random-0.5-lr0.0012-seed1"]
    assert len(counted) == 30
    kept = sorted(path.parent.name for path in (study.out / "runs").glob("*/model"))
    assert len(kept) == 10
    assert all(name.startswith("full-lr0.0012-seed") for name in kept)
    assert len(study.results()) == len(runner.labels)


def test_an_interrupted_study_goes_on_with_what_is_missing(study: Study) -> None:
    first = PretendRunner(study, best=0, stop_after=40)
    with pytest.raises(KeyboardInterrupt):
        study.run(first)
    again = Study(study.out, study.arms)
    second = PretendRunner(again, best=0)
    again.run(second)
    assert not set(first.labels) & set(second.labels)
    assert len(first.labels) + len(second.labels) == 3 * 4 * 2 + 30
    third = PretendRunner(again, best=0)
    again.run(third)
    assert third.labels == []


def test_a_second_batch_of_arms_finds_full_s_models_of_the_first(study: Study) -> None:
    study.run(PretendRunner(study, best=0))
    more = Study(study.out, [*study.arms, ARMS[3]])
    runner = PretendRunner(more, best=0)
    more.run(runner)
    assert len(runner.labels) == 4 * 2 + 10
    assert all(label.startswith("GMT-0.9-") for label in runner.labels)


# The measures


@dataclass(frozen=True)
class Question:
    """A chat in place of a sum."""

    text: str
    reply: str

    def chat(self) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": self.text},
                {"role": "assistant", "content": self.reply},
            ]
        }


def greedy_reply(folder: Path, text: str, tokens: int) -> str:
    """What the model replies token by token, without a cache."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    ids, _ = encode(tokenizer, chat)
    start = len(ids)
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([ids])).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    return str(tokenizer.decode(ids[start:]))


def make_it_stop_after(folder: Path, letter: str, to: Path) -> None:
    """A copy of the model which says ``letter`` after anything else, and then ends its turn."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    (token,) = tokenizer(letter, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for layer in model.model.layers:  # Nothing but the token itself reaches the head.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(0.1)
        model.model.embed_tokens.weight[:, 1] = 0.0
        model.model.embed_tokens.weight[token, 1] = 10.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[token, 0] = 1.0
        model.lm_head.weight[tokenizer.eos_token_id, 1] = 1.0
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


def test_an_answer_is_right_if_greedy_decoding_writes_it(toy_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_it_stop_after(toy_model, "7", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert greedy_reply(folder, "What?", 2) == "7" + tokenizer.eos_token
    questions = [Question(f"What is {n}?", "7" if n % 3 else "77") for n in range(120)]
    questions += [Question("Another?", "8"), Question("Another one?", "")]
    found = judge(load(folder), tokenizer, questions)  # type: ignore[arg-type]
    assert found.is_right == [question.reply == "7" for question in questions]
    assert found.accuracy == 80 / 122


def test_losses_are_those_of_one_chat_at_a_time(toy_model: Path) -> None:
    model, tokenizer = load(toy_model), AutoTokenizer.from_pretrained(toy_model)
    questions = [Question(f"What is {n} + {n}?", str(2 * n)) for n in (3, 30, 300, 4, 40)] * 15
    found = judge(model, tokenizer, questions)  # type: ignore[arg-type]
    tokens = 0
    for question, loss in zip(questions, found.losses, strict=True):
        prompt, answer = encode(tokenizer, question.chat()["messages"])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        mean = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item()
        assert loss == pytest.approx(mean * len(answer), rel=1e-5)
        tokens += len(answer)
    assert found.tokens == tokens
    assert found.loss == pytest.approx(sum(found.losses) / tokens)


def test_divergence_is_that_of_each_token_alone_and_0_for_the_model_itself(
    toy_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "replies.json"
    prompts = ["What?", "What is the answer to this long question?", "Why?"] * 4
    write_replies(toy_model, prompts, 9, file)
    rows = json.loads(file.read_text())
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    for prompt, row in zip(prompts[:3], rows[:3], strict=True):
        assert tokenizer.decode(row["reply"]) == greedy_reply(toy_model, prompt, len(row["reply"]))
    base, other = load(toy_model), load(toy_model)
    assert divergence(base, base, file) == 0.0
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.3)
    terms = []
    for row in rows:
        ids = row["prompt"] + row["reply"]
        for place in range(len(row["prompt"]), len(ids)):
            so_far = torch.tensor([ids[:place]])
            p, q = (
                model(input_ids=so_far).logits[0, -1].double().log_softmax(-1)
                for model in (base, other)
            )
            terms.append((p.exp() * (p - q)).sum().item())
    assert divergence(other, base, file) == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_the_way_that_weights_went_is_measured_over_all_of_them(
    toy_model: Path, tmp_path: Path
) -> None:
    base = load_file(toy_model / "model.safetensors")
    names = list(base)
    first = {name: tensor.clone() for name, tensor in base.items()}
    first[names[0]].view(-1)[:4] += 1.0
    second = {name: tensor.clone() for name, tensor in base.items()}
    second[names[0]].view(-1)[:1] += 3.0
    second[names[1]].view(-1)[:1] += 4.0
    for name, tensors in (("first", first), ("second", second)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = moved(toy_model, tmp_path / "first", tmp_path / "second")
    entries = sum(tensor.numel() for tensor in base.values())
    assert found["norm"] == pytest.approx(2.0, rel=1e-5)
    assert found["changed"] == 4 / entries
    assert found["cosine"] == pytest.approx(3.0 / (2.0 * 5.0), rel=1e-5)
    assert "cosine" not in moved(toy_model, tmp_path / "first", None)


# The analysis


def test_tests_are_those_of_the_textbook() -> None:
    assert analysis.holm([0.04, 0.01]) == pytest.approx([0.04, 0.02])
    assert analysis.holm([0.03, 0.02]) == pytest.approx([0.04, 0.04])
    assert analysis.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    found = analysis.Paired((0.01, 0.03, 0.02, 0.02))
    # Mean 0.02, standard error 0.004082: t of 4.899 and, against 0.03, of -2.449; 3 degrees.
    assert found.p == pytest.approx(0.01627, rel=1e-3)
    half_width = 2.35336 * 0.0040825  # The quantile of t at 95%.
    assert found.inner_interval == pytest.approx((0.02 - half_width, 0.02 + half_width), rel=1e-3)
    assert found.p_equivalent(0.03) == pytest.approx(0.04587, rel=1e-3)
    assert found.p_equivalent(0.01) > 0.5


def made_up(study: Study) -> list[tuple[Run, dict[str, Any]]]:
    results = []
    for index, arm in enumerate(study.arms):
        for seed in (101, 102, 1, 2, 3):
            for exponent in (0, 1) if seed > 100 else (0,):
                judged = {
                    "is_right": [n < 5 + index + seed % 2 for n in range(10)],
                    "losses": [0.1 * (index + exponent)] * 10,
                    "tokens": 40,
                }
                found = {"tuning": judged, "curve": [2.0, 1.0], "train_seconds": 9.0, "commit": "c"}
                if seed < 100:
                    found |= {"test": judged, "kl": 0.1 * index, "norm": 2.0}
                results.append((Run(arm, exponent, seed), found))
    return results


def test_the_csv_gives_every_table_and_picture_and_pairs_go_by_seed(
    study: Study, tmp_path: Path
) -> None:
    base = tmp_path / "base.json"
    judged = {"is_right": [False] * 10, "losses": [1.0] * 10, "tokens": 40}
    base.write_text(json.dumps({"tuning": judged, "test": judged, "kl": 0.0}))
    analysis.write(made_up(study), base, tmp_path, tmp_path)
    rows = analysis.read(tmp_path / "sums.csv")
    assert len(rows) == 1 + 3 * 7
    found = analysis.paired(rows, "test_accuracy", GMT.name, FULL.name)
    assert found.values == pytest.approx((0.1, 0.1, 0.1))
    assert analysis.tuning_means(rows, GMT.name) == pytest.approx({1.5e-4: 0.025, 3e-4: 0.05})
    primary, arms, secondary, seeds, tuning = analysis.tables(rows)
    assert "GMT 0.5 less full, test sums | +10.0 [+10.0, +10.0] |" in primary
    assert "| untrained | - | 0.0% | 0.250 | 0 |" in arms
    assert "| random 0.5 less full | +20.0 [+20.0, +20.0] |" in secondary
    assert "| GMT 0.5 | 70.0% | 60.0% | 70.0% |" in seeds
    assert "| GMT 0.5 | **0.025** (0.025, 0.025) | 0.050 (0.050, 0.050) |" in tuning
    before = (tmp_path / "sums-problems.csv.gz").read_bytes()
    analysis.write(made_up(study), base, tmp_path, tmp_path)
    assert (tmp_path / "sums-problems.csv.gz").read_bytes() == before
    for name in ("differences", "curves", "tuning"):
        assert (tmp_path / f"sums-{name}.png").stat().st_size > 5000


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "sums.csv"


def test_the_page_s_tables_and_numbers_are_those_of_the_csv() -> None:
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    section = page.partition("\n## Sums")[2].partition("\n## ")[0]
    text = section
    tables = analysis.tables(analysis.read(RESULTS))
    for table in tables:
        assert table in section
        text = text.replace(table, "")
    # Whatever is said between the tables stands in one of them, or was decided before the runs.
    plan = (ROOT / "benchmarks" / "study" / "PLAN.md").read_text(encoding="utf-8")
    known = {*_numbers("\n".join(tables)), *_numbers(plan)}
    assert {*_numbers(text)} - known == set()


def _numbers(text: str) -> list[str]:
    """The numbers with a decimal point in a text, without their signs."""
    return re.findall(r"\d[\d,]*\.\d+", text)


@pytest.mark.timeout(1800)
def test_a_run_of_each_kind_trains_and_is_judged_with_axolotl(
    tmp_path: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        quickstart, "_write_base_model", lambda target: shutil.copytree(toy_model, target) and None
    )
    monkeypatch.setattr(design, "TRAIN", 2 * design.BATCH)
    monkeypatch.setattr(design, "SEEDS", (1,))
    monkeypatch.setattr(design, "TUNING_SEEDS", (101,))
    monkeypatch.setattr(design, "beyond", lambda losses: None)
    monkeypatch.setattr(design.Arm, "grid", lambda arm: [arm.centre])
    monkeypatch.setattr(design, "REPLY_TOKENS", 4)
    arms = [FULL, replace(ARMS[6], settings={**ARMS[6].settings})]
    study = Study(tmp_path / "out", arms, "commit")

    def on_end(job: Job, seconds: float, done: bool) -> None:
        assert done, job.log.read_text()
        study.tidy()

    runner = Runner(1, 1, forkserver(["torch"]), on_end)
    study.prepare(runner)
    study.run(runner)
    results = study.results()
    assert [(run.arm.name, run.seed) for run, _ in results] == [
        ("full", 101),
        ("GMT 0.9 hold", 101),
        ("full", 1),
        ("GMT 0.9 hold", 1),
    ]
    found = results[3][1]
    assert len(found["test"]["is_right"]) == 1000
    assert len(found["tuning"]["losses"]) == 500
    assert found["kl"] > 0
    assert found["cosine"] > 0
    # What was ever kept is what moved, but for what Adam's step was too small for.
    assert 0.1 < found["changed"] <= found["ever_kept"] < 0.25
    assert found["commit"] == "commit"
    assert len(found["model"]) == 64
    analysis.write(results, study.base_result, tmp_path, tmp_path)
