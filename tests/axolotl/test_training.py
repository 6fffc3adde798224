"""Whole Axolotl runs on a toy model: what a user's YAML does with GMT, and without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_gmt import GMTCallback
from axolotl_gmt.integrations.axolotl.model_card import HEADING, TAGS
from axolotl_gmt.record import FORGETTING, FORGETTING_LOSS
from axolotl_gmt.report.log import find_state, read_log
from tests.conftest import Run, RunAxolotl
from tests.reference.forgetting_reference import mean_loss
from tests.reference.gmt_reference import masked, masked_by_scores, random_scores

LORA: dict[str, Any] = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "lora_qkv_kernel": False,  # Triton kernels, which need a GPU
    "lora_o_kernel": False,
    "lora_mlp_kernel": False,
}
LAYERS = ("model.layers.0.", "model.layers.1.")


def reference_step(
    gradients: dict[str, Tensor], mask_ratio: float, granularity: str = "tensor"
) -> dict[str, Tensor]:
    """The masked gradients of one step, with groups written out by hand for the toy model."""
    if granularity == "global":
        groups = [list(gradients)]
    elif granularity == "layer":
        groups = [[name for name in gradients if name.startswith(layer)] for layer in LAYERS]
        groups += [[name] for name in gradients if not name.startswith(LAYERS)]
    else:
        groups = [[name] for name in gradients]
    result: dict[str, Tensor] = {}
    for names in groups:
        survivors = masked([gradients[name] for name in names], mask_ratio)
        result.update(zip(names, survivors, strict=True))
    return result


def assert_masked_like_reference(
    run: Run, mask_ratio: float = 0.5, optimizer_rescales_gradients: bool = False
) -> None:
    assert run.gradients, "the run made no optimizer step"
    expected = []
    for gradients, left in zip(run.gradients, run.masked, strict=True):
        survivors = reference_step(gradients, mask_ratio)
        for name, survivor in survivors.items():
            if optimizer_rescales_gradients:  # in place, entry by entry
                assert torch.equal(left[name] != 0, survivor != 0), name
            else:
                assert torch.equal(left[name], survivor), name
        kept = sum(int(survivor.count_nonzero()) for survivor in survivors.values())
        expected.append(kept / sum(survivor.numel() for survivor in survivors.values()))
    assert run.kept_fractions == pytest.approx(expected, abs=1e-4)  # logs are rounded


def assert_same_weights(one: Run, other: Run) -> None:
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name


@pytest.mark.parametrize(
    "plugin",
    [
        "axolotl_gmt",
        "axolotl_gmt.GMTPlugin",
        "axolotl_gmt:GMTPlugin",
        "axolotl_gmt.plugin.GMTPlugin",
        "axolotl_gmt.integrations.axolotl.plugin:GMTPlugin",
    ],
)
def test_one_line_in_a_plain_sft_yaml_turns_gmt_on(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], plugin: str
) -> None:
    run = run_axolotl(sft_yaml, plugins=[plugin])
    assert_masked_like_reference(run)
    assert type(run.optimizer) is torch.optim.AdamW
    assert sum(isinstance(callback, GMTCallback) for callback in run.callbacks) == 1
    assert isinstance(run.callbacks[0], GMTCallback)


def test_one_line_in_a_plain_dpo_yaml_turns_gmt_on(
    run_axolotl: RunAxolotl, dpo_yaml: dict[str, Any]
) -> None:
    assert_masked_like_reference(run_axolotl(dpo_yaml, plugins=["axolotl_gmt"]))


def test_optimizer_gmt_needs_no_plugin_line(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_axolotl(sft_yaml, optimizer="gmt", gmt_mask_ratio=0.9)
    assert_masked_like_reference(run, 0.9)
    assert run.optimizer.defaults["fused"]
    assert run.config.optimizer == "adamw_torch_fused"


def test_one_log_line_says_what_runs(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run_axolotl(sft_yaml, plugins=["axolotl_gmt"], gmt_mask_ratio=0.75, gmt_exclude="norm")
    (line,) = [r.getMessage() for r in caplog.records if "Gradient-Mask Tuning" in r.getMessage()]
    assert "base optimizer AdamW" in line
    assert "ratio masked 0.75 (kept 0.25)" in line
    assert "granularity tensor" in line
    assert "16 tensors" in line  # 2 layers of 7 matrices, the embedding and the head
    assert f"{2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 2 * 258 * 32:,} parameters" in line


@pytest.mark.parametrize("granularity", ["tensor", "layer", "global"])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.97])
def test_one_sgd_step_moves_exactly_the_selected_entries_by_their_gradients(
    run_axolotl: RunAxolotl,
    sft_yaml: dict[str, Any],
    toy_model: Path,
    granularity: str,
    mask_ratio: float,
) -> None:
    run = run_axolotl(
        sft_yaml,
        optimizer="gmt",
        gmt_base_optimizer="sgd",
        gmt_granularity=granularity,
        gmt_mask_ratio=mask_ratio,
        learning_rate=1.0,
        lr_scheduler="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        max_steps=1,
    )
    before = load_file(toy_model / "model.safetensors")
    (gradients,) = run.gradients
    survivors = reference_step(gradients, mask_ratio, granularity)
    assert survivors.keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(run.weights[name], weight - survivors[name]), name
    assert any(not torch.equal(survivors[name], gradients[name]) for name in gradients)


def test_ratio_zero_is_the_base_optimizer_bit_for_bit(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any]
) -> None:
    plain = run_axolotl(sft_yaml)
    gmt = run_axolotl(sft_yaml, plugins=["axolotl_gmt"], gmt_mask_ratio=0)
    assert_same_weights(plain, gmt)
    assert [log["loss"] for log in plain.logs if "loss" in log] == [
        log["loss"] for log in gmt.logs if "loss" in log
    ]


@pytest.mark.parametrize("off", [{}, {"gmt_enabled": False, "plugins": ["axolotl_gmt"]}])
def test_an_installed_plugin_that_is_off_changes_nothing(
    run_axolotl: RunAxolotl,
    sft_yaml: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    off: dict[str, Any],
) -> None:
    installed = run_axolotl(sft_yaml, **off)
    with monkeypatch.context() as patch:
        # As if the distribution were not installed.
        patch.setattr("axolotl.integrations.base.entry_points", lambda **_: [])
        absent = run_axolotl(sft_yaml)
    assert_same_weights(installed, absent)
    assert [type(callback) for callback in installed.callbacks] == [
        type(callback) for callback in absent.callbacks
    ]
    assert not installed.optimizer._optimizer_step_pre_hooks
    own = {"output_dir", "axolotl_config_path", *off}
    assert {k: v for k, v in installed.config.items() if k not in own} == {
        k: v for k, v in absent.config.items() if k not in own
    }


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any]
) -> None:
    config = {**sft_yaml, "plugins": ["axolotl_gmt"], "max_steps": 4, "save_steps": 2}
    whole = run_axolotl(config)
    checkpoint = whole.output.parent / "checkpoint-2"
    shutil.copytree(whole.output / "checkpoint-2", checkpoint)
    resumed = run_axolotl(config, resume_from_checkpoint=str(checkpoint))
    assert len(resumed.gradients) == 2
    assert_same_weights(whole, resumed)
    began = [read_log(run.output / "trainer_state.json").began for run in (whole, resumed)]
    assert began[0] == began[1] is not None


def test_a_resumed_run_goes_on_with_its_mask(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any]
) -> None:
    """The checkpoint is outside the output folder, so that Axolotl's YAML alone says where."""
    sparse = {"gmt_mask_interval": "once", "gmt_hold": True, "gmt_mask_ratio": 0.9}
    config = {**sft_yaml, "plugins": ["axolotl_gmt"], "max_steps": 4, "save_steps": 2, **sparse}
    whole = run_axolotl(config)
    checkpoint = whole.output.parent / "checkpoint-2"
    shutil.copytree(whole.output / "checkpoint-2", checkpoint)
    resumed = run_axolotl(config, resume_from_checkpoint=str(checkpoint))
    assert len(resumed.gradients) == 2
    assert_same_weights(whole, resumed)
    shutil.rmtree(checkpoint / "gmt_masks")
    with pytest.raises(ValueError, match="cannot go on with the masks"):
        run_axolotl(config, resume_from_checkpoint=str(checkpoint))


def test_one_mask_and_held_weights_change_the_entries_of_the_first_mask_alone(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], toy_model: Path
) -> None:
    run = run_axolotl(
        sft_yaml,
        plugins=["axolotl_gmt"],
        gmt_mask_ratio=0.95,
        gmt_mask_interval="once",
        gmt_hold=True,
        weight_decay=0.1,
        max_steps=5,
    )
    assert len(run.gradients) == 5
    before = load_file(toy_model / "model.safetensors")
    masks = {name: g != 0 for name, g in reference_step(run.gradients[0], 0.95).items()}
    assert masks.keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(run.weights[name] != weight, masks[name]), name


def test_packed_sft(run_axolotl: RunAxolotl, sft_yaml: dict[str, Any]) -> None:
    run = run_axolotl(
        sft_yaml, plugins=["axolotl_gmt"], sample_packing=True, micro_batch_size=1, max_steps=2
    )
    assert_masked_like_reference(run)


def test_lora_masks_the_adapter_and_nothing_else(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = run_axolotl(
        sft_yaml,
        plugins=["axolotl_gmt"],
        **LORA,
        gmt_granularity="layer",
        gmt_include=r"layers\.1\.",
    )
    assert run.weights
    assert all("lora_" in name for name in run.weights)
    assert "14 tensors" in caplog.text
    assert all("lora_" in name for gradients in run.gradients for name in gradients)


@pytest.mark.parametrize(
    "settings",
    [
        {**LORA, "adapter": "qlora", "load_in_4bit": True, "bf16": True},
        {**LORA, "loraplus_lr_ratio": 16},
        {"embedding_lr_scale": 0.5},
        {"lr_groups": [{"name": "down", "modules": ["down_proj"], "lr": 1e-4}]},
    ],
    ids=["qlora", "lora+", "embedding lr", "lr groups"],
)
def test_parameter_groups_of_axolotl(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], settings: dict[str, Any]
) -> None:
    plugins = ["axolotl_gmt", "tests.use_cpu.UseCpu"]
    assert_masked_like_reference(run_axolotl(sft_yaml, plugins=plugins, max_steps=2, **settings))


@pytest.mark.parametrize("criterion", ["random", "gradient_weight"])
def test_scored_criteria_mask_like_the_reference(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], toy_model: Path, criterion: str
) -> None:
    run = run_axolotl(
        sft_yaml,
        optimizer="gmt",
        gmt_base_optimizer="sgd",
        gmt_criterion=criterion,
        gmt_mask_ratio=0.8,
        learning_rate=0.1,
        lr_scheduler="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        max_steps=2,
    )
    weights = load_file(toy_model / "model.safetensors")
    for step, (gradients, left) in enumerate(zip(run.gradients, run.masked, strict=True)):
        for name, gradient in gradients.items():
            score = (
                random_scores(name, gradient.shape, 7, step)  # the run's seed
                if criterion == "random"
                else (gradient * weights[name]).abs()
            )
            (survivors,) = masked_by_scores([gradient], [score], 0.8)
            assert torch.equal(left[name], survivors), name
            weights[name] = weights[name] - 0.1 * survivors


def test_half_freezes_half_of_the_matrices(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], toy_model: Path
) -> None:
    run = run_axolotl(sft_yaml, plugins=["axolotl_gmt"], gmt_criterion="half", weight_decay=0.0)
    before = load_file(toy_model / "model.safetensors")
    frozen = [name for name, weight in run.weights.items() if torch.equal(weight, before[name])]
    assert len(frozen) == 7
    assert all("_proj" in name for name in frozen)
    for step in run.masked:
        assert all(bool((step[name] != 0).any()) != (name in frozen) for name in step)


def test_bf16(run_axolotl: RunAxolotl, sft_yaml: dict[str, Any]) -> None:
    run = run_axolotl(sft_yaml, plugins=["axolotl_gmt", "tests.use_cpu.UseCpu"], bf16=True)
    assert torch.bfloat16 in {g.dtype for step in run.gradients for g in step.values()}
    assert_masked_like_reference(run)


@pytest.mark.parametrize("rl", ["ipo", "simpo", "orpo", "kto"])
def test_preference_methods(
    run_axolotl: RunAxolotl, dpo_yaml: dict[str, Any], orpo_data: Path, kto_data: Path, rl: str
) -> None:
    by_method: dict[str, dict[str, Any]] = {
        "ipo": {},
        "simpo": {"rl_beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5},
        "orpo": {
            "orpo_alpha": 0.1,
            "datasets": [
                {"path": str(orpo_data), "ds_type": "json", "type": "chat_template.argilla"}
            ],
        },
        "kto": {
            "datasets": [{"path": str(kto_data), "ds_type": "json", "type": "chatml.argilla"}],
            "remove_unused_columns": False,
            "sequence_len": 256,
        },
    }
    run = run_axolotl(dpo_yaml, plugins=["axolotl_gmt"], rl=rl, max_steps=2, **by_method[rl])
    assert_masked_like_reference(run)


def test_grpo(
    run_axolotl: RunAxolotl,
    sft_yaml: dict[str, Any],
    kto_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)  # Axolotl takes top-level modules only
    run = run_axolotl(
        sft_yaml,
        plugins=["axolotl_gmt"],
        rl="grpo",
        datasets=[{"path": str(kto_data), "ds_type": "json", "type": "grpo_task.prompt"}],
        trl={
            "num_generations": 2,
            "max_completion_length": 4,
            "reward_funcs": ["grpo_task.digits"],
        },
        gradient_accumulation_steps=1,
        max_steps=2,
    )
    assert_masked_like_reference(run)


@pytest.mark.parametrize(
    "base",
    [
        "adafactor",
        "adagrad",
        "adamc",
        "adamw_bnb_8bit",
        "adamw_torch_4bit",
        "adopt_adamw",
        "ao_adamw_fp8",
        "lion_32bit",
        "muon",
        "muon_8bit",
        "paged_adamw_8bit",
        "rmsprop",
        "schedule_free_adamw",
        "sinkgd",
    ],
)
def test_base_optimizers(run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], base: str) -> None:
    run = run_axolotl(sft_yaml, optimizer="gmt", gmt_base_optimizer=base, max_steps=2)
    assert run.config.optimizer == base
    assert_masked_like_reference(run, optimizer_rescales_gradients=base == "schedule_free_adamw")


def axolotl_train(file: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("axolotl")
    return subprocess.run(
        [program, "train", str(file), "--launcher", "python"],
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_bare_name_works_on_the_command_line(sft_yaml: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "sft.yml"
    settings = {**sft_yaml, "plugins": ["axolotl_gmt"], "output_dir": str(tmp_path / "out")}
    file.write_text(yaml.safe_dump(settings))
    result = axolotl_train(file)
    assert result.returncode == 0, result.stderr
    assert "Gradient-Mask Tuning: base optimizer AdamW" in result.stdout
    assert "gmt/kept_fraction" in result.stdout + result.stderr


def test_a_bad_setting_stops_the_command_line_before_a_model_is_loaded(
    sft_yaml: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "sft.yml"
    settings = {**sft_yaml, "optimizer": "gmt", "gmt_mask_ratio": 1.5, "base_model": "no/model"}
    file.write_text(yaml.safe_dump(settings))
    result = axolotl_train(file)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: gmt_mask_ratio: 1.5 is outside [0, 1)")
    assert "Traceback" not in result.stderr
    assert "no/model" not in result.stderr


LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True} | {
    f"lora_{part}_kernel": False  # They need a GPU.
    for part in ("mlp", "qkv", "o")
}


@pytest.mark.parametrize("adapter", [{}, LORA])
def test_a_pattern_that_matches_nothing_stops_before_weights_are_read(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], tmp_path: Path, adapter: dict[str, Any]
) -> None:
    model = tmp_path / "without_weights"
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(sft_yaml["base_model"], model, ignore=ignored)
    patterns = {"gmt_include": ["mlpp"], "base_model": str(model), **adapter}
    with pytest.raises(SystemExit, match=r"gmt_include.*: the pattern 'mlpp' matches no trained"):
        run_axolotl(sft_yaml, plugins=["axolotl_gmt"], **patterns)


def test_a_pattern_that_no_config_tells_of_stops_before_the_first_step(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any]
) -> None:
    kind = {"type_of_model": "LlamaForCausalLM"}
    with pytest.raises(ValueError, match=r"gmt_include.*: the pattern 'mlpp' matches no trained"):
        run_axolotl(sft_yaml, plugins=["axolotl_gmt"], gmt_include=["mlpp"], **kind)


def test_looking_at_the_names_first_changes_no_training(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"plugins": ["axolotl_gmt"], "gmt_exclude": "lora_B", "max_steps": 1, **LORA}
    looked = run_axolotl(sft_yaml, **settings)
    monkeypatch.setattr("axolotl_gmt.integrations.axolotl.meta_model.check_patterns", id)
    plain = run_axolotl(sft_yaml, **settings)
    assert looked.weights.keys() == plain.weights.keys()
    assert all(torch.equal(looked.weights[name], plain.weights[name]) for name in plain.weights)


@pytest.mark.parametrize(
    "settings",
    [
        {"sample_packing": True, "eval_sample_packing": False, "pad_to_sequence_len": True},
        {**LORA, "lora_dropout": 0.5, "gmt_mask_ratio": 0},
    ],
    ids=["packed", "lora"],
)
def test_forgetting_is_measured_and_changes_no_training(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], settings: dict[str, Any]
) -> None:
    config = {
        **sft_yaml,
        "plugins": ["axolotl_gmt"],
        "val_set_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        **settings,
    }
    plain = run_axolotl(config)
    measured = run_axolotl(config, gmt_forgetting=True)
    assert_same_weights(plain, measured)
    logged = [log for log in measured.logs if FORGETTING in log]
    assert [log["step"] for log in logged] == [0, 2, 3]
    assert logged[0][FORGETTING] == 0
    assert len({log[FORGETTING_LOSS] for log in logged}) == 3
    assert (measured.output / "gmt_report" / "forgetting.png").is_file()
    assert not any(FORGETTING in log for log in plain.logs)


def test_forgetting_in_dpo_is_that_of_the_model_that_is_trained(
    run_axolotl: RunAxolotl, dpo_yaml: dict[str, Any], toy_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "chat.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    text.write_text(json.dumps({"messages": chat}))
    settings = {"plugins": ["axolotl_gmt"], "gmt_forgetting": str(text), "learning_rate": 0.01}
    run = run_axolotl(dpo_yaml, **settings)
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokens = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    logged = [log[FORGETTING_LOSS] for log in run.logs if FORGETTING in log]
    for folder, loss in zip((toy_model, run.output), (logged[0], logged[-1]), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert loss == pytest.approx(mean_loss(model, [tokens], 1024), rel=1e-5)
    assert logged[0] != logged[-1]


def test_a_held_out_text_that_is_missing_stops_the_command_line_before_a_model_is_loaded(
    sft_yaml: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "sft.yml"
    settings = {
        **sft_yaml,
        "optimizer": "gmt",
        "gmt_forgetting": "no.txt",
        "base_model": "no/model",
    }
    file.write_text(yaml.safe_dump(settings))
    result = axolotl_train(file)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("Error: gmt_forgetting: no.txt is not here")
    assert "no/model" not in result.stderr


def test_statistics_reach_tensorboard(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_axolotl(sft_yaml, plugins=["axolotl_gmt"], use_tensorboard=True)
    (events,) = tmp_path.rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    scalars = [event.value for event in accumulator.Scalars("train/gmt/kept_fraction")]
    assert scalars == pytest.approx(run.kept_fractions, abs=1e-6)
    assert len(accumulator.Scalars("train/gmt/grad_norm_kept")) == 3
    assert len(accumulator.Scalars("train/gmt/l1_kept")) == 3


def section_of(card: ModelCard) -> str:
    """The section on GMT, which must be there once, as must its tags and all else."""
    assert card.text.count(HEADING) == 1
    tags = card.data.to_dict()["tags"]
    assert [tags.count(tag) for tag in TAGS] == [1, 1]
    assert len(tags) > 2
    return str(card.text[card.text.index(HEADING) :])


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_leaves_a_report_and_a_section_in_its_model_card(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], dpo_yaml: dict[str, Any], method: str
) -> None:
    config = {"sft": sft_yaml, "dpo": dpo_yaml}[method]
    run = run_axolotl(
        config, plugins=["axolotl_gmt"], gmt_mask_ratio=0.75, gmt_exclude=r"\.bias$|norm"
    )
    page = (run.output / "gmt_report" / "index.html").read_text()
    assert "0.75 (kept 0.25)" in page
    assert "AdamW" in page

    log = read_log(find_state(run.output))
    assert log.settings["exclude"] == [r"\.bias$|norm"]
    assert (log.step, log.max_steps) == (3, 3)
    np.testing.assert_array_equal(log.curves["gmt/kept_fraction"].values, run.kept_fractions)
    assert log.last("loss") == [entry["loss"] for entry in run.logs if "loss" in entry][-1]
    assert log.masked_parameters == sum(
        g.numel() for n, g in run.gradients[0].items() if "norm" not in n
    )
    assert log.model == Path(config["base_model"]).name
    assert log.data == [Path(config["datasets"][0]["path"]).name]
    assert log.began is not None
    assert log.train_runtime is not None
    assert yaml.safe_load(log.config_text)["gmt_mask_ratio"] == 0.75
    if method == "sft":  # For preferences Axolotl counts no tokens.
        assert log.trained_tokens_per_second is not None
    # A checkpoint alone tells the same of the settings.
    assert read_log(find_state(run.output / "checkpoint-3")).settings == log.settings

    section = section_of(ModelCard.load(run.output / "README.md"))
    settings = yaml.safe_load(section.split("```yaml")[1].split("```")[0])
    assert settings["gmt_mask_ratio"] == 0.75
    assert settings["gmt_exclude"] == [r"\.bias$|norm"]
    assert f"{sum(run.kept_fractions) / 3:.2%}" in section
    assert "2406.15330" in section


def test_module_statistics_add_up_to_those_of_the_whole(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any]
) -> None:
    run = run_axolotl(sft_yaml, plugins=["axolotl_gmt"], gmt_log_modules=True)
    sizes = {name.removesuffix(".weight"): tensor.numel() for name, tensor in run.weights.items()}
    logs = [log for log in run.logs if "loss" in log]
    for log, kept in zip(logs, run.kept_fractions, strict=True):
        prefix = "gmt/kept_fraction/"
        modules = {key.removeprefix(prefix): log[key] for key in log if key.startswith(prefix)}
        assert modules.keys() == sizes.keys()
        weighted = sum(sizes[name] * fraction for name, fraction in modules.items())
        assert weighted / sum(sizes.values()) == pytest.approx(kept, abs=1e-4)  # logs are rounded
    assert (run.output / "gmt_report" / "grad_norm_kept_by_step.png").is_file()


def test_without_gmt_there_is_no_report_and_no_section(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any]
) -> None:
    run = run_axolotl(sft_yaml, max_steps=1)
    card = ModelCard.load(run.output / "README.md")
    assert HEADING not in card.text
    assert not set(TAGS) & set(card.data.to_dict()["tags"])
    assert not (run.output / "gmt_report").exists()
    assert not (run.output / "trainer_state.json").exists()


def test_the_section_reaches_the_hub(
    run_axolotl: RunAxolotl, sft_yaml: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards: list[ModelCard] = []

    class Hub:
        def create_repo(self, name: str, **settings: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path: str, **settings: Any) -> Any:
            cards.append(ModelCard.load(Path(folder_path, "README.md")))

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    run_axolotl(
        sft_yaml,
        plugins=["axolotl_gmt"],
        max_steps=1,
        hub_model_id="somebody/something",
        hub_strategy="end",
    )
    assert cards
    assert "kept fraction" in section_of(cards[-1])


def test_a_model_card_that_cannot_be_completed_does_not_stop_a_run(
    run_axolotl: RunAxolotl,
    sft_yaml: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("axolotl_gmt.integrations.axolotl.plugin.add_section", full_disk)
    monkeypatch.setattr("axolotl_gmt.report.page.write_report", full_disk)
    run = run_axolotl(sft_yaml, plugins=["axolotl_gmt"], max_steps=1)
    assert run.weights
    assert (run.output / "README.md").is_file()
    assert "The section on GMT is missing" in caplog.text
    assert f"python -m axolotl_gmt report {run.output}" in caplog.text
