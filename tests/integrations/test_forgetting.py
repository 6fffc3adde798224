"""The loss on a held-out text during a training: what it is, and that it changes nothing."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
)

from axolotl_gmt import GMTCallback, GMTReportCallback
from axolotl_gmt.integrations import forgetting as forgetting_module
from axolotl_gmt.integrations.forgetting import Forgetting, longest_window, mean_loss
from axolotl_gmt.integrations.held_out_text import BUILT_IN, MAX_BYTES, HeldOutText
from axolotl_gmt.record import FORGETTING, FORGETTING_LOSS
from axolotl_gmt.report.log import find_state, read_log
from tests.integrations.test_callback import Tracker, arguments
from tests.reference import forgetting_reference

CPU = torch.device("cpu")
ROWS: list[dict[str, Any]] = [
    {"text": "The cat sat on the mat."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"text": "A much longer document, which does not end before it has filled a window or two."},
    {"text": "x"},  # One token: nothing is predicted in it.
]


def tiny(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    file = tmp_path / "held_out.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    return file


def token_ids(tokenizer: Any) -> list[list[int]]:
    texts = [
        row.get("text") or "<|user|>Hi<eos><|assistant|>Ho<eos>"  # As the toy's template has it.
        for row in ROWS
    ]
    return [tokenizer(text)["input_ids"] for text in texts]


def trainer(toy_model: Path, folder: Path, *callbacks: Any, **changes: Any) -> Any:
    """A trainer of a model with dropout, which draws at random in every forward pass."""
    model = AutoModelForCausalLM.from_pretrained(toy_model, attention_dropout=0.3)
    model.train()
    ids = [[2 + i, 3 + i, 4 + i, 5] for i in range(16)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return Trainer(
        model,
        arguments(folder, **{"eval_strategy": "steps", "eval_steps": 2, **changes}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(toy_model),
        callbacks=list(callbacks),
    )


# The number


@pytest.mark.parametrize("longest", [2, 7, 64])
@pytest.mark.parametrize("at_once", [1, 16, 1024])
def test_the_loss_is_that_of_one_token_after_the_other(
    toy_model: Path,
    held_out: Path,
    monkeypatch: pytest.MonkeyPatch,
    longest: int,
    at_once: int,
) -> None:
    monkeypatch.setattr(forgetting_module, "LONGEST_WINDOW", at_once)
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    model = tiny().double().eval()
    windows = HeldOutText.read(held_out).windows(tokenizer, longest)
    assert max(map(len, windows)) <= longest
    expected = forgetting_reference.mean_loss(model, token_ids(tokenizer), longest)
    assert mean_loss(model, windows, CPU) == pytest.approx(expected, rel=1e-12)


def test_the_loss_of_a_known_model_is_known() -> None:
    class Uniform(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50, dtype=torch.float64))

    loss = mean_loss(Uniform(), [[1, 2, 3], [4, 5]], CPU)
    assert loss == pytest.approx(torch.log(torch.tensor(50.0, dtype=torch.float64)).item())


def test_each_token_is_read_once_in_few_passes(toy_model: Path) -> None:
    passes: list[torch.Size] = []
    model = tiny(max_position_embeddings=512)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    longest = longest_window(model)
    windows = HeldOutText.read(True).windows(AutoTokenizer.from_pretrained(toy_model), longest)
    mean_loss(model, windows, CPU)
    read = sum(rows * length for rows, length in passes)
    assert max(rows * length for rows, length in passes) <= 1024
    assert read < 1.3 * sum(map(len, windows))  # Little of it pads.


def test_windows_fit_the_model() -> None:
    assert longest_window(tiny()) == 64
    assert longest_window(tiny(max_position_embeddings=100_000)) == 1024
    assert longest_window(nn.Linear(1, 1)) == 1024


def test_a_model_that_predicts_no_tokens_is_refused() -> None:
    model = LlamaForSequenceClassification(tiny().config)
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification gives logits of shape"):
        mean_loss(model, [[1, 2, 3]], CPU)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()  # As Axolotl leaves frozen parts.
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [
        (p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None
    ]
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    without_dropout = mean_loss(copy.deepcopy(model).eval(), [[1, 2, 3, 4]], CPU)
    assert mean_loss(model, [[1, 2, 3, 4]], CPU) == without_dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for parameter, (value, gradient) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, gradient)


def test_what_a_model_draws_in_evaluation_mode_is_put_back() -> None:
    class Noisy(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.randn(*input_ids.shape, 50))

    state = torch.get_rng_state()
    mean_loss(Noisy(), [[1, 2, 3]], CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_step_is_measured_once() -> None:
    model, forgetting = tiny(), Forgetting([[1, 2, 3]], CPU)
    first = forgetting.measure(model, 0)
    assert first[FORGETTING] == 0
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    assert forgetting.measure(model, 0) == first
    later = forgetting.measure(model, 1)
    assert later[FORGETTING_LOSS] == mean_loss(model, [[1, 2, 3]], CPU) != first[FORGETTING_LOSS]
    assert later[FORGETTING] == later[FORGETTING_LOSS] - first[FORGETTING_LOSS]


# In a trainer


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_a_training_is_bit_for_bit_what_it_is_without(
    toy_model: Path, held_out: Path, tmp_path: Path, mask_ratio: float
) -> None:
    def train(name: str, **settings: Any) -> tuple[Any, list[float]]:
        random.seed(0)
        run = trainer(
            toy_model,
            tmp_path / name,
            GMTCallback(mask_ratio=mask_ratio, **settings),
            eval_steps=1,
            logging_steps=1,
            bf16=True,
        )
        run.train()
        draws = [torch.rand(1).item(), random.random()]
        return run, draws

    plain, plain_draws = train("plain")
    measured, draws = train("measured", forgetting=held_out)
    assert draws == plain_draws
    for one, other in zip(plain.model.parameters(), measured.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(
        plain.optimizer.state_dict()["state"].values(),
        measured.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(one[key], other[key]) for key in ("exp_avg", "exp_avg_sq"))
    times = ("runtime", "per_second")
    theirs, ours = (
        [
            {key: value for key, value in log.items() if not key.endswith(times)}
            for log in run.state.log_history
            if FORGETTING not in log
        ]
        for run in (plain, measured)
    )
    assert ours == theirs


def test_it_is_logged_before_at_evaluations_and_at_the_end(
    toy_model: Path, held_out: Path, tmp_path: Path
) -> None:
    tracker = Tracker()
    gmt = GMTCallback(mask_ratio=0.5, forgetting=held_out)
    run = trainer(
        toy_model, tmp_path, tracker, gmt, GMTReportCallback(), max_steps=5, learning_rate=0.01
    )
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    windows = HeldOutText.read(held_out).windows(tokenizer, 512)
    before = mean_loss(run.model, windows, CPU)
    run.train()
    after = mean_loss(run.model, windows, CPU)
    logged = [log for log in run.state.log_history if FORGETTING in log]
    assert [log["step"] for log in logged] == [0, 2, 4, 5]
    assert logged[0][FORGETTING_LOSS] == before
    assert logged[0][FORGETTING] == 0
    assert logged[-1][FORGETTING_LOSS] == after
    assert all(log[FORGETTING] == log[FORGETTING_LOSS] - before for log in logged)
    assert after > before  # A learning rate at which much is forgotten.
    # Trackers, which come later, get them with the log of the evaluation, and with the last one.
    for keys in ("eval_loss", "train_runtime"):
        found = [log for log in tracker.logs if keys in log]
        assert found
        assert all(FORGETTING in log and FORGETTING_LOSS in log for log in found)
    assert not any(FORGETTING in log for log in tracker.logs if "loss" in log)
    # The page has it, in a picture of its own.
    log = read_log(find_state(tmp_path))
    assert log.curves[FORGETTING].steps.tolist() == [0, 2, 4, 5]
    assert log.last(FORGETTING) == after - before
    assert (tmp_path / "gmt_report" / "forgetting.png").is_file()
    # An evaluation after the training belongs to nobody's run.
    assert FORGETTING not in run.evaluate()
    assert sum(FORGETTING in log for log in run.state.log_history) == 4


def test_without_evaluations_it_is_measured_at_both_ends(toy_model: Path, tmp_path: Path) -> None:
    run = trainer(toy_model, tmp_path, GMTCallback(forgetting=True), eval_strategy="no")
    run.train()
    logged = [log["step"] for log in run.state.log_history if FORGETTING in log]
    assert logged == [0, 4]


def test_the_loss_has_the_precision_of_the_training(
    toy_model: Path, held_out: Path, tmp_path: Path
) -> None:
    dtypes: list[torch.dtype] = []
    run = trainer(toy_model, tmp_path, GMTCallback(forgetting=held_out), bf16=True, max_steps=1)
    run.model.lm_head.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    run.train()
    assert set(dtypes) == {torch.bfloat16}


def test_a_resumed_run_goes_on_from_the_loss_before_training(
    toy_model: Path, held_out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}

    def train(folder: str, text: Path, resume: str | None = None, **changes: Any) -> Any:
        run = trainer(
            toy_model, tmp_path / folder, GMTCallback(forgetting=text), **saving, **changes
        )
        run.train(resume_from_checkpoint=resume)
        return [log for log in run.state.log_history if FORGETTING in log]

    whole = train("whole", held_out)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    assert [log["step"] for log in whole] == [0, 2, 4]
    assert train("whole", held_out, checkpoint) == whole
    # A trainer may be asked to make its callbacks anew, as the checkpoint has them.
    anew = train("whole", held_out, checkpoint, restore_callback_states_from_checkpoint=True)
    assert anew == whole
    assert "gmt/forgetting is what is forgotten from here on" not in caplog.text
    # The loss on one text says nothing of another.
    other = tmp_path / "other.txt"
    other.write_text("Something else.")
    on_other = train("whole", other, checkpoint)
    assert [log["step"] for log in on_other] == [0, 2, 2, 4]
    assert on_other[2][FORGETTING] == 0
    assert on_other[2][FORGETTING_LOSS] != whole[1][FORGETTING_LOSS]
    assert caplog.text.count("gmt/forgetting is what is forgotten from here on") == 1
    # A second training of one trainer is a new run.
    run = trainer(toy_model, tmp_path / "twice", GMTCallback(forgetting=held_out))
    run.train()
    run.train()
    first = next(log for log in run.state.log_history if FORGETTING in log)
    assert first["step"] == first[FORGETTING] == 0
    assert first[FORGETTING_LOSS] != whole[0][FORGETTING_LOSS]


def test_a_trainer_without_a_tokenizer_is_told_so(toy_model: Path, tmp_path: Path) -> None:
    run = trainer(toy_model, tmp_path, GMTCallback(forgetting=True))
    run.processing_class = run.callback_handler.processing_class = None
    with pytest.raises(ValueError, match=r"Give it to the trainer as processing_class"):
        run.train()


# The file


def test_the_text_that_ships_is_short_english_and_needs_no_tokenizer_of_chats() -> None:
    text = HeldOutText.read(True)
    words = [word for document in text.documents.values() for word in str(document).split()]
    assert 1_500 < len(words) < 3_000
    assert len(text.documents) == len(set(map(str, text.documents.values()))) >= 10
    assert BUILT_IN.read_bytes().isascii()


def test_the_wheel_holds_the_text_that_ships() -> None:
    project = Path(__file__).parents[2]
    build = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    (package,) = build["targets"]["wheel"]["packages"]  # With all files in it that git has.
    name = BUILT_IN.relative_to(project / package)
    listed = ["git", "check-ignore", "--quiet", str(BUILT_IN)]
    assert name.as_posix() == "texts/english.jsonl"
    assert subprocess.run(listed, cwd=project).returncode != 0


def test_plain_text_is_one_document(tmp_path: Path, toy_model: Path) -> None:
    file = tmp_path / "text.md"
    file.write_bytes(b"\xef\xbb\xbf# One\n\nTwo \xc3\xa9")
    assert HeldOutText.read(file).documents == {1: "# One\n\nTwo é"}
    assert HeldOutText.read(str(file)) == HeldOutText.read(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, r"gone\.txt is not here; paths are relative to "),
        ("empty.txt", b" \n", r"is empty\. Name a file with text"),
        ("empty.jsonl", b"", r"is empty"),
        ("latin.txt", "é".encode("latin-1"), r"is not UTF-8 text \(.* at byte 0\)"),
        ("long.txt", b"a" * (MAX_BYTES + 1), r"has more than 400,000 bytes \(about 100,000 tokens"),
        ("row.jsonl", b'{"text": "a b"}\n\n{"prompt": "a"}', r"row\.jsonl, line 3 has no document"),
        ("row.jsonl", b'{"text": ""}', r"line 1 has no document\. Write \{\"text\": "),
        ("row.jsonl", b'{"messages": [{"role": "user"}]}', r"line 1 has no document"),
        ("row.jsonl", b'{"messages": []}', r"line 1 has no document"),
        ("row.json", b'[{"text": "a b"}]', r"line 1 has no document"),
        ("row.jsonl", b'{"text": "a b"', r"line 1 is not JSON"),
        ("row.jsonl", b"[" * 100_000, r"line 1 is not JSON"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        HeldOutText.read(tmp_path / name)
    with pytest.raises(ValueError, match=f"^forgetting: .*{message}"):
        GMTCallback(forgetting=str(tmp_path / name))


@pytest.mark.parametrize("setting", ["", 1, ["a.txt"], None, False])
def test_what_is_no_file_is_refused(setting: object) -> None:
    with pytest.raises(ValueError, match="is neither true nor a file"):
        HeldOutText.read(setting)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        HeldOutText.read(tmp_path)


def test_the_longest_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(b"a" * MAX_BYTES)
    assert HeldOutText.read(tmp_path / "long.txt").documents == {1: "a" * MAX_BYTES}


def test_a_chat_that_the_tokenizer_cannot_put_is_named(toy_model: Path, held_out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"held_out\.jsonl, line 2: the tokenizer cannot put"):
        HeldOutText.read(held_out).windows(tokenizer, 64)


def test_a_text_of_a_single_token_is_refused(toy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="no document of two tokens or more"):
        HeldOutText.read(tmp_path / "x.txt").windows(AutoTokenizer.from_pretrained(toy_model), 64)
