"""Deltas: against a slow version that compares whole files, and against files made to do harm."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from axolotl_gmt.cli import gmt
from axolotl_gmt.errors import UserError
from axolotl_gmt.tools import checkpoint
from axolotl_gmt.tools.delta import file as delta_file
from axolotl_gmt.tools.delta.apply import apply
from axolotl_gmt.tools.delta.diff import diff
from axolotl_gmt.tools.inspect import compare as inspection
from axolotl_gmt.tools.inspect.compare import compare
from tests.reference import delta_reference as reference
from tests.reference.delta_reference import BITS, Checkpoint, Raw
from tests.test_docs import DOCS, snippets
from tests.tools import test_inspect

# Round trips.

NAMES = [
    "w",
    "values/w",
    "indices/w",
    "w.values",
    'a"\\b',
    "\x1b[31m",
    "é/漢",
    "",
    "model.layers.0.q",
]
SHAPES = [(), (0,), (3, 0), (1,), (4,), (2, 6), (3, 2, 4), (90,), (8, 25)]


@st.composite
def raws(draw: st.DrawFn) -> Raw:
    dtype = draw(st.sampled_from(sorted(BITS)))
    shape = draw(
        st.sampled_from([s for s in SHAPES if np.prod(s, dtype=int) * BITS[dtype] % 8 == 0])
    )
    size = int(np.prod(shape, dtype=int)) * BITS[dtype] // 8
    seed = draw(st.integers(0, 5))
    return Raw(dtype, shape, np.random.default_rng(seed).bytes(size))


@st.composite
def tuned_raws(draw: st.DrawFn, base: Raw) -> Raw:
    """The same, or changed in a few bits, in most of them, or in kind."""
    how = draw(st.sampled_from(["same", "few", "few", "most", "dtype", "shape", "other"]))
    if how == "dtype":
        alike = [dtype for dtype, bits in BITS.items() if bits == BITS[base.dtype]]
        return base._replace(dtype=draw(st.sampled_from(alike)))
    if how == "shape":
        return base._replace(shape=(1, *base.shape))
    if how == "other":
        return draw(raws())
    data = bytearray(base.data)
    if how == "most":
        data = bytearray(byte ^ 1 for byte in data)
    if how == "few" and data:
        for place in draw(st.lists(st.integers(0, len(data) - 1), max_size=4)):
            data[place] ^= draw(st.sampled_from([1, 0x40, 0x80]))
    return base._replace(data=bytes(data))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Checkpoint, Checkpoint]:
    base = draw(st.dictionaries(st.sampled_from(NAMES), raws(), min_size=1))
    tuned = {name: draw(tuned_raws(raw)) for name, raw in base.items() if draw(st.integers(0, 5))}
    return base, draw(st.dictionaries(st.sampled_from(NAMES), raws(), max_size=1)) | tuned


def save(folder: Path, tensors: Checkpoint, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    files = [f"part-{number}.safetensors" for number in range(shards)]
    places = {name: files[number % shards] for number, name in enumerate(tensors)}
    for file in files:
        held = {name: tensors[name] for name in tensors if places[name] == file}
        reference.write_file(folder / (file if shards > 1 else "model.safetensors"), held)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def floats(*values: float, dtype: torch.dtype = torch.float32) -> Raw:
    tensor = torch.tensor(values, dtype=dtype)
    names = {each: name for name, each in reference.WEIGHTS.items()}
    return Raw(names[dtype], tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())


ZEROS = floats(*[0.0] * 20)
NEGATIVE_ZERO = floats(*[0.0] * 10, -0.0, *[0.0] * 9)
NAN = ZEROS._replace(data=struct.pack("<I", 0x7FC00000) + ZEROS.data[4:])
OTHER_NAN = ZEROS._replace(data=struct.pack("<I", 0xFFC12345) + ZEROS.data[4:])


@pytest.mark.parametrize("window", [8, 1 << 22], ids=["small windows", "one window"])
@given(pair=pairs(), shards=st.tuples(st.integers(1, 3), st.integers(1, 3)))
@example(pair=({"w": ZEROS}, {"w": NEGATIVE_ZERO}), shards=(1, 1))
@example(pair=({"w": NAN}, {"w": OTHER_NAN}), shards=(1, 1))
@example(pair=({"w": NAN}, {"w": ZEROS}), shards=(1, 1))
@example(pair=({"embed": ZEROS, "head": ZEROS}, {"embed": NEGATIVE_ZERO}), shards=(2, 1))
@example(pair=({"embed": ZEROS}, {"embed": NEGATIVE_ZERO, "head": NEGATIVE_ZERO}), shards=(1, 2))
@example(pair=({"w": ZEROS}, {"v": ZEROS}), shards=(3, 1))
@settings(deadline=None, max_examples=150)
def test_the_tuned_model_is_made_again_bit_for_bit(
    pair: tuple[Checkpoint, Checkpoint], shards: tuple[int, int], window: int
) -> None:
    base, tuned = pair
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as temporary:
        patch.setattr(checkpoint, "_WINDOW_BYTES", window)
        patch.setattr(delta_file, "_CHECKED_AT_ONCE", max(window // 4, 3))
        folder = Path(temporary)
        old, new = (
            save(folder / name, tensors, count)
            for name, tensors, count in zip(("base", "tuned"), pair, shards, strict=True)
        )
        delta = folder / "delta.safetensors"
        result = diff(old, new, delta, force=True)
        apply(old, delta, folder / "again")
        apply(old, delta, None)
        assert reference.read_folder(folder / "again") == tuned
        assert reference.apply_delta(base, delta) == tuned
        assert_as_reference(base, tuned, delta)
        assert result.nbytes == delta.stat().st_size
        assert result.entries == sum(int(np.prod(raw.shape, dtype=int)) for raw in tuned.values())
        assert result.removed == sorted(base.keys() - tuned.keys())
        assert sorted(path.name for path in folder.iterdir()) == [
            "again",
            "base",
            "delta.safetensors",
            "tuned",
        ]


def assert_as_reference(base: Checkpoint, tuned: Checkpoint, delta: Path) -> None:
    """The delta has what changed and nothing else, in part where that is the smaller form."""
    found, expected = reference.read_file(delta), {}
    for name, raw in tuned.items():
        if name in base and base[name] == raw:
            continue
        indices = reference.expected_form(base.get(name), raw)
        if indices is None:
            expected[f"values/{name}"] = raw
            continue
        values = b"".join(raw.entries[index] for index in indices)
        packed = struct.pack(f"<{len(indices)}i", *indices)
        expected[f"values/{name}"] = Raw(raw.dtype, (len(indices),), values)
        expected[f"indices/{name}"] = Raw("I32", (len(indices),), packed)
    assert found == expected


def test_the_share_of_changed_entries_counts_bits(tmp_path: Path) -> None:
    base = {"w": ZEROS, "f4": Raw("F4", (4,), b"\0\1"), "cut": ZEROS, "gone": ZEROS, "same": ZEROS}
    tuned = {
        "w": NEGATIVE_ZERO,
        "f4": Raw("F4", (4,), b"\1\1"),
        "cut": floats(*[0.0] * 19),
        "new": floats(1.0, 2.0),
        "same": ZEROS,
    }
    result = diff(
        save(tmp_path / "base", base),
        save(tmp_path / "tuned", tuned),
        tmp_path / "delta.safetensors",
        force=True,
    )
    # One of w; all of a dtype whose entries share bytes, of another shape, and of a new tensor.
    assert (result.changed, result.entries) == (1 + 4 + 19 + 2, 20 + 4 + 19 + 2 + 20)
    assert (result.in_part, result.in_whole) == (["w"], ["cut", "f4", "new"])
    assert result.removed == ["gone"]


def test_indices_take_four_bytes_wherever_they_can() -> None:
    assert [delta_file.index_dtype(entries) for entries in (1, 2**31, 2**31 + 1)] == [
        "I32",
        "I32",
        "I64",
    ]


def test_every_tensor_of_the_delta_is_aligned_for_its_dtype(tmp_path: Path) -> None:
    kinds = {str(dtype): torch.zeros(99, dtype=dtype) for dtype in reference.WEIGHTS.values()}
    changed = {name: tensor.clone() for name, tensor in kinds.items()}
    for tensor in changed.values():
        tensor[7] = 1
    base, tuned = (test_inspect.save(tmp_path / n, t) for n, t in (("a", kinds), ("b", changed)))
    diff(base, tuned, tmp_path / "delta.safetensors", force=True)
    assert len(load_file(tmp_path / "delta.safetensors")) == 8  # Torch reads aligned ones only.


# What goes along with the tensors.


def tuned_pair(folder: Path, shards: int = 1) -> tuple[Path, Path]:
    """Two folders of a model of which 3% of the entries of each matrix differ."""
    generator = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.{layer}.mlp.down_proj.weight": torch.randn(64, 32, generator=generator)
        for layer in range(3)
    } | {"model.norm.weight": torch.ones(32)}
    tuned = {
        name: torch.where(torch.rand(old.shape, generator=generator) < 0.03, old + 1, old)
        for name, old in base.items()
    }
    return (
        test_inspect.save(folder / "base", base, shards),
        test_inspect.save(folder / "tuned", tuned),
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return tuned_pair(tmp_path)


@pytest.fixture
def delta(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    diff(*pair, tmp_path / "delta.safetensors")
    return tmp_path / "delta.safetensors"


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="numpy") as opened:
        return dict(opened.metadata())


def test_files_that_differ_travel_with_the_delta_and_the_rest_come_from_the_base(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    for folder, files in {
        base: {"config.json": "{}", "tokenizer.json": "[1]", "modeling.py": "1", "README.md": "a"},
        tuned: {
            "config.json": '{"dtype": "bfloat16"}',
            "tokenizer.json": "[1]",
            "chat_template.jinja": "{{ messages }}\n\0é",
            "modeling.py": "2",
            "trainer_state.json": "{}",
        },
    }.items():
        for name, text in files.items():
            (folder / name).write_text(text)
    result = diff(base, tuned, tmp_path / "delta.safetensors")
    assert result.files == ["chat_template.jinja", "config.json"]
    applied = apply(base, tmp_path / "delta.safetensors", tmp_path / "again")
    assert applied.files == result.files
    assert applied.copied == ["modeling.py", "tokenizer.json"]
    found = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert found.keys() == {"model.safetensors", *applied.files, *applied.copied}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert found[name] == (tuned / name).read_bytes()
    assert found["modeling.py"] == b"1"


@pytest.mark.parametrize("place", [".", "checkpoint-9"])
def test_the_settings_of_the_run_are_in_the_delta(
    place: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    record = {"args": {"mask_ratio": 0.25, "granularity": "layer", "include": None, "other": 1}}
    state = {
        "log_history": [{"step": 1, "loss": 0.5}],
        "stateful_callbacks": {"GMTCallback": record},
    }
    (pair[1] / place).mkdir(exist_ok=True)
    (pair[1] / place / "trainer_state.json").write_text(json.dumps(state))
    delta = tmp_path / "delta.safetensors"
    assert "mask_ratio 0.25, granularity layer" in run("diff", *pair, "-o", delta).stdout
    assert json.loads(metadata(delta)["gmt"]) == {"mask_ratio": 0.25, "granularity": "layer"}
    result = run("apply", pair[0], delta, "--check")
    assert "GMT's settings: mask_ratio 0.25, granularity layer\n" in result.stderr


def test_settings_that_a_stranger_wrote_are_those_of_this_version_and_can_be_printed(
    pair: tuple[Path, Path], delta: Path
) -> None:
    written = {"mask_ratio": 0.5, "criterion": "\x1b[31m" * 10**4, "seed": [[1]], "x": "y"}
    delta.write_bytes(with_metadata(gmt=json.dumps(written))(*parts(delta)))
    result = run("apply", pair[0], delta, "--check")
    (line,) = [line for line in result.stderr.splitlines() if "settings" in line]
    assert re.fullmatch(
        r"GMT's settings: mask_ratio 0.5, criterion (\\x1b\[31m)+[^\x1b]{0,8}", line
    )
    assert len(line) < 2000


def test_without_a_record_there_are_no_settings(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[1] / "trainer_state.json").write_text("[")
    diff(*pair, tmp_path / "delta.safetensors")
    assert "gmt" not in metadata(tmp_path / "delta.safetensors")


def test_a_model_with_tied_weights_is_loaded_by_transformers(
    toy_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(toy_model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    with torch.no_grad():
        model.lm_head.weight[5, 3:6] += 1
        model.model.layers[1].mlp.up_proj.weight[0, 0] = -0.0
    model.config.use_cache = False
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(toy_model).save_pretrained(tmp_path / "tuned")
    result = diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta.safetensors")
    assert result.in_part == ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
    apply(tmp_path / "base", tmp_path / "delta.safetensors", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.use_cache is False
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter.view(torch.int32), again.state_dict()[name].view(torch.int32))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(toy_model).chat_template


# Other readers.


def test_the_reader_in_the_docs_makes_the_tuned_model(pair: tuple[Path, Path], delta: Path) -> None:
    reader, _ = snippets(DOCS / "delta-format.md", "python")
    names: dict[str, Any] = {}
    exec(reader, names)
    found = names["apply_delta"](pair[0] / "model.safetensors", delta)
    expected = load_file(pair[1] / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Served(torch.nn.Module):
    """A model that is being served, in which a loader finds checkpoint names."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.weights.items())

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            self.weights[name].data.copy_(tensor)
        return {name for name, _ in weights}


VLLM = "vllm.model_executor.model_loader.checkpoint_weight_patch"


def vllms_loader() -> types.ModuleType:
    try:
        return importlib.import_module(VLLM)
    except ImportError:
        return reference


def test_the_patches_in_the_docs_are_those_that_vllm_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for dtype in reference.WEIGHTS.values():
        old = torch.randn(40, 5, generator=generator).to(dtype)
        base[f"{dtype}"], tuned[f"{dtype}"] = old, old.clone()
        tuned[f"{dtype}"][::7, 2] = -0.0
        base[f"{dtype} with NaN"], tuned[f"{dtype} with NaN"] = old.clone(), old.clone()
        tuned[f"{dtype} with NaN"][3, 2] = torch.nan
    base["ids"], tuned["ids"] = torch.arange(9), torch.arange(9) * 2
    diff(
        test_inspect.save(tmp_path / "base", base),
        test_inspect.save(tmp_path / "tuned", tuned),
        tmp_path / "delta.safetensors",
        force=True,
    )
    monkeypatch.setitem(sys.modules, VLLM, vllms_loader())
    for parent in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, types.ModuleType(parent)))
    names: dict[str, Any] = {}
    exec(snippets(DOCS / "delta-format.md", "python")[1], names)
    served = Served({name: tensor.clone() for name, tensor in base.items()})
    names["patch"](served, tmp_path / "delta.safetensors")
    for name, tensor in tuned.items():
        bits = [each.view(torch.uint8) for each in (served.weights[name], tensor)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("case", test_inspect.CASES)
def test_inspect_says_of_a_delta_what_it_says_of_the_tuned_model(case: str, tmp_path: Path) -> None:
    base, after, shards = test_inspect.CASES[case]
    old = test_inspect.save(tmp_path / "base", base | {"ids": torch.arange(3)}, shards)
    new = test_inspect.save(
        tmp_path / "tuned", after | {"ids": torch.arange(3), "n": torch.ones(1)}
    )
    diff(old, new, tmp_path / "delta.safetensors", force=True)
    expected = compare(old, new).as_dict()
    found = compare(old, tmp_path / "delta.safetensors").as_dict()
    assert found | {"tuned": expected["tuned"]} == expected


def test_inspect_reads_a_few_changed_entries_in_small_windows(
    pair: tuple[Path, Path], delta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_WINDOW_ENTRIES", 7)
    expected = compare(*pair).as_dict()
    found = compare(pair[0], delta).as_dict()
    assert found | {"tuned": expected["tuned"]} == expected


# Refusals.


def run(*arguments: object) -> Result:
    return CliRunner().invoke(gmt, [str(argument) for argument in arguments])


def adapter(folder: Path) -> Path:
    return test_inspect.fake_adapter(folder)


NO_DIFF: dict[str, tuple[Callable[[Path], Path], str]] = {
    "adapter": (adapter, r"is an adapter.*type axolotl merge-lora CONFIG.yml"),
    "adapter's file": (
        lambda path: adapter(path) / "adapter_model.safetensors",
        r"is an adapter.*merge-lora",
    ),
    "pickle": (
        lambda path: test_inspect.write(path / "pytorch_model.bin", ""),
        "pickle.*save_pretrained",
    ),
    "missing": (lambda path: path, "does not exist"),
    "truncated": (test_inspect.truncated, "incomplete"),
    "base": (lambda path: path.parent / "base", "are the same files"),
    "delta": (lambda path: path.parent / "delta.safetensors", "is a delta"),
}


@pytest.mark.parametrize("case", NO_DIFF)
def test_what_has_no_delta_is_refused_in_one_line(
    case: str, pair: tuple[Path, Path], delta: Path, tmp_path: Path
) -> None:
    make, message = NO_DIFF[case]
    result = run("diff", pair[0], make(tmp_path / "other"), "-o", tmp_path / "new.safetensors")
    assert result.exit_code == 1
    assert re.fullmatch(f"Error: .*{message}.*\n", result.stderr)
    assert not (tmp_path / "new.safetensors").exists()


def test_a_delta_larger_than_the_model_is_written_by_force_only(tmp_path: Path) -> None:
    base, tuned = (
        save(tmp_path / name, {"w": floats(*values)})
        for name, values in {"base": [0.0] * 20, "tuned": [1.0] * 20}.items()
    )
    output = tmp_path / "delta.safetensors"
    result = run("diff", base, tuned, "-o", output)
    assert result.exit_code == 1
    assert re.fullmatch(
        r"Error: The delta would take \d+ bytes, and .* takes 80: 100.00% of its entries changed. "
        r"Share the model itself, or write the delta with --force.\n",
        result.stderr,
    )
    assert not output.exists()
    assert run("diff", base, tuned, "-o", output, "--force").exit_code == 0
    assert run("apply", base, output, "--check").exit_code == 0


def test_existing_files_are_never_overwritten(
    pair: tuple[Path, Path], delta: Path, tmp_path: Path
) -> None:
    before = delta.read_bytes()
    for arguments in (
        ["diff", *pair, "-o", delta],
        ["apply", pair[0], delta, "-o", pair[1]],
        ["apply", pair[0], delta, "-o", delta],
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert re.fullmatch(r"Error: .* exists. Name another .*\n", result.stderr)
    assert delta.read_bytes() == before
    for arguments in (
        ["diff", *pair, "-o", tmp_path / "no" / "d"],
        ["apply", pair[0], delta, "-o", tmp_path / "no" / "again"],
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert re.fullmatch(r"Error: .*No such file or directory.*\n", result.stderr)


@pytest.mark.parametrize("arguments", [[], ["-o", "again", "--check"]])
def test_apply_is_told_to_write_or_to_check(
    arguments: list[str], pair: tuple[Path, Path], delta: Path
) -> None:
    result = run("apply", pair[0], delta, *arguments)
    assert result.exit_code == 2
    assert "with -o, or --check" in result.stderr


def other_values(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][31] += 1
    save_file(tensors, path / "model.safetensors")


def other_dtype(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, path / "model.safetensors")


def one_more(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"new": torch.ones(1)}, path / "model.safetensors")


def one_less(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_values, "model.norm.weight has other values"),
        (other_dtype, r"model.norm.weight is F16 \[32\] here, and F32 \[32\] in the base"),
        (one_more, "new is not one of its tensors"),
        (one_less, "model.norm.weight is missing here"),
    ],
)
@pytest.mark.parametrize("kind", ["in part", "whole", "unchanged", "removed"])
def test_another_base_is_refused_whatever_became_of_its_tensor(
    change: Callable[[Path], None], why: str, kind: str, tmp_path: Path
) -> None:
    base, tuned = tuned_pair(tmp_path)
    tensors, old = load_file(tuned / "model.safetensors"), load_file(base / "model.safetensors")
    norm = old["model.norm.weight"]
    becomes = {"in part": norm + (torch.arange(32) == 3), "whole": norm + 1, "unchanged": norm}
    tensors.pop("model.norm.weight")
    if kind in becomes:
        tensors["model.norm.weight"] = becomes[kind]
    save_file(tensors, tuned / "model.safetensors")
    delta = tmp_path / "delta.safetensors"
    diff(base, tuned, delta)
    change(base)
    for arguments in (["-o", tmp_path / "again"], ["--check"]):
        result = run("apply", base, delta, *arguments)
        assert result.exit_code == 1
        assert re.fullmatch(
            f"Error: .*delta.safetensors is the delta of another base: {why}.*\n", result.stderr
        )
    assert run("inspect", base, delta).exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base",
        "delta.safetensors",
        "tuned",
    ]


# Hostile files.

Header = dict[str, Any]
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


def parts(file: Path) -> tuple[Header, bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(header: str, data: bytes) -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


def with_metadata(**changes: str | None) -> Callable[[Header, bytes], bytes]:
    def change(header: Header, data: bytes) -> bytes:
        header["__metadata__"] |= changes
        header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if v is not None}
        return packed(json.dumps(header), data)

    return change


def with_entry(key: str, name: str, **changes: Any) -> Callable[[Header, bytes], bytes]:
    """Another entry in the metadata's base or tuned."""

    def change(header: Header, data: bytes) -> bytes:
        entries = json.loads(header["__metadata__"][key])
        entries[name] = entries.get(name, entries[NORM]) | changes
        return with_metadata(**{key: json.dumps(entries)})(header, data)

    return change


def with_tensors(**changes: Any) -> Callable[[Header, bytes], bytes]:
    """Other tensors: a change by name of (dtype, array), or None to leave it out."""

    def change(header: Header, data: bytes) -> bytes:
        tensors = {
            name: (each["dtype"], each["shape"], data[slice(*each["data_offsets"])])
            for name, each in header.items()
            if name != "__metadata__"
        }
        for name, new in changes.items():
            if new is None:
                del tensors[name]
            else:
                tensors[name] = (new[0], list(new[1].shape), new[1].tobytes())
        written, body = {"__metadata__": header["__metadata__"]}, b""
        for name, (dtype, shape, held) in tensors.items():
            offsets = [len(body), len(body) + len(held)]
            written[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            body += held
        return packed(json.dumps(written), body)

    return change


def with_indices(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Header, bytes], bytes]:
    def change(header: Header, data: bytes) -> bytes:
        held = data[slice(*header[f"indices/{DOWN}"]["data_offsets"])]
        indices = edit(np.frombuffer(held, np.int32).copy())
        dtype = {"i": "I", "u": "U", "f": "F"}[indices.dtype.kind] + f"{indices.itemsize * 8}"
        return with_tensors(**{f"indices/{DOWN}": (dtype, indices)})(header, data)

    return change


def put(place: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def edit(indices: np.ndarray) -> np.ndarray:
        indices[place] = value
        return indices

    return edit


def twice(header: Header, data: bytes) -> bytes:
    """One tensor that stands in the header twice, with two dtypes."""
    name, text = f"values/{DOWN}", json.dumps(header)
    again = json.dumps({name: header[name] | {"dtype": "I32"}})[1:-1]
    return packed(f"{{{again}, {text[1:]}", data)


def with_a_flipped_bit(header: Header, data: bytes) -> bytes:
    start = header[f"values/{DOWN}"]["data_offsets"][0]
    return packed(json.dumps(header), data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])


BYTES = np.frombuffer(b"{}", np.uint8)
HOSTILE: dict[str, tuple[Callable[[Header, bytes], bytes], str]] = {
    "text": (lambda header, data: b"{}", "is incomplete, damaged"),
    "empty": (lambda header, data: b"", "is incomplete, damaged"),
    "endless header": (lambda header, data: b"\xff" * 8 + data, "is incomplete, damaged"),
    "truncated": (lambda header, data: packed(json.dumps(header), data[:-1]), "incomplete"),
    "more data": (lambda header, data: packed(json.dumps(header), data + b"\0"), "incomplete"),
    "header of a list": (lambda header, data: packed("[]", data), "incomplete"),
    "deep header": (lambda header, data: packed('{"a":' * 10**5, data), "incomplete"),
    "name twice": (twice, "a name stands in its header twice"),
    "no metadata": (
        lambda header, data: packed(json.dumps({**header, "__metadata__": {}}), data),
        "is no delta",
    ),
    "metadata of numbers": (
        lambda header, data: packed(json.dumps({**header, "__metadata__": {"format": 1}}), data),
        "incomplete",
    ),
    "other format": (with_metadata(format="pt"), "is no delta"),
    "newer": (with_metadata(format_version="2"), "delta of the version '2'"),
    "no version": (with_metadata(format_version=None), "delta of the version None"),
    "huge metadata": (with_metadata(more="x" * 10**7), "its header takes 10,00.* bytes"),
    "huge names": (with_metadata(**{str(i): "" for i in range(10**5)}), "its header takes"),
    "no base": (with_metadata(base=None), "base in its metadata is not valid"),
    "no JSON": (with_metadata(base="{'a': 1}"), "base in its metadata is not valid"),
    "deep JSON": (with_metadata(tuned="[" * 10**5), "tuned in its metadata is not valid"),
    "list": (with_metadata(tuned="[]"), "tuned in its metadata is not valid"),
    "settings": (with_metadata(gmt="[1]"), "gmt in its metadata is not valid"),
    "deep settings": (with_metadata(gmt='{"a":' * 10**5), "gmt in its metadata is not valid"),
    "no hash": (with_entry("base", NORM, sha256=""), "base.*not valid: .*sha256"),
    "hash of a line": (with_entry("base", NORM, sha256="0" * 64 + "\n"), "base.*not valid"),
    "negative shape": (with_entry("tuned", NORM, shape=[-32]), "tuned.*not valid"),
    "shape of a fraction": (with_entry("tuned", NORM, shape=[32.0]), "tuned.*not valid"),
    "shape of a text": (with_entry("tuned", NORM, shape="32"), "tuned.*not valid"),
    "more in an entry": (with_entry("tuned", NORM, more=1), "tuned.*not valid"),
    "gigantic base": (with_entry("base", NORM, shape=[2**62, 2**62]), "another base: .*norm"),
    "longest number": (
        lambda header, data: with_metadata(
            tuned=header["__metadata__"]["tuned"].replace("[32]", f"[{'9' * 5000}]")
        )(header, data),
        "not valid|has no values",
    ),
    "gigantic": (with_entry("tuned", DOWN, shape=[2**62, 2**62]), "has indices, and is F32"),
    "gigantic and new": (with_entry("tuned", "x", shape=[2**40]), "x is not as in the base"),
    "unknown dtype": (with_entry("tuned", "x", dtype="F1"), "x is not as in the base"),
    "surrogate": (with_entry("tuned", "\ud800"), "tuned.*not valid"),
    "name of the metadata": (
        lambda header, data: with_tensors(**{"values/__metadata__": ("F32", np.zeros(32, "f"))})(
            json.loads(json.dumps(header)) | {}, data
        ),
        "__metadata__ is not a tensor of the tuned model",
    ),
    "entry of the metadata": (with_entry("tuned", "__metadata__"), "name of safetensors' metadata"),
    "unknown tensor": (with_tensors(**{"x": ("U8", BYTES)}), "a tensor has the name x"),
    "long name": (with_tensors(**{"x" * 10**5: ("U8", BYTES)}), r"the name x{400,500} \[\.\.\.\]"),
    "escapes": (with_tensors(**{"\x1b[31m\n": ("U8", BYTES)}), r"the name \\x1b\[31m\\n"),
    "not in the model": (with_tensors(**{"values/x": ("U8", BYTES)}), "x is not a tensor of"),
    "no values": (with_tensors(**{f"values/{DOWN}": None}), "is not as in the base, and has no"),
    "indices alone": (
        with_tensors(**{f"indices/{NORM}": ("I32", np.zeros(0, "i4"))}),
        "has indices, and is not in the base or has no values",
    ),
    "no indices": (
        with_tensors(**{f"indices/{DOWN}": None}),
        r"are F32 \[\d+\], not F32 \[64, 32\]",
    ),
    "values of another dtype": (
        with_tensors(**{f"values/{DOWN}": ("F16", np.zeros(3, "f2"))}),
        r"are F16 \[3\], not F32",
    ),
    "fewer values": (
        with_tensors(**{f"values/{DOWN}": ("F32", np.zeros(3, "f4"))}),
        r"are F32 \[3\], not F32",
    ),
    "indices of floats": (with_indices(lambda i: i.astype("f4")), r"the indices of .* are F32"),
    "short indices": (with_indices(lambda i: i.astype("i2")), r"the indices of .* are I16"),
    "indices in a matrix": (with_indices(lambda i: i[None]), r"the indices of .* are I32 \[1, "),
    "indices that descend": (with_indices(lambda i: i[::-1].copy()), "do not ascend"),
    "index twice": (with_indices(lambda i: put(1, int(i[0]))(i)), "do not ascend"),
    "negative index": (with_indices(put(0, -1)), "do not ascend"),
    "index out of range": (with_indices(put(-1, 2048)), "has 2,048 entries, and an index 2,048"),
    "largest index": (
        with_indices(lambda i: put(-1, 2**63 - 1)(i.astype("i8"))),
        "an index 9,223,372,036,854,775,807",
    ),
    "path": (with_tensors(**{"files/../evil.json": ("U8", BYTES)}), "it carries ../evil.json"),
    "absolute path": (with_tensors(**{"files//tmp/x": ("U8", BYTES)}), "it carries /tmp/x"),
    "code": (with_tensors(**{"files/modeling.py": ("U8", BYTES)}), "it carries modeling.py"),
    "weights": (
        with_tensors(**{"files/model.safetensors": ("U8", BYTES)}),
        "it carries model.safetensors",
    ),
    "file of floats": (
        with_tensors(**{"files/config.json": ("F32", np.zeros(1, "f4"))}),
        r"it carries config.json, F32",
    ),
    "file without a hash": (
        with_tensors(**{"files/config.json": ("U8", BYTES)}),
        "are not those that its metadata names",
    ),
    "hash without a file": (
        with_metadata(files=json.dumps({"config.json": "0" * 64})),
        "are not those that its metadata names",
    ),
    "flipped bit": (with_a_flipped_bit, "is damaged: .* would not be as it was"),
    "other index": (
        # Ascending, in range, and not what changed.
        with_indices(lambda i: np.arange(i.size, dtype=np.int32)),
        "is damaged: .* would not be as it was",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_delta_costs_an_error_of_one_line(
    case: str, pair: tuple[Path, Path], delta: Path, tmp_path: Path
) -> None:
    change, message = HOSTILE[case]
    delta.write_bytes(change(*parts(delta)))
    for arguments in (["-o", tmp_path / "again"], ["--check"]):
        result = run("apply", pair[0], delta, *arguments)
        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert re.fullmatch(f"Error: [^\n]*(?:{message})[^\n]*\n", result.stderr), result.stderr
        assert "\x1b" not in result.stderr
        assert len(result.stderr) < 1000
    inspected = run("inspect", pair[0], delta)
    assert isinstance(inspected.exception, SystemExit)
    assert inspected.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base",
        "delta.safetensors",
        "tuned",
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_damage_is_an_error_or_makes_no_difference(data: st.DataObject) -> None:
    """As where it is in the names of settings, or in the spaces that end a header."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, tuned = tuned_pair(folder)
        (tuned / "config.json").write_text('{"model_type": "llama"}')
        state = {
            "log_history": [{"step": 1, "loss": 0.5}],
            "stateful_callbacks": {"GMTCallback": {"args": {"mask_ratio": 0.25}}},
        }
        (tuned / "trainer_state.json").write_text(json.dumps(state))
        delta = folder / "delta.safetensors"
        diff(base, tuned, delta)
        apply(base, delta, folder / "again")
        content = bytearray(delta.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        start = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(content) - 1)))
        stop = start + data.draw(st.integers(0, 3))
        content[start:stop] = data.draw(st.binary(max_size=3))
        delta.write_bytes(content)
        result = run("apply", base, delta, "-o", folder / "damaged")
        if result.exit_code == 0:
            assert contents(folder / "damaged") == contents(folder / "again")
        else:
            assert isinstance(result.exception, SystemExit)
            assert re.fullmatch("Error: [^\n]*\n", result.stderr)
            assert not (folder / "damaged").exists()


@pytest.mark.parametrize("place", ["missing", "folder", "model"])
def test_what_is_no_delta_is_refused_in_one_line(
    place: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    paths = {
        "missing": tmp_path / "x",
        "folder": pair[1],
        "model": pair[1] / "model.safetensors",
    }
    result = run("apply", pair[0], paths[place], "--check")
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .* axolotl gmt diff (wrote|writes them)\.\n", result.stderr)


def test_names_in_the_base_do_not_say_where_files_are_written(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path / "models", shards=2)
    index = base / "model.safetensors.index.json"
    (base / "part-1.safetensors").rename(tmp_path / "outside.safetensors")
    index.write_text(index.read_text().replace("part-1", "../../outside"))
    delta = tmp_path / "delta.safetensors"
    diff(base, tuned, delta)
    before = (tmp_path / "outside.safetensors").read_bytes()
    apply(base, delta, tmp_path / "again")
    assert (tmp_path / "outside.safetensors").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "again").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_model_that_changes_while_it_is_read_leaves_no_delta(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    totals: list[int] = []

    def change(_: int, total: int) -> None:
        totals.append(total)
        if total > totals[0] and totals.count(total) == 1:  # The first block was written.
            tensors = load_file(pair[1] / "model.safetensors")
            save_file({n: t + 1 for n, t in tensors.items()}, pair[1] / "model.safetensors")

    with pytest.raises(UserError, match="changed while it was read"):
        diff(*pair, tmp_path / "delta.safetensors", on_progress=change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


# The commands.


def test_the_commands_say_what_changed_and_what_they_wrote(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for folder, text in zip(pair, ("{}", '{"a": 1}'), strict=True):
        (folder / "config.json").write_text(text)
    output = tmp_path / "delta.safetensors"
    written = run("diff", *pair, "-o", output)
    assert written.exit_code == 0
    tensors = [load_file(folder / "model.safetensors") for folder in pair]
    changed = sum(int((tensors[0][name] != tensors[1][name]).sum()) for name in tensors[0])
    lines = [" ".join(line.split()) for line in written.stdout.splitlines()]
    size, model = output.stat().st_size, 4 * (3 * 64 * 32 + 32)
    in_part = sum(not torch.equal(tensors[0][n], tensors[1][n]) for n in tensors[0])
    assert lines == [
        f"Entries changed {changed:,} of 6,176 ({changed / 6176:.2%})",
        f"Tensors {in_part} changed in part, 0 stored whole, 0 only in BASE",
        f"Size of the delta {size:,} bytes, TUNED {model:,} ({size / model:.2%})",
        "Files of TUNED config.json",
        "GMT's settings not recorded",
    ]
    assert f"Wrote {output}" in written.stderr
    for arguments in (["--check"], ["-o", tmp_path / "again"]):
        applied = run("apply", pair[0], output, *arguments)
        assert applied.exit_code == 0
        assert applied.stdout == f"4 tensors, {model:,} bytes: every hash is right.\n"
        assert "Files of the delta: config.json" in applied.stderr
        assert ("Wrote" in applied.stderr) == ("-o" in arguments)


# Memory.

MB = 10**6


def measured(*arguments: object) -> tuple[int, bool]:
    """The most memory in bytes that a command took, and whether torch was imported."""
    command = [sys.executable, "-c", test_inspect.MEASURED_RUN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    peak, imported_torch = done.stdout.split()[-2:]
    return int(peak) * 1024, imported_torch == "True"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("changed", ["one entry", "a quarter", "all"])
def test_memory_stays_far_below_the_largest_tensor(changed: str, tmp_path: Path) -> None:
    """A tensor of 200 MB in BF16; what was promised is 2 * 200 + 500 MB."""
    entries = 100 * MB
    base = {"base": np.zeros(entries, np.uint16)}
    tuned = base["base"].copy()
    tuned[
        {"one entry": slice(1), "a quarter": slice(0, entries, 4), "all": slice(None)}[changed]
    ] = 1
    for name, words in (base | {"tuned": tuned}).items():
        (tmp_path / name).mkdir()
        header = json.dumps(
            {
                "w": {
                    "dtype": "BF16",
                    "shape": [1000, entries // 1000],
                    "data_offsets": [0, 2 * entries],
                }
            }
        )
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header.encode())
            words.tofile(file)
    delta = tmp_path / "delta.safetensors"
    for arguments in (
        ["diff", tmp_path / "base", tmp_path / "tuned", "-o", delta, "--force"],
        ["apply", tmp_path / "base", delta, "-o", tmp_path / "again"],
        ["inspect", tmp_path / "base", delta],
    ):
        peak, imported_torch = measured(*arguments)
        assert not imported_torch  # It takes more memory than all the rest.
        # Python, numpy and pydantic take some 90 MB of it.
        assert peak < 180 * MB, arguments[0]
    again = np.fromfile(tmp_path / "again" / "model.safetensors", np.uint16)[-entries:]
    assert np.array_equal(again, tuned)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_hostile_header_costs_no_memory(pair: tuple[Path, Path], delta: Path) -> None:
    header, data = parts(delta)
    header["__metadata__"] |= {f"{number}": "" for number in range(10**6)}
    delta.write_bytes(packed(json.dumps(header), data))
    code = (
        "import sys\nfrom axolotl_gmt.cli import gmt\n"
        "try: gmt(sys.argv[1:])\nexcept SystemExit as end: print(end.code)\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(status['VmHWM'].split()[0])"
    )
    for arguments in (["apply", pair[0], delta, "--check"], ["inspect", pair[0], delta]):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        status, peak = done.stdout.split()
        assert status == "1"
        assert int(peak) * 1024 < 120 * MB
