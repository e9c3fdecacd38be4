"""Notebooks run as they stand, cell by cell, without Jupyter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))
# Models and images as small as they can be, in place of what a cell with the tag "parameters" says, as in papermill.
SMALL = {
    "TOKENIZER": {
        **{"preset": "smoke", "width": 8, "depth": 1, "grid_size": 2, "codebook_size": 32, "code_dim": 3},
        **{"steps": 2, "batch_size": 4, "warmup": 0, "lpips_weight": 0.0, "gan_width": 8, "device": "cpu"},
    },
    "PRIOR": {"steps": 2, "parameters": 30_000, "samples": 8, "device": "cpu"},
}


def cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def played(path: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """The names that the cells leave behind, those of ``parameters`` set in between."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path)):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert {*parameters} <= {*names}
            names |= parameters
    return names


def first_steps(names: dict[str, Any]) -> None:
    assert set(names["ours"].index) == {"cnn", "vit"}
    assert names["ours"].psnr.notna().all()
    assert names["drawn"].shape == (10, 4, 4)
    assert names["bits"].shape == names["codes"]["vit"].shape


def assignments(names: dict[str, Any]) -> None:
    """Each question is asked of the runs that it names, and all other settings are those of the top."""
    configs = {name: names[name].config() for name in ("one", "grid", "gan", "few")}
    configs |= {label: run.config() for label, run in names["filters"].items()}
    assert [configs.pop(f"{count} filters")["code_dim"] for count in (2, 4, 64, 3)] == [2, 4, 64, 3]
    base = configs.pop("grid")
    changed = {name: {key for key in base if config[key] != base[key]} for name, config in configs.items()}
    assert changed == {"one": {"grid_size", "codebook_size"}, "gan": {"gan_weight"}, "few": {"codebook_size"}}
    assert {*names["priors"]} == {"independent", "pixelcnn", "rnn", "mamba", "transformer"}
    assert {run.config()["tokenizer"] for run in names["priors"].values()} == {names["grid"].folder.name}
    assert names["easy"].config()["tokenizer"] == names["few"].folder.name
    assert names["sizes"].sum() == len(names["images"])


# What is to hold of the names in each.
CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {"first_steps": first_steps, "assignments": assignments}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_it_printed(path):
    assert cells(path)
    assert path.stem in CHECKS
    for cell in cells(path):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_the_public_face_alone(path):
    lines = "".join("".join(cell["source"]) + "\n" for cell in cells(path)).splitlines()
    assert "import bench" in lines
    assert not [line for line in lines if "from bench" in line or "import bench." in line]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_in_their_order(path, image_folder, tmp_path, monkeypatch):
    """In a folder of their own. Pictures are as large as they say."""
    monkeypatch.chdir(tmp_path)
    small = {**SMALL, "TOKENIZER": {**SMALL["TOKENIZER"], "data": f"folder:{image_folder}"}}
    names = played(path, small)
    CHECKS[path.stem](names)
    x = names["x"]
    shown = names["sheet"](x, x)
    assert isinstance(shown, Image.Image)
    assert shown.size == (3 * len(x) * x.shape[3], 3 * 2 * x.shape[2])
