"""Settings: defaults, and the message for each bad one."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from pydantic import ValidationError

from axolotl_gmt import GMTConfig
from axolotl_gmt.config import explain
from axolotl_gmt.criteria import BUILT_IN


def test_defaults() -> None:
    assert GMTConfig().model_dump() == {
        "mask_ratio": 0.5,
        "granularity": "tensor",
        "criterion": "gradient",
        "include": None,
        "exclude": None,
        "seed": None,
        "mask_interval": 1,
        "warmup_steps": 0,
        "hold": False,
        "log_modules": False,
        "log_overlap": False,
    }


def test_a_single_pattern_is_a_list_of_one() -> None:
    assert GMTConfig.model_validate({"include": "mlp"}).include == ("mlp",)


def test_a_ratio_that_yaml_reads_as_text_is_a_number() -> None:
    assert GMTConfig.model_validate({"mask_ratio": "5e-1"}).mask_ratio == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1}, r"gmt_mask_ratio: 1 is outside \[0, 1\).*such as 0\.5"),
        ({"mask_ratio": 1.0}, r"gmt_mask_ratio: 1\.0 is outside"),
        ({"mask_ratio": -0.1}, r"gmt_mask_ratio: -0\.1 is outside"),
        ({"mask_ratio": math.nan}, r"gmt_mask_ratio: nan is outside"),
        ({"mask_ratio": math.inf}, r"gmt_mask_ratio: inf is outside"),
        ({"mask_ratio": True}, r"gmt_mask_ratio: True is not a number"),
        ({"mask_ratio": "half"}, r"gmt_mask_ratio: 'half' is not a number"),
        ({"mask_ratio": [0.5]}, r"gmt_mask_ratio: \[0\.5\] is not a number"),
        ({"granularity": "row"}, r"gmt_granularity: 'row' is not one of tensor, layer, global"),
        ({"granularity": ["layer"]}, r"gmt_granularity: \['layer'\] is not one of"),
        ({"criterion": "magic"}, r"gmt_criterion: 'magic' is not one of gradient"),
        ({"include": "("}, r"gmt_include: '\(' is not a valid regular expression.*Fix"),
        ({"exclude": ["a", "["]}, r"gmt_exclude: '\[' is not a valid regular expression"),
        ({"exclude": [3]}, r"gmt_exclude: 3 is not a valid regular expression"),
        ({"include": []}, r"gmt_include: \[\] is not a regular expression or a list of them"),
        ({"include": {"a": 1}}, r"gmt_include: \{'a': 1\} is not a regular expression"),
        ({"include": "a{4294967295}"}, r"gmt_include: 'a\{4294967295\}' is not a valid"),
        ({"include": "a{99999999999999999999}"}, r"gmt_include: 'a\{9+\}' is not a valid"),
        ({"include": "(" * 9000 + ")" * 9000}, r"gmt_include: '\(+\.\.\.\)+' is not a valid"),
        ({"mask_interval": 0}, r"gmt_mask_interval: 0 is neither a number of .*steps nor once"),
        ({"mask_interval": "twice"}, r"gmt_mask_interval: 'twice' is neither"),
        ({"mask_interval": True}, r"gmt_mask_interval: True is neither"),
        ({"mask_interval": 2.5}, r"gmt_mask_interval: 2\.5 is neither"),
        ({"warmup_steps": -1}, r"gmt_warmup_steps: -1 is not a number of optimizer steps"),
        ({"warmup_steps": 0.1}, r"gmt_warmup_steps: 0\.1 is not a number of optimizer steps"),
        ({"hold": "perhaps"}, r"gmt_hold: 'perhaps' is not valid"),
        ({"seed": "x"}, r"gmt_seed: 'x' is not valid"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        GMTConfig.model_validate(settings)
    assert re.match(message, explain(error.value, "gmt_")), explain(error.value, "gmt_")


def test_every_bad_setting_gets_its_line() -> None:
    with pytest.raises(ValidationError) as error:
        GMTConfig.model_validate({"mask_ratio": 2, "granularity": "row", "typo": 1})
    lines = explain(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["mask_ratio", "granularity", "typo"]
    assert lines[-1].startswith("typo: there is no such setting. Did you mean ")


def test_the_json_schema_says_what_is_allowed() -> None:
    properties = GMTConfig.model_json_schema()["properties"]
    ratio = properties["mask_ratio"]
    assert (ratio["minimum"], ratio["exclusiveMaximum"], ratio["type"]) == (0, 1, "number")
    interval = {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "once", "type": "string"}]}
    assert properties["mask_interval"].items() >= interval.items()
    assert (properties["warmup_steps"]["minimum"], properties["hold"]["type"]) == (0, "boolean")
    assert properties["granularity"]["enum"] == ["tensor", "layer", "global"]
    assert properties["criterion"]["examples"] == list(BUILT_IN)
    for setting in ("include", "exclude"):
        kinds = [kind["type"] for kind in properties[setting]["anyOf"]]
        assert kinds == ["string", "array", "null"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ""),
        ({"mask_interval": 5}, ", a new mask every 5 steps"),
        ({"mask_interval": "once"}, ", one mask for the whole run"),
        (
            {"warmup_steps": 7, "hold": True},
            ", no mask in the first 7 steps, weights of masked entries held",
        ),
        ({"mask_ratio": 0, "warmup_steps": 7, "hold": True}, ""),
    ],
)
def test_the_log_says_what_departs_from_the_paper(settings: Any, words: str) -> None:
    assert GMTConfig(**settings).summary.partition("criterion gradient")[2] == words
