"""Reading replies, scoring, and the command ``score``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_gmt.cli import gmt
from axolotl_gmt.errors import UserError
from axolotl_gmt.tools import scoring


def write_jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


# Reading replies


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("12 + 30 = 42.", "42"),
        ("The answer is **1,234.5**!", "1234.5"),
        ("It is -3", "-3"),
        ("That is 12-30", "30"),
        ("Between 1,2 and 3", "3"),
        ("7, 8", "8"),
        ("12345", "12345"),
        ("none", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert scoring.last_number(text) == (None if number is None else Decimal(number))


def test_an_exact_reply_is_the_answer_and_nothing_else() -> None:
    assert scoring.is_exact(" 42\n", "42")
    assert not scoring.is_exact("It is 42", "42")
    assert not scoring.is_exact("420", "42")


def test_a_reply_that_ends_with_the_right_number_counts_as_such() -> None:
    assert scoring.has_last_number("12 + 30 = 42.0", "42")
    assert not scoring.has_last_number("42 is not 43", "42")
    assert not scoring.has_last_number("no idea", "yes")


# Scoring


def test_a_batch_is_answered_as_each_chat_would_be_alone(toy_model: Path) -> None:
    """Against greedy decoding of one unpadded prompt at a time, without a cache."""
    questions = [f"What is {n} + {n}{n}?" * (n % 4 + 1) for n in range(scoring.BATCH_SIZE + 3)]
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    problems = []
    for question in questions:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        tokens = prompt
        for _ in range(8):
            with torch.inference_mode():
                following = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
            if following == tokenizer.eos_token_id:
                break
        reply = tokenizer.decode(tokens[0, prompt.size(1) :], skip_special_tokens=True)
        problems.append(scoring.Problem(turns, reply))
    problems[5] = scoring.Problem(problems[5].turns, "something else")
    answered: list[int] = []
    score = scoring.score_model(toy_model, problems, 8, answered.append)
    assert score.exact == len(questions) - 1
    assert answered == [scoring.BATCH_SIZE, 3]


def score_cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(gmt, ["score", *map(str, arguments)])


def test_score_prints_json_and_respects_the_limit(toy_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", *[chat(f"{n} + 1?", f"{n + 1}") for n in range(5)])
    result = score_cli(toy_model, "--data", data, "--limit", "3", "--max-new-tokens", "4", "--json")
    assert result.exit_code == 0
    (scored,) = json.loads(result.stdout)
    assert scored["problems"] == 3
    assert scored["model"] == str(toy_model)
    assert scored["exact_accuracy"] == scored["exact"] / 3


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no problem"),
        ("\n\n", "no problem"),
        (json.dumps(chat("1 + 1?", "2")) + "\n{nonsense\n", "line 2: not valid JSON"),
        ("[1, 2]\n", 'line 1: needs "messages"'),
        ('{"messages": ["hello"]}\n', 'line 1: needs "messages"'),
        ('{"messages": [{"role": "user", "content": 3}]}\n', 'line 1: needs "messages"'),
        ('{"messages": []}\n', "line 1: the last of at least two turns"),
        (json.dumps({"messages": chat("1", "2")["messages"][::-1]}), "line 1: the last of"),
        ("[" * 100_000, "line 1: not valid JSON"),
        (json.dumps(chat("\ud800", "2")), "line 1: not valid JSON"),
    ],
)
def test_malformed_data_gets_one_line_and_a_failure(
    text: str, complaint: str, toy_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    assert_one_line_failure(score_cli(toy_model, "--data", data), complaint)


def test_data_that_is_no_text_or_not_there_gets_one_line(toy_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    assert_one_line_failure(score_cli(toy_model, "--data", data), "No such file")
    data.write_bytes(b"\xff\xfe\x00")
    assert_one_line_failure(score_cli(toy_model, "--data", data), "not UTF-8")
    assert_one_line_failure(score_cli(toy_model, "--data", tmp_path), "Is a directory")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _remove_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (shutil.rmtree, "is not a folder"),
        (_empty, "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (_truncate_weights, "incomplete or damaged"),
        (_break_config, "cannot be loaded"),
        (_remove_template, "no chat template"),
    ],
)
def test_a_folder_that_is_no_whole_model_gets_one_line(
    damage: Callable[[Path], None], complaint: str, toy_model: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", chat("1 + 1?", "2"))
    model = tmp_path / "model"
    shutil.copytree(toy_model, model)
    damage(model)
    assert_one_line_failure(score_cli(model, "--data", data), complaint)


def assert_one_line_failure(result: Result, complaint: str) -> None:
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert complaint in line
    assert result.stderr.rstrip().endswith(line)


# Models and data that mean harm


def changed(toy_model: Path, folder: Path, file: str, text: str) -> Path:
    """A copy of the toy in ``folder``, one file of which holds ``text``."""
    shutil.copytree(toy_model, folder)
    (folder / file).write_text(text)
    return folder


PROBLEMS = [scoring.Problem([{"role": "user", "content": "1 + 1?"}], "2")]


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ 1 // 0 }}", "its chat template fails on these turns: integer division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('no such turn') }}", "fails on these turns: no such turn"),
        ("{{ '\\ud800' }}", "its chat template fails on these turns: "),
        ("{{ 'word ' * 500 }}", "a prompt has 2,500 tokens, but the model's context 512"),
    ],
)
def test_a_template_that_fails_is_told_in_one_line(
    template: str, complaint: str, toy_model: Path, tmp_path: Path
) -> None:
    model = changed(toy_model, tmp_path / "model", "chat_template.jinja", template)
    with pytest.raises(UserError) as caught:
        scoring.score_model(model, PROBLEMS)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "limits", "complaint"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            (3, 1 << 32),
            "takes more than 3 seconds of work",
        ),
        ("{{ 'a' * 2000000000 }}", (60, 1 << 30), "fails on these turns: MemoryError"),
    ],
)
def test_a_template_without_end_ends_at_a_limit(
    template: str,
    limits: tuple[int, int],
    complaint: str,
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "MAX_SECONDS", limits[0])
    monkeypatch.setattr(scoring, "MAX_MEMORY", limits[1])
    model = changed(toy_model, tmp_path / "model", "chat_template.jinja", template)
    data = write_jsonl(tmp_path / "data.jsonl", chat("1 + 1?", "2"))
    assert_one_line_failure(score_cli(model, "--data", data), complaint)


def test_a_config_without_end_ends_at_a_limit(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MAX_SECONDS", 5)
    config = json.loads((toy_model / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    model = changed(toy_model, tmp_path / "model", "config.json", json.dumps(config))
    with pytest.raises(UserError, match=r"config takes more than 5 seconds of work|MemoryError"):
        scoring.score_models([model], PROBLEMS)


def test_replies_are_greedy_whatever_the_model_asks_for(toy_model: Path, tmp_path: Path) -> None:
    settings = {"eos_token_id": 1, "num_beams": 10**9, "repetition_penalty": 9.0, "do_sample": True}
    model = changed(toy_model, tmp_path / "a", "generation_config.json", json.dumps(settings))
    replies = []
    for folder in (toy_model, model):
        tokenizer = scoring._load_tokenizer(folder)
        loaded = scoring._load_model(folder, tokenizer)
        prompts = tokenizer(["1 + 1?"], return_tensors="pt")
        replies.append(scoring._answer(loaded, tokenizer, prompts, 8))
    assert replies[0] == replies[1]


def test_data_without_end_is_told_in_one_line(toy_model: Path) -> None:
    result = score_cli(toy_model, "--data", "/dev/zero")
    assert_one_line_failure(result, "/dev/zero has more than 200,000,000 characters")


def test_markup_and_escapes_in_names_are_printed_as_they_are(
    toy_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "[" / "b]:smile:\x1b[31m"
    model.parent.mkdir()
    shutil.copytree(toy_model, model)
    data = write_jsonl(tmp_path / "[" / "b]\x1b[2J.jsonl", chat("1 + 1?", "2"))
    result = score_cli(model, "--data", data, "--max-new-tokens", "1")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "b]:smile:\\x1b[31m" in result.output.replace("\n", "")
    shutil.rmtree(model)
    result = score_cli(model, "--data", data)
    assert_one_line_failure(result, "[/b]:smile:\\x1b[31m is not a folder")
