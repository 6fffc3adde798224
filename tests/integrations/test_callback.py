"""GMT in Transformers' and TRL's trainers, without Axolotl."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import RichProgressCallback

from axolotl_gmt import GMTCallback, GMTConfig, GMTReportCallback
from axolotl_gmt.report.log import find_state, read_log
from tests.reference.gmt_reference import masked


class Spy(TrainerCallback):
    """Copies gradients before the optimizer sees them, and logs as a reporting callback does."""

    def __init__(self) -> None:
        self.gradients: list[list[torch.Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def arguments(
    folder: Path, cls: type[TrainingArguments] = TrainingArguments, **changes: Any
) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 4,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
    }
    return cls(**{**settings, **changes})


def check(trainer: Trainer, spy: Spy, mask_ratio: float) -> None:
    trainer.train()
    assert len(spy.gradients) == 4
    for step, log in zip((2, 4), [log for log in spy.logs if "loss" in log], strict=True):
        gradients = spy.gradients[step - 1]
        kept = sum(int(masked([g], mask_ratio)[0].count_nonzero()) for g in gradients)
        total = sum(gradient.numel() for gradient in gradients)
        assert log["gmt/kept_fraction"] == pytest.approx(kept / total)
        assert 0 < log["gmt/l1_kept"] < log["gmt/grad_norm_kept"] <= 1
    history = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["gmt/kept_fraction"] for log in history] == [
        log["gmt/kept_fraction"] for log in spy.logs if "loss" in log
    ]
    assert not any("gmt/kept_fraction" in log for log in spy.logs if "loss" not in log)


def test_transformers_trainer(toy_model: Path, sft_data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    rows = [json.loads(line)["messages"] for line in sft_data.read_text().splitlines()]
    ids = [tokenizer(str(turns[0]["content"]).ljust(20))["input_ids"][:16] for turns in rows]
    spy = Spy()
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(toy_model),
        arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[spy, GMTCallback(mask_ratio=0.3)],
    )
    check(trainer, spy, 0.3)
    # A second run attaches anew, once.
    spy.gradients.clear()
    spy.logs.clear()
    check(trainer, spy, 0.3)


def test_trl_sft_trainer(toy_model: Path, sft_data: Path, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    spy = Spy()
    trainer = SFTTrainer(
        str(toy_model),
        args=arguments(tmp_path, SFTConfig, max_length=64),
        train_dataset=load_dataset("json", data_files=str(sft_data), split="train"),
        callbacks=[spy, GMTCallback(GMTConfig(mask_ratio=0.8))],
    )
    check(trainer, spy, 0.8)


def test_trl_dpo_trainer(toy_model: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": f"{i}+1", "chosen": f"{i + 1}", "rejected": f"{i}"} for i in range(16)]
    spy = Spy()
    trainer = DPOTrainer(
        str(toy_model),
        args=arguments(tmp_path, DPOConfig, max_length=64),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(toy_model),
        callbacks=[spy, GMTCallback(mask_ratio=0.8)],
    )
    check(trainer, spy, 0.8)


def test_a_callback_added_later_reports_too(toy_model: Path, tmp_path: Path) -> None:
    ids = [[2 + i, 3 + i, 4 + i] for i in range(16)]
    spy = Spy()
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(toy_model),
        arguments(tmp_path),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[spy],
    )
    trainer.add_callback(GMTCallback())
    check(trainer, spy, 0.5)


def test_the_optimizer_is_left_as_it_was(toy_model: Path, tmp_path: Path) -> None:
    ids = [[2, 3, 4]] * 16
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(toy_model),
        arguments(tmp_path),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[GMTCallback()],
    )
    trainer.train()
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks


def test_a_reporting_callback_before_a_plain_one_would_miss_an_edit(
    toy_model: Path, tmp_path: Path
) -> None:
    """If this fails, Transformers lets later callbacks add to a log: drop _move_to_front."""

    class Late(TrainerCallback):
        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            logs["late"] = 1.0

    ids = [[2, 3, 4]] * 16
    spy = Spy()
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(toy_model),
        arguments(tmp_path),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[spy, Late()],
    )
    trainer.train()
    assert not any("late" in log for log in spy.logs)


def test_settings_come_one_way() -> None:
    with pytest.raises(TypeError, match="either a config or settings"):
        GMTCallback(GMTConfig(), mask_ratio=0.5)
    with pytest.raises(ValueError, match="is outside"):
        GMTCallback(mask_ratio=1.5)
    for name in ("ratio", "gmt_mask_ratio", "maskRatio"):
        settings: dict[str, Any] = {name: 0.5}
        with pytest.raises(ValueError, match=rf"{name}\n  there is no .*Did you mean mask_ratio\?"):
            GMTCallback(None, **settings)
    with pytest.raises(TypeError, match=r"GMTCallback\(0\.5\) .*GMTCallback\(mask_ratio=0\.5\)"):
        GMTCallback(0.5)  # type: ignore[arg-type]


class Tracker(TrainerCallback):
    """Reads a run's configuration and logs as Transformers' callbacks of wandb and others do."""

    def __init__(self) -> None:
        self.run_config: dict[str, Any] = {}
        self.logs: list[dict[str, float]] = []
        self.begun = 0

    def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.begun += 1
        self.run_config = model.config.to_dict()

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_trackers_get_the_settings_and_saved_models_do_not(toy_model: Path, tmp_path: Path) -> None:
    tracker = Tracker()
    gmt = GMTCallback(mask_ratio=0.7, include=["mlp"])
    trainer = plain_trainer(
        toy_model, tmp_path, tracker, gmt, save_strategy="steps", save_steps=1, max_steps=1
    )
    trainer.train()
    assert tracker.run_config["gmt_mask_ratio"] == 0.7
    assert tracker.run_config["gmt_include"] == ["mlp"]
    assert tracker.run_config["gmt_seed"] == trainer.args.seed
    assert "gmt" not in (tmp_path / "checkpoint-1" / "config.json").read_text()
    assert not any(key.startswith("gmt") for key in trainer.model.config.to_dict())


def test_tensorboard_has_the_settings(toy_model: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = plain_trainer(
        toy_model, tmp_path, GMTCallback(mask_ratio=0.7), report_to=["tensorboard"], max_steps=1
    )
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    (text,) = accumulator.Tensors("model_config/text_summary")
    assert json.loads(text.tensor_proto.string_val[0])["gmt_mask_ratio"] == 0.7


@pytest.mark.parametrize("printer", [ProgressCallback, PrinterCallback])
@pytest.mark.parametrize("is_added_later", [False, True])
def test_modules_reach_trackers_and_the_history_but_not_the_console(
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    printer: type[TrainerCallback],
    is_added_later: bool,
) -> None:
    first, last = Tracker(), Tracker()
    gmt = GMTCallback(log_modules=True)
    given = (first,) if is_added_later else (first, gmt)
    trainer = plain_trainer(toy_model, tmp_path, *given, disable_tqdm=True)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(printer)
    if is_added_later:
        trainer.add_callback(gmt)
    trainer.add_callback(last)
    for runs in (1, 2):
        trainer.train()
        assert first.begun == last.begun == runs
    key = "gmt/kept_fraction/model.layers.0.mlp.down_proj"
    of_steps = [log for log in trainer.state.log_history if "loss" in log]
    assert all(key in log for log in of_steps)
    for tracker in (first, last):
        assert all(key in log for log in tracker.logs if "loss" in log)
    printed = "".join(capsys.readouterr())
    assert "gmt/kept_fraction" in printed
    assert "down_proj" not in printed


class RichSpy(RichProgressCallback):
    """Says what it would print, as the display itself shows what a terminal has room for."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.keys |= logs.keys()


def test_trl_s_printer_does_not_print_modules_either(toy_model: Path, tmp_path: Path) -> None:
    spy = RichSpy()
    plain_trainer(toy_model, tmp_path, GMTCallback(log_modules=True), spy).train()
    assert "gmt/kept_fraction" in spy.keys
    assert not any("down_proj" in key for key in spy.keys)


def test_how_masks_change_joins_the_log_of_who_asks(toy_model: Path, tmp_path: Path) -> None:
    spy = Spy()
    gmt = GMTCallback(mask_ratio=0.5, log_overlap=True, log_modules=True)
    trainer = plain_trainer(
        toy_model, tmp_path, spy, gmt, GMTReportCallback(), max_steps=6, logging_steps=2
    )
    trainer.train()
    entries = sum(gradient.numel() for gradient in spy.gradients[0])
    ever = [torch.zeros_like(gradient, dtype=torch.bool) for gradient in spy.gradients[0]]
    before: list[torch.Tensor] = []
    logs = iter([log for log in spy.logs if "loss" in log])
    for step, gradients in enumerate(spy.gradients, 1):
        now = [masked([gradient], 0.5)[0] != 0 for gradient in gradients]
        ever = [one | other for one, other in zip(ever, now, strict=True)]
        if step % 2:
            continue
        log = next(logs)
        assert log["gmt/ever_kept"] == sum(int(kept.sum()) for kept in ever) / entries
        assert ("gmt/mask_overlap" in log) == ("gmt/mask_overlap_by_chance" in log) == (step > 2)
        if before:
            pairs = list(zip(before, now, strict=True))
            both = sum(int((one & other).sum()) for one, other in pairs)
            assert log["gmt/mask_overlap"] == both / sum(int((a | b).sum()) for a, b in pairs)
            assert 0 < log["gmt/mask_overlap_by_chance"] < 1
            assert 0 < log["gmt/mask_overlap/model.layers.0.mlp.down_proj"] < 1
        before = now
    drawn = {file.name for file in (tmp_path / "gmt_report").glob("*.png")}
    assert {"mask_overlap.png", "ever_kept.png", "mask_overlap_by_layer.png"} <= drawn
    assert read_log(find_state(tmp_path)).curves["gmt/mask_overlap"].steps.tolist() == [4, 6]


@pytest.mark.parametrize("level", [None, "INFO"])
def test_a_script_is_told_that_gmt_is_on_and_where_the_report_is(
    level: str | None, toy_model: Path, tmp_path: Path
) -> None:
    script = f"""
import logging
from pathlib import Path
from axolotl_gmt import GMTCallback, GMTReportCallback
from tests.integrations.test_callback import plain_trainer

{f"logging.basicConfig(level={level!r})" if level else ""}
callbacks = GMTCallback(mask_ratio=0.7), GMTReportCallback()
plain_trainer(Path({str(toy_model)!r}), Path({str(tmp_path)!r}), *callbacks).train()
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stderr.count("Gradient-Mask Tuning: base optimizer AdamW, ratio masked 0.7") == 1
    assert result.stderr.count(f"report of this run with GMT is {tmp_path / 'gmt_report'}") == 1


@pytest.mark.parametrize(
    "imports",
    [
        "import axolotl_gmt",
        "from axolotl_gmt import GMTConfig, GradientMasker",
        "from axolotl_gmt import GMTCallback, GMTReportCallback",
        "import axolotl_gmt.integrations.callback",
    ],
)
def test_importing_brings_nothing_that_a_run_may_not_need(imports: str) -> None:
    unneeded = {"axolotl", "deepspeed", "jinja2", "matplotlib"}
    unneeded |= {"axolotl_gmt.report", "axolotl_gmt.gradients.zero"}
    # Transformers imports jinja2 itself.
    code = (
        "import sys; from transformers import TrainerCallback, TrainingArguments; "
        f"before = {{*sys.modules}}; {imports}; print({unneeded} & (sys.modules.keys() - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_the_package_lists_its_public_names() -> None:
    import axolotl_gmt

    assert set(axolotl_gmt.__all__) <= set(dir(axolotl_gmt))
    assert axolotl_gmt.GMTConfig is GMTConfig
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        axolotl_gmt.nothing  # noqa: B018


def plain_trainer(
    toy_model: Path, folder: Path, *callbacks: TrainerCallback, **changes: Any
) -> Any:
    ids = [[2 + i, 3 + i, 4 + i] for i in range(16)]
    return Trainer(
        AutoModelForCausalLM.from_pretrained(toy_model),
        arguments(folder, **changes),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=list(callbacks),
    )


def test_a_run_without_any_checkpoint_leaves_its_report(toy_model: Path, tmp_path: Path) -> None:
    callbacks = GMTCallback(mask_ratio=0.9), GMTReportCallback()
    trainer = plain_trainer(toy_model, tmp_path / "out", *callbacks)
    trainer.train()
    log = read_log(find_state(tmp_path / "out"))
    assert log.mask_ratio == 0.9
    assert log.base_optimizer == "AdamW"
    assert log.model == toy_model.name
    assert log.began is not None
    assert (log.data, log.config_text) == ([], "")
    assert log.masked_parameters == sum(p.numel() for p in trainer.model.parameters())
    kept = [entry["gmt/kept_fraction"] for entry in trainer.state.log_history if "loss" in entry]
    assert log.curves["gmt/kept_fraction"].values.tolist() == kept
    assert (tmp_path / "out" / "gmt_report" / "index.html").is_file()


def test_what_a_run_was_told_of_outlasts_its_end(toy_model: Path, tmp_path: Path) -> None:
    gmt = GMTCallback()
    gmt.data, gmt.config_file = "org/chats", "base_model: x"
    saving = {"save_strategy": "steps", "save_steps": 2}
    plain_trainer(toy_model, tmp_path, gmt, GMTReportCallback(), **saving).train()
    first = read_log(find_state(tmp_path))
    assert (first.data, first.config_text) == (["org/chats"], "base_model: x")
    # The second trainer makes its callback anew, of what the checkpoint has.
    anew = {**saving, "restore_callback_states_from_checkpoint": True}
    resumed = plain_trainer(toy_model, tmp_path, GMTCallback(), GMTReportCallback(), **anew)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    last = read_log(find_state(tmp_path))
    assert (last.data, last.config_text) == (first.data, first.config_text)
    assert last.began == first.began


@pytest.mark.parametrize("broken", ["page.write_report", "log.parse_state"])
def test_a_report_that_fails_does_not_fail_the_training(
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("matplotlib is broken.")

    monkeypatch.setattr(f"axolotl_gmt.report.{broken}", fail)
    trainer = plain_trainer(toy_model, tmp_path / "my out", GMTCallback(), GMTReportCallback())
    assert trainer.train().global_step == 4
    assert "the report was not written: matplotlib is broken." in caplog.text
    command = f"python -m axolotl_gmt report '{tmp_path / 'my out'}'"
    assert command in caplog.text
    monkeypatch.undo()
    subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "my out" / "gmt_report" / "index.html").is_file()


def test_a_run_that_logs_nothing_says_so_and_offers_no_command_that_cannot_succeed(
    toy_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = plain_trainer(
        toy_model, tmp_path, GMTCallback(), GMTReportCallback(), logging_steps=500
    )
    assert trainer.train().global_step == 4
    assert "this run ended after 4 steps, before its first log" in caplog.text
    assert "logging_steps (now 500)" in caplog.text
    assert "python -m axolotl_gmt report" not in caplog.text
    assert not (tmp_path / "gmt_report").exists()


def test_a_report_is_written_only_for_who_asks(toy_model: Path, tmp_path: Path) -> None:
    plain_trainer(toy_model, tmp_path, GMTCallback()).train()
    assert list(tmp_path.iterdir()) == []


def test_only_one_process_writes_the_report(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 1.0}]
    for is_zero in (False, True):
        state = TrainerState(log_history=history, is_world_process_zero=is_zero)
        GMTReportCallback().on_train_end(arguments(tmp_path), state, TrainerControl())
        assert (tmp_path / "gmt_report").exists() == is_zero
        assert (tmp_path / "trainer_state.json").exists() == is_zero


def test_a_run_that_began_without_gmt_resumes_with_it(toy_model: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    plain_trainer(toy_model, tmp_path, max_steps=4, **saving).train()
    trainer = plain_trainer(toy_model, tmp_path, GMTCallback(mask_ratio=0.7), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    log = read_log(tmp_path / "checkpoint-4" / "trainer_state.json")
    assert log.mask_ratio == 0.7
    assert log.curves["loss"].steps.tolist() == [2, 4]
    assert log.curves["gmt/kept_fraction"].steps.tolist() == [4]
    assert log.began is None  # It is not known.
