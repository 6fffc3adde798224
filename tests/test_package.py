"""The wheel and the sdist: what is in them, and that the wheel works where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from axolotl_gmt import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "axolotl_gmt"
DIST_INFO = f"axolotl_gmt-{__version__}.dist-info"
CACHES = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".venv", ".git"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it, without the network."""
    folder = tmp_path_factory.mktemp("dist")
    # In an environment of its own, hatchling would be fetched.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def site(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder into which the wheel was installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = dist.glob("*.whl")
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(folder)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *options, str(wheel)]
    result = subprocess.run(pip, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def in_wheel(dist: Path) -> set[str]:
    (wheel,) = dist.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def in_sdist(dist: Path) -> set[str]:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def files(folder: Path) -> set[str]:
    """The files of a folder of the checkout that belong to it, as paths from the checkout."""
    found = {file.relative_to(ROOT) for file in folder.rglob("*") if file.is_file()}
    return {path.as_posix() for path in found if not CACHES.intersection(path.parts)}


def test_the_wheel_has_the_package_with_its_recipes_and_nothing_else(dist: Path) -> None:
    package, recipes = files(PACKAGE), files(ROOT / "example_configs")
    assert {"axolotl_gmt/py.typed", "axolotl_gmt/templates/report.html"} <= package
    assert recipes
    metadata = {
        f"{DIST_INFO}/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }
    assert in_wheel(dist) == package | {f"axolotl_gmt/{name}" for name in recipes} | metadata


def test_the_sdist_has_what_is_needed_to_build_and_test_it(dist: Path) -> None:
    found = in_sdist(dist)
    for folder in ("axolotl_gmt", "example_configs", "tests", "docs", "benchmarks", "tools"):
        assert files(ROOT / folder) <= found
    assert files(ROOT / ".ci") | files(ROOT / ".github") <= found
    assert {file.name for file in ROOT.glob("*.md")} <= found
    assert {"CITATION.cff", "LICENSE", "Makefile", "pyproject.toml"} <= found
    assert not {name for name in found if CACHES.intersection(Path(name).parts)}


def test_the_metadata_says_who_may_use_it_and_what_it_needs(site: Path) -> None:
    metadata = PathDistribution(site / DIST_INFO).metadata
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Author"] == "axolotl-gmt contributors"
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2406.15330"]
    assert metadata["Description"].startswith("# axolotl-gmt")


def run(site: Path, folder: Path, *command: str) -> str:
    """What a command says in a fresh process, to which the installed wheel is the package."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_commands_of_the_installed_wheel_work(site: Path, tmp_path: Path) -> None:
    program = str(site / "bin" / "gmt-tools")
    recipes = run(site, tmp_path, program, "recipes")
    for recipe in (ROOT / "example_configs").glob("*.yml"):
        assert recipe.stem in recipes
    run(site, tmp_path, program, "recipe", "sft-smollm2-360m", "-o", "my.yml")
    assert "my.yml: good" in run(site, tmp_path, program, "check", "my.yml")
    assert f"axolotl-gmt   {__version__}" in run(site, tmp_path, program, "env")


EXAMPLE = """
import sys
from pathlib import Path

import torch
import axolotl_gmt
from axolotl_gmt import GMTConfig, GradientMasker

assert Path(axolotl_gmt.__file__).is_relative_to(sys.argv[1]), axolotl_gmt.__file__
weight = torch.nn.Parameter(torch.zeros(4))
optimizer = torch.optim.SGD([weight], lr=1.0)
GradientMasker([("weight", weight)], GMTConfig(mask_ratio=0.5)).attach(optimizer)
weight.grad = torch.tensor([1.0, -4.0, 3.0, 2.0])
optimizer.step()
print(weight.tolist())
"""


def test_a_masker_of_the_installed_wheel_masks(site: Path, tmp_path: Path) -> None:
    said = run(site, tmp_path, sys.executable, "-c", EXAMPLE, str(site))
    assert said == "[0.0, 4.0, -3.0, 0.0]\n"
