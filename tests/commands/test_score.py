"""``python -m bench.score``: guests of every kind, side by side."""

import json
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import bench
from bench import report
from bench.core.store import Store
from tests.fabricate import fabricate

score = import_module("bench.score")  # not the function of the public face


def scored(name, bits, **metrics):
    found = {"psnr": 20.0, "ssim": 0.5, "lpips_vgg": 0.3, "bits_per_image": bits, **metrics}
    found = {key: value for key, value in found.items() if value is not None}
    return SimpleNamespace(config=lambda: {"backbone": name}, metrics=lambda: found)


def lines(table):
    return [[str(cell) for cell in row] for row in zip(*(column._cells for column in table.columns), strict=True)]


def test_only_equal_bits_share_a_ranking():
    """Ascending, each under its rate, and what has none last."""
    runs = [scored("none", None), scored("b", 900), scored("a", 100), scored("c", 900, psnr=21.0, psnr_kmeans=19.0)]
    first = [row[0] for row in lines(score.table_of(runs))]
    titles = ["[italic]100 bits per image[/]", "[italic]900 bits per image[/]", "[italic]no rate[/]"]
    assert first == [titles[0], "a", titles[1], "b", "c", titles[2], "none"]
    best = next(row for row in lines(score.table_of(runs)) if row[0] == "c")
    assert "[bold]21.00[/]" in best


def test_k_means_at_the_same_bits_stands_below():
    table = score.table_of([scored("a", 100, psnr_kmeans=19.0)])
    assert [row[0] for row in lines(table)][-1] == "k-means on patches"


@pytest.fixture
def images(tmp_path):
    """A folder of 3 × 6 images of 32×32."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(tmp_path / "images" / split / f"{split}{number}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_guests_of_every_kind_meet_in_one_table(images, tmp_path, capsys):
    """Scored once; the report that is named at the end has them."""
    diffusers = pytest.importorskip("diffusers")
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "num_vq_embeddings": 16}
    diffusers.VQModel(**levels, **small).save_pretrained(tmp_path / "vq")
    shared = ["--data", f"folder:{images}", "--image-size", "32", "--results", str(tmp_path / "results")]
    guests = [f"diffusers:{tmp_path / 'vq'}", "python:tests.guests.test_guests:Grey"]
    assert score.main([*guests, "codec:webp@900", *shared, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for guest in (*guests, "codec:webp@900", "k-means on patches", "1024 bits per image", "64 bits per image"):
        assert guest in said
    assert "Protocol 3: folder: 6 train / 6 val / 6 test images" in " ".join(said.split())
    runs = Store(tmp_path / "results").runs()
    assert [run.status for run in runs] == ["finished"] * 3
    before = [run.folder.stat().st_mtime_ns for run in runs]
    assert score.main([*guests, "codec:webp@900", *shared, "--device", "cpu"]) == 0
    assert [run.folder.stat().st_mtime_ns for run in runs] == before
    assert score.main([guests[1], "--resize-to", "16", *shared, "--device", "cpu"]) == 0
    assert "Not to be ranked" not in capsys.readouterr().out.partition("scored:")[0]
    resized = next(run for run in Store(tmp_path / "results").runs() if "16×16" in run.protocol()["resizer"])
    assert resized.metrics()["tokens"] == 4
    assert report.main(["--results", str(tmp_path / "results")]) == 0
    assert "all of these were trained elsewhere" in " ".join(capsys.readouterr().out.split())
    about = json.loads((resized.folder / "config.json").read_text())["about"]
    assert about == {"class": "Grey", "range": "[0, 1]"}


def test_the_command_leaves_the_function_of_the_public_face():
    """Which is called like it."""
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)

    class Same:
        def encode(self, x):
            return x.half()

        def decode(self, codes):
            return codes.float() * 0.5

    metrics, per_image = bench.score(Same(), None, images)
    assert metrics["psnr"] == pytest.approx(per_image["psnr"].mean())


def test_a_run_of_ours_on_its_own_images_is_itself(tiny, tmp_path, monkeypatch):
    """Nothing is scored again, and no second row is made."""
    from bench.guests import Guest, score_guest, trial

    run = fabricate(Store(tmp_path), replace(tiny))
    monkeypatch.setattr(trial, "_conditions", lambda *given: run.protocol())
    own = Guest("run:x", object(), 16, "d", "cpu", folder=run.folder)
    assert score_guest(own, SimpleNamespace(), Store(tmp_path)).folder == run.folder
