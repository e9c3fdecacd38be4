"""What leads out of the page, and what its viewer shows."""

import re
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from bench.analysis import charts, viewer
from bench.analysis.frames import frame
from bench.analysis.page import _picture
from bench.analysis.report import write_report
from bench.core.store import Store
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate, fabricate_failed, sweep


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results of #1")


def test_rows_lead_to_the_files_of_their_run(store, monkeypatch):
    monkeypatch.setattr(charts, "draw", lambda *_: [])
    runs = sweep(store, {"cnn": 0.0, "vit": 0.1}, betas=(0.25,), seeds=(1, 0))
    failed = fabricate_failed(store, make_config("cnn", "smoke", seed=5))
    page = write_report([], store.root).page
    text = unescape(page.read_text())
    files = {(page.parent / unquote(address)).resolve() for address in re.findall(r'class="file" href="([^"]+)"', text)}
    pictures = {run.folder.resolve() / "reconstructions.png" for run in runs}
    assert files == pictures | {run.folder.resolve() / "config.json" for run in (*runs, failed)}
    ids = re.findall(r'<td id="([^"]+)"', text)
    assert sorted(ids) == sorted(run.folder.name for run in (*runs, failed))
    lowest = {run.config()["backbone"]: run.folder.name for run in runs if run.config()["seed"] == 0}
    assert (
        dict(
            re.findall(r'<a href="#([^"]+)">(?:cnn|vit)</a>', text)
            and [(words, run) for run, words in re.findall(r'<a href="#([^"]+)">(cnn|vit)</a>', text)]
        )
        == lowest
    )


def test_the_viewer_has_the_same_images_of_every_backbone(store):
    assert viewer.look(frame(store.runs())) is None
    for backbone in ("vit", "cnn", "mamba"):
        for seed in (1, 0):
            fabricate(store, make_config(backbone, "smoke", seed=seed))
    table = frame(store.runs())
    lowest = table[table.seed == 0].set_index("backbone")
    pixels = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(f"{lowest.folder['vit']}/samples.npz", x=pixels, x_hat=pixels)  # other images
    with np.load(f"{lowest.folder['mamba']}/samples.npz") as kept:
        x = kept["x"]
    np.savez(f"{lowest.folder['mamba']}/samples.npz", x=x, x_hat=x // 3)
    found = viewer.look(table)
    assert [name.partition(":")[0] for name in found.runs] == ["cnn", "mamba"]
    np.testing.assert_array_equal(found.originals, x)
    np.testing.assert_array_equal([*found.runs.values()][1], x // 3)
    assert f"PSNR dB {lowest.psnr['cnn']:.2f}" in next(iter(found.runs))


def test_a_photograph_is_shown_without_the_title_that_stands_above_it(tmp_path):
    pixels = np.zeros((10, 4, 3), dtype=np.uint8)
    pixels[:3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    chart = charts.Chart("a", "A", "", tmp_path / "a.png", head=3)
    shown = _picture(chart)
    assert shown.startswith("data:image/png;base64,")
    assert shown != _picture(chart._replace(head=0))
    blank = _picture(chart._replace(head=9))
    assert len(blank) < len(_picture(chart._replace(head=0)))
