"""Masks that stay are a part of a checkpoint, without which no run goes on with another mask."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from axolotl_gmt import GMTCallback
from axolotl_gmt.integrations import mask_files
from tests.integrations.test_callback import plain_trainer

SPARSE: dict[str, Any] = {"mask_ratio": 0.9, "mask_interval": 3, "hold": True, "warmup_steps": 1}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 7, "logging_steps": 1}


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def train(
    toy_model: Path, folder: Path, resume: Path | None = None, **settings: Any
) -> dict[str, torch.Tensor]:
    callback = GMTCallback(**{**SPARSE, **settings})
    trainer = plain_trainer(toy_model, folder, callback, **SAVING)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return weights(trainer.model)


@pytest.fixture(scope="module")
def whole(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    torch.save(train(toy_model, folder), folder / "final.pt")
    return folder


@pytest.mark.parametrize("step", range(1, 7))
def test_a_run_resumes_at_every_step_with_the_masks_that_it_had(
    step: int, whole: Path, toy_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = train(toy_model, tmp_path, tmp_path / f"checkpoint-{step}")
    expected = torch.load(whole / "final.pt")
    for name, weight in expected.items():
        assert torch.equal(weight, resumed[name]), name


def test_a_checkpoint_elsewhere_is_named_to_the_callback(
    whole: Path, toy_model: Path, tmp_path: Path
) -> None:
    checkpoint = whole / "checkpoint-3"
    with pytest.raises(
        ValueError, match=r"resumes at step 3 .* Set resume_from of the GMTCallback"
    ):
        train(toy_model, tmp_path, checkpoint)
    callback = GMTCallback(**SPARSE)
    callback.resume_from = str(checkpoint)
    trainer = plain_trainer(toy_model, tmp_path, callback, **SAVING)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in torch.load(whole / "final.pt").items():
        assert torch.equal(weight, weights(trainer.model)[name]), name


def test_the_checkpoint_of_another_run_is_not_taken_for_it(
    whole: Path, toy_model: Path, tmp_path: Path
) -> None:
    train(toy_model, tmp_path, mask_ratio=0.5)
    with pytest.raises(ValueError, match="is not that checkpoint"):
        train(toy_model, tmp_path, whole / "checkpoint-3")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"is missing.*it has none\).*gmt_warmup_steps in YAML\): 3"),
        ("of two ranks", r"it has rank_0_of_2\.safetensors\)\. Resume with as many processes"),
        ("cut off", "does not hold masks"),
        ("something else", "does not hold masks"),
        ("of another model", r"The mask of .* was made when it was \(7, 7\).*but now it is"),
    ],
)
def test_a_resume_that_cannot_have_its_masks_is_refused(
    damage: str, message: str, whole: Path, toy_model: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(whole / "checkpoint-3", checkpoint)
    path = mask_files.path_in(checkpoint, 0, 1)
    match damage:
        case "missing":
            path.unlink()
        case "of two ranks":
            path.rename(mask_files.path_in(checkpoint, 0, 2))
        case "cut off":
            path.write_bytes(path.read_bytes()[:-10])
        case "something else":
            save_file({"weight": torch.zeros(3)}, path)
        case "of another model":
            state = mask_files.load(path)
            state["layouts"] = dict.fromkeys(state["layouts"], "(7, 7) torch.float32, whole")
            mask_files.save(path, state)
    with pytest.raises(ValueError, match=message):
        train(toy_model, tmp_path, checkpoint)


def test_where_a_new_mask_is_due_none_is_needed(
    whole: Path, toy_model: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(whole / "checkpoint-4", checkpoint)
    mask_files.path_in(checkpoint, 0, 1).unlink()
    resumed = train(toy_model, tmp_path, checkpoint)
    for name, weight in torch.load(whole / "final.pt").items():
        assert torch.equal(weight, resumed[name]), name


def test_a_run_whose_masks_do_not_stay_writes_none(toy_model: Path, tmp_path: Path) -> None:
    for settings in ({"mask_interval": 1}, {"mask_ratio": 0.0}):
        train(toy_model, tmp_path, **settings)
        assert not list(tmp_path.rglob(mask_files.FOLDER))


def test_a_checkpoint_that_no_run_resumes_from_has_no_masks(
    toy_model: Path, tmp_path: Path
) -> None:
    settings = {**SAVING, "save_only_model": True}
    plain_trainer(toy_model, tmp_path, GMTCallback(**SPARSE), **settings).train()
    assert (tmp_path / "checkpoint-7").is_dir()
    assert not list(tmp_path.rglob(mask_files.FOLDER))


def test_masks_take_an_eighth_of_a_byte_an_entry(whole: Path, toy_model: Path) -> None:
    state = mask_files.load(mask_files.path_in(whole / "checkpoint-3", 0, 1))
    entries = sum(w.numel() for w in torch.load(whole / "final.pt").values())
    taken = sum(bits.nbytes for bits in state["masks"].values())
    assert entries / 8 <= taken <= entries / 8 + len(state["masks"])
    assert state["step"] == 3
