"""The files for GitHub, for citations and for contributors, against what they are about."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from axolotl_gmt import __version__
from axolotl_gmt.cli import gmt

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(file.name for file in (GITHUB / "workflows").glob("*.yml"))


def loaded(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def workflow(name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = loaded(GITHUB / "workflows" / name)
    return found


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job.get("steps", ())]


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_the_workflows_run_what_the_makefile_and_contributing_name() -> None:
    assert WORKFLOWS == ["lint.yml", "release.yml", "tests.yml"]
    commands = {
        step["run"] for name in ("lint.yml", "tests.yml") for step in steps(name) if "run" in step
    }
    assert commands == {"make lint", "make test"}
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    on_ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command in commands:
        assert command.removeprefix("make ") in targets()
        assert f"`{command}`" in contributing
        assert command in on_ci


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_action_is_pinned_to_a_commit_with_its_version_beside_it(name: str) -> None:
    text = (GITHUB / "workflows" / name).read_text(encoding="utf-8")
    used = re.findall(r"uses: (.*)", text)
    assert used
    for action in used:
        assert re.fullmatch(r"\./\.github/workflows/\w+\.yml", action) or re.fullmatch(
            r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action
        ), action


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_job_may_more_than_it_needs(name: str) -> None:
    found = workflow(name)
    assert found["permissions"] == {}
    for job, content in found["jobs"].items():
        needed = {"id-token": "write"} if job == "publish" else {"contents": "read"}
        assert content["permissions"] == needed
    for step in steps(name):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_a_release_waits_for_style_and_tests_and_needs_no_token() -> None:
    jobs = workflow("release.yml")["jobs"]
    assert set(jobs["publish"]["needs"]) == {"lint", "tests", "build"} == jobs.keys() - {"publish"}
    for name in ("lint", "tests"):
        called = ROOT / jobs[name]["uses"]
        assert "workflow_call" in workflow(called.name)[True]  # YAML 1.1 reads `on` as true.
    assert jobs["publish"]["environment"]["name"] == "pypi"
    assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")


def test_the_form_for_bugs_asks_for_commands_that_exist() -> None:
    text = (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    named = re.findall(r"`gmt-tools (\w+)", text)
    assert "env" in named
    assert set(named) <= gmt.commands.keys()
    fields = {field["id"]: field for field in yaml.safe_load(text)["body"]}
    assert fields["env"]["validations"]["required"]


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_the_forms_have_what_github_asks_for(name: str) -> None:
    form = loaded(GITHUB / "ISSUE_TEMPLATE" / name)
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] == "textarea"
        assert field["attributes"]["label"]


def test_the_hooks_before_a_commit_use_the_tools_of_make_lint() -> None:
    local = loaded(ROOT / ".pre-commit-config.yaml")["repos"][0]
    assert local["repo"] == "local"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in local["hooks"]:
        tool, *rest = hook["entry"].split()
        command = " ".join([tool.replace(".venv/bin", "$(BIN)"), *rest[:1]])
        assert command in makefile, command


def test_the_citation_is_that_of_the_readme_and_of_this_version() -> None:
    citation = loaded(ROOT / "CITATION.cff")
    assert citation["version"] == __version__
    paper = citation["preferred-citation"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (bibtex,) = re.findall(r"```bibtex\n(.*?)```", text, re.DOTALL)
    fields = {
        key: " ".join(value.split())
        for key, value in re.findall(r"(\w+) += \{(.*?)\}(?:,|\n)", bibtex, re.DOTALL)
    }
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert fields == {
        "title": paper["title"],
        "author": " and ".join(authors),
        "booktitle": paper["collection-title"],
        "volume": str(paper["volume"]),
        "number": str(paper["issue"]),
        "year": str(paper["year"]),
        "doi": paper["doi"],
    }
    # What the docs say of it.
    for page in ("README.md", "docs/method.md"):
        assert f"*{paper['title']}*" in " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert paper["url"] in (ROOT / page).read_text(encoding="utf-8")


def test_the_readme_supports_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    (of_axolotl,) = map(Requirement, project["optional-dependencies"]["axolotl"])
    pins = {need.name: need.specifier for need in map(Requirement, requires("axolotl") or [])}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+), (.*)$", text, re.MULTILINE))
    assert str(of_axolotl.specifier) == "<0.22,>=0.21"
    assert "| 0.21.0, " in rows["Axolotl"]
    assert "| 0.21 only" in rows["Axolotl"]
    for package, name in (("transformers", "Transformers"), ("trl", "TRL")):
        pinned = str(pins[package]).removeprefix("==")
        assert f"{name} {pinned}" in rows["Axolotl"]
        assert f"| {pinned} by the tests" in rows[name]
    oldest = str(needs["transformers"]).removeprefix(">=")
    assert rows["Transformers"].endswith(f"| {oldest} or newer |")
