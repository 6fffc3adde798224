"""The documentation against the code: links, snippets, settings, commands, and its examples."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from axolotl_gmt import GMTConfig, GradientMasker, criteria
from axolotl_gmt.cli import gmt
from axolotl_gmt.tools.recipes import recipe_names
from benchmarks import sparse_tunes
from tests.reference.gmt_reference import masked_by_scores

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md")
    for page in ROOT.glob(pattern)
)
_MARKDOWN = MarkdownIt("commonmark").enable("table")


def tokens(page: Path) -> list[Token]:
    return _MARKDOWN.parse(page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[str]:
    """What links and images of a page point at."""
    for token in tokens(page):
        for part in token.children or []:
            if target := part.attrGet("href") or part.attrGet("src"):
                yield str(target)


def headings(page: Path) -> list[str]:
    parsed = tokens(page)
    return [
        parsed[index + 1].content.replace("`", "")
        for index, token in enumerate(parsed)
        if token.type == "heading_open"
    ]


def anchors(page: Path) -> set[str]:
    """The ids that GitHub and GitLab give the headings of a page."""
    found: set[str] = set()
    count: Counter[str] = Counter()
    for heading in headings(page):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{anchor}-{count[anchor]}" if count[anchor] else anchor)
        count[anchor] += 1
    return found


def snippets(page: Path, language: str) -> list[str]:
    return [t.content for t in tokens(page) if t.type == "fence" and t.info == language]


def tables(page: Path) -> Iterator[list[list[str]]]:
    """The tables of a page: rows of cells as they are written, the heading first."""
    rows: list[list[str]] = []
    for token in tokens(page):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and token.level >= 3 and rows:
            rows[-1].append(token.content)
        elif token.type == "table_close":
            yield rows
            rows = []


def settings_table(page: Path) -> dict[str, str]:
    (rows,) = (rows for rows in tables(page) if rows[0][:2] == ["key", "default"])
    return {row[0].strip("`"): row[1] for row in rows[1:]}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    file = ROOT / page
    for link in links(file):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            assert parts.scheme == "https", link
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), link
            continue
        target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert target.exists(), f"{link} leads nowhere"
        if parts.fragment:
            assert parts.fragment in anchors(target), f"{link}: no such heading"


def test_the_readme_leads_to_every_page() -> None:
    linked = {(ROOT / urlsplit(link).path).resolve() for link in links(ROOT / "README.md")}
    missing = {page for page in DOCS.glob("*.md") if page.resolve() not in linked}
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_can_be_parsed_and_sets_keys_that_exist(page: str) -> None:
    from axolotl_gmt.integrations.axolotl.args import GMTArgs

    for text in snippets(ROOT / page, "yaml"):
        settings = yaml.safe_load(text)
        assert isinstance(settings, dict), text
        unknown = {key for key in settings if key.startswith("gmt_")} - GMTArgs.model_fields.keys()
        assert not unknown, text
    for text in snippets(ROOT / page, "python"):
        ast.parse(text)
    for text in snippets(ROOT / page, "toml"):
        tomllib.loads(text)
    for text in snippets(ROOT / page, "bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def defaults() -> dict[str, str]:
    """Every key and its default as a page writes it."""
    from axolotl_gmt.integrations.axolotl.args import PREFIX, GMTArgs

    of_config = {PREFIX + name: field.default for name, field in GMTConfig.model_fields.items()}
    values = {key: of_config.get(key) for key in GMTArgs.model_fields}
    words = {None: "unset", True: "true", False: "false"}
    return {
        key: words[value] if value is None or isinstance(value, bool) else str(value)
        for key, value in values.items()
    }


def test_the_settings_page_has_every_key_with_its_default() -> None:
    assert settings_table(DOCS / "settings.md") == defaults()


def test_the_readme_has_the_right_defaults() -> None:
    table = settings_table(ROOT / "README.md")
    assert len(table) >= 3
    assert table.items() <= defaults().items()


def test_every_command_has_a_section_that_names_all_of_its_options() -> None:
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert sections.keys() == gmt.commands.keys()
    for name, command in gmt.commands.items():
        options = {
            option
            for parameter in command.params
            for option in parameter.opts
            if option.startswith("-")
        }
        missing = {o for o in options if not re.search(rf"(?<![\w-]){o}(?![\w-])", sections[name])}
        assert not missing, f"{name}: {missing}"


def test_no_page_tells_to_type_a_command_that_is_not_there() -> None:
    typed = 0
    start = re.compile(
        r"^(?:\S*/)?(?:axolotl gmt|gmt-tools|python -m axolotl_gmt) (.*)$", re.MULTILINE
    )
    for page in PAGES:
        for text in snippets(ROOT / page, "bash"):
            for arguments in start.findall(text):
                name, *rest = shlex.split(arguments.partition(" | ")[0], comments=True)
                assert name in gmt.commands, f"{page}: {name}"
                known = {option for p in gmt.commands[name].params for option in p.opts}
                assert {a for a in rest if a.startswith("-")} <= known, f"{page}: {arguments}"
                if name == "recipe":
                    assert rest[0] in recipe_names(), f"{page}: {arguments}"
                typed += 1
    assert typed > 10


def test_the_recipes_page_names_every_recipe() -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9.]+(?:-[a-z0-9.]+)+)`", text))
    of_one_gpu = {name for name in recipe_names() if not name.endswith(("-fsdp2", "-zero3"))}
    assert of_one_gpu <= named
    assert {name for name in named if not name.startswith("-")} <= set(recipe_names())


def test_every_built_in_criterion_has_a_section() -> None:
    assert criteria.BUILT_IN.keys() <= set(headings(DOCS / "criteria.md"))


def test_the_figures_of_sparse_tunes_are_those_that_were_measured() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "sparse_tunes.json").read_text())
    assert sparse_tunes.table(results) in (ROOT / "docs" / "sparse-tunes.md").read_text()


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api" / "index.html").read_text()
    assert "mask_ratio" in page
    assert not re.search(r":\w+:<code>", page)  # A role of Sphinx.
    assert "(../" not in "".join(file.read_text() for file in tmp_path.rglob("index.html"))


def test_every_page_is_in_the_site_s_navigation() -> None:
    listed = re.findall(r"\S+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(file.name for file in DOCS.glob("*.md"))


def test_the_tests_that_pages_cite_exist() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", (ROOT / page).read_text(encoding="utf-8")):
            assert f"def {name}(" in source, f"{page}: {name}"


def test_the_package_on_the_criteria_page_can_be_installed_and_selects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, *_ = snippets(DOCS / "criteria.md", "python")
    (project,) = snippets(DOCS / "criteria.md", "toml")
    package, site = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    (package / "weight_magnitude.py").write_text(module)
    (package / "pyproject.toml").write_text(project)
    # As `pip install --no-deps .`, but with this environment's setuptools, not one of the network.
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *options, str(package)]
    result = subprocess.run(pip, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    weight = torch.nn.Parameter(torch.randn(6, 5))
    weight.grad = torch.randn(6, 5)
    (expected,) = masked_by_scores([weight.grad.clone()], [weight.detach().abs()], 0.5)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    GradientMasker([("w", weight)], GMTConfig(criterion="weight_magnitude")).attach(optimizer)
    optimizer.step()
    assert torch.equal(weight.grad, expected)
