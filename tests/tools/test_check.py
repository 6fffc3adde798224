"""What ``axolotl gmt check`` says of configs, and that it runs nothing that they name."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from axolotl.integrations.base import PluginManager
from axolotl.utils import config as axolotl_config
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from axolotl_gmt.cli import gmt
from axolotl_gmt.errors import UserError
from axolotl_gmt.tools.check import child
from axolotl_gmt.tools.check.check import check
from axolotl_gmt.tools.check.report import Mask, Report
from axolotl_gmt.tools.check.validation import build_schema_once, validated
from axolotl_gmt.tools.check.yaml_file import parse

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {
    "base_model": "somebody/some-model",
    "plugins": ["axolotl_gmt"],
    "datasets": [{"path": "somebody/some-data", "type": "chat_template"}],
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_epochs": 1,
    "learning_rate": 1e-5,
    "optimizer": "adamw_torch",
    "output_dir": "./out",
}
HF_TOKEN = "hf_" + "aBcD" * 8
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"


def write(folder: Path, changes: dict[str, Any] | None = None, name: str = "config.yml") -> Path:
    """GOOD with changes, None meaning without."""
    config = {key: value for key, value in {**GOOD, **(changes or {})}.items() if value is not None}
    file = folder / name
    file.write_text(yaml.safe_dump(config))
    return file


def report(folder: Path, **changes: Any) -> Report:
    return check(write(folder, changes), share=True)


class SameProcess:
    """Checks where the test runs, which saves the imports of a child."""

    check = staticmethod(check)

    def __enter__(self) -> SameProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "Checker", SameProcess)


@pytest.fixture(autouse=True, scope="module")
def plugins_of_axolotl() -> Iterator[None]:
    """A check replaces them and keeps their schema, since its child does nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PluginManager.get_instance(), "plugins", OrderedDict())
        patch.setattr(axolotl_config, "merge_input_args", axolotl_config.merge_input_args)
        build_schema_once()
        yield


def run(*arguments: object) -> Result:
    return CliRunner().invoke(gmt, ["check", *map(str, arguments)])


# What GMT would do


@pytest.mark.parametrize(
    ("changes", "enabled", "why", "base_optimizer"),
    [
        ({}, True, "axolotl_gmt is listed under plugins", "adamw_torch"),
        ({"optimizer": None}, True, "axolotl_gmt is listed under plugins", "adamw_torch_fused"),
        ({"plugins": ["axolotl_gmt:GMTPlugin"]}, True, "listed under plugins", "adamw_torch"),
        ({"plugins": None, "optimizer": "gmt"}, True, "optimizer is gmt", "adamw_torch_fused"),
        (
            {"plugins": None, "optimizer": "gmt", "gmt_base_optimizer": "muon"},
            True,
            "optimizer is gmt",
            "muon",
        ),
        ({"plugins": None, "gmt_enabled": True}, True, "gmt_enabled is true", "adamw_torch"),
        ({"gmt_enabled": False}, False, "gmt_enabled is false", "adamw_torch"),
        ({"plugins": None}, False, "not listed under plugins, and", "adamw_torch"),
    ],
)
def test_the_plan_says_whether_gmt_is_on_why_and_with_which_optimizer(
    changes: dict[str, Any], enabled: bool, why: str, base_optimizer: str, tmp_path: Path
) -> None:
    found = report(tmp_path, **changes)
    assert found.ok, found
    assert found.gmt is not None
    assert (found.gmt.enabled, found.gmt.base_optimizer) == (enabled, base_optimizer)
    assert why in found.gmt.why


def test_the_plan_has_the_settings(tmp_path: Path) -> None:
    found = report(tmp_path, gmt_mask_ratio=0.3, gmt_granularity="layer", gmt_include="mlp", seed=7)
    assert found.gmt is not None
    for key, value in {
        "mask_ratio": 0.3,
        "granularity": "layer",
        "criterion": "gradient",
        "include": ("mlp",),
        "exclude": None,
        "seed": 7,
    }.items():
        assert found.gmt.settings[key] == value


# The numbers of parameters, against a model that is really loaded


def really_masked(
    model: torch.nn.Module, include: str | None = None, exclude: str | None = None
) -> Mask:
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    masked = {
        name: size
        for name, size in trained.items()
        if (include is None or re.search(include, name))
        and (exclude is None or not re.search(exclude, name))
    }
    return Mask(len(masked), sum(masked.values()), len(trained), sum(trained.values()))


ADAPTER = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("patterns", [(None, None), ("mlp", None), (None, "q_proj"), ("mlp", "1")])
@pytest.mark.parametrize("adapter", [None, "lora", "qlora"])
def test_the_numbers_under_the_mask_are_those_of_the_loaded_model(
    adapter: str | None, patterns: tuple[str | None, str | None], toy_model: Path, tmp_path: Path
) -> None:
    include, exclude = patterns
    found = report(
        tmp_path,
        base_model=os.path.relpath(toy_model),
        gmt_include=include,
        gmt_exclude=exclude,
        adapter=adapter,
        load_in_4bit=True if adapter == "qlora" else None,
        **(ADAPTER if adapter else {}),
    )
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    if adapter:
        target = ADAPTER["lora_target_modules"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=target))
    assert found.gmt is not None
    assert found.gmt.mask == really_masked(model, include, exclude)
    assert found.ok


@pytest.mark.parametrize(
    ("changes", "tensors", "parameters"),
    [
        # 256 x 8 embeddings, a layer of 4 x 64 + 3 x 128 + 2 norms, a norm; the head is tied.
        ({}, 11, 2048 + 640 + 16 + 8),
        ({"tie": False}, 12, 2048 * 2 + 640 + 16 + 8),
        ({"model_config": {"num_hidden_layers": 2}}, 20, 2048 + 2 * 656 + 8),
        ({"optimizer": "muon"}, 8, 2048 + 640),
        ({"unfrozen_parameters": ["model.layers.0.mlp"]}, 3, 384),
        ({"reward_model": True, "pad_to_sequence_len": True}, 12, 2048 + 640 + 16 + 8 + 8),
        ({"model_type": "LlamaForCausalLM"}, 11, 2048 + 640 + 16 + 8),
    ],
)
def test_tied_frozen_and_other_models_are_counted_as_axolotl_trains_them(
    changes: dict[str, Any],
    tensors: int,
    parameters: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny(changes.pop("tie", True)).save_pretrained("model")
    found = report(tmp_path, base_model="./model", **changes)
    assert found.gmt is not None
    assert found.gmt.mask == Mask(tensors, parameters, tensors, parameters), found


def tiny(tied: bool = True) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )


def test_a_model_in_the_cache_of_the_hub_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = report(tmp_path)
    assert found.gmt is not None
    assert found.gmt.mask is None
    assert found.gmt.not_counted == "the model's config is not on this machine"
    repository = tmp_path / "models--somebody--some-model"
    commit = "c0ffee" * 6 + "0000"
    tiny().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = report(tmp_path)
    assert found.gmt is not None
    assert found.gmt.mask is not None
    assert found.gmt.mask.masked_parameters == 2712


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gmt_include": "mpl"}, r"include .*'mpl' matches no trained parameter"),
        ({"gmt_include": "mlp", "gmt_exclude": "mlp"}, r"together leave no parameter"),
        ({"gmt_exclude": "lm_head", "adapter": "lora", **ADAPTER}, r"'lm_head' matches no trained"),
        ({"unfrozen_parameters": ["nothing"]}, r"unfrozen_parameters: nothing is trained"),
    ],
)
def test_patterns_that_stop_the_training_are_errors(
    changes: dict[str, Any], message: str, toy_model: Path, tmp_path: Path
) -> None:
    found = report(tmp_path, base_model=os.path.relpath(toy_model), **changes)
    assert len(found.errors) == 1
    assert re.search(message, found.errors[0])


# What Axolotl says


@pytest.mark.parametrize(
    ("changes", "errors"),
    [
        ({"base_model": None}, [r"^base_model: is not set, but required\.$"]),
        (
            {"micro_batch_size": "many", "num_epochs": [1]},
            [r"^micro_batch_size: 'many' is not valid: .*integer", r"^num_epochs: a list is not"],
        ),
        ({"datasets": None}, [r"datasets or pretraining_dataset is required"]),
        ({"datasets": ["some/data"]}, [r"^datasets: .*Write each one as '- path: \.\.\.'"]),
        ({"datasets": [{"path": "a/b"}, {"path": 5}]}, [r"^datasets\[1\]\.path: 5 is not valid"]),
        ({"rl": "dpo", "datasets": [{"split": 3}]}, [r"^datasets\[0\]\.split: 3 is not valid"]),
        ({"plugins": "axolotl_gmt"}, [r"^plugins: 'axolotl_gmt' .*Write plugins: \[axolotl_gmt\]"]),
        (
            {"plugins": ["axolotl.integrations.ligr.LigerPlugin"]},
            [r"^plugins: 'axolotl\.integrations\.ligr\.LigerPlugin' is not in the Axolotl"],
        ),
        ({"trl": 5, "rl": "grpo"}, [r"^trl: 5 is not valid"]),
        ({"adapter": "ia3"}, [r"Adapter 'ia3' is not built in"]),
        ({"attn_implementation": "flash"}, [r"^attn_implementation: .*'flash_attention_2'"]),
        ({"max_packed_sequence_len": 5}, [r"`max_packed_sequence_len` is no longer supported"]),
        ({"fsdp": ["full_shard"]}, [r"`fsdp` list is no longer supported"]),
        ({"gmt_mask_ratio": 1}, [r"^gmt_mask_ratio: 1 is outside"]),
        ({"gmt_ratio": 0.5}, [r"^gmt_ratio: .*Did you mean gmt_mask_ratio"]),
        ({"plugins": None, "gmt_include": "mlp"}, [r"^gmt_include: 'mlp' is set, but GMT is off"]),
        ({"optimizer": "lomo"}, [r"^optimizer: 'lomo' updates each weight"]),
        (
            {"gmt_mask_ratio": "x", "gmt_granularity": "row", "micro_batch_size": "x"},
            [r"^gmt_mask_ratio: ", r"^gmt_granularity: ", r"^micro_batch_size: "],
        ),
        ({"deepspeed": "."}, [r"^deepspeed: '\.' is not a file"]),
        ({"deepspeed": {"zero_optimization": 3}}, [r"^GMT's check ends in AttributeError"]),
    ],
)
def test_what_would_stop_the_training_is_one_line_each(
    changes: dict[str, Any], errors: list[str], tmp_path: Path
) -> None:
    found = report(tmp_path, **changes)
    assert len(found.errors) == len(errors), found.errors
    for message, pattern in zip(found.errors, errors, strict=True):
        assert re.search(pattern, message)
    assert not found.warnings


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({}, 1),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, 2),
        ({"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}, 2),
        ({"tensor_parallel_size": 2, "context_parallel_size": 2}, 4),
        ({"context_parallel": {"size": 4}}, 4),
        ({"dp_shard_size": 2, "dp_replicate_size": 2, "fsdp_config": {"version": 2}}, 4),
        ({"tensor_parallel_size": "many"}, 1),
    ],
)
def test_a_config_is_checked_for_as_many_gpus_as_it_asks_for(
    changes: dict[str, Any], gpus: int, tmp_path: Path
) -> None:
    assert report(tmp_path, **changes).gpus == gpus
    assert check(write(tmp_path, changes), gpus=8).gpus == 8


def test_the_number_of_gpus_matters_to_axolotl(tmp_path: Path) -> None:
    file = write(tmp_path, {"rl": "grpo", "trl": {"num_generations": 3}})
    assert "must be divisible by `trl.num_generations`" in check(file).errors[0]
    assert check(file, gpus=3).ok


def test_axolotls_own_warnings_are_remarks_of_each_file(tmp_path: Path) -> None:
    changes = {"flash_attention": True, "fsdp_config": {"fsdp_offload_params": False}}
    for _ in range(2):  # Axolotl says some of it once in a process.
        found = report(tmp_path, **changes)
        assert found.ok
        remarks = "\n".join(found.remarks)
        assert "Axolotl warns: `flash_attention: true` is deprecated" in remarks
        assert "Axolotl warns: Configuring FSDP fields with the `fsdp_` prefix" in remarks
        assert "flash_attention_2 was not looked for" in remarks


def test_a_deepspeed_file_is_checked_if_it_is_there_and_remarked_on_if_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = report(tmp_path, deepspeed="zero.json")
    assert found.ok
    assert "deepspeed: zero.json is not here" in found.remarks[0]
    Path("zero.json").write_text('{"zero_optimization": {"stage": 0}}')
    assert "zero_optimization.stage: 0" in report(tmp_path, deepspeed="zero.json").errors[0]
    Path("zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    found = report(tmp_path, deepspeed="zero.json")
    assert found.ok
    assert not found.remarks


def test_the_text_to_measure_forgetting_on_is_read_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(tmp_path, gmt_forgetting=True).ok
    for name in ("text.jsonl", "text"):
        found = report(tmp_path, gmt_forgetting=name)
        assert found.ok
        assert f"gmt_forgetting: {name}: not here. Paths are relative" in found.remarks[0]
    Path("text").write_text("Some text.")
    found = report(tmp_path, gmt_forgetting="text")
    assert found.ok
    assert not found.remarks
    Path("text.jsonl").write_text('{"prompt": "my secret"}')
    (error,) = report(tmp_path, gmt_forgetting="text.jsonl").errors
    assert error.startswith("gmt_forgetting: text.jsonl, line 1 has no document. Write")
    os.mkfifo("pipe")  # Which nobody writes to: to read it would take forever.
    (error,) = report(tmp_path, gmt_forgetting="pipe").errors
    assert error.startswith("gmt_forgetting: pipe is not a file")


def test_the_config_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # A run refuses options of GMT on its command line; they are no matter of a check.
    monkeypatch.setattr("sys.argv", ["axolotl", "gmt", "check", "--gmt-mask-ratio=0.7"])
    for changes in ({"optimizer": "gmt"}, {"trl": 5, "rl": "grpo"}, {"plugins": ["x.Y"]}):
        raw = {**GOOD, **changes}
        given = copy.deepcopy(raw)
        validated(raw)
        assert raw == given
    assert not validated({**GOOD, "optimizer": "gmt"}).errors


# Keys


def test_keys_that_axolotl_ignores_are_warned_of(tmp_path: Path) -> None:
    found = report(tmp_path, learning_rte=1e-4, blue=True, model_type="AutoModelForCausalLM")
    assert found.warnings == [
        "blue: Axolotl has no such key, and ignores it in silence. Remove it.",
        "learning_rte: Axolotl has no such key, and ignores it in silence. "
        "Did you mean learning_rate?",
    ]


def test_keys_of_plugins_are_known_from_the_source_of_axolotl_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another test may have imported it in this process; an import here would bring it back.
    monkeypatch.delitem(sys.modules, "axolotl.integrations.liger", raising=False)
    liger = ["axolotl_gmt", "axolotl.integrations.liger.LigerPlugin"]
    keys = {"liger_rope": True, "liger_rms_nrom": True}
    found = report(tmp_path, plugins=liger, **keys)
    assert [line.split(":")[0] for line in found.warnings] == ["liger_rms_nrom"]
    assert "Did you mean liger_rms_norm?" in found.warnings[0]
    found = report(tmp_path, plugins=[*liger, "strange.Plugin"], blue=True, learning_rte=1, **keys)
    assert [line.split(":")[0] for line in found.warnings] == ["learning_rte", "liger_rms_nrom"]
    assert sum("blue" in line for line in found.remarks) == 1
    assert "axolotl.integrations.liger" not in sys.modules


# What should not be shared


@pytest.mark.parametrize(
    ("changes", "warning", "secret"),
    [
        ({"wandb_entity": HF_TOKEN}, "wandb_entity: *** looks like a Hugging Face token", HF_TOKEN),
        (
            {"datasets": [{"path": "a/b", "type": "alpaca", "name": f"x {HF_TOKEN}"}]},
            "datasets[0].name: *** looks like a Hugging Face token",
            HF_TOKEN,
        ),
        ({"wandb_name": WANDB_KEY}, "wandb_name: *** looks like 40 hexadecimal digits", WANDB_KEY),
        ({"comet_api_key": "abc"}, "comet_api_key: *** looks like a secret, by the name", "abc"),
        ({"openai_api_key": "abc"}, "openai_api_key: *** looks like a secret", "abc"),
        (
            {"wandb_name": "sk-proj-" + "x1" * 20},
            "wandb_name: *** looks like a key of OpenAI or Anthropic",
            "x1x1",
        ),
        ({"wandb_name": "AKIA" + "A1" * 8}, "wandb_name: *** looks like an AWS key", "A1A1"),
        (
            {"mlflow_tracking_uri": "https://ann:pass@mlflow.example/x"},
            "mlflow_tracking_uri: *** looks like a URL with credentials",
            "pass",
        ),
        (
            {"base_model": "https://example.com/model?sig=abcdef"},
            "base_model: *** looks like a signed URL",
            "abcdef",
        ),
        ({"micro_batch_size": HF_TOKEN}, "micro_batch_size: *** looks like", HF_TOKEN),
        ({"output_dir": "/data/ann/out"}, "output_dir: '/data/ann/out' is a path of this", None),
        ({"output_dir": "/out"}, "output_dir: '/out' is a path of this machine", None),
        ({"output_dir": "~/out"}, "output_dir: '~/out' is a path of this machine", None),
        ({"gmt_forgetting": "/text"}, "gmt_forgetting: '/text' is a path of this machine", None),
        ({"output_dir": "C:\\out"}, "output_dir: 'C:\\\\out' is a path of this machine", None),
        (
            {"datasets": [{"path": "json", "data_files": ["/a/b.json"], "type": "alpaca"}]},
            "datasets[0].data_files[0]: '/a/b.json' is a path",
            None,
        ),
        (
            {"wandb_name": "from /home/ann"},
            "wandb_name: names the home directory '/home/ann'",
            None,
        ),
        (
            {"datasets": [{"path": "s3://b/x.json", "type": "alpaca"}]},
            "datasets[0].path: 's3://b/x.json' lies in a bucket",
            None,
        ),
        ({"hub_model_id": "ann/model"}, "hub_model_id: 'ann/model': training pushes", None),
        (
            {"hub_model_id": "ann/model", "base_model": "ann/base"},
            "base_model: 'ann/base' belongs to an account that this file pushes to",
            None,
        ),
        ({"wandb_project": "gmt"}, "wandb_project: 'gmt': this turns on reporting", None),
        ({"wandb_run_id": "gmt"}, "wandb_run_id: 'gmt': runs are logged into this very run", None),
    ],
)
def test_what_should_not_be_shared_is_named_and_secrets_are_not_shown(
    changes: dict[str, Any], warning: str, secret: str | None, tmp_path: Path
) -> None:
    found = report(tmp_path, **changes)
    assert any(line.startswith(warning) for line in found.warnings), found.warnings
    if secret is not None:
        assert secret not in json.dumps(found.as_dict())
    kept = check(write(tmp_path, changes))
    assert not any(line.startswith(warning) for line in kept.warnings)
    if secret is not None:
        assert secret not in json.dumps(kept.as_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"revision_of_model": WANDB_KEY},
        {"datasets": [{"path": "a/b", "type": "alpaca", "revision": WANDB_KEY}]},
        {"hub_model_id": "model-of-whoever-trains"},
        {"wandb_project": "", "wandb_entity": ""},
        {"mlflow_tracking_uri": "file:./mlruns"},
        {"comet_api_key": "${COMET_API_KEY}"},
        {"comet_api_key": "<your key>"},
        {"hf_use_auth_token": True},
        {"special_tokens": {"pad_token": "<|end|>", "eos_token": "</s>"}, "tokens": ["/think"]},
        {"chat_template_jinja": "{% for m in messages %}/{{ m.role }}/{% endfor %}"},
        {"dataset_prepared_path": "last_run_prepared", "output_dir": "outputs/a/b"},
        {"unfrozen_parameters": ["^lm_head.weight$", "model.layers.2[0-9]+.mlp"]},
    ],
)
def test_what_can_be_shared_is_good(changes: dict[str, Any], tmp_path: Path) -> None:
    found = report(tmp_path, **changes)
    assert found.ok, found


def test_a_token_in_a_comment_is_found(tmp_path: Path) -> None:
    file = write(tmp_path)
    file.write_text(file.read_text() + f"# export HF_TOKEN={HF_TOKEN}\n")
    (warning,) = check(file, share=True).warnings
    assert warning.startswith(f"line {len(file.read_text().splitlines())}: *** looks like")


# Files that hold no config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"holds nothing, not keys"),
        (b"- base_model: x\n", r"holds a list, not keys"),
        (b"just words", r"holds a str, not keys"),
        (b"a: [1, 2\nb: 3\n", r"is not valid YAML in line 2: "),
        (b"a: b: c", r"is not valid YAML in line 1: "),
        (b"a: 1\n---\nb: 2\n", r"is not valid YAML in line 2: "),
        (b"a: !!python/object/apply:os.system [ls]", r"is not valid YAML in line 1: .*constructor"),
        (b"a: 2024-99-99", r"is not valid YAML: month must be in"),
        (b"\x89PNG\r\n\x1a\n\x00", r"is not UTF-8 text"),
        (b"\x00\x01\x02", r"is not valid YAML: "),
        (b"1: x\n", r"has the key 1, which is not text"),
        (b"on: x\n", r"has the key True, which is not text"),
        (b"? [a, b]\n: c\n", r"is not valid YAML in line 1: .*unhashable"),
        (b"[" * 5000, r"is nested too deeply"),
        (b"a: &a [*a]\n", r"or contains itself"),
        (
            b"\n".join(
                b"k%d: &k%d [%s]" % (i, i, b", ".join([b"*k%d" % (i - 1)] * 9) if i else b"x")
                for i in range(12)
            ),
            r"has more than 100,000 values",
        ),
        (b"a: " + b"x" * 1_000_000, r"has more than 1,000,000 bytes"),
    ],
)
def test_a_file_without_a_config_gets_one_clear_line(
    content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.yml"
    file.write_bytes(content)
    found = check(file)
    assert not found.readable
    assert found.gmt is None
    (error,) = found.errors
    assert re.search(message, error)


def test_keys_that_are_given_twice_are_warned_of(tmp_path: Path) -> None:
    file = write(tmp_path, {"trl": {"beta": 0.1}})
    file.write_text("base_model: a/b\n" + file.read_text() + "special_tokens: {a: x, a: y}\n")
    found = check(file)
    assert [line.split(",")[0] for line in found.warnings] == [
        "base_model: is given twice",
        "a: is given twice",
    ]
    assert "in lines 1 and 2." in found.warnings[0]


@given(st.text() | st.text("&*[]{}:-?!| \n'\"#%a1<").map(lambda text: f"a: {text}"))
@settings(max_examples=500, deadline=None)
def test_no_text_makes_the_parser_raise_anything_else(text: str) -> None:
    try:
        raw, _ = parse(text)
    except UserError:
        return
    assert isinstance(raw, dict)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
KEYS = st.deferred(lambda: st.sampled_from(sorted(validated(GOOD).known_keys)))


@given(changes=st.dictionaries(KEYS, VALUES, max_size=4))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_config_makes_a_check_raise(changes: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump({**GOOD, **changes}, allow_unicode=True), encoding="utf-8")
    found = check(file)
    json.dumps(found.as_dict())
    for line in (*found.errors, *found.warnings, *found.remarks):
        assert line.isprintable()


# The command


def test_the_exit_status_is_that_of_a_linter(tmp_path: Path) -> None:
    good = write(tmp_path, name="good.yml")
    warned = write(tmp_path, {"output_dir": "/my/out"}, "warned.yml")
    wrong = write(tmp_path, {"gmt_mask_ratio": 1}, "wrong.yml")
    missing = tmp_path / "missing.yml"
    expected: list[tuple[list[object], int]] = [
        ([good], 0),
        ([good, good], 0),
        ([good, warned], 0),
        ([good, warned, "--share"], 1),
        ([wrong], 1),
        ([missing], 2),
        ([tmp_path], 2),
        ([missing, wrong, good], 2),
        ([], 2),
        ([good, "--gpus", "0"], 2),
    ]
    for files, status in expected:
        assert run(*files).exit_code == status, files


@pytest.mark.parametrize(
    ("changes", "is_warned"),
    [
        ({}, True),
        ({"bf16": "auto"}, True),
        ({"bf16": False}, False),
        ({"fp16": False}, False),
        ({"fp16": True}, False),
    ],
)
def test_a_precision_that_no_cpu_can_train_in_is_remarked_upon_where_no_gpu_is(
    changes: dict[str, Any], is_warned: bool, tmp_path: Path
) -> None:
    file = write(tmp_path, changes)
    for has_gpu in (False, True):
        found = check(file, has_gpu=has_gpu)
        assert found.ok
        remarks = [line for line in found.remarks if line.startswith("bf16 and fp16 are unset")]
        assert len(remarks) == (is_warned and not has_gpu)


@pytest.mark.parametrize(("devices", "is_found"), [("", False), ("-1", False), (None, True)])
def test_gpus_that_are_hidden_are_none(
    devices: str | None, is_found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia0")]))
    if devices is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert child._has_gpu() is is_found


def test_weight_decay_is_remarked_upon_where_gmt_is_on(tmp_path: Path) -> None:
    for changes, count in (
        ({"weight_decay": 0.01}, 1),
        ({"weight_decay": 0.0}, 0),
        ({}, 0),
        ({"weight_decay": 0.01, "plugins": None}, 0),
    ):
        found = report(tmp_path, **changes)
        assert sum("moves masked entries" in line for line in found.remarks) == count
        assert found.ok


@pytest.mark.parametrize("key", ["GMT_mask_ratio", "gmt-mask-ratio", "gmt"])
def test_a_key_that_looks_like_gmts_is_an_error_once(key: str, tmp_path: Path) -> None:
    found = report(tmp_path, **{key: 0.3})
    (error,) = found.errors
    assert error.startswith(f"{key}: 0.3 is set, but there is no such key. Did you mean gmt_mask_")
    assert not found.warnings


@pytest.mark.parametrize("name", ["axolotl-gmt", "axolotl_gmt"])
def test_the_name_of_the_package_is_a_plugin_and_its_text_is_not(name: str, tmp_path: Path) -> None:
    assert report(tmp_path, plugins=[name]).gmt.enabled  # type: ignore[union-attr]
    (error,) = report(tmp_path, plugins=name).errors
    assert error.endswith("is not a list of names. Write plugins: [axolotl_gmt].")


def test_the_output_has_a_block_for_each_file_and_a_summary(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = os.path.relpath(toy_model)
    write(tmp_path, {"base_model": model, "gmt_mask_ratio": 0.3, "gmt_include": "mlp"}, "a.yml")
    write(tmp_path, {"plugins": ["[red]x.Y"], "output_dir": "/my/out"}, "b.yml")
    result = run("a.yml", "b.yml", "c.yml", "--gpus", "2", "--share")
    assert "Checking 3 files" in result.stderr
    assert result.stdout.splitlines() == [
        "a.yml: good, on 2 GPUs",
        "  GMT is on, since axolotl_gmt is listed under plugins. Base optimizer adamw_torch.",
        "  Ratio masked 0.3 (kept 0.7), granularity tensor, criterion gradient.",
        "  Include: mlp.",
        "  Under the mask: 12,288 of 35,104 trained parameters, in 6 of 21 tensors.",
        "b.yml: has problems, on 2 GPUs",
        "  GMT is off: axolotl_gmt is not listed under plugins, and optimizer is not gmt.",
        "  warning output_dir: '/my/out' is a path of this machine. Write one relative to the "
        "folder in which axolotl is run, such as ./data, or a hub id.",
        "  remark  plugins: [red]x.Y: not imported, so what they check themselves was not checked.",
        "  remark  Keys of [red]x.Y are not known without importing it, so they were not checked, "
        "if there are any.",
        "c.yml: has problems",
        "  error   cannot be read: No such file or directory.",
        "1 of 3 files good: 1 error, 1 warning, 2 remarks.",
    ]


def test_json_is_one_document_with_an_object_for_each_file(toy_model: Path, tmp_path: Path) -> None:
    good = write(tmp_path, {"base_model": os.path.relpath(toy_model)}, "good.yml")
    result = run(good, tmp_path / "missing.yml", "--json")
    assert result.exit_code == 2
    assert len(result.stdout.splitlines()) == 1
    first, second = json.loads(result.stdout)
    assert first == {
        "path": str(good),
        "ok": True,
        "readable": True,
        "gpus": 1,
        "errors": [],
        "warnings": [],
        "remarks": [],
        "gmt": {
            "enabled": True,
            "why": "axolotl_gmt is listed under plugins",
            "base_optimizer": "adamw_torch",
            "settings": first["gmt"]["settings"],
            "mask": {
                "masked_tensors": 21,
                "masked_parameters": 35104,
                "trained_tensors": 21,
                "trained_parameters": 35104,
            },
            "not_counted": None,
        },
    }
    assert first["gmt"]["settings"]["mask_ratio"] == 0.5
    assert second["ok"] is second["readable"] is False
    assert second["gmt"] is None
    assert second["errors"] == ["cannot be read: No such file or directory."]


def test_the_recipes_are_good() -> None:
    for recipe in sorted((ROOT / "example_configs").glob("*.yml")):
        found = check(recipe, share=True)
        assert found.ok, found
        assert not any("weight_decay" in remark for remark in found.remarks)


# Nothing of a stranger runs, and nobody is called

EVIL = "from pathlib import Path\nPath({marker!r}).touch()\n"
# Python runs sitecustomize.py when it starts, in the child too.
ALONE = """
import socket
from pathlib import Path

def refuse(*arguments):
    Path({marker!r}).write_text(f"called {{arguments}}")
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = refuse
"""


def test_no_code_of_the_file_runs_and_no_server_is_called(tmp_path: Path) -> None:
    ran, called = tmp_path / "ran", tmp_path / "called"
    for module in ("evil_plugin.py", "evil_rewards.py"):
        (tmp_path / module).write_text(EVIL.format(marker=str(ran)) + "class Plugin: ...\n")
    (tmp_path / "sitecustomize.py").write_text(ALONE.format(marker=str(called)))
    model = tmp_path / "model"
    tiny().save_pretrained(model)
    settings = json.loads((model / "config.json").read_text())
    settings |= {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "attn_implementation": "somebody/kernels",
        "_attn_implementation": "somebody/kernels",
    }
    (model / "config.json").write_text(json.dumps(settings))
    (model / "evil.py").write_text(EVIL.format(marker=str(ran)))
    config = write(
        tmp_path,
        {
            "base_model": "./model",
            "plugins": ["axolotl_gmt", "evil_plugin.Plugin", "evil_plugin:Plugin"],
            "trust_remote_code": True,
            "rl": "grpo",
            "trl": {"reward_funcs": ["evil_rewards.reward"], "num_generations": 4},
            "attn_implementation": "flash_attention_2",
            "use_kernels": True,
            "hub_model_id": "somebody/else",
        },
    )
    harmless = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    harmless.pop("HF_HUB_OFFLINE")
    result = subprocess.run(
        [sys.executable, "-m", "axolotl_gmt", "check", "--json", "--share", str(config)],
        cwd=tmp_path,
        env=harmless,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1, result.stderr
    (found,) = json.loads(result.stdout)
    assert not found["errors"]
    assert found["gmt"]["not_counted"].startswith("the model's own code")
    assert not called.exists(), called.read_text()
    assert not ran.exists()


def test_no_socket_is_opened_to_count_a_model(
    tmp_path: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"called {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for model in (os.path.relpath(toy_model), "somebody/some-model"):
        assert report(tmp_path, base_model=model, trust_remote_code=True).ok


# Names that do not exist, and files that are not here


def test_an_optimizer_that_axolotl_cannot_make_is_an_error(tmp_path: Path) -> None:
    optimizer = "adamw_trch_fused"
    (error,) = report(tmp_path, optimizer=optimizer).errors
    assert error.startswith(f"optimizer: {optimizer!r} is no optimizer that Axolotl knows")
    assert "The nearest are adamw_torch_fused" in error
    # A plugin that is not imported may put another name in its place.
    assert not report(tmp_path, optimizer=optimizer, plugins=["axolotl_gmt", "my.Plugin"]).errors


@pytest.mark.parametrize("name", ["axolotl-gnt", "axolotl_gtm", "axolotl_gmt.Plugin"])
def test_a_misspelt_gmt_is_an_error(name: str, tmp_path: Path) -> None:
    found = report(tmp_path, plugins=[name])
    assert found.errors == [f"plugins: there is no {name!r}. Did you mean axolotl_gmt?"]


def test_files_that_are_not_here_are_remarked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").touch()
    kind = {"type": "chat_template"}
    data = [
        {"path": "./here.jsonl", **kind},
        {"path": "gone.jsonl", "ds_type": "json", **kind},
        {"path": "s3://bucket/data.jsonl", **kind},
        {"path": "somebody/data", **kind},
    ]
    remarks = report(tmp_path, base_model="./gone", datasets=data).remarks
    missing = [line for line in remarks if "not here" in line]
    assert len(missing) == 1
    assert missing[0].startswith("base_model: ./gone, datasets[1].path: gone.jsonl: not here.")


def test_what_decides_what_is_trained_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("model")
    spectrum = "axolotl.integrations.spectrum.SpectrumPlugin"
    for plugin in (spectrum, "my.Plugin"):
        plan = report(tmp_path, base_model="./model", plugins=["axolotl_gmt", plugin]).gmt
        assert plan is not None
        assert plan.mask is None
        assert plan.not_counted == f"{plugin} may decide what is trained"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size: '2' is text. Write 2, without"),
        ({"tensor_parallel_size": -3}, "tensor_parallel_size: -3 is no number of GPUs."),
        ({"plugins": [""]}, "plugins: [''] is not a list of names."),
        ({"gmt_mask_ratio": 1 << 2000}, "has a number of more than 100 digits in line"),
        ({"plugins": ["axolotl.integrations." + "a" * 400]}, "plugins: 'axolotl.integrations.aaa"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], error: str, tmp_path: Path) -> None:
    assert report(tmp_path, **changes).errors[0].startswith(error)


@pytest.mark.parametrize("optimizer", ["2024-01-01", "!!set {a, b}", ".nan", ".inf", "[1]"])
def test_json_is_json_whatever_the_optimizer_is(optimizer: str, tmp_path: Path) -> None:
    file = write(tmp_path)
    file.write_text(file.read_text().replace("adamw_torch", optimizer))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    result = run(file, "--json")
    json.loads(result.stdout.splitlines()[-1], parse_constant=refuse)


def test_the_plan_hides_secrets_and_escapes_too(tmp_path: Path) -> None:
    escape = "\x1b]0;x\x07"
    found = report(tmp_path, gmt_include=[HF_TOKEN, f".*{escape}", "."])
    assert any("Hugging Face token" in line for line in found.warnings)
    assert HF_TOKEN not in json.dumps(found.as_dict())
    assert escape not in run(tmp_path / "config.yml").stdout


@pytest.mark.parametrize(
    ("comment", "is_secret"),
    [
        (f"# wandb_api_key: {WANDB_KEY}", True),
        ("# hub_token: my-secret-value-123", True),
        ("learning_rate_note: 1 # see below", False),
        ("# wandb_api_key: $WANDB_API_KEY", False),
        (f"# revision: {WANDB_KEY}", False),
    ],
)
def test_secrets_in_comments_are_found(comment: str, is_secret: bool, tmp_path: Path) -> None:
    file = write(tmp_path)
    file.write_text(f"{file.read_text()}{comment}\n")
    warnings = [line for line in check(file, share=True).warnings if "looks like" in line]
    assert len(warnings) == is_secret
    assert all(line.startswith("line ") for line in warnings)


@pytest.mark.parametrize(
    ("key", "value", "is_secret"),
    [
        ("wandb_name", f"export WANDB_API_KEY={WANDB_KEY}", True),
        ("password", "$up3rS3cret!", True),
        ("wandb_api_key", "yourdog99x12", True),
        ("aws_session_token", "abcdefghijkl", True),
        ("s3_password", 1234567.25, True),
        ("wandb_api_key", "$WANDB_API_KEY", False),
        ("wandb_api_key", "${{ secrets.WANDB }}", False),
        ("wandb_api_key", "<your key>", False),
        ("wandb_api_key", "your-api-key-here", False),
        ("wandb_api_key", "xxxx", False),
    ],
)
def test_secrets_and_placeholders_are_told_apart(
    key: str, value: object, is_secret: bool, tmp_path: Path
) -> None:
    found = report(tmp_path, **{key: value})
    assert any("looks like" in line for line in found.warnings) == is_secret
    assert (str(value) in json.dumps(found.as_dict())) <= (not is_secret)


def test_no_error_of_the_parser_shows_a_secret(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    for text in (f"a: *{HF_TOKEN}", f"a: !{HF_TOKEN} x", f"a: 1\n? {HF_TOKEN}\n? {HF_TOKEN}"):
        file.write_text(text)
        found = check(file)
        assert HF_TOKEN not in json.dumps(found.as_dict())
        assert "***" in json.dumps(found.as_dict())


def test_many_keys_that_axolotl_does_not_know_take_seconds(tmp_path: Path) -> None:
    start = time.process_time()
    found = report(tmp_path, **{f"learning_rat{index}": 1 for index in range(20_000)})
    assert len(found.warnings) == 20_000
    assert sum("Did you mean learning_rate?" in line for line in found.warnings) == 100
    assert time.process_time() - start < 30


def test_no_line_of_a_private_key_is_shown(tmp_path: Path) -> None:
    body = "MIIEvQIBADANBgkqhkiG9w0BAQ"
    key = f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n"
    found = report(tmp_path, gmt_mask_ratio=key)
    assert found.errors
    assert body not in json.dumps(found.as_dict())


def test_a_long_value_takes_no_long_time(tmp_path: Path) -> None:
    start = time.process_time()
    report(tmp_path, wandb_name="https://" * 100_000, wandb_notes="A=" * 100_000)
    assert time.process_time() - start < 30
