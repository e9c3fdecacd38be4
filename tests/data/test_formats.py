"""Arrays, Parquet and data sets of the package datasets: the same images as a folder's, with splits and labels."""

from __future__ import annotations

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bench.core.errors import UserError
from bench.core.files import located
from bench.data import SPLITS, Data, check_name, decoding, load, sources, to_pixels

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 9, 11, 3), dtype=np.uint8)
PARTS = {"train": range(40), "val": range(40, 45), "test": range(45, 60)}
NAMES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Every test has an empty cache of its own, also of the package."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    return tmp_path / "cache"


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(IMAGES[number]).save(content, "png")
    return content.getvalue()


def write_npy(place: Path, parts: dict[str, range]) -> str:
    for split, numbers in parts.items():
        np.save(place / f"{split or 'all'}.npy", IMAGES[list(numbers)])
    return f"npy:{place / 'all.npy' if '' in parts else place}"


def write_parquet(place: Path, parts: dict[str, range]) -> str:
    for split, numbers in parts.items():
        for half in (0, 1):
            rows = list(numbers)[half * len(numbers) // 2 : (half + 1) * len(numbers) // 2]
            files = [{"bytes": png(number), "path": None} for number in rows]
            columns = {"text": ["word"] * len(rows), "image": files, "label": [number % 3 for number in rows]}
            pq.write_table(pa.table(columns), place / f"{split or 'part'}-{half}.parquet", row_group_size=7)
    return f"parquet:{place}"


def write_hub(place: Path, parts: dict[str, range]) -> str:
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    tables = {}
    for split, numbers in parts.items():
        rows = {"image": [{"bytes": png(n), "path": None} for n in numbers], "label": [n % 3 for n in numbers]}
        tables[split or "everything"] = datasets.Dataset.from_dict(rows, features=kinds)
    datasets.DatasetDict(tables).save_to_disk(place)
    return f"hf:{place}"


WRITERS = {"npy": write_npy, "parquet": write_parquet, "hf": write_hub}


def contents(data: Data) -> dict[str, np.ndarray]:
    return {split: np.array(getattr(data, split)) for split in SPLITS}


@pytest.mark.parametrize("kind", WRITERS)
def test_splits_images_and_labels_are_those_that_were_written(kind, tmp_path, capfd):
    data = load(WRITERS[kind](tmp_path, PARTS), 8)
    for split, found in contents(data).items():
        numbers = PARTS[split]
        assert np.array_equal(found, [to_pixels(Image.fromarray(IMAGES[number]), 8) for number in numbers])
        if kind == "npy":
            assert data.labels_of(split) is None
        else:
            assert data.classes == (NAMES if kind == "hf" else ("0", "1", "2"))
            assert np.array_equal(data.labels_of(split), [number % 3 for number in numbers])


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_what_no_split_says_is_held_out_by_a_hash_and_no_image_is_in_two(kind, splits, tmp_path, capfd):
    parts = {split: PARTS[split] for split in splits} if splits != ("",) else {"": range(60)}
    found = contents(load(WRITERS[kind](tmp_path, parts), 8))
    assert [len(images) for images in found.values()] == ([36, 4, 15] if len(splits) == 2 else [48, 6, 6])
    pixels = [image.tobytes() for images in found.values() for image in images]
    assert len(set(pixels)) == len(pixels)


def test_one_split_of_a_hub_can_be_taken_alone(tmp_path, capfd):
    where = write_hub(tmp_path / "pets", {"train": range(40), "test": range(40, 60)})
    assert [len(images) for images in contents(load(f"{where}:test", 8)).values()] == [16, 2, 2]
    with pytest.raises(UserError, match="has no split 'dev'; it has train, test"):
        load(f"{where}:dev", 8)


def test_no_more_are_held_out_than_is_needed(monkeypatch):
    monkeypatch.setattr(sources, "MOST_HELD", 3)
    train, val, test, _ = sources.divided({"": range(100)}, "here")
    assert (len(train), len(val), len(test)) == (94, 3, 3)
    train, val, test, _ = sources.divided({"train": range(100), "val": range(100, 120)}, "here")
    assert (len(train), len(val), [*test]) == (97, 3, [*range(100, 120)])


@pytest.mark.parametrize("kind", WRITERS)
def test_the_cache_is_used_until_a_file_changes(kind, tmp_path, monkeypatch, capfd):
    made, decode = [], decoding._decode
    monkeypatch.setattr(decoding, "_decode", lambda *a: (made.append(a), decode(*a)))
    where = WRITERS[kind](tmp_path / "x" if kind == "hf" else tmp_path, PARTS)
    before = load(where, 8).fingerprint
    assert load(where, 8).fingerprint == before
    assert len(made) == 1
    WRITERS[kind](tmp_path / "x" if kind == "hf" else tmp_path, PARTS | {"test": range(45, 55)})
    assert load(where, 8).fingerprint != before
    assert len(made) == 2


def test_data_of_a_path_is_known_by_the_real_one(tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    real = os.path.realpath(tmp_path)
    for kind in ("folder", "shards", "parquet", "npy", "hf"):
        assert located(f"{kind}:pets") == f"{kind}:{real}/pets"
    assert located("shards:{0..9}.tar") == f"shards:{real}/{{0..9}}.tar"
    assert located("hf:pets:train") == f"hf:{real}/pets:train"
    assert located("hf:owner/pets:train") == "hf:owner/pets:train"
    assert located("photos") == "photos"


class Bomb:
    """Whose unpickling would be noticed."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


ARRAYS = {
    "grey": IMAGES[..., 0],
    "floats": IMAGES / np.float32(255),
    "channels first": IMAGES.transpose(0, 3, 1, 2),
    "nothing": IMAGES[:0],
    "objects": np.array([Bomb()], dtype=object),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_is_no_images_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "x.npy", ARRAYS[name], allow_pickle=True)
    with pytest.raises(UserError, match=r"no array of numbers|images are one array N×H×W×3 of uint8") as caught:
        load(f"npy:{tmp_path}/x.npy", 8)
    assert "\n" not in str(caught.value)
    assert not Path("unpickled").exists()


BAD = {
    "parquet without images": ("parquet:{root}/words.parquet", "no column of images.*it has text"),
    "no parquet": ("parquet:{root}/noise", "is no Parquet file"),
    "a folder without parquet": ("parquet:{root}/empty", "no Parquet in"),
    "a folder without arrays": ("npy:{root}/empty", "no arrays in"),
    "noise as an array": ("npy:{root}/noise", "no array of numbers"),
    "several arrays": ("npy:{root}/several.npz", "holds several arrays"),
    "a hub without images": ("hf:{root}/table", "no column of images; it has text"),
    "a hub that is not there": ("hf:{root}/nowhere", "cannot load hf:"),
    "a few images": ("npy:{root}/two.npy", "too few images"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_table_is_one_sentence(name, tmp_path, cache, capfd):
    (tmp_path / "noise").write_bytes(b"noise" * 100)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "several.npz", IMAGES)
    np.save(tmp_path / "two.npy", IMAGES[:2])
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "words.parquet")
    if name == "a hub without images":
        datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(tmp_path / "table")
    where, sentence = BAD[name]
    with pytest.raises(UserError, match=sentence) as caught:
        load(where.format(root=tmp_path), 8)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("data/*/*"))


@pytest.mark.parametrize(("where", "package"), [("shards:x", "webdataset"), ("hf:x", "datasets")])
def test_a_package_that_is_missing_is_told_before_anything_is_read(where, package, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"needs the package {package}; pip install 'vqbench\[data\]'"):
        check_name(where)
