"""The notebooks: they run from the first cell to the last, and what is committed holds no text of a collection."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from st_wkl.packaged import SQUAD, fetch

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens it runs all cells, and stops at the first that fails."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_there_and_hold_no_text_of_the_collection(path: Path) -> None:
    """Outputs are what a reader sees without running it; the texts have a licence of their own."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in cells[-3:])
    shown = json.dumps([cell.outputs for cell in cells], ensure_ascii=False)
    articles = json.loads((fetch(SQUAD) / "dev-v1.1.json").read_text(encoding="utf-8"))["data"]
    parts = [part for article in articles for part in article["paragraphs"]]
    assert [part["context"][:40] for part in parts if part["context"][:40] in shown] == []
    assert [asked["question"] for part in parts for asked in part["qas"] if asked["question"] in shown] == []
    assert '"stderr"' not in shown
    assert str(Path.home()) not in shown
