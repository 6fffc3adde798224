"""Comparing checkpoints: against a slow version that loads both whole, and against PEFT's merge."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from axolotl_gmt.cli import gmt
from axolotl_gmt.errors import UserError
from axolotl_gmt.tools.checkpoint import Stored, read_checkpoint
from axolotl_gmt.tools.inspect import compare as inspection
from axolotl_gmt.tools.inspect.adapter import adapt, read_adapter
from axolotl_gmt.tools.inspect.compare import Change, Comparison, compare
from axolotl_gmt.tools.inspect.merge import merge
from axolotl_gmt.tools.inspect.picture import draw_png

Tensors = dict[str, Tensor]


def save(folder: Path, tensors: Tensors, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {name: f"part-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def small_model(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (11, 6),
        "model.norm.weight": (6,),
        "lm_head.weight": (11, 6),
        **{
            f"model.layers.{layer}.{name}": shape
            for layer in range(3)
            for name, shape in {
                "self_attn.q_proj.weight": (6, 6),
                "self_attn.q_proj.bias": (6,),
                "mlp.down_proj.weight": (6, 17),
                "mlp.experts.weight": (4, 3, 5),
            }.items()
        },
    }
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def tuned(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """About a third of the entries changed, by more than bfloat16 rounds away."""
    generator = torch.Generator().manual_seed(1)
    changed = {}
    for name, tensor in tensors.items():
        mask = torch.rand(tensor.shape, generator=generator) < 0.3
        changed[name] = (tensor.double() * (1 + mask / 16)).to(dtype or tensor.dtype)
    return changed


def reference_change(base: Tensor, tuned: Tensor) -> tuple[int, int, int, float, float]:
    """Entries, changed, non-finite, and the norms of the change and the base: one by one."""
    changed = non_finite = 0
    change, kept = [], []
    for before, after in zip(base.to(tuned.dtype).flatten(), tuned.flatten(), strict=True):
        if not (torch.isfinite(before) and torch.isfinite(after)):
            non_finite += 1
            continue
        changed += bool(before != after)
        change.append(after.double() - before.double())
        kept.append(before.double())
    norms = [torch.tensor(values).norm().item() if values else 0.0 for values in (change, kept)]
    return base.numel(), changed, non_finite, norms[0], norms[1]


def assert_as_reference(result: Comparison, base: Tensors, tuned: Tensors) -> None:
    assert result.tensors.keys() == base.keys() & tuned.keys()
    for name, change in result.tensors.items():
        *counts, norm, base_norm = reference_change(base[name], tuned[name])
        assert [change.entries, change.changed, change.non_finite] == counts, name
        assert change.norm == pytest.approx(norm, rel=1e-6), name
        assert change.square_base**0.5 == pytest.approx(base_norm, rel=1e-12), name


def with_nan(tensors: Tensors) -> Tensors:
    changed = tuned(tensors)
    changed["lm_head.weight"][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return changed


def with_odd_shapes(tensors: Tensors) -> Tensors:
    return tensors | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}


CASES: dict[str, tuple[Tensors, Tensors, int]] = {
    "one file": (small_model(), tuned(small_model()), 1),
    "sharded against one file": (small_model(), tuned(small_model()), 3),
    "bf16": (small_model(torch.bfloat16), tuned(small_model(torch.bfloat16)), 1),
    "fp16": (small_model(torch.float16), tuned(small_model(torch.float16)), 2),
    "fp64": (small_model(torch.float64), tuned(small_model(torch.float64)), 1),
    "fp32 tuned to bf16": (small_model(), tuned(small_model(), torch.bfloat16), 1),
    "bf16 tuned to fp32": (
        small_model(torch.bfloat16),
        tuned(small_model(torch.bfloat16), torch.float32),
        1,
    ),
    "fp16 tuned to bf16": (
        small_model(torch.float16),
        tuned(small_model(torch.float16), torch.bfloat16),
        1,
    ),
    "bf16 tuned to fp64": (
        small_model(torch.bfloat16),
        tuned(small_model(torch.bfloat16), torch.float64),
        1,
    ),
    "NaN after": (small_model(), with_nan(small_model()), 1),
    "NaN before and after": (with_nan(small_model()), with_nan(small_model()), 1),
    "odd shapes": (with_odd_shapes(small_model()), tuned(with_odd_shapes(small_model())), 1),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("window", [1, 7, 1 << 18])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_streamed_comparison_equals_one_that_loads_both_whole(
    case: tuple[Tensors, Tensors, int],
    window: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, after, shards = case
    monkeypatch.setattr(inspection, "_WINDOW_ENTRIES", window)
    result = compare(save(tmp_path / "base", base, shards), save(tmp_path / "tuned", after))
    assert_as_reference(result, base, after)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_rounding_equals_torch_for_every_kind_of_float(dtype: str) -> None:
    to = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    patterns = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    halfway = np.arange(0, 1 << 32, 1 << 15, dtype=np.uint32)  # Ties of bfloat16 among them.
    values = np.concatenate([patterns, halfway]).view(np.float32)
    expected = torch.from_numpy(values).to(getattr(torch, to)).double().numpy()
    stored = {each: Stored(Path(), "", each, values.shape, 0) for each in ("F32", dtype)}
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = inspection._converted(values, stored["F32"], stored[dtype]).astype(np.float64)
    np.testing.assert_array_equal(rounded, expected)


def test_rounding_alone_is_no_change_and_is_remarked_upon(tmp_path: Path) -> None:
    base = small_model()
    result = compare(
        save(tmp_path / "base", base),
        save(tmp_path / "tuned", {name: tensor.bfloat16() for name, tensor in base.items()}),
    )
    assert result.total.changed == 0
    assert result.total.norm == 0
    assert result.converted == {("F32", "BF16"): len(base)}
    assert "converted to BF16 first" in result.remarks()[0]


def test_what_cannot_be_compared_is_listed(tmp_path: Path) -> None:
    base = small_model() | {"position_ids": torch.arange(3), "old": torch.ones(1)}
    after = small_model() | {"position_ids": torch.arange(3), "new": torch.ones(1)}
    after["model.embed_tokens.weight"] = torch.ones(12, 6)
    del after["lm_head.weight"]
    result = compare(save(tmp_path / "base", base), save(tmp_path / "tuned", after))
    assert result.only_in_base == ["lm_head.weight", "old"]
    assert result.only_in_tuned == ["new"]
    assert result.reshaped == {"model.embed_tokens.weight": ((11, 6), (12, 6))}
    assert result.not_weights == ["position_ids"]
    remarks = "\n".join(result.remarks())
    for name in ("lm_head.weight, old", ": new", "11x6, then 12x6", ": position_ids"):
        assert name in remarks


def test_non_finite_entries_are_named_and_stay_out_of_the_norms(tmp_path: Path) -> None:
    base, after = small_model(), with_nan(small_model())
    result = compare(save(tmp_path / "base", base), save(tmp_path / "tuned", after))
    assert result.non_finite == ["lm_head.weight"]
    assert result.total.non_finite == 3
    assert np.isfinite(result.total.norm)
    assert "lm_head.weight (3)" in "\n".join(result.remarks())


def test_figures_add_up_over_modules_and_layers(tmp_path: Path) -> None:
    result = compare(
        save(tmp_path / "base", small_model()), save(tmp_path / "tuned", tuned(small_model()))
    )
    modules = result.by_module()
    assert list(modules) == [
        "lm_head",
        "model.embed_tokens",
        "mlp.down_proj",
        "mlp.experts",
        "self_attn.q_proj",
        "model.norm",
    ]
    assert list(result.by_layer()) == ["0", "1", "2"]
    for parts in (modules, result.by_layer() | result.outside_layers()):
        total = sum(parts.values(), Change())
        assert total.changed == result.total.changed
        assert total.norm == pytest.approx(result.total.norm)
    q_proj = sum(
        (result.tensors[f"model.layers.1.self_attn.q_proj.{part}"] for part in ("weight", "bias")),
        Change(),
    )
    cell = result.by_module_and_layer()["self_attn.q_proj", 1]
    assert cell.changed_fraction == q_proj.changed / 42
    assert cell.relative_norm == pytest.approx(q_proj.relative_norm)


def compared(tmp_path: Path, names: list[str]) -> Comparison:
    base = {name: torch.ones(2) for name in names}
    return compare(save(tmp_path / "base", base), save(tmp_path / "tuned", tuned(base)))


def test_experts_are_one_module_type_and_layers_without_them_stay_empty(tmp_path: Path) -> None:
    experts = [f"model.layers.10.mlp.experts.{expert}.up_proj.weight" for expert in range(3)]
    result = compared(tmp_path, [*experts, "model.layers.9.mlp.up_proj.weight"])
    assert result.by_module()["mlp.experts.*.up_proj"].entries == 6
    assert list(result.by_layer()) == ["9", "10"]
    assert result.by_module_and_layer().keys() == {
        ("mlp.experts.*.up_proj", 10),
        ("mlp.up_proj", 9),
    }


def test_stacks_of_layers_are_told_apart(tmp_path: Path) -> None:
    names = ["model.visual.blocks.0.attn.weight", "model.text.layers.0.attn.weight"]
    result = compared(tmp_path, names)
    assert set(result.by_layer()) == {"visual.blocks.0", "text.layers.0"}
    assert set(result.by_module()) == {"visual.blocks.*.attn", "text.layers.*.attn"}


def test_labels_tell_two_folders_of_one_name_apart(tmp_path: Path) -> None:
    base = save(tmp_path / "a" / "checkpoint-9", small_model())
    after = save(tmp_path / "b" / "checkpoint-9", tuned(small_model()))
    assert compare(base, after).labels == ("a/checkpoint-9", "b/checkpoint-9")
    assert compare(base, after / "model.safetensors").labels == (
        "a/checkpoint-9",
        "checkpoint-9/model.safetensors",
    )


# LoRA. All numbers are small integers and all scales powers of 2, so that PEFT's merge is exact.


def integers(tensors: Tensors, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        tensor.copy_(torch.randint(-3, 4, tensor.shape, generator=generator))


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rank stabilised": {"target_modules": ["v_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.1\.mlp\.up_proj": 8, "k_proj": 2},
        "alpha_pattern": {r"layers\.0\..*proj": 16, "down_proj": 2},
    },
    "embedding and whole modules": {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
    },
    "as Axolotl writes it": {"target_modules": ["q_proj", "down_proj"], "fan_in_fan_out": None},
    "fan_in_fan_out": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "fan_in_fan_out unset": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": None},
    "DoRA": {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_dora": True},
    "DoRA fan_in_fan_out": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    "bias": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    "PiSSA": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "LoHa": {"method": "LOHA", "target_modules": ["q_proj", "up_proj"]},
    "LoKr": {"method": "LOKR", "target_modules": ["q_proj", "up_proj"]},
    "OFT": {"method": "OFT", "target_modules": ["q_proj", "up_proj"], "oft_block_size": 4},
    "IA3": {
        "method": "IA3",
        "target_modules": ["k_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
}


def base_model(folder: Path, adapter: str, toy_model: Path) -> Path:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    if "c_attn" in ADAPTERS[adapter]["target_modules"]:
        config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
        model = GPT2LMHeadModel(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(toy_model, dtype=torch.float32)
    with torch.no_grad():
        integers(dict(model.named_parameters()), seed=0)
    model.save_pretrained(folder)
    return folder


def save_adapter(
    base: Path, folder: Path, seed: int = 1, method: str = "LORA", **settings: Any
) -> tuple[Path, Path]:
    """Folders of an adapter of ``base`` and of both merged."""
    from peft import PeftConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    if method == "LORA":
        settings |= {"r": 4, "lora_alpha": 8}
    config = PeftConfig.from_peft_type(peft_type=method, task_type="CAUSAL_LM", **settings)
    load = partial(AutoModelForCausalLM.from_pretrained, base, dtype=torch.float32)
    model = get_peft_model(load(), config)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    with torch.no_grad():
        integers(trained, seed)
    adapter, merged = folder / "adapter", folder / "merged"
    model.save_pretrained(adapter)
    # Loaded as a user would: of the patterns that fit, the first one in the file counts.
    PeftModel.from_pretrained(load(), adapter).merge_and_unload().save_pretrained(merged)
    return adapter, merged


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_merged_layer_by_layer_as_peft_merges_it_whole(
    name: str, toy_model: Path, tmp_path: Path
) -> None:
    base = base_model(tmp_path / "base", name, toy_model)
    adapter, merged = save_adapter(base, tmp_path, **ADAPTERS[name])
    model, expected = adapt(read_checkpoint(base), read_adapter(adapter)), read_checkpoint(merged)
    assert model.tensors.keys() == expected.tensors.keys()
    for tensor in model.tensors:
        layer, values = tensor.rpartition(".")[0], model.unmerged(tensor)
        if layer in model.layers:
            values = merge(model, layer).get_parameter(tensor).flatten().numpy()
        np.testing.assert_array_equal(values, expected.read(tensor), tensor)


def test_an_adapter_is_compared_by_what_it_changes(toy_model: Path, tmp_path: Path) -> None:
    name = "embedding and whole modules"
    base = base_model(tmp_path / "base", name, toy_model)
    adapter, merged = save_adapter(base, tmp_path, **ADAPTERS[name])
    result = run(base, adapter / "adapter_model.safetensors", "--json")
    assert result.stderr.strip() == ""
    found, expected = json.loads(result.stdout), compare(base, merged).as_dict()
    assert 0 < found["total"]["changed"] < found["total"]["entries"]
    assert found["compared"] == "weights and an adapter"
    for key in ("total", "tensors", "only_in_base", "only_in_tuned"):
        assert found[key] == expected[key], key


def test_two_adapters_are_compared_by_their_own_matrices(toy_model: Path, tmp_path: Path) -> None:
    first, second = (
        save_adapter(toy_model, tmp_path / str(seed), seed, target_modules=["q_proj"])[0]
        for seed in (1, 2)
    )
    result = compare(first, second)
    before, after = (load_file(file / "adapter_model.safetensors") for file in (first, second))
    prefix = "base_model.model."
    assert_as_reference(
        result,
        {name.removeprefix(prefix): tensor for name, tensor in before.items()},
        {name.removeprefix(prefix): tensor for name, tensor in after.items()},
    )
    assert "self_attn.q_proj.lora_A" in result.by_module()
    assert "their own matrices" in result.remarks()[0]


# Refusals.


def fake_adapter(folder: Path, tensors: Tensors | None = None, **config: object) -> Path:
    weights = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{matrix}.weight": torch.ones(shape)
        for matrix, shape in {"A": (2, 6), "B": (6, 2)}.items()
    }
    save(folder, {})
    (folder / "model.safetensors").unlink()
    save_file(tensors or weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file.parent


def truncated(folder: Path) -> Path:
    file = save(folder, small_model()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    return folder


def without_a_shard(folder: Path) -> Path:
    (save(folder, small_model(), 3) / "part-1.safetensors").unlink()
    return folder


def with_a_shard_of_another(folder: Path) -> Path:
    save(folder, small_model(), 3)
    save_file({"other": torch.ones(1)}, folder / "part-1.safetensors")
    return folder


def two_files(folder: Path) -> Path:
    save_file({"a": torch.ones(1)}, save(folder, small_model()) / "b.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    return folder


INDEX = "model.safetensors.index.json"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"

REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path, "does not exist.*hf download"),
    "empty": (lambda path: write(path / "config.json", "{}"), r"has no weights \(\*.safetensors\)"),
    "pickle": (lambda path: write(path / "pytorch_model.bin", ""), "pickle.*save_pretrained"),
    "pickle file": (lambda path: write(path / "a.bin", "") / "a.bin", "not a .safetensors file"),
    "checkpoints": (
        lambda path: save(path / "checkpoint-5", small_model()).parent,
        "Name one of its checkpoints: checkpoint-5",
    ),
    "truncated": (truncated, "model.safetensors is incomplete"),
    "not safetensors": (lambda path: write(path / "model.safetensors", "{}"), "damaged"),
    "index without JSON": (lambda path: write(path / INDEX, "{"), "is not valid JSON"),
    "index of a list": (lambda path: write(path / INDEX, "[]"), "is not a JSON object"),
    "index without map": (lambda path: write(path / INDEX, "{}"), "has no weight_map"),
    "no shard": (without_a_shard, "1 of 3 shards are missing, first part-1.safetensors"),
    "wrong shard": (with_a_shard_of_another, "says that part-1.safetensors holds"),
    "no index": (two_files, "has 2 safetensors files and no model.safetensors.index.json"),
    "bytes": (
        lambda path: save(path, {"model.norm.weight": torch.ones(6, dtype=torch.uint8)}),
        "model.norm.weight is stored as U8: quantised",
    ),
    "float8": (
        lambda path: save(path, {"model.norm.weight": torch.ones(6).to(torch.float8_e4m3fn)}),
        "stored as F8_E4M3: quantised",
    ),
    "no floats": (lambda path: save(path, {"ids": torch.arange(3)}), "no floating-point tensor"),
    "another model": (lambda path: save(path, {"w": torch.ones(1)}), "no tensor name in common"),
    "replicated layers": (
        lambda path: fake_adapter(path, layer_replication=[[0, 2], [1, 3]]),
        "layer_replication is set.*merge-lora",
    ),
    "adapter of another model": (
        lambda path: fake_adapter(
            path,
            {
                "base_model.model.w.lora_A.weight": torch.ones(2, 8),
                "base_model.model.w.lora_B.weight": torch.ones(8, 2),
            },
        ),
        "has w.lora_A.weight, and .* has no weight that it could change",
    ),
    "adapter without weights": (
        lambda path: write(path / "adapter_config.json", "{}"),
        "but no adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_refused_in_one_line(
    case: tuple[Callable[[Path], Path], str], tmp_path: Path
) -> None:
    make, message = case
    base, after = save(tmp_path / "base", small_model()), make(tmp_path / "tuned")
    with pytest.raises(UserError, match=message) as caught:
        compare(base, after)
    assert "\n" not in str(caught.value)
    result = run(base, after)
    assert result.exit_code == 1
    assert f"Error: {caught.value}" in result.stderr
    assert result.stdout == ""


NOT_MERGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no method": (lambda path: fake_adapter(path, peft_type=None), "peft_type is 'None'"),
    "unknown method": (lambda path: fake_adapter(path, peft_type="X"), "peft_type is 'X', which"),
    "VeRA": (lambda path: fake_adapter(path, peft_type="VERA"), "VERA.*each weight by itself"),
    "prompts": (
        lambda path: fake_adapter(path, peft_type="PROMPT_TUNING"),
        "PROMPT_TUNING.*each weight by itself",
    ),
    "DoRA": (lambda path: fake_adapter(path, use_dora=True), "lora_magnitude_vector"),
    "activated LoRA": (
        lambda path: fake_adapter(path, alora_invocation_tokens=[1]),
        "aLoRA does not support merging",
    ),
    "Megatron": (
        lambda path: fake_adapter(path, megatron_config={}, megatron_core="os", r=3),
        r"q_proj has \{'lora_A.weight': \[2, 6\].* be \{'lora_A.weight': \[3, 6\]",
    ),
    "alpha": (lambda path: fake_adapter(path, lora_alpha="big"), "unsupported operand"),
    "pattern": (lambda path: fake_adapter(path, alpha_pattern={"(": 1}), "unterminated subpattern"),
    "magnitudes": (
        lambda path: fake_adapter(path, {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(6)}),
        r"q_proj has \{'lora_magnitude_vector': \[6\]\}, which would be \{'lora_A",
    ),
    "half a pair": (
        lambda path: fake_adapter(path, {f"{Q_PROJ}.lora_A.weight": torch.ones(2, 6)}),
        r"q_proj has \{'lora_A.weight': \[2, 6\]\}, which would be .*'lora_B.weight'",
    ),
    "not gathered": (
        lambda path: fake_adapter(
            path, {f"{Q_PROJ}.lora_{matrix}.weight": torch.ones(0) for matrix in "AB"}
        ),
        r"'lora_A.weight': \[0\].* would be",
    ),
    "adapter of a larger model": (
        lambda path: fake_adapter(
            path,
            {
                f"{Q_PROJ}.lora_A.weight": torch.ones(2, 8),
                f"{Q_PROJ}.lora_B.weight": torch.ones(8, 2),
            },
        ),
        r"'lora_A.weight': \[2, 8\].* would be .*\[2, 6\]",
    ),
}


@pytest.mark.parametrize("case", NOT_MERGED.values(), ids=NOT_MERGED.keys())
def test_peft_says_which_adapters_it_cannot_merge(
    case: tuple[Callable[[Path], Path], str], tmp_path: Path
) -> None:
    make, message = case
    base, adapter = save(tmp_path / "base", small_model()), make(tmp_path / "tuned")
    model = adapt(read_checkpoint(base), read_adapter(adapter))
    with pytest.raises(Exception, match=message):
        merge(model, "model.layers.0.self_attn.q_proj")


def test_an_adapter_that_is_not_merged_is_refused_in_one_line(tmp_path: Path) -> None:
    base = save(tmp_path / "base", small_model())
    adapter = fake_adapter(tmp_path / "tuned", alora_invocation_tokens=[1])
    result = run(base, adapter)
    assert result.exit_code == 1
    assert result.stderr.strip() == (
        f"Error: PEFT cannot merge {adapter} layer by layer: NotImplementedError: aLoRA does not "
        f"support merging. Merge {adapter} into its base, with axolotl merge-lora, and name the "
        "merged model instead."
    )


def test_the_same_files_are_not_compared_with_themselves(tmp_path: Path) -> None:
    base = save(tmp_path / "base", small_model())
    with pytest.raises(UserError, match="are the same files"):
        compare(base, base / "model.safetensors")


def test_an_adapter_as_base_of_a_whole_model_is_refused(tmp_path: Path) -> None:
    after = save(tmp_path / "tuned", small_model())
    with pytest.raises(UserError, match=r"Name the adapter's base model first"):
        compare(fake_adapter(tmp_path / "adapter"), after)


# The command.


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(gmt, ["inspect", *map(str, arguments)])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = save(tmp_path / "base", small_model())
    return base, save(tmp_path / "tuned", tuned(small_model(), torch.bfloat16))


def test_the_table_has_every_module_every_layer_and_the_sum(pair: tuple[Path, Path]) -> None:
    result = run(*pair)
    assert result.exit_code == 0
    total = compare(*pair).total
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "│" in line]
    parts = [row[0].strip() for row in rows]
    assert parts[:2] == ["lm_head", "model.embed_tokens"]
    assert parts[-4:] == ["layer 0", "layer 1", "layer 2", "all"]
    assert [cell.strip() for cell in rows[-1][1:4]] == [
        f"{total.entries:,}",
        f"{total.changed_fraction:.2%}",
        f"{total.norm:.4g}",
    ]
    assert "converted to BF16 first" in result.stderr


def test_json_has_every_tensor_and_can_be_piped(pair: tuple[Path, Path]) -> None:
    result = run(*pair, "--json")
    found = json.loads(result.stdout)
    expected = compare(*pair)
    assert found["total"]["changed"] == expected.total.changed
    assert found["total"]["relative_change_norm"] == expected.total.relative_norm
    assert found["tensors"].keys() == expected.tensors.keys()
    assert found["converted"] == [{"base": "F32", "tuned": "BF16", "tensors": 15}]


def test_the_picture_is_written_once_and_never_over_another(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from matplotlib.image import imread

    file = tmp_path / "changes.png"
    assert run(*pair, "--png", file).exit_code == 0
    assert imread(file).shape[1] > 1000
    before = file.read_bytes()
    again = run(*pair, "--png", file)
    assert again.exit_code == 1
    assert "changes.png exists" in again.stderr
    assert file.read_bytes() == before
    nowhere = run(*pair, "--png", tmp_path / "no" / "a.png")
    assert nowhere.exit_code == 1
    assert "a.png cannot be written: No such file or directory" in nowhere.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "changes.png", "tuned"]


@pytest.mark.parametrize(
    ("names", "change"),
    [
        (["model.layers.0.w.weight"], 0.0),
        (["model.layers.0.w.weight", "head.weight"], torch.nan),
        ([f"layers.{layer}.w.weight" for layer in range(100)], 1.0),
    ],
    ids=["nothing changed", "nothing finite", "100 layers"],
)
@pytest.mark.filterwarnings("error")
def test_a_picture_can_be_drawn_of_unusual_models(
    names: list[str], change: float, tmp_path: Path
) -> None:
    base = {name: torch.zeros(4) for name in names}
    after = {name: torch.full((4,), change) for name in names}
    result = compare(save(tmp_path / "base", base), save(tmp_path / "tuned", after))
    assert draw_png(result).startswith(b"\x89PNG")


def test_a_model_without_layers_has_a_table_but_no_picture(tmp_path: Path) -> None:
    base, after = (
        save(tmp_path / "a", {"w": torch.ones(1)}),
        save(tmp_path / "b", {"w": torch.zeros(1)}),
    )
    result = run(base, after, "--png", tmp_path / "c.png")
    assert result.exit_code == 1
    assert "no heat map to draw" in result.stderr
    assert "100.00%" in result.stdout


def test_checkpoints_without_a_common_shape_are_an_error(tmp_path: Path) -> None:
    base = save(tmp_path / "a", {"model.layers.0.w.weight": torch.ones(2, 3)})
    tuned = save(tmp_path / "b", {"model.layers.0.w.weight": torch.ones(3, 2)})
    result = run(base, tuned)
    assert result.exit_code == 1
    assert "No tensor has the same shape" in result.stderr
    assert "model.layers.0.w.weight is [2, 3] and [3, 2]" in result.stderr


def test_norms_beyond_float64_are_no_numbers_in_json(tmp_path: Path) -> None:
    base = save(tmp_path / "a", {"w": torch.full((4,), 1e200, dtype=torch.float64)})
    tuned = save(tmp_path / "b", {"w": torch.full((4,), 2e200, dtype=torch.float64)})
    result = run(base, tuned, "--json")
    total = json.loads(result.stdout)["total"]
    assert (total["changed"], total["change_norm"], total["relative_change_norm"]) == (
        4,
        None,
        None,
    )


def test_a_layer_number_beyond_belief_is_just_a_name(tmp_path: Path) -> None:
    name = f"model.layers.{'9' * 5000}.mlp.weight"
    paths = [
        save(tmp_path / x, {name: torch.full((2,), float(i))}) for i, x in enumerate("ab", start=1)
    ]
    assert run(*paths).exit_code == 0


# Memory.

MB = 10**6
LARGEST, OTHERS = 128 << 20, 16 << 20
MEASURED_RUN = """
import sys
from axolotl_gmt.cli import gmt
gmt(sys.argv[1:], standalone_mode=False)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]), "torch" in sys.modules)
"""


def sparse_checkpoint(folder: Path, dtype: str, first_byte: bytes) -> Path:
    """One tensor of 128 MiB and 40 of 16 MiB that take no room on the disk: zeros but for one."""
    sizes = {"model.embed_tokens.weight": LARGEST}
    sizes |= {f"model.layers.{layer}.mlp.up_proj.weight": OTHERS for layer in range(40)}
    header, end = {}, 0
    for name, size in sizes.items():
        shape = [1024, size // 1024 // {"BF16": 2, "F32": 4}[dtype]]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + first_byte)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_memory_stays_far_below_the_largest_tensor(dtype: str, tmp_path: Path) -> None:
    base = sparse_checkpoint(tmp_path / "base", dtype, b"\0")
    after = sparse_checkpoint(tmp_path / "tuned", dtype, b"\1")
    command = [sys.executable, "-c", MEASURED_RUN, "inspect", str(base), str(after), "--png"]
    done = subprocess.run(
        [*command, str(tmp_path / "a.png")], capture_output=True, text=True, timeout=300, check=True
    )
    peak, imported_torch = done.stdout.split()[-2:]
    assert imported_torch == "False"  # It takes more memory than all the rest.
    # Python, numpy and matplotlib are some 110 MB; both models are 1.6 GB, a pair of whole small
    # tensors 34 MB more, and the bound that was promised is 2 * 134 + 500 MB.
    assert int(peak) * 1024 < 140 * MB
