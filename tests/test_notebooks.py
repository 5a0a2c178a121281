"""The notebooks run from top to bottom, in their order and in one folder, and are stored without
output."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_OUTPUT = 600_000
"""Bytes of all outputs of one notebook."""


@pytest.fixture(scope="module")
def run_all():
    spec = importlib.util.spec_from_file_location("run_all", FOLDER / "run_all.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared, so that a study is computed once."""
    return tmp_path_factory.mktemp("notebooks")


def test_there_are_four_notebooks() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, run_all, folder) -> None:
    notebook = run_all.execute(path, folder)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len(json.dumps(outputs)) < MOST_OUTPUT
    drawn = [cell for cell in notebook.cells if "plot" in cell.source and cell.cell_type == "code"]
    assert drawn
    for cell in drawn:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_output(path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["parameters"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def test_links_between_notebooks_lead_somewhere() -> None:
    import re

    found = 0
    for path in NOTEBOOKS:
        for target in re.findall(r"\]\(([\w.]+\.ipynb)\)", path.read_text(encoding="utf-8")):
            assert (FOLDER / target).is_file()
            found += 1
    assert found == 3
