"""Codes: what the tokenizer says of every image, mirror images and labels in step, in files that say whose they are."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from bench.core.errors import UserError
from bench.core.files import sha256_arrays, unseal
from bench.data import Data
from bench.priors import codes as module
from bench.priors.codes import digest, encode, load_data

SIDE = 4


class Reader(torch.nn.Module):
    """Says what it is shown: the code of a cell is red of its pixel, plus 256 where green is above the middle."""

    def __init__(self, codebook_size: int = 512, augment: str = "flip", split: str = "test", train_images: int = 0):
        super().__init__()
        self.config = SimpleNamespace(
            **{"codebook_size": codebook_size, "augment": augment, "data": "toy", "image_size": SIDE},
            **{"split": split, "train_images": train_images},
        )
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32
        assert x.min() >= -1
        assert x.max() <= 1
        self.batches.append(len(x))
        red = ((x[:, 0] + 1) * 127.5).round().long()
        return (red + 256 * (x[:, 1] > 0)) % self.config.codebook_size


def toy_data(classes: int = 0) -> Data:
    generator, counts = np.random.default_rng(0), (70, 50, 66)
    images = [generator.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8) for count in counts]
    labels = tuple(generator.integers(0, classes, count) for count in counts) if classes else None
    return Data("toy", *images, "f" * 64, "toy", (), tuple("abcdef"[:classes]), labels)


def expected(images: np.ndarray, codebook_size: int = 512) -> np.ndarray:
    return (images[..., 0].astype(int) + 256 * (images[..., 1] > 127)) % codebook_size


@pytest.fixture
def folder(tmp_path) -> Path:
    """A finished run, as far as codes look at it."""
    (tmp_path / "config.json").write_text('{"config": {}, "environment": {}}')
    (tmp_path / "metrics.json").write_text(json.dumps({"metrics": {}, "protocol": {"fingerprint": "f" * 64}}))
    (tmp_path / "tokenizer.safetensors").write_bytes(b"weights")
    return tmp_path


@pytest.mark.parametrize("augment", ["flip", "blog", "none"])
def test_mirror_images_follow_all_images_where_training_mirrors(folder, augment):
    """Of held-out images there are none. All images are encoded in order, whatever the batches."""
    data, reader = toy_data(), Reader(augment=augment)
    codes = encode(folder, reader, data)
    mirrored = [expected(data.train), expected(data.train[:, :, ::-1])][: 1 + (augment != "none")]
    assert np.array_equal(codes.train, np.concatenate(mirrored))
    assert np.array_equal(codes.held_out, expected(data.test))
    assert sum(reader.batches) == 70 * len(mirrored) + 66
    assert (codes.codebook_size, codes.grid) == (512, (SIDE, SIDE))


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_codes_are_of_the_split_that_the_tokenizer_was_scored_on(folder, split):
    data = toy_data(classes=3)
    for _ in range(2):  # also when read again
        codes = encode(folder, Reader(split=split), data)
        assert np.array_equal(codes.held_out, expected(data.images(split)))
        assert np.array_equal(codes.held_out_labels, data.labels_of(split))


@pytest.mark.parametrize("augment", ["flip", "none"])
def test_codes_are_of_the_images_that_the_tokenizer_was_trained_on(folder, monkeypatch, augment):
    """Of a subset, where there was one, with its labels and mirror images."""
    monkeypatch.setattr(module, "load", lambda data, image_size: toy_data(classes=3))
    reader = Reader(augment=augment, train_images=9)
    codes, chosen = encode(folder, reader, load_data(folder, reader)), toy_data(classes=3).with_train(9)
    images, copies = chosen.train[:], 1 + (augment == "flip")
    assert np.array_equal(codes.train, np.concatenate([expected(images), expected(images[:, :, ::-1])][:copies]))
    assert np.array_equal(codes.train_labels, np.tile(chosen.labels[0], copies))
    assert len(codes.held_out) == 66


@pytest.mark.parametrize("augment", ["flip", "none"])
def test_labels_are_those_of_their_images_and_of_their_mirror_images(folder, augment):
    data = toy_data(classes=3)
    for _ in range(2):  # also when read again
        codes = encode(folder, Reader(augment=augment), data)
        assert codes.classes == ("a", "b", "c")
        assert len(codes.train_labels) == len(codes.train)
        assert np.array_equal(codes.held_out_labels, data.labels[2])
        for row, label in enumerate(codes.train_labels):
            assert label == data.labels[0][row % 70]


def test_without_labels_there_are_none(folder):
    codes = encode(folder, Reader(), toy_data())
    assert (codes.classes, codes.train_labels, codes.held_out_labels) == ((), None, None)


@pytest.mark.parametrize(
    ("codebook_size", "kind"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (512, np.uint16)]
)
def test_every_code_comes_back_in_the_smallest_type_that_holds_them(folder, codebook_size, kind):
    data = toy_data()
    codes = encode(folder, Reader(codebook_size, "none"), data)
    assert codes.train.dtype == codes.held_out.dtype == kind
    assert np.array_equal(codes.train, expected(data.train, codebook_size))
    assert codes.train.max() >= codebook_size // 2


def test_codes_are_made_once_and_say_whose_they_are(folder):
    first = encode(folder, Reader(), toy_data())
    again = Reader()
    second = encode(folder, again, toy_data())
    assert not again.batches
    assert np.array_equal(first.train, second.train)
    assert first.tokenizer == second.tokenizer == digest(folder)
    (folder / "tokenizer.safetensors").write_bytes(b"others")
    assert digest(folder) != first.tokenizer
    with pytest.raises(UserError, match=rf"has codes of another tokenizer \({first.tokenizer}, not {digest(folder)}\)"):
        encode(folder, Reader(), toy_data())


def test_codes_stay_on_disk_where_nobody_writes_to_them(folder):
    """A data set of them need not fit into memory."""
    codes = encode(folder, Reader(), toy_data())
    for grids in (codes.train, codes.held_out):
        assert isinstance(grids, np.memmap)
        assert not grids.flags.writeable


def test_images_are_encoded_in_float32_whatever_autocast_says(folder):
    cast = set()

    class Watched(Reader):
        def encode(self, x):
            cast.add((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
            return super().encode(x)

    with torch.autocast("cpu", torch.bfloat16):
        encode(folder, Watched(), toy_data())
    assert cast == {(False, True)}


def test_codes_that_were_interrupted_are_made_anew(folder):
    """The file that says that they are complete is written last."""

    class Torn(Reader):
        def encode(self, x):
            if len(self.batches) == 3:  # training images, mirrored, are 4 batches
                raise KeyboardInterrupt
            return super().encode(x)

    class TornLater(Torn):
        def encode(self, x):
            if len(self.batches) == 5:  # the second of held-out images
                raise KeyboardInterrupt
            return Reader.encode(self, x)

    for torn in (Torn, TornLater):
        with pytest.raises(KeyboardInterrupt):
            encode(folder, torn(), toy_data())
        assert not (folder / "codes" / "meta.json").exists()
    assert np.array_equal(encode(folder, Reader(), toy_data()).held_out, expected(toy_data().test))


def test_the_identity_of_a_tokenizer_is_its_weights(folder):
    before = digest(folder)
    (folder / "config.json").write_text('{"config": {}, "environment": {}}')
    (folder / "metrics.json").write_text('{"metrics": {}, "protocol": {}}')
    assert digest(folder) == before
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError) as error:
        digest(folder)
    assert str(error.value) == f"{folder} holds no finished run (no metrics.json); train one with python -m bench.run"


def test_data_are_those_that_the_tokenizer_was_scored_on(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "load", lambda *arguments: asked.append(arguments) or toy_data())
    assert load_data(folder, Reader()).name == "toy"
    assert asked == [("toy", SIDE)]
    (folder / "metrics.json").write_text(json.dumps({"metrics": {}, "protocol": {"fingerprint": "0" * 64}}))
    with pytest.raises(UserError) as error:
        load_data(folder, Reader())
    assert str(error.value) == f"toy has other images now than when {folder} was trained; train it again"


def test_two_that_encode_at_once_do_it_once(folder):
    """Whoever comes while the first is at it waits, and reads what the first has made."""
    taken = []

    class Watched(Reader):
        def encode(self, x):
            try:
                with FileLock(folder / "codes" / ".lock", timeout=0):
                    taken.append(False)
            except Timeout:
                taken.append(True)
            return super().encode(x)

    encode(folder, Watched(), toy_data())
    assert set(taken) == {True}
    with FileLock(folder / "codes" / ".lock", timeout=0):  # given free again
        pass


def test_the_files_say_what_the_codes_are(folder):
    """Of which weights, by the beginning of their digest, how many there can be, and of which images."""
    codes = encode(folder, Reader(), toy_data())
    assert {path.name for path in (folder / "codes").iterdir()} - {".lock"} == {
        "train.npy",
        "held_out.npy",
        "meta.json",
    }
    assert unseal(folder / "codes" / "meta.json") == {
        **{"tokenizer": hashlib.sha256(b"weights").hexdigest()[:16], "codebook_size": 512, "mirrored": True},
        **{"data": "toy", "fingerprint": "f" * 64, "digest": sha256_arrays(codes.train, codes.held_out)},
    }


@pytest.mark.parametrize("name", ["train.npy", "held_out.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "noise", "gone"])
def test_damaged_codes_are_encoded_again(folder, capsys, name, damage):
    """Of which a line tells; and afterwards they are read as before."""
    codes = encode(folder, Reader(), toy_data())
    whole = {split: np.array(getattr(codes, split)) for split in ("train", "held_out")}
    path = folder / "codes" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"flip": content, "cut": content[:-9], "empty": b"", "noise": b"noise" * 99}
    path.unlink() if damage == "gone" else path.write_bytes(damaged[damage])
    reader = Reader()
    again = encode(folder, reader, toy_data())
    assert reader.batches
    assert all(np.array_equal(getattr(again, split), array) for split, array in whole.items())
    assert ("is made again" in capsys.readouterr().err) == ((name, damage) != ("meta.json", "gone"))
    quiet = Reader()
    encode(folder, quiet, toy_data())
    assert quiet.batches == []


def test_codes_may_lie_elsewhere_behind_a_link(folder, tmp_path_factory):
    elsewhere, reader = tmp_path_factory.mktemp("disk") / "codes", Reader()
    encode(folder, Reader(), toy_data())
    (folder / "codes").rename(elsewhere)
    (folder / "codes").symlink_to(elsewhere)
    assert len(encode(folder, reader, toy_data()).held_out) == 66
    assert reader.batches == []


@pytest.mark.parametrize("name", ["train.npy", "held_out.npy"])
def test_a_pipe_where_codes_belong_is_not_waited_for(folder, impatient, capsys, name):
    encode(folder, Reader(), toy_data())
    path = folder / "codes" / name
    path.unlink()
    os.mkfifo(path)
    codes = encode(folder, Reader(), toy_data())
    assert np.array_equal(codes.held_out, expected(toy_data().test))
    assert path.is_file()
    assert f"it has no file {name}; it is made again" in " ".join(capsys.readouterr().err.split())


def test_codes_of_older_versions_are_read_without_a_digest(folder):
    encode(folder, Reader(), toy_data())
    path = folder / "codes" / "meta.json"
    old = {name: value for name, value in unseal(path).items() if name != "digest"}
    path.write_text(json.dumps(old))
    reader = Reader()
    encode(folder, reader, toy_data())
    assert reader.batches == []


@pytest.mark.parametrize("shape", [(-1,), (-1, SIDE), (-1, SIDE, SIDE // 2), (-1, 1, SIDE, SIDE)])
@pytest.mark.parametrize("splits", [["train"], ["held_out"], ["train", "held_out"]])
def test_codes_of_older_versions_of_another_shape_are_encoded_again(folder, capsys, splits, shape):
    codes = encode(folder, Reader(), toy_data())
    path = folder / "codes" / "meta.json"
    path.write_text(json.dumps({name: value for name, value in unseal(path).items() if name != "digest"}))
    for split in splits:
        np.save(path.with_name(f"{split}.npy"), np.array(getattr(codes, split)).reshape(shape))
    again = encode(folder, Reader(), toy_data())
    assert np.array_equal(
        again.train, np.concatenate([expected(toy_data().train), expected(toy_data().train[:, :, ::-1])])
    )
    assert again.held_out.shape == (66, SIDE, SIDE)
    assert "its codes are of another shape; it is made again" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("augment", ["flip", "none"])
def test_the_bar_counts_every_image_that_is_encoded(folder, monkeypatch, augment):
    bars = []

    class Noted(module.Bar):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            bars.append(self)

    monkeypatch.setattr(module, "Bar", Noted)
    encode(folder, Reader(augment=augment), toy_data())
    (bar,) = bars
    assert bar.label == "encoding images" + ", those to train on mirrored, too" * (augment == "flip")
    assert bar.done == bar.total == 66 + 70 * (1 + (augment == "flip"))


def test_codes_are_written_whole_or_not_at_all(folder, monkeypatch):
    """A disk that fills up leaves no part of a file under its name, and nothing else either."""

    def full(path, codes):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(OSError, match="disk full"):
        encode(folder, Reader(), toy_data())
    assert {path.name for path in (folder / "codes").iterdir()} <= {".lock"}


@pytest.mark.parametrize("quantizer", ["none", "kl"])
def test_a_latent_without_codes_is_refused(folder, quantizer):
    """In one sentence that says what to do, before anything is written."""
    (folder / "config.json").write_text(json.dumps({"config": {"quantizer": quantizer}, "environment": {}}))
    before = {path.name for path in folder.iterdir()}
    for work in (lambda: digest(folder), lambda: encode(folder, Reader(), toy_data())):
        with pytest.raises(UserError, match=f"quantizer '{quantizer}' of .* makes no codes .*; train a tokenizer with"):
            work()
    assert {path.name for path in folder.iterdir()} - {"codes"} == before
