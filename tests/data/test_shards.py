"""Images in shards: those of the folder, bit for bit, by an index, in an order that is a function of steps."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import shard
from bench.core.errors import UserError
from bench.data import SPLITS, Shards, batch, batch_indices, batches, decoding, load, shards, sources

COUNTS = {"train": 120, "val": 10, "test": 20}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Every test has an empty cache of its own."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_folder(root: Path, seed: int = 0) -> Path:
    """Images of two classes in three splits."""
    rng = np.random.default_rng(seed)
    for split, count in COUNTS.items():
        for number in range(count):
            path = root / split / ("dog" if number % 3 else "cat") / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pets"))


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> Path:
    """The same images as shards of 25."""
    place = tmp_path_factory.mktemp("shards") / "pets"
    assert shard.main([str(folder), "--to", str(place), "--per-shard", "25"]) == 0
    return place


@pytest.fixture
def copied(written, tmp_path) -> Path:
    """The shards, for a test that breaks them."""
    return shutil.copytree(written, tmp_path / "copied")


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def picture(seed: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


# --- the same images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "blog"])
def test_shards_and_memory_map_have_the_same_images_labels_and_batches(folder, written, augment):
    """So also the same training and scores: both see them through these alone."""
    mapped, kept = load(f"folder:{folder}", 8), load(f"shards:{written}", 8)
    assert isinstance(kept.train, Shards)
    assert (mapped.classes, kept.classes) == (("cat", "dog"),) * 2
    for split in SPLITS:
        assert np.array_equal(getattr(mapped, split)[:], getattr(kept, split)[:])
        assert np.array_equal(mapped.labels_of(split), kept.labels_of(split))
    some = mapped.with_train(50), kept.with_train(50)
    for one, other in ((mapped, kept), some):
        for step in (0, 1, 2, 9, 3):  # forwards and back: what is decoded ahead is not always what comes
            x, y = (batch(data.train, 4, step, 32, augment, "cpu") for data in (one, other))
            assert torch.equal(x, y)


def test_a_batch_does_not_depend_on_those_before_it_nor_on_how_many_share_it(written):
    train = load(f"shards:{written}", 8).train
    whole = batch(train, 1, 7, 32, "flip", "cpu")
    again = Shards(train.paths, train.places, 8)
    assert torch.equal(whole, batch(again, 1, 7, 32, "flip", "cpu"))
    processes = [(Shards(train.paths, train.places, 8), part) for part in (slice(16), slice(16, 32))]
    parts = [batch(images, 1, 7, 32, "flip", "cpu", part) for images, part in processes]
    assert torch.equal(whole, torch.cat(parts))


def test_how_images_are_spread_over_shards_changes_neither_them_nor_their_fingerprint(folder, written, tmp_path):
    assert shard.main([str(folder), "--to", str(tmp_path / "other"), "--per-shard", "1000"]) == 0
    one, other = load(f"shards:{written}", 8), load(f"shards:{tmp_path / 'other'}", 8)
    assert one.fingerprint == other.fingerprint
    assert np.array_equal(one.train[:], other.train[:])
    write_folder(tmp_path / "changed", seed=1)
    assert shard.main([str(tmp_path / "changed"), "--to", str(tmp_path / "third")]) == 0
    assert load(f"shards:{tmp_path / 'third'}", 8).fingerprint != one.fingerprint


def test_nothing_of_what_is_trained_on_is_decoded_beforehand(written, cache):
    load(f"shards:{written}", 8)
    sizes = {path.name: np.load(path).nbytes for path in (cache / "data").glob("*/*.npy")}
    assert sizes["train.npy"] == COUNTS["train"] * shards.PLACE.itemsize == 32 * 120
    assert sizes["test.npy"] == COUNTS["test"] * 8 * 8 * 3


# --- an epoch in a bounded window ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1000, 1005, 65])
def test_every_image_comes_once_an_epoch_from_a_window_of_few_runs(count, monkeypatch):
    monkeypatch.setattr(batches, "WINDOW", 64)
    epochs = np.split(np.concatenate([batch_indices(2, step, 5, count, run=8) for step in range(2 * count // 5)]), 2)
    for rows in epochs:
        assert sorted(rows) == list(range(count))
        for start in range(0, count, 64):
            assert len({*(rows[start : start + 64] // 8)}) <= 9  # and the last, which is shorter
    assert len({*(epochs[0][:64] // 8)} & {*(epochs[1][:64] // 8)}) < 9 or count < 100
    assert (epochs[0] != epochs[1]).any()
    assert np.abs(np.diff(epochs[0][:64])).min() >= 1  # it is no run itself: neighbours are mixed
    assert (np.diff(epochs[0][:64]) == 1).mean() < 0.3


def test_what_fits_a_window_comes_in_the_order_of_a_memory_map(monkeypatch):
    monkeypatch.setattr(batches, "WINDOW", 100)
    for count, same in ((100, True), (101, False)):
        rows = [batch_indices(0, 0, 50, count, run) for run in (0, 10)]
        assert np.array_equal(*rows) == same


# --- what is missing or broken ---------------------------------------------------------------------------------------


def test_an_image_that_is_broken_is_named_and_the_next_stands_in_its_place(copied, capsys):
    train = load(f"shards:{copied}", 8).train
    clean = train[:]
    place = train.places[7]
    with open(train.paths[place["shard"]], "r+b") as file:  # another image in its place, which could be decoded
        other = picture(0)
        assert len(other) <= place["size"]
        file.seek(int(place["offset"]))
        file.write(other)
    broken = Shards(train.paths, train.places, 8)
    for _ in range(2):
        assert np.array_equal(broken[:], clean[[*range(7), 8, *range(8, len(train))]])
    said = capsys.readouterr().err
    assert said.count("skipped:") == 1
    assert f"at byte {place['offset']}" in said.replace("\n", "")


def test_more_than_one_percent_of_broken_images_is_an_error(copied):
    train = load(f"shards:{copied}", 8).train
    for row in (3, 5):
        with open(train.paths[train.places["shard"][row]], "r+b") as file:
            file.seek(int(train.places["offset"][row]))
            file.write(b"broken")
    train[4:]
    with pytest.raises(UserError, match="more than 1 % of the 120 images"):
        train[:4]


@pytest.mark.parametrize("how", ["gone", "cut", "noise", "compressed"])
@pytest.mark.parametrize("count", [99, 100])
def test_one_percent_of_shards_may_be_missing_or_broken_and_is_named(tmp_path, capsys, how, count):
    names = [f"{number:03}.tar" for number in range(count)]
    for number, name in enumerate(names):
        tar(tmp_path / "tars" / name, {"a.png": picture(number)})
    bad = tmp_path / "tars" / names[5]
    whole = bad.read_bytes()
    if how == "gone":
        bad.unlink()
    elif how == "compressed":
        with tarfile.open(bad, "w:gz") as file:
            file.addfile(tarfile.TarInfo("a.png"))
    else:
        bad.write_bytes(whole[:600] if how == "cut" else os.urandom(len(whole)))
    where = f"shards:{tmp_path}/tars/{{000..{count - 1:03}}}.tar"
    if count < 100:
        with pytest.raises(UserError, match=f"1 of {count} shards are missing or no tar files.*005.tar"):
            load(where, 8)
        return
    data = load(where, 8)
    assert sum(len(getattr(data, split)) for split in SPLITS) == count - 1
    assert "005.tar" in capsys.readouterr().err.replace("\n", "")


def test_a_shard_that_was_listed_and_is_gone_is_missed(copied):
    (copied / "train" / "train-000002.tar").unlink()
    with pytest.raises(UserError, match=r"train-000002\.tar"):
        load(f"shards:{copied}", 8)


def test_an_index_that_is_damaged_is_made_again(written, cache, capsys):
    before = load(f"shards:{written}", 8).train[:]
    (path,) = cache.glob("data/*/train.npy")
    places = np.load(path)
    places["offset"][3] += 512
    np.save(path, places)
    decoding._fingerprint.cache_clear()
    assert np.array_equal(load(f"shards:{written}", 8).train[:], before)
    assert "is damaged" in capsys.readouterr().err


# --- WebDataset's conventions ----------------------------------------------------------------------------------------


def test_samples_have_an_image_and_a_label_by_their_key(tmp_path):
    files = {
        "a/1.txt": b"a caption", "a/1.JPG": picture(0), "a/1.cls": b"3\n",
        "a/2.seg.png": picture(1), "a/2.png": picture(2),
        "a/2.webp": picture(5), "a/2.json": b'{"label": "dog", "x": 1}', "a/2.cls": b"7",
        "b.c/3.png": picture(3), "b.c/3.json": b"not json",
        "4.cls": b"9", "__meta__": b"", "5.png": picture(4), "5.json": b'{"class": 4}',
    }  # fmt: skip
    found = list(shards.samples(str(tar(tmp_path / "x.tar", files))))
    assert [label for *_, label in found] == ["3", "dog", "", "4"]
    assert [known for _, _, known, _ in found] == [shards.digest(picture(seed)) for seed in (0, 2, 3, 4)]
    content = (tmp_path / "x.tar").read_bytes()
    assert all(shards.digest(content[offset:][:size]) == known for offset, size, known, _ in found)


def test_the_package_itself_reads_what_is_written(written, folder):
    import webdataset

    paths = sorted(map(str, (written / "train").glob("*.tar")))
    found = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [int(sample["cls"]) for sample in found] == [0] * 40 + [1] * 80
    for sample in found:
        about = json.loads(sample["json"])
        assert sample["png"] == (folder / about["file"]).read_bytes()
        assert about["label"] == about["file"].split("/")[1]


def test_files_belong_to_the_split_that_their_folder_or_name_says():
    def split(*paths: str) -> dict[str, list[str]]:
        return sources.by_split([f"/data/test/{path}" for path in paths])

    assert split("train/0.tar", "validation/0.tar") == {
        "train": ["/data/test/train/0.tar"], "val": ["/data/test/validation/0.tar"]
    }  # fmt: skip
    assert {*split("x-train-00.tar", "x-test-00.tar", "readme.tar")} == {"train", "test"}
    assert {*split("train-0.tar", "train-1.tar")} == {""}  # nothing to score on
    assert {*split("a.tar", "test.tar")} == {""}
    assert {*split("train-test/0.tar", "1.tar")} == {""}


def test_shards_of_no_split_are_divided_by_a_digest_of_the_image(tmp_path):
    """So the same however they lie in shards, and one image twice is in one split."""
    images = [picture(seed // 2) for seed in range(60)]
    for name, order in (("one", range(60)), ("two", range(59, -1, -1))):
        for first in (0, 30):
            files = {f"{number}.png": images[number] for number in order[first : first + 30]}
            tar(tmp_path / name / f"{first}.tar", files)
    found = []
    for name in ("one", "two"):
        data = load(f"shards:{tmp_path / name}", 8)
        assert [len(getattr(data, split)) for split in SPLITS] == [48, 6, 6]
        found.append([{image.tobytes() for image in getattr(data, split)[:]} for split in SPLITS])
    assert found[0] == found[1]
    train, val, test = found[0]
    assert not train & val
    assert not val & test
    assert not train & test


BAD = {
    "nothing there": ("shards:{root}/none", "no shards in"),
    "a range that matches nothing": ("shards:{root}/{{000..099}}.tar", "no shards in"),
    "a range without an end": ("shards:{root}/{{000..099.tar", "no pattern"),
    "an address": ("shards:https://host/{{0..9}}.tar", "not from an address"),
    "without images": ("shards:{root}/words", "no images in the shards of"),
    "unreadable": ("shards:{root}/noise", "1 of 1 shards are missing or no tar files"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_shards_is_one_sentence(name, tmp_path, cache):
    tar(tmp_path / "words" / "0.tar", {"0.txt": b"word"})
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "0.tar").write_bytes(b"noise" * 1000)
    where, sentence = BAD[name]
    with pytest.raises(UserError, match=sentence) as caught:
        load(where.format(root=tmp_path), 8)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("data/*/*"))


# --- python -m bench.shard -------------------------------------------------------------------------------------------


def content(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_the_same_command_writes_what_is_missing_and_the_same_bytes(folder, written, copied, capsys):
    (copied / "train" / "train-000001.tar").unlink()
    (copied / "train" / ".part-train-000001-x.tar").write_bytes(b"of a killed process")
    assert shard.main([str(folder), "--to", str(copied), "--per-shard", "25"]) == 0
    assert "7 shards, 1 written: 120 train / 10 val / 20 test images" in capsys.readouterr().out.replace("\n", " ")
    assert content(copied) == content(written)
    assert shard.main([f"folder:{folder}", "--to", str(copied), "--per-shard", "25"]) == 0
    assert "7 shards, already written" in capsys.readouterr().out.replace("\n", " ")


def test_nothing_is_overwritten(folder, copied, tmp_path, capsys):
    before = content(copied)
    assert shard.main([str(folder), "--to", str(copied), "--per-shard", "26"]) == 2
    other = write_folder(tmp_path / "others", seed=3)
    (other / "val" / "cat" / "000.png").unlink()
    assert shard.main([str(other), "--to", str(copied), "--per-shard", "25"]) == 2
    assert content(copied) == before
    assert shard.main([str(folder), "--to", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 3
    assert "is not empty" in said


def test_images_that_cannot_be_decoded_are_left_out_up_to_one_percent(tmp_path, capsys):
    root = write_folder(tmp_path / "pets")
    (root / "train" / "cat" / "003.png").write_bytes(b"broken")
    assert shard.main([str(root), "--to", str(tmp_path / "out"), "--per-shard", "50"]) == 0
    assert "train/cat/003.png" in capsys.readouterr().err
    data = load(f"shards:{tmp_path / 'out'}", 8)
    assert np.array_equal(data.train[:], load(f"folder:{root}", 8).train[:])
    (root / "train" / "cat" / "006.png").write_bytes(b"broken")
    assert shard.main([str(root), "--to", str(tmp_path / "other")]) == 2
    assert "more than 1 % of the images" in capsys.readouterr().err
    assert not list((tmp_path / "other").rglob("*.tar"))


@pytest.mark.parametrize("mistake", [["--to", "{out}", "--per-shard", "0"], ["--to"], []])
def test_a_mistake_on_the_command_line_is_exit_code_2(mistake, folder, tmp_path):
    arguments = [str(folder), *(word.format(out=tmp_path / "out") for word in mistake)]
    try:
        code = shard.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert not (tmp_path / "out").exists()


# --- before a disk is full -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "said"), [(36000, ""), (35000, "the disk fills"), (28000, "error")])
def test_arrays_that_would_fill_the_disk_are_told_with_what_shards_would_take(folder, monkeypatch, capsys, free, said):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda place: usage(free))
    if said == "error":
        with pytest.raises(UserError, match=r"as shards they take .* python -m bench.shard"):
            load(f"folder:{folder}", 8)
    else:
        load(f"folder:{folder}", 8)
    told = capsys.readouterr().err
    assert ("bench.shard" in told) == (said == "the disk fills") == ("the disk fills" in told)
