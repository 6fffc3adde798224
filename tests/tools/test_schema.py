"""The JSON schemas of the command ``schema`` against what GMT and Axolotl accept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from axolotl_gmt import GMTConfig
from axolotl_gmt.cli import gmt
from axolotl_gmt.integrations.axolotl.args import PREFIX, GMTArgs
from axolotl_gmt.tools.recipes import recipe_folder

SCHEMA = [sys.executable, "-m", "axolotl_gmt", "schema"]


def printed(*command: str) -> dict[str, Any]:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    schema: dict[str, Any] = json.loads(result.stdout)
    Draft202012Validator.check_schema(schema)
    return schema


@pytest.fixture(scope="module")
def of_gmt() -> dict[str, Any]:
    return printed(*SCHEMA)


@pytest.fixture(scope="module")
def of_axolotl() -> dict[str, Any]:
    return printed(*SCHEMA, "--axolotl")


def test_the_schema_of_gmt_has_every_key_with_its_default_and_meaning(
    of_gmt: dict[str, Any],
) -> None:
    properties = of_gmt["properties"]
    assert properties.keys() == GMTArgs.model_fields.keys()
    for name, setting in GMTConfig.model_fields.items():
        assert properties[PREFIX + name]["default"] == setting.default
        assert properties[PREFIX + name]["description"] == setting.description


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_ratio": 0},
        {"mask_ratio": 0.99},
        {"mask_ratio": 1},
        {"mask_ratio": -0.1},
        {"mask_ratio": "half"},
        {"granularity": "layer"},
        {"granularity": "row"},
        {"criterion": "random"},
        {"criterion": 3},
        {"include": "norm"},
        {"exclude": ["norm", "embed"]},
        {"exclude": []},
        {"exclude": 3},
        {"mask_interval": 5},
        {"mask_interval": "once"},
        {"mask_interval": 0},
        {"mask_interval": "twice"},
        {"warmup_steps": 0},
        {"warmup_steps": -1},
        {"seed": 7},
        {"seed": "seven"},
        {"hold": True},
        {"hold": 7},
        {"log_modules": None},
        {"mask_rato": 0.5},
    ],
)
def test_the_schema_of_gmt_allows_what_gmt_accepts(
    settings: dict[str, Any], of_gmt: dict[str, Any]
) -> None:
    try:
        GMTConfig(**{name: value for name, value in settings.items() if value is not None})
        accepted = True
    except ValidationError:
        accepted = False
    keys = {PREFIX + name: value for name, value in settings.items()}
    config = {"base_model": "model", "learning_rate": 1e-5, **keys}
    assert Draft202012Validator(of_gmt).is_valid(config) == accepted


def test_axolotls_schema_has_the_keys_of_both(
    of_axolotl: dict[str, Any], of_gmt: dict[str, Any]
) -> None:
    for key, setting in of_gmt["properties"].items():
        assert of_axolotl["properties"][key] == setting
    validator = Draft202012Validator(of_axolotl)
    for recipe in recipe_folder().glob("*.yml"):
        config = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        unknown = config.keys() - of_axolotl["properties"].keys()
        assert all(key.startswith("lm_eval_") for key in unknown)  # Those of an integration.
        validator.validate(config)
        assert not validator.is_valid({**config, "sequence_len": "long"})
        assert not validator.is_valid({**config, "gmt_mask_rato": 0.5})
    quantized = {**config, "quantization": {"weight_dtype": "fp8"}}
    validator.validate(quantized)  # An enum of torch's dtypes, which no JSON can hold.


def test_the_schema_of_gmt_needs_no_axolotl_and_comes_at_once(of_gmt: dict[str, Any]) -> None:
    program = (
        "import sys; sys.modules['axolotl'] = None\n"
        "from axolotl_gmt.cli import gmt\n"
        "gmt(['schema'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    assert printed(sys.executable, "-c", program) == of_gmt


def test_without_axolotl_its_schema_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(gmt, ["schema", "--axolotl"])
    assert result.exit_code == 2
    assert "Install axolotl-gmt[axolotl]." in result.output


def test_an_axolotl_that_cannot_be_imported_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "axolotl").mkdir()
    (tmp_path / "axolotl" / "__init__.py").write_text("raise ImportError('it is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    result = CliRunner().invoke(gmt, ["schema", "--axolotl"])
    assert result.exit_code == 1
    assert "Error: Axolotl cannot be imported: ImportError: it is broken" in result.output
