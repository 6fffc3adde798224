"""The recipes: their heads, what they claim, that Axolotl and lm_eval take them, the commands."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from axolotl_gmt.cli import gmt
from axolotl_gmt.errors import UserError
from axolotl_gmt.tools import recipes
from axolotl_gmt.tools.recipes import HEAD
from tests.conftest import RunAxolotl

RECIPES = {recipe.name: recipe for recipe in recipes.all_recipes()}
BODIES: dict[str, dict[str, Any]] = {
    name: yaml.safe_load(recipe.text) for name, recipe in RECIPES.items()
}
PAPER = "(Li et al., AAAI 2025, arXiv 2406.15330)"
OF_PAPER = sorted(name for name, recipe in RECIPES.items() if recipe.reproduces.endswith(PAPER))
KINDS = ("fsdp2", "zero3")
VARIANTS = [name for name in RECIPES if name.endswith(("-fsdp2", "-zero3"))]
BASES = [name for name in RECIPES if name not in VARIANTS]

# Millions of parameters of the models, counted from their configs.
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-1.7B": 1711,
    "HuggingFaceTB/SmolLM2-360M": 362,
    "HuggingFaceTB/SmolLM3-3B": 3075,
    "Qwen/Qwen3-0.6B-Base": 596,
    "Qwen/Qwen3-1.7B": 1721,
    "Qwen/Qwen3-4B-Base": 4022,
    "meta-llama/Llama-2-13b-hf": 13016,
    "meta-llama/Llama-2-7b-hf": 6738,
    "meta-llama/Llama-3.2-1B": 1236,
    "meta-llama/Llama-3.2-1B-Instruct": 1236,
    "meta-llama/Meta-Llama-3-8B": 8030,
    "mistralai/Mistral-7B-v0.1": 7242,
}
BYTES = {
    "weights": 2,
    "gradients": 2,
    "8-bit AdamW": 2,
    "AdamW": 4,
    "Kahan": 2,
    "reference": 2,
}
BYTES_UNDER_ZERO_3 = {**BYTES, "fp32 weights": 4, "AdamW": 8}

# A row of each data set, with the columns that its card lists.
_PAIR = {
    side: [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": answer}]
    for side, answer in (("chosen", "It is 2."), ("rejected", "It is 3."))
}
_CHAT = {"messages": _PAIR["chosen"] + [{"role": "user", "content": "Sure?"}, _PAIR["chosen"][1]]}
ROWS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/smol-smoltalk": {**_CHAT, "source": "x"},
    "allenai/tulu-v2-sft-mixture": {"dataset": "x", "id": "x", **_CHAT},
    "argilla/ultrafeedback-binarized-preferences-cleaned": {
        "source": "x",
        "prompt": "1 + 1?",
        **_PAIR,
        "chosen-rating": 5.0,
        "chosen-model": "x",
        "rejected-rating": 1.0,
        "rejected-model": "x",
    },
    "argilla/ultrafeedback-binarized-preferences-cleaned-kto": {
        "prompt": "1 + 1?",
        "completion": "It is 2.",
        "label": True,
        "model": "x",
        "average_rating": 5.0,
        "source": "x",
    },
    "ise-uiuc/Magicoder-Evol-Instruct-110K": {"instruction": "1 + 1?", "response": "It is 2."},
    "meta-math/MetaMathQA": {
        "type": "x",
        "query": "1 + 1?",
        "original_question": "x",
        "response": "It is 2.",
    },
}


def base_of(name: str) -> str:
    return name.removesuffix("-fsdp2").removesuffix("-zero3")


def parameters(name: str) -> float:
    """Billions, those of the model that training started from if that was trained here too."""
    model = BODIES[name]["base_model"]
    if model.startswith("./outputs/"):
        return parameters(model.removeprefix("./outputs/"))
    return PARAMETERS[model] / 1000


@pytest.mark.parametrize("name", RECIPES)
def test_a_head_says_which_file_runs_and_whether_it_is_of_the_paper(name: str) -> None:
    recipe = RECIPES[name]
    assert f"axolotl train {name}.yml" in recipe.command
    assert recipe.reproduces == "beyond the paper" or name in OF_PAPER
    assert all(getattr(recipe, key.replace(" ", "_")) for key in HEAD)
    assert re.fullmatch(r"(1 GPU|8 GPUs) of \d+ GB", recipe.hardware)
    assert max(map(len, recipe.text.splitlines())) <= 100


@pytest.mark.parametrize("name", RECIPES)
def test_the_estimated_memory_adds_up_and_fits_the_hardware(name: str) -> None:
    recipe = RECIPES[name]
    gpus = 8 if name in VARIANTS else 1
    terms, total = re.match(r"(.*) = ([\d.]+) GB", recipe.memory).groups()  # type: ignore[union-attr]
    costs = {
        label: float(cost) for label, cost in re.findall(r"([\w ,-]+?) ([\d.]+)(?: \+ |$)", terms)
    }
    assert recipe.memory.endswith("; estimated")
    assert sum(costs.values()) == pytest.approx(float(total), abs=0.01)
    assert float(total) < 0.8 * int(re.findall(r"of (\d+) GB", recipe.hardware)[0])
    sizes = BYTES_UNDER_ZERO_3 if name.endswith("-zero3") else BYTES
    for label in costs.keys() & sizes.keys():
        assert costs[label] == pytest.approx(sizes[label] * parameters(name) / gpus, abs=0.06)
    if BODIES[name].get("adapter") is None:
        assert costs.keys() <= sizes.keys()
        assert ("reference" in costs) == (BODIES[name].get("rl") == "dpo")


def test_each_system_of_the_paper_has_a_recipe_for_one_gpu_for_fsdp2_and_for_zero_3() -> None:
    systems = {
        ("mistralai/Mistral-7B-v0.1", "ise-uiuc/Magicoder-Evol-Instruct-110K"),
        ("mistralai/Mistral-7B-v0.1", "meta-math/MetaMathQA"),
        ("meta-llama/Meta-Llama-3-8B", "meta-math/MetaMathQA"),
        ("meta-llama/Llama-2-7b-hf", "allenai/tulu-v2-sft-mixture"),
        ("meta-llama/Llama-2-13b-hf", "allenai/tulu-v2-sft-mixture"),
        ("./outputs/sft-llama-2-7b", "argilla/ultrafeedback-binarized-preferences-cleaned"),
        ("./outputs/sft-llama-2-13b", "argilla/ultrafeedback-binarized-preferences-cleaned"),
    }
    bases = {name for name in OF_PAPER if name in BASES}
    assert {
        (BODIES[name]["base_model"], BODIES[name]["datasets"][0]["path"]) for name in bases
    } == systems
    assert set(OF_PAPER) - bases == {f"{name}-{kind}" for name in bases for kind in KINDS}


@pytest.mark.parametrize("name", OF_PAPER)
def test_recipes_of_the_paper_have_its_settings(name: str) -> None:
    settings = BODIES[name]
    assert settings["bf16"] is True
    assert settings["weight_decay"] == 0
    assert settings["lr_scheduler"] == "cosine"
    assert settings["warmup_ratio"] == 0.03


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_its_base_but_for_distribution_and_how_small_steps_survive(name: str) -> None:
    distribution = {"deepspeed", "fsdp_version", "fsdp_config", "gradient_accumulation_steps"}
    rounding = {"optimizer", "optim_args"}
    variant, base = BODIES[name], BODIES[base_of(name)]
    different = {key for key in variant | base if variant.get(key) != base.get(key)}
    assert different <= distribution | rounding
    per_step = "micro_batch_size", "gradient_accumulation_steps"
    assert 8 * variant[per_step[0]] * variant[per_step[1]] == base[per_step[0]] * base[per_step[1]]


@pytest.mark.parametrize("name", [name for name in RECIPES if not BODIES[name].get("adapter")])
def test_an_optimizer_of_bf16_weights_keeps_the_steps_that_they_would_round_away(name: str) -> None:
    settings = BODIES[name]
    keeps = {
        "adamw_torch_8bit": settings.get("optim_args") == {"bf16_stochastic_round": True}
        and name in BASES,  # torchao's does not step DTensors in BF16
        "optimi_adamw": True,
        "adamw_torch_fused": settings.get("deepspeed", {}).get("bf16") == {"enabled": True},
    }
    assert keeps[settings["optimizer"]]


@pytest.mark.parametrize("name", RECIPES)
def test_paths_are_relative_and_outputs_are_named_after_the_recipe(name: str) -> None:
    assert BODIES[name]["output_dir"] == f"./outputs/{base_of(name)}"
    assert not re.search(r"""(^|[\s="'])(/|~|[A-Za-z]:\\)\w""", RECIPES[name].text)


def test_axolotl_gmt_check_finds_nothing_in_the_recipes() -> None:
    files = [str(recipes.recipe_folder() / f"{name}.yml") for name in RECIPES]
    result = CliRunner().invoke(gmt, ["check", "--json", *files])
    reports = json.loads(result.stdout.splitlines()[-1])
    assert len(reports) == len(RECIPES)
    assert [(each["path"], each["errors"], each["warnings"]) for each in reports] == [
        (file, [], []) for file in files
    ]
    assert result.exit_code == 0


@pytest.fixture(scope="module")
def toy_start(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with the special tokens that the recipes name, as real tokenizers have them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = {
        token
        for settings in BODIES.values()
        for token in settings.get("special_tokens", {}).values()
    }
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.add_tokens(sorted(named), special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    model.resize_token_embeddings(len(tokenizer))
    folder = tmp_path_factory.mktemp("toy_start")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _ways_to_train() -> list[str]:
    """A recipe for each combination of data, method and prompt."""
    keys = "rl", "adapter", "chat_template", "chat_template_jinja"
    ways = {
        (BODIES[name]["datasets"][0]["path"], *map(BODIES[name].get, keys)): name for name in BASES
    }
    return sorted(ways.values())


@pytest.mark.parametrize("name", _ways_to_train())
def test_a_recipe_trains_a_toy_model_on_rows_like_those_of_its_data(
    name: str, run_axolotl: RunAxolotl, toy_start: Path, tmp_path: Path
) -> None:
    settings = BODIES[name]
    (data,) = settings["datasets"]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([json.dumps(ROWS[data["path"]])] * 32))
    run = run_axolotl(
        settings,
        base_model=str(toy_start),
        datasets=[{**data, "path": str(file), "ds_type": "json", "split": "train"}],
        dataset_prepared_path=str(tmp_path / "prepared"),
        dataset_num_proc=1,
        plugins=[*settings["plugins"], "tests.use_cpu.UseCpu"],
        attn_implementation="eager",
        sequence_len=256,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=2,
        warmup_ratio=None,
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        **{key: False for key in settings if re.fullmatch(r"lora_\w+_kernel", key)},
    )
    assert all(0 < fraction < 1 for fraction in run.kept_fractions)
    assert len(run.kept_fractions) == 2
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in run.logs if "loss" in log)


def eval_commands(name: str) -> list[list[str]]:
    """The lm_eval commands in a recipe's comments, as their arguments after ``lm_eval``."""
    comments = "\n".join(
        line[1:] for line in RECIPES[name].text.splitlines() if line.startswith("#")
    ).replace("\\\n", " ")
    return [shlex.split(command) for command in re.findall(r"lm_eval (run .*)", comments)]


def tasks_in(arguments: list[str]) -> list[str]:
    return arguments[arguments.index("--tasks") + 1].split(",")


@pytest.fixture(scope="module")
def installed_tasks() -> dict[str, dict[str, Any]]:
    from lm_eval.tasks import TaskManager

    index: dict[str, dict[str, Any]] = TaskManager().task_index
    return index


def test_lm_eval_knows_the_tasks_and_axolotl_can_run_those_that_it_is_given(
    installed_tasks: dict[str, dict[str, Any]],
) -> None:
    for name, settings in BODIES.items():
        for task in settings.get("lm_eval_tasks", []):
            definition = Path(installed_tasks[task.partition(":")[0]]["yaml_path"]).read_text()
            assert "unsafe_code" not in definition, (name, task)
        assert settings.get("lm_eval_post_train", False) is False
        for arguments in eval_commands(name):
            for task in tasks_in(arguments):
                definition = Path(installed_tasks[task]["yaml_path"]).read_text()
                unsafe = "unsafe_code: true" in definition
                assert unsafe == ("--confirm_run_unsafe_code" in arguments), (name, task)
    assert not [task for task in installed_tasks if "tydi" in task.lower()]


@pytest.mark.parametrize("name", OF_PAPER)
def test_the_benchmarks_of_the_paper_judge_its_recipes(name: str) -> None:
    benchmarks = {
        "code": {"humaneval", "mbpp"},
        "math": {"gsm8k", "minerva_math"},
        "sft": {"mmlu", "gsm8k", "bbh", "truthfulqa_mc2", "humaneval"},
    }
    benchmarks["dpo"] = benchmarks["sft"]
    system = name.partition("-")[0]
    tasks = {task.partition(":")[0] for task in BODIES[name].get("lm_eval_tasks", [])}
    tasks.update(task for arguments in eval_commands(name) for task in tasks_in(arguments))
    assert tasks == benchmarks[system]
    assert ("TyDiQA" in RECIPES[name].text) == (system in ("sft", "dpo"))


@pytest.mark.parametrize("name", [name for name in RECIPES if eval_commands(name)])
def test_lm_eval_understands_the_commands_in_the_comments(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval._cli.harness import HarnessCLI

    for arguments in eval_commands(name):
        monkeypatch.setattr("sys.argv", ["lm_eval", *arguments])
        parsed = HarnessCLI().parse_args()
        assert parsed.model == "hf"
        assert parsed.model_args["pretrained"] == BODIES[name]["output_dir"]


@pytest.mark.parametrize("columns", ["30", "200"])
def test_the_list_names_every_recipe_its_model_method_and_hardware(columns: str) -> None:
    listed = CliRunner().invoke(gmt, ["recipes"], env={"COLUMNS": columns}).stdout
    lines = [re.split(r"  +", line.strip()) for line in listed.splitlines()[1:]]
    assert lines == [[r.name, r.model, r.method, r.hardware] for r in RECIPES.values()]


def test_the_list_as_json_is_the_last_line() -> None:
    result = CliRunner().invoke(gmt, ["recipes", "--json"])
    listed = json.loads(result.stdout.splitlines()[-1])
    assert listed == [recipe.as_dict() for recipe in RECIPES.values()]
    assert "base_model" not in result.stdout


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("sft-llama-2-7b", "SFT, full"),
        ("dpo-llama-2-7b-fsdp2", "DPO, full, FSDP2"),
        ("code-mistral-7b-zero3", "SFT, full, ZeRO-3"),
        ("lora-qwen3-4b", "SFT, LoRA"),
        ("qlora-qwen3-8b", "SFT, QLoRA"),
        ("kto-llama-3.2-1b", "KTO, LoRA"),
        ("orpo-smollm2-1.7b", "ORPO, full"),
        ("simpo-qwen3-1.7b", "SimPO, LoRA"),
    ],
)
def test_the_method_is_read_from_the_yaml(name: str, method: str) -> None:
    assert RECIPES[name].method == method


@pytest.mark.parametrize("ending", ["", ".yml"])
def test_a_recipe_is_printed_or_written_as_it_is(tmp_path: Path, ending: str) -> None:
    recipe, file = RECIPES["math-qwen3-0.6b"], tmp_path / "mine.yml"
    assert CliRunner().invoke(gmt, ["recipe", recipe.name + ending]).stdout == recipe.text
    result = CliRunner().invoke(gmt, ["recipe", recipe.name + ending, "-o", str(file)])
    assert result.exit_code == 0
    assert (result.stdout, result.stderr) == ("", f"Wrote {file}\n")
    # Its commands name the file that they are about; no path of this machine gets in.
    text = file.read_text(encoding="utf-8")
    assert text == recipe.text.replace("math-qwen3-0.6b.yml", "mine.yml") != recipe.text
    assert list(tmp_path.iterdir()) == [file]


def test_a_recipe_in_a_folder_has_its_path_in_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    CliRunner().invoke(gmt, ["recipe", "math-qwen3-0.6b", "-o", "configs/mine.yml"])
    (command,) = (
        line for line in Path("configs/mine.yml").read_text().splitlines() if "command: " in line
    )
    assert command.endswith("axolotl train configs/mine.yml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["math-qwen-0.6b"], ["math-qwen-0.6b", "no such recipe", "math-qwen3-0.6b"]),
        (["math-qwen3-0.6b", "-o", "kept.yml"], ["kept.yml", "already exists"]),
        (["math-qwen3-0.6b", "-o", "nowhere/new.yml"], ["nowhere/new.yml", "cannot be written"]),
        (["../pyproject"], ["../pyproject", "no such recipe"]),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept.yml").write_text("mine")
    result = CliRunner().invoke(gmt, ["recipe", *arguments])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert all(word in line for word in words)
    assert Path("kept.yml").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "kept.yml"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("base_model: x\n", "title"),
        ("# title: x\n# reproduces: y\n\nbase_model: x\n", "memory"),
        ("\n".join(f"# {key}: x" for key in reversed(HEAD)) + "\n\nbase_model: x\n", "order"),
        ("\n".join(f"# {key}: x" for key in HEAD) + "\n\nplugins: []\n", "base_model"),
    ],
)
def test_a_file_without_the_head_is_no_recipe(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        recipes.parse_recipe("x", text)


def test_an_installation_without_recipes_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "recipe_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: no recipes are there"):
        recipes.all_recipes()


def test_the_wheel_holds_the_recipes_where_they_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Path(__file__).parents[2]
    wheel = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    (place,) = wheel["targets"]["wheel"]["force-include"].items()
    assert place == ("example_configs", "axolotl_gmt/example_configs")
    assert recipes.recipe_folder() == project / "example_configs"
    (tmp_path / place[1]).mkdir(parents=True)
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "axolotl_gmt" / "tools" / "recipes.py"))
    assert recipes.recipe_folder() == tmp_path / place[1]
