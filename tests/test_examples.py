"""Notebooks run as they stand, cell by cell, without Jupyter."""

import json
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_it_printed(path):
    assert cells(path)
    for cell in cells(path):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_in_their_order(path, tmp_path, monkeypatch):
    """In a folder of their own. Pictures are as large as they say."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path)):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    assert set(names["ours"].index) == {"cnn", "vit"}
    assert names["ours"].psnr.notna().all()
    assert names["drawn"].shape == (10, 4, 4)
    assert names["bits"].shape == names["codes"]["vit"].shape
    shown = names["sheet"](names["x"], names["x"])
    assert isinstance(shown, Image.Image)
    assert shown.size == (3 * 10 * 32, 3 * 2 * 32)
