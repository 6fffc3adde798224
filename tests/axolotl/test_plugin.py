"""What the plugin makes of a config, and the message for each bad one, before Axolotl validates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from axolotl.cli.utils.train import generate_config_files
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault

from axolotl_gmt import GMTCallback, GMTConfig, GMTPlugin, GMTReportCallback
from axolotl_gmt.integrations.axolotl.args import GMTArgs, read_config
from axolotl_gmt.integrations.held_out_text import HeldOutText
from tests.test_docs import snippets

LISTED = {"plugins": ["axolotl_gmt"]}


@pytest.fixture(autouse=True)
def fresh_plugins() -> Iterator[None]:
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


def prepared(**settings: Any) -> dict[str, Any]:
    """The raw config after Axolotl has let every plugin register."""
    cfg = DictDefault(settings)
    prepare_plugins(cfg)
    result: dict[str, Any] = cfg.to_dict()
    return result


@pytest.mark.parametrize(
    ("settings", "optimizer", "enabled"),
    [
        ({**LISTED, "optimizer": "sgd"}, "sgd", True),
        ({**LISTED}, None, True),
        ({**LISTED, "gmt_base_optimizer": "sgd"}, "sgd", True),
        ({**LISTED, "optimizer": "sgd", "gmt_base_optimizer": "sgd"}, "sgd", True),
        ({**LISTED, "optimizer": "gmt"}, "adamw_torch_fused", True),
        ({"optimizer": "gmt"}, "adamw_torch_fused", True),
        ({"optimizer": "gmt", "gmt_base_optimizer": "muon"}, "muon", True),
        ({"optimizer": "gmt", "gmt_base_optimizer": "galore_adamw"}, "galore_adamw", True),
        ({"optimizer": "sgd", "gmt_enabled": True}, "sgd", True),
        ({**LISTED, "optimizer": "sgd", "gmt_enabled": False}, "sgd", False),
        ({"optimizer": "gmt", "gmt_enabled": False}, "adamw_torch_fused", False),
        (
            {"optimizer": "gmt", "gmt_enabled": False, "gmt_base_optimizer": "sgd"},
            "sgd",
            False,
        ),
        ({"optimizer": "lomo"}, "lomo", None),
        ({"plugins": ["axolotl-gmt"], "optimizer": "sgd"}, "sgd", True),
        ({"plugins": ["axolotl_gmt:GMTPlugin"], "optimizer": "sgd"}, "sgd", True),
        ({"plugins": ["axolotl_gmt.GMTPlugin", "axolotl_gmt"], "optimizer": "sgd"}, "sgd", True),
    ],
)
def test_who_is_on_and_with_which_optimizer(
    settings: dict[str, Any], optimizer: str | None, enabled: bool | None
) -> None:
    cfg = prepared(**settings)
    assert cfg.get("optimizer") == optimizer
    assert cfg.get("gmt_enabled") is enabled


def test_registering_a_registered_config_changes_nothing() -> None:
    once = prepared(optimizer="gmt", gmt_base_optimizer="sgd", gmt_mask_ratio=0.3)
    assert prepared(**once) == once


def test_an_unlisted_plugin_leaves_the_config_alone() -> None:
    assert prepared(optimizer="sgd", learning_rate=1.0) == {
        "optimizer": "sgd",
        "learning_rate": 1.0,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gmt_mask_ratio": 1.0}, r"gmt_mask_ratio: 1\.0 is outside \[0, 1\)"),
        ({"gmt_mask_ratio": "half"}, r"gmt_mask_ratio: 'half' is not a number"),
        ({"gmt_criterion": "fisher"}, r"gmt_criterion: 'fisher' is not one of gradient"),
        ({"gmt_granularity": "row"}, r"gmt_granularity: 'row' is not one of tensor, layer, global"),
        ({"gmt_include": "("}, r"gmt_include: '\(' is not a valid regular expression"),
        ({"gmt_exclude": ["a", "*"]}, r"gmt_exclude: '\*' is not a valid regular expression"),
        ({"gmt_seed": "x"}, r"gmt_seed: 'x' is not valid"),
        ({"gmt_enabled": "perhaps"}, r"gmt_enabled: 'perhaps' is not true or false"),
        ({"gmt_report": 1}, r"gmt_report: 1 is not true or false"),
        ({"gmt_forgetting": 5}, r"gmt_forgetting: 5 is neither true nor a file"),
        ({"gmt_forgetting": ""}, r"gmt_forgetting: '' is neither true nor a file"),
        ({"gmt_forgetting": "no.txt"}, r"gmt_forgetting: no\.txt is not here; paths are relative"),
        (
            {"gmt_forgetting": True, "context_parallel_size": 2},
            r"context_parallel_size: 2 splits .*Remove it, or gmt_forgetting: True\.",
        ),
        (
            {"gmt_forgetting": True, "context_parallel": {"size": 2}},
            r"context_parallel_size: 2 splits each sequence",
        ),
        ({"gmt_forgetting": True, "reward_model": True}, r"reward_model: True .*predicts no token"),
        (
            {
                "gmt_forgetting": True,
                "plugins": ["axolotl.integrations.diffusion.DiffusionPlugin"],
            },
            r"plugins: '.*DiffusionPlugin' trains a model that does not predict the next token",
        ),
        (
            {"gmt_mask_rate": 0.5},
            r"gmt_mask_rate: 0\.5 .*Did you mean gmt_mask_ratio\?",
        ),
        ({"gmt_optimizer": None}, r"gmt_optimizer: .*Did you mean gmt_base_optimizer\?"),
        ({"GMT_mask_ratio": 0.3}, r"^GMT_mask_ratio: 0\.3 .*Did you mean gmt_mask_ratio\?"),
        ({"gmt-mask-ratio": 0.3}, r"^gmt-mask-ratio: 0\.3 .*Did you mean gmt_mask_ratio\?"),
        ({"gmtMaskRatio": 0.3}, r"^gmtMaskRatio: 0\.3 .*Did you mean gmt_mask_ratio\?"),
        ({"gmtmaskratio": 0.3}, r"^gmtmaskratio: 0\.3 .*Did you mean gmt_mask_ratio\?"),
        ({"gmt.granularity": "layer"}, r"^gmt\.granularity: .*Did you mean gmt_granularity\?"),
        ({"gmt": 0.3}, r"^gmt: 0\.3 .*Did you mean gmt_mask_ratio\?"),
        ({"gmt": True}, r"^gmt: True .*Did you mean gmt_enabled\?"),
        (
            {"gmt": {"mask_ratio": 0.3, "gmt-granularity": "layer"}},
            r"^gmt: GMT's keys stand at the top level.*Write .*: "
            r"gmt_mask_ratio: 0\.3, gmt_granularity: layer\.$",
        ),
        ({"axolotl-gmt": {"ratio": 0.3}}, r"^axolotl-gmt: .* gmt_mask_ratio: 0\.3\.$"),
        ({"gmt_base_optimizer": "gmt"}, r"gmt_base_optimizer: 'gmt' cannot step with itself"),
        ({"gmt_base_optimizer": "adamw"}, r"gmt_base_optimizer: 'adamw' is no optimizer.*adamw_"),
        ({"gmt_base_optimizer": "lomo"}, r"gmt_base_optimizer: 'lomo' updates each weight during"),
        ({"gmt_base_optimizer": "apollo_adamw_layerwise"}, r"or apollo_adamw\."),
    ],
)
def test_bad_settings_are_refused_with_key_value_and_fix(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(optimizer="gmt", **settings)


@pytest.mark.parametrize("listed", ["axolotl_gmt", "axolotl-gmt", "axolotl_gmt:GMTPlugin"])
def test_plugins_as_text_are_explained(listed: str) -> None:
    with pytest.raises(ValueError, match=rf"^plugins: '{listed}' is text.*plugins: \[{listed}\]"):
        prepared(optimizer="sgd", plugins=listed)


def test_what_waits_for_text_under_plugins_is_gone_when_training_begins() -> None:
    prepared(optimizer="sgd")
    assert all(len(name) > 1 for name in PluginManager.get_instance().plugins)


@pytest.mark.parametrize("key", ["gmtime", "gm_t", "mask_ratio", "optimizer_gmt"])
def test_keys_of_others_are_left_alone(key: str) -> None:
    assert prepared(optimizer="sgd", **{key: 1})[key] == 1


@pytest.mark.parametrize("optimizer", ["GMT", "Gmt", "axolotl_gmt"])
@pytest.mark.parametrize("settings", [{}, {"gmt_mask_ratio": 0.3}, LISTED])
def test_the_optimizer_in_another_spelling_is_corrected(
    optimizer: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=rf"^optimizer: '{optimizer}' is spelled gmt"):
        prepared(optimizer=optimizer, **settings)


@pytest.mark.parametrize(
    "optimizer",
    [
        "lomo",
        "adalomo",
        "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
        "apollo_adamw_layerwise",
    ],
)
def test_an_optimizer_that_steps_in_the_backward_pass_is_refused(optimizer: str) -> None:
    with pytest.raises(ValueError, match=rf"^optimizer: '{optimizer}' updates each weight during"):
        prepared(optimizer=optimizer, **LISTED)


def test_a_base_optimizer_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gmt_base_optimizer: 'sgd' has no effect.*'adamw_torch'"):
        prepared(optimizer="adamw_torch", gmt_base_optimizer="sgd", **LISTED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gmt_mask_ratio": 0.5}, r"gmt_mask_ratio: 0\.5 is set, but GMT is off. Add axolotl_gmt"),
        (
            {**LISTED, "gmt_enabled": False, "gmt_include": "mlp"},
            r"gmt_include: 'mlp' is set, but GMT is off. Set gmt_enabled: true, or remove",
        ),
        ({"gmt_base_optimizer": "sgd"}, r"gmt_base_optimizer: 'sgd' is set, but GMT is off"),
        ({"gmt_mask_rate": 0.5}, r"Did you mean gmt_mask_ratio\?"),
    ],
)
def test_settings_of_a_gmt_that_is_off_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(optimizer="sgd", **settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"zero_optimization\.stage: None.*Set 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization\.stage: 0.*Set 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer\.device: 'nvme'.*Set cpu",
        ),
        (
            {"zero_optimization": {"stage": 1}, "optimizer": {"type": "OneBitAdam"}},
            r"optimizer\.type: 'onebitadam'.*Set AdamW",
        ),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
            r"mics_shard_size: 2.*Remove it",
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, r"zenflow"),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            r"round_robin_gradients: True.*Set false",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}},
            r"super_offload: True.*Set false",
        ),
        (
            {"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}},
            r"tensor_parallel: .*Remove it",
        ),
        (
            {"zero_optimization": {"stage": 1}, "expert_parallel": {"size": 2}},
            r"expert_parallel: .*Remove it",
        ),
        (
            {"zero_optimization": {"stage": 3}, "compile": {"deepcompile": True}},
            r"compile\.deepcompile: True.*Set false",
        ),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_deepspeed_configs_that_cannot_be_exact_are_refused(
    config: dict[str, Any], message: str, as_file: bool, tmp_path: Path
) -> None:
    deepspeed: Any = config
    if as_file:
        (tmp_path / "zero.json").write_text(json.dumps(config))
        deepspeed = str(tmp_path / "zero.json")
    with pytest.raises(ValueError, match=f"^deepspeed: .*{message}"):
        prepared(optimizer="gmt", deepspeed=deepspeed or {"bf16": {"enabled": True}})


def test_a_deepspeed_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text("{")
    with pytest.raises(ValueError, match=r"^deepspeed: .*zero\.json is not JSON"):
        prepared(optimizer="gmt", deepspeed=str(tmp_path / "zero.json"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_welcome(stage: int) -> None:
    deepspeed = {
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW"},
    }
    assert prepared(optimizer="gmt", deepspeed=deepspeed)["gmt_enabled"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_parallel_size": 2}, r"expert_parallel_size: 2 .*shard with FSDP2 or ZeRO-3"),
        ({"deepspeed": "zero3.json", "deepcompile": True}, r"deepcompile: True .*Set deepcompile"),
        (
            {"deepspeed": "zero3.json", "tensor_parallel_size": 2},
            r"tensor_parallel_size: 2 with deepspeed.*Remove",
        ),
        (
            {"adapter": "lora", "tensor_parallel_size": 2},
            r"tensor_parallel_size: 2 with adapter.*Remove",
        ),
        (
            {"base": "polora", "adapter": "lora", "fsdp_config": {"reshard_after_forward": True}},
            r"polora.*gathers itself.*Remove fsdp_config",
        ),
    ],
)
def test_other_set_ups_that_cannot_be_exact_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    settings = dict(settings)
    base = settings.pop("base", "sgd")
    with pytest.raises(ValueError, match=message):
        prepared(optimizer="gmt", gmt_base_optimizer=base, **settings)
    assert prepared(optimizer=base, **settings)["optimizer"] == base


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (
            "adamw_bnb_8bit",
            {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}},
            "adamw_bnb_8bit|8.?bit",
        ),
        (
            "adamw_torch",
            {"fsdp_version": 1, "fsdp_config": {"reshard_after_forward": True}},
            "Use fsdp_version: 2",
        ),
    ],
)
def test_what_axolotl_refuses_of_a_base_optimizer_it_refuses_under_gmt(
    sft_yaml: dict[str, Any], base: str, settings: dict[str, Any], message: str
) -> None:
    for optimizer in ({"optimizer": base}, {"optimizer": "gmt", "gmt_base_optimizer": base}):
        cfg = DictDefault({**sft_yaml, **settings, **optimizer})
        prepare_plugins(cfg)
        with pytest.raises(ValueError, match=message):
            validate_config(cfg)


@pytest.mark.parametrize("option", ["--gmt-mask-ratio=0.7", "--gmt_mask_ratio"])
def test_keys_on_the_command_line_are_refused_not_dropped(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["axolotl", "train", "sft.yml", option, "0.7"])
    message = rf"^Error: {option}( 0\.7)?: .*Write gmt_mask_ratio: 0\.7 into the YAML file"
    with pytest.raises(SystemExit, match=message):
        prepared(optimizer="gmt")
    with pytest.raises(SystemExit, match=message):
        prepared(optimizer="sgd")  # Else it would be dropped, and GMT would be off.
    monkeypatch.setattr("sys.argv", ["axolotl", "train", option.partition("=")[0], "--debug"])
    with pytest.raises(SystemExit, match=r"Write gmt_mask_ratio: \.\.\. into"):
        prepared(optimizer="sgd")
    monkeypatch.setattr("sys.argv", ["another-program", option, "0.7"])
    assert prepared(optimizer="sgd") == {"optimizer": "sgd"}


def test_the_keys_survive_the_trip_to_a_ray_worker(sft_yaml: dict[str, Any]) -> None:
    settings = {"optimizer": "gmt", "gmt_base_optimizer": "sgd", "gmt_mask_ratio": 0.3}
    driver = DictDefault({**sft_yaml, **settings, "gmt_include": "mlp", "gmt_granularity": "layer"})
    prepare_plugins(driver)
    # What axolotl.cli.train.ray_train_func does with the config that the driver validated.
    worker = DictDefault(validate_config(driver).to_dict())
    prepare_plugins(worker)
    received = validate_config(worker)
    assert received.optimizer == "sgd"
    assert read_config(received) == GMTConfig(
        mask_ratio=0.3, include=("mlp",), granularity="layer", seed=7
    )
    assert received.gmt_enabled is True


def test_the_schema_keeps_the_keys(sft_yaml: dict[str, Any]) -> None:
    cfg = DictDefault(
        {**sft_yaml, "optimizer": "gmt", "gmt_mask_ratio": 0.3, "gmt_include": "mlp", "gmt_seed": 3}
    )
    prepare_plugins(cfg)
    valid = validate_config(cfg)
    assert {key: value for key, value in valid.items() if key.startswith("gmt_")} == {
        "gmt_enabled": True,
        "gmt_mask_ratio": 0.3,
        "gmt_include": ("mlp",),
        "gmt_seed": 3,
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gmt_enabled": True}, [GMTCallback, GMTReportCallback]),
        ({"gmt_enabled": True, "gmt_report": True}, [GMTCallback, GMTReportCallback]),
        ({"gmt_enabled": True, "gmt_report": False}, [GMTCallback]),
        ({"gmt_report": True}, []),
    ],
)
def test_a_report_is_left_unless_the_config_says_no(
    settings: dict[str, Any], expected: list[type]
) -> None:
    callbacks = GMTPlugin().add_callbacks_post_trainer(DictDefault(settings), MagicMock())
    assert [type(callback) for callback in callbacks] == expected


def test_the_text_to_measure_forgetting_on_is_that_of_the_config(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Some text.")
    for setting, expected in (
        (None, None),
        (False, None),
        (True, HeldOutText.read(True)),
        (str(file), HeldOutText.read(file)),
    ):
        cfg = prepared(optimizer="gmt", gmt_forgetting=setting)
        callback, *_ = GMTPlugin().add_callbacks_post_trainer(DictDefault(cfg), MagicMock())
        assert isinstance(callback, GMTCallback)
        assert callback.held_out_text == expected


def test_no_spelling_of_the_plugin_makes_a_second_one() -> None:
    real = f"{GMTPlugin.__module__}.{GMTPlugin.__name__}"
    names = [LISTED["plugins"][0], "axolotl_gmt.GMTPlugin", "axolotl_gmt.plugin.GMTPlugin", real]
    for spelling in [*names, *(":".join(name.rsplit(".", 1)) for name in names[1:])]:
        assert prepared(plugins=[spelling], optimizer="sgd")["gmt_enabled"] is True, spelling
        active = [
            plugin
            for plugin in PluginManager.get_instance().plugins.values()
            if isinstance(plugin, GMTPlugin)
        ]
        assert len(active) == 1, spelling


def test_every_setting_is_a_documented_key_of_the_schema() -> None:
    only_in_yaml = {"gmt_enabled", "gmt_base_optimizer", "gmt_report", "gmt_forgetting"}
    of_config = {f"gmt_{name}" for name in GMTConfig.model_fields}
    assert set(GMTArgs.model_fields) == only_in_yaml | of_config
    assert all(field.description for field in GMTArgs.model_fields.values())


def test_a_sweep_over_gmt_s_keys_makes_a_good_config_of_each_combination(tmp_path: Path) -> None:
    """The files in docs/recipes.md, through the code of ``axolotl train --sweep``."""
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    lists, paired = snippets(page, "yaml")
    base, sweep = tmp_path / "my.yml", tmp_path / "sweep.yml"
    base.write_text("plugins: [axolotl_gmt]\noptimizer: sgd\noutput_dir: out\n")
    found = []
    for text in (lists, paired):
        sweep.write_text(text)
        for file, is_group in generate_config_files(str(base), str(sweep)):
            assert is_group
            cfg = prepared(**yaml.safe_load(Path(file).read_text()))
            Path(file).unlink()
            config = read_config(DictDefault(cfg))
            found.append((config.mask_ratio, config.criterion, cfg["learning_rate"]))
    lists_of = [(ratio, "gradient", lr) for ratio in (0.0, 0.5, 0.9) for lr in (1e-4, 2e-4)]
    assert sorted(found[:6]) == lists_of
    assert sorted(found[6:]) == [(0.0, "gradient", 1e-4), (0.5, "random", 2e-4)]
