"""docs/notebook.ipynb runs from its first to its last cell, as in a notebook, and is a page of the site."""

import json
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
TOOLS = runpy.run_path(str(DOCS / "notebook.py"))


def notebook() -> dict:
    return json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))


def test_the_cells_run_and_show_what_the_text_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    cells = notebook()["cells"]
    shown = [[output["output_type"] for output in cell.get("outputs", ())] for cell in cells]
    names = TOOLS["run_cells"](cells)
    assert [[output["output_type"] for output in cell.get("outputs", ())] for cell in cells] == shown
    ndcg = names["metrics"]["ndcg_at_10"].droplevel(1)
    assert ndcg["guided"] > max(ndcg["base"], ndcg["shuffled"])
    why = names["why"]
    assert why["base_part"][0] + why["term"].sum() == pytest.approx(why["score"][0], abs=1e-5)
    assert "a new film" in names["wider"].recommend(names["user"], n=3)[0].item_id


def test_the_page_holds_every_cell():
    text = "\n".join(map(TOOLS["cell_text"], notebook()["cells"]))
    assert all("".join(cell["source"]) in text for cell in notebook()["cells"])
    assert "<table" in text and "```text" in text
