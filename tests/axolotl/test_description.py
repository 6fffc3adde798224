"""What the report is told of an Axolotl config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.utils.dict import DictDefault

from axolotl_gmt.integrations.axolotl.description import config_text, data_names

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4"


@pytest.mark.parametrize(
    ("cfg", "names"),
    [
        ({"datasets": [{"path": "org/chats", "type": "alpaca"}]}, ["org/chats"]),
        ({"datasets": [{"path": "/home/me/mine.jsonl"}, {"path": "b"}]}, ["mine.jsonl", "b"]),
        ({"datasets": [{"path": "data/mine.jsonl"}]}, ["data/mine.jsonl"]),
        ({"datasets": [{"path": "json", "data_files": "/data/a.jsonl"}]}, ["a.jsonl"]),
        ({"datasets": [{"path": "json", "data_files": ["a.jsonl", "b"]}]}, ["a.jsonl", "b"]),
        ({"datasets": [{"path": "a", "split": "x"}, {"path": "a", "split": "y"}]}, ["a"]),
        ({"datasets": [{"path": f"https://me:{TOKEN}@host/a"}]}, ["https://HIDDENhost/a"]),
        ({"pretraining_dataset": "org/web"}, ["org/web"]),
        ({"pretraining_dataset": [{"path": "org/web", "name": "en"}]}, ["org/web"]),
        ({"datasets": [{"path": None}, {"type": "no path"}]}, []),
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
        f"""base_model: org/küçük
note: &anchor {TOKEN}  # {TOKEN}
hub_token: *anchor
comet_api_key: >-
  short-one
special_tokens: {{pad_token: <pad>}}
mlflow_tracking_uri: https://me:{TOKEN}@host/path
datasets:
  - path: org/chats
    storage_options: {{client_secret: short-two}}
{TOKEN}: 1
""",
        encoding="utf-8",
    )
    text = config_text(DictDefault({"axolotl_config_path": str(file)}))
    for secret in (TOKEN, "short-one", "short-two"):
        assert secret not in text
    assert "base_model: org/küçük\n" in text
    shown = yaml.safe_load(text)
    assert shown["special_tokens"] == {"pad_token": "<pad>"}
    assert shown["comet_api_key"] == "HIDDEN"
    assert shown["datasets"][0]["path"] == "org/chats"


@pytest.mark.parametrize("content", ["a: [", "!!python/object:x {}", "\x00"])
def test_a_file_that_cannot_be_read_stops_nothing(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.yml"
    file.write_text(content)
    assert config_text(DictDefault({"axolotl_config_path": str(file)})) == ""


@pytest.mark.parametrize("path", [None, "no/such/file.yml", "a\0b"])
def test_a_file_that_is_gone_stops_nothing(path: str | None) -> None:
    assert config_text(DictDefault({"axolotl_config_path": path})) == ""
