"""One's own images through trained tokenizers: what is in the picture, and every mistake in one sentence."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_model

from bench import reconstruct
from bench.core import plots
from bench.core.store import Store
from bench.metrics import psnr
from bench.tokenizers.config import make_config
from bench.tokenizers.tokenizer import Tokenizer
from tests.fabricate import fabricate

SMALL = {"width": 16, "depth": 1, "codebook_size": 16, "code_dim": 4, "device": "cpu"}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def photo(tmp_path):
    """A file of 90×60 pixels whose central square is red and the rest white."""
    pixels = np.full((60, 90, 3), 255, dtype=np.uint8)
    pixels[:, 15:75] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Every figure that is saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(reconstruct, "save", lambda figure, path: figures.append(figure) or plots.save(figure, path))
    return figures


def trained(store, backbone="cnn", **settings):
    """The folder of a run whose weights are drawn by its seed."""
    config = make_config(backbone, "smoke", **{**SMALL, **settings}).resolved()
    run = fabricate(store, config)
    torch.manual_seed(config.seed)
    save_model(Tokenizer(config), run.folder / "tokenizer.safetensors")
    return run.folder


def command(store, *words) -> int:
    return reconstruct.main([*map(str, words), "--device", "cpu", "--results", str(store.root)])


def words_of(figure: Figure) -> list[list[str]]:
    """By row, what stands above and below each tile."""
    columns = len({axes.get_subplotspec().colspan.start for axes in figure.axes})
    told = [f"{axes.get_title()}|{axes.get_xlabel()}" for axes in figure.axes]
    return [told[i : i + columns] for i in range(0, len(told), columns)]


def test_a_row_per_image_and_a_column_per_tokenizer_with_its_decibels(store, photo, image_folder, drawn, tmp_path):
    folders = [trained(store), trained(store, "vit", quantizer="fsq", code_dim=2)]
    out = tmp_path / "new" / "side.png"
    assert command(store, photo, image_folder / "test" / "003.png", "--run", folders[0], "vit", "--out", out) == 0
    assert Image.open(out).format == "PNG"
    (figure,) = drawn
    assert "central squares, resized to 32×32" in figure.get_suptitle()
    first, second = words_of(figure)
    heads = ["original|photo.png", "cnn, ema\n64 bits per image|", "vit, fsq\n64 bits per image|"]
    assert all(cell.startswith(head) for cell, head in zip(first, heads, strict=True))
    assert second[0] == "|003.png"
    for column, folder in enumerate(folders, 1):
        tokenizer = Tokenizer.from_run(folder)
        for row, own in enumerate((first, second)):
            original, shown = (figure.axes[3 * row + i].images[0].get_array() for i in (0, column))
            x = torch.from_numpy(np.array(original)).permute(2, 0, 1)[None]
            x_hat = tokenizer.decode(tokenizer.encode(x / 127.5 - 1)).add(1).mul(127.5).round().to(torch.uint8)
            assert (x_hat[0].permute(1, 2, 0).numpy() == shown).all()
            assert own[column].endswith(f"|{psnr(x_hat, x).item():.2f} dB")
    assert figure.axes[0].images[0].get_array()[..., 1].max() < 20  # the central square alone: no white


def test_a_picture_in_the_place_of_another_file_is_told(store, photo, tmp_path, capsys):
    """And the same once more is no other."""
    words = (photo, "--run", trained(store), "--out", tmp_path / "x.png")
    told = []
    for content in (None, None, b"a picture of years ago"):
        if content:
            (tmp_path / "x.png").write_bytes(content)
        assert command(store, *words) == 0
        told.append(capsys.readouterr().out)
    assert ["overwritten" in out for out in told] == [False, False, True]


def test_runs_that_would_be_called_alike_are_told_apart(store, photo, drawn, tmp_path):
    folders = [trained(store, seed=seed) for seed in (0, 1)]
    assert command(store, photo, "--run", *folders, folders[0], "--out", tmp_path / "a.png") == 0
    ((_, *told),) = words_of(drawn[0])
    assert [cell.partition("|")[0].splitlines()[-1] for cell in told] == [one.name[-12:] for one in folders]


def test_a_tokenizer_of_another_size_gets_the_image_at_its_own(store, photo, drawn, tmp_path):
    folders = [trained(store), trained(store, "vit", image_size=64)]
    assert command(store, photo, "--run", *folders, "--out", tmp_path / "a.png") == 0
    assert [len(axes.images[0].get_array()) for axes in drawn[0].axes] == [32, 32, 64]
    ((_, small, large),) = words_of(drawn[0])
    assert "\nat 32×32|" in small
    assert "\nat 64×64|" in large


@pytest.mark.parametrize(("quantizer", "told"), [("none", "\nno codes|"), ("kl", " bits, the mean|")])
def test_a_latent_without_codes_says_what_it_takes(store, photo, drawn, tmp_path, quantizer, told):
    assert command(store, photo, "--run", trained(store, quantizer=quantizer), "--out", tmp_path / "a.png") == 0
    assert told in words_of(drawn[0])[0][1]


def test_a_folder_means_its_images_and_the_first_of_many(store, image_folder, drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reconstruct, "MOST", 3)
    assert command(store, image_folder / "val", "--run", trained(store), "--out", tmp_path / "a.png") == 0
    assert [row[0].partition("|")[2] for row in words_of(drawn[0])] == ["000.png", "001.png", "002.png"]
    assert "left out: all but the first 3 of 24 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--run", "cnn"], "-m bench.reconstruct IMAGE... --run RUN"),
        (["photo.png"], "name images and runs"),
        (["nowhere.png", "--run", "cnn"], "there is no image nowhere.png; name files, or folders of them"),
        (["empty", "--run", "cnn"], "no images in empty: put some there, or name another folder"),
        (["text.png", "--run", "cnn"], "text.png cannot be read as an image (cannot identify image file"),
        (["photo.png", "--run", "mamba"], "unknown run 'mamba'"),
        (["photo.png", "--run", "vit"], "has lost its tokenizer.safetensors; move that folder and train it again"),
        (["photo.png", "--run", "cnn", "--out", "a.jpg"], "a.jpg is no name of a picture; let --out end in .png"),
        (["photo.png", "--run", "cnn", "--out", "folder.png"], "folder.png is no name of a picture"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(store, photo, tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    trained(store)
    fabricate(store, make_config("vit", "smoke", device="cpu"))  # without weights
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    before = sorted(tmp_path.iterdir())
    assert command(store, *words) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told in sentence
    assert sorted(tmp_path.iterdir()) == before
