"""The recipes: the YAML files of example_configs, and what the head of each says.

Knows nothing of Axolotl: a recipe is text here, and a mapping of keys to read its method from.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from axolotl_gmt.errors import UserError
from axolotl_gmt.files import whole

HEAD = (
    "title",
    "reproduces",
    "hardware",
    "memory",
    "command",
    "model licence",
    "data licence",
)
"""The keys of a head, in their order: the comment lines that a recipe opens with, as YAML."""


@dataclass(frozen=True)
class Recipe:
    """A recipe: the keys of its head, what its YAML says of model and method, and its text."""

    name: str
    title: str
    reproduces: str
    hardware: str
    memory: str
    command: str
    model_licence: str
    data_licence: str
    model: str
    method: str
    text: str

    def as_dict(self) -> dict[str, str]:
        """All but the text."""
        return {key: value for key, value in asdict(self).items() if key != "text"}


def recipe_folder() -> Path:
    """Where the recipes lie: inside the package when it was installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "example_configs"
    return installed if installed.is_dir() else package.parent / "example_configs"


def recipe_names() -> list[str]:
    """The names of all recipes, without ``.yml``, sorted.

    Raises:
        UserError: If there are none.
    """
    folder = recipe_folder()
    names = sorted(file.stem for file in folder.glob("*.yml"))
    if not names:
        raise UserError(f"{folder}: no recipes are there. Install axolotl-gmt again.")
    return names


def all_recipes() -> list[Recipe]:
    """All recipes, sorted by name.

    Raises:
        UserError: If there are none, or one cannot be read.
    """
    return [find_recipe(name) for name in recipe_names()]


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, which may end in ``.yml``.

    Raises:
        UserError: If there is none, with the nearest names, or it cannot be read.
    """
    names = recipe_names()
    name = name.removesuffix(".yml")
    if name not in names:
        nearest = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0))
        raise UserError(
            f"{name!r}: there is no such recipe. The nearest are {nearest}; "
            "axolotl gmt recipes lists all."
        )
    file = recipe_folder() / f"{name}.yml"
    try:
        return parse_recipe(name, file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not a recipe ({error}).") from error


def parse_recipe(name: str, text: str) -> Recipe:
    """A recipe from its text.

    Raises:
        ValueError: If the head or the body is not as it must be.
        yaml.YAMLError: If one of them is not YAML.
    """
    head = yaml.safe_load("\n".join(_head_lines(text)))
    if not isinstance(head, dict) or tuple(head) != HEAD:
        raise ValueError(f"its head must have the keys {', '.join(HEAD)}, in this order")
    body = yaml.safe_load(text)
    if not isinstance(body, dict) or "base_model" not in body:
        raise ValueError("it must set base_model")
    fields = {key.replace(" ", "_"): str(value) for key, value in head.items()}
    return Recipe(name=name, model=body["base_model"], method=_method(body), text=text, **fields)


def write_recipe(recipe: Recipe, file: Path) -> None:
    """Write a recipe into a new file, whole or not at all, with the file's name in its commands.

    Raises:
        UserError: If the file exists, or cannot be written.
    """
    if file.exists():
        raise UserError(f"{file}: already exists, and is kept. Name another file, or remove it.")
    # Its comments have commands to copy. A path of this machine should not end up in a shared file.
    name = file.name if file.is_absolute() else file.as_posix()
    try:
        with whole(file) as part:
            part.write_text(recipe.text.replace(f"{recipe.name}.yml", name), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}).") from error


def _head_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("# "):
            return
        yield line.removeprefix("# ")


def _method(body: Mapping[str, object]) -> str:
    """In the words of the field, such as ``DPO, full, FSDP2`` or ``SFT, QLoRA``."""
    training = body.get("rl", "sft")
    adapter = body.get("adapter")
    parts = [
        "SimPO" if training == "simpo" else str(training).upper(),
        {"lora": "LoRA", "qlora": "QLoRA"}.get(str(adapter), str(adapter)) if adapter else "full",
        *(["FSDP2"] if "fsdp_config" in body else []),
        *(["ZeRO-3"] if "deepspeed" in body else []),
    ]
    return ", ".join(parts)
