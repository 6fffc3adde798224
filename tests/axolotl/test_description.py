"""What the report is told of an Axolotl config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault

from axolotl_gmt.integrations.axolotl.description import config_text, data_names


@pytest.mark.parametrize(
    ("cfg", "names"),
    [
        ({"datasets": [{"path": "org/chats", "type": "alpaca"}]}, ["org/chats"]),
        ({"datasets": [{"path": "/home/me/mine.jsonl"}, {"path": "b"}]}, ["mine.jsonl", "b"]),
        ({"datasets": [{"path": "data/mine.jsonl"}]}, ["data/mine.jsonl"]),
        ({"pretraining_dataset": "org/web"}, ["org/web"]),
        ({"pretraining_dataset": [{"path": "org/web", "name": "en"}]}, ["org/web"]),
        ({"datasets": [{"type": "no path"}]}, []),
        ({}, []),
    ],
)
def test_data_sets_are_named_without_folders_of_the_disk(
    cfg: dict[str, Any], names: list[str]
) -> None:
    assert data_names(DictDefault(cfg)) == names


def test_the_file_is_shown_without_secrets(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text(
        "base_model: org/model  # küçük\n"
        "comet_api_key: abc\n"
        "hub_token: hf_abc\n"
        "special_tokens:\n"
        "  pad_token: <pad>\n"
        "datasets:\n"
        "  - path: x\n"
        "    storage_options: {client_secret: abc}\n"
        "    auth_token: abc\n"
    )
    text = config_text(DictDefault({"axolotl_config_path": str(file)}))
    assert "abc" not in text
    assert "base_model: org/model  # küçük\n" in text
    assert "comet_api_key: (left out)\n" in text
    assert "  pad_token: <pad>\n" in text


@pytest.mark.parametrize("path", [None, "no/such/file.yml", "a\0b"])
def test_a_file_that_is_gone_stops_nothing(path: str | None) -> None:
    assert config_text(DictDefault({"axolotl_config_path": path})) == ""
