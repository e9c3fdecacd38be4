"""Data: decoding to arrays, its cache and its errors; batches and augmentations as pure functions of (seed, step)."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import struct
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets
from torchvision.transforms import functional as TF

from bench.core.errors import UserError
from bench.core.files import cache_dir, unseal
from bench.data import (
    AUGMENTATIONS,
    DATASETS,
    SPLITS,
    Data,
    batch,
    batch_indices,
    batches,
    decoding,
    eval_batches,
    from_uint8,
    load,
    photographs,
    photos,
    sources,
    to_pixels,
    to_rgb,
)
from bench.data.decoding import Subset, decoded
from bench.data.photos import Box, Photograph


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Every test has an empty cache of its own."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decodes(monkeypatch) -> list[str]:
    """Grows by one name for every data set that is really decoded."""
    names, decode = [], decoding._decode
    monkeypatch.setattr(decoding, "_decode", lambda name, *rest: (names.append(name), decode(name, *rest)))
    return names


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sizes(loaded: Data) -> tuple[int, ...]:
    """How many images are in each split."""
    return tuple(len(getattr(loaded, split)) for split in SPLITS)


def write_images(folder: Path, count: int, size: tuple[int, int] = (10, 8), ending: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(noise(*size, 3, seed=index)).save(folder / f"{index:03}{ending}")
    return folder


# --- photos ---------------------------------------------------------------------------------------------------------


def coded_photos(*sides: int) -> dict[str, Photograph]:
    """Pictures that say where each of their pixels came from, (row, column, photograph). Each of a picture's parts is
    as narrow as its side, and longer: crops of that size are not resized."""
    found = {}
    for number, side in enumerate(sides or (64, 64, 64)):
        rows, columns = np.indices((200, 230))
        parts = (
            (Box(0, 0, 150, side), Box(0, side, side, 200), Box(side, side, 230, 2 * side)),
            (Box(0, 0, side, 200), Box(side, 0, 2 * side, 90), Box(2 * side, 0, 230, side)),
            (Box(20, 120, 230, 120 + side), Box(100, 5, 200, 5 + side), Box(0, 0, side, 100)),
        )
        pixels = np.stack([rows, columns, 0 * rows + number], axis=2).astype(np.uint8)
        found[f"photo{number}"] = Photograph(pixels, *parts[number])
    return found


def crops(image_size: int, made=coded_photos, counts: tuple[int, int, int] = (200, 100, 100)) -> Data:
    """Few crops of pictures that are not the embedded ones."""
    return decoded("photos", photos.photo_source(image_size, made, counts), image_size)


def test_photo_splits_share_no_pixel_and_photographs_are_equally_frequent():
    loaded, seen = crops(64), set()
    for split in SPLITS:
        images = getattr(loaded, split).astype(int)
        assert (np.diff(images[..., 0], axis=1) == 1).all()  # a crop is a crop: neighbours stay neighbours
        assert (np.diff(images[..., 1], axis=2) == 1).all()
        assert np.ptp(np.bincount(images[:, 0, 0, 2])) <= 1
        own = set(map(tuple, np.unique(images.reshape(-1, 3), axis=0).tolist()))
        for row, column, number in own:
            box = getattr(coded_photos()[f"photo{number}"], split)
            assert box.left <= column < box.right
            assert box.top <= row < box.bottom
        assert not own & seen
        seen |= own


@pytest.mark.parametrize("name", photographs())
def test_the_parts_of_a_photograph_are_inside_and_disjoint(name):
    photo = photographs()[name]
    height, width, _ = photo.pixels.shape
    taken = np.zeros((height, width), int)
    for split in SPLITS:
        box: Box = getattr(photo, split)
        assert 0 <= box.left < box.right <= width
        assert 0 <= box.top < box.bottom <= height
        taken[box.top : box.bottom, box.left : box.right] += 1
    assert taken.max() == 1
    assert photo.largest >= 128


def test_a_crop_is_made_of_its_own_part_alone_whatever_its_size():
    """Resized, too: a filter that looked around the crop would see another split."""
    pixels = np.full((120, 240, 3), 255, np.uint8)
    boxes = Box(10, 10, 110, 110), Box(110, 10, 170, 100), Box(170, 20, 230, 110)
    for level, box in enumerate(boxes, 1):
        pixels[box.top : box.bottom, box.left : box.right] = level
    loaded = crops(16, lambda: {"flat": Photograph(pixels, *boxes)}, (60, 60, 60))
    assert [np.unique(getattr(loaded, split)).tolist() for split in SPLITS] == [[1], [2], [3]]


def test_a_crop_is_its_square_resized_by_lanczos():
    *splits, _ = photos.photo_source(24, photographs, (24, 8, 8)).open()
    for split in splits:
        for name, box in split.items:
            square = Image.fromarray(photographs()[name].pixels).crop(box)
            assert square.width == square.height
            assert np.array_equal(split.read((name, box)), square.resize((24, 24), Image.Resampling.LANCZOS))


def test_crops_are_of_all_sizes_and_reach_every_edge_of_their_part():
    """From image_size up to the whole part, each as likely: details and whole faces."""
    part = Box(20, 30, 84, 130)
    photo = Photograph(noise(200, 200, 3), part, Box(100, 0, 200, 100), Box(100, 100, 200, 200))
    train, *_ = photos.photo_source(16, lambda: {"one": photo}, (2000, 1, 1)).open()
    boxes = np.array([box for _, box in train.items])
    sides = boxes[:, 2] - boxes[:, 0]
    assert (sides == boxes[:, 3] - boxes[:, 1]).all()
    assert set(sides) == set(range(16, 65))
    assert abs(sides.mean() - 40) < 1
    assert boxes.min(axis=0).tolist()[:2] == [20, 30]
    assert boxes.max(axis=0).tolist()[2:] == [84, 130]
    slack = (boxes[:, 0] - 20) / np.maximum(64 - sides, 1), (boxes[:, 1] - 30) / (100 - sides)
    assert all(abs(share[sides < 60].mean() - 0.5) < 0.03 for share in slack)


def test_photo_crops_are_the_same_on_every_machine():
    # A golden value: it must survive other versions of NumPy, and changes only together with DECODING_VERSION.
    assert crops(64).fingerprint == "89fd4567d6c1ce6f1e410c7d14af3d1b760d0d73f80551c2a610b82490d156a3"


def test_the_places_of_crops_are_the_same_on_every_machine():
    """Golden values, of sizes and places that no decoder can change."""
    drawn = {split: photos._draw_crops(photographs(), 64, 16, split) for split in SPLITS}
    assert {split: [tuple(box) for _, box in drawn[split][7::8]] for split in SPLITS} == {
        "train": [(248, 379, 393, 524), (103, 412, 252, 561)],
        "val": [(0, 127, 65, 192), (0, 74, 119, 193)],
        "test": [(283, 92, 368, 177), (155, 109, 339, 293)],
    }


def test_photos_are_real_and_their_fingerprint_does_not_depend_on_the_cache(tmp_path, monkeypatch):
    assert DATASETS["photos"](64).identity == (4096, 512, 512)
    first = crops(64, photographs, (90, 45, 40))
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "other"))
    second = crops(64, photographs, (90, 45, 40))
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(first.test, second.test)
    assert first.train.shape == (90, 64, 64, 3)
    assert first.train.dtype == np.uint8
    assert isinstance(first.train, np.memmap)
    assert first.split == (
        "photos: 90 train / 45 val / 40 test crops of 8 photographs, disjoint parts, resized to 64×64"
    )
    assert first.classes == tuple(sorted(photographs()))


def test_flat_crops_are_redrawn():
    pixels = noise(64, 400, 3)
    pixels[:, :150] = pixels[:, 300:340] = 7  # half of the training part, and some of the validation part
    pixels[:, 75:150] += noise(64, 75, 3) % 7  # a standard deviation of 2 levels
    parts = Box(0, 0, 300, 64), Box(300, 0, 360, 64), Box(360, 0, 400, 64)
    loaded = crops(16, lambda: {"bordered": Photograph(pixels, *parts)})
    for images in (loaded.train, loaded.val, loaded.test):
        assert min(image.std(axis=(0, 1)).max() for image in images) >= photos.CONTRAST
        assert not any(photos._is_flat(image) for image in images)
    constant = Photograph(np.full_like(pixels, 7), *parts)
    assert len(crops(20, lambda: {"constant": constant}).train) == 200  # the tries are bounded


def test_photos_that_are_too_small_are_left_out_and_the_limit_is_told():
    assert set(crops(66, lambda: coded_photos(70, 64, 64)).val[..., 2].ravel()) == {0}
    assert crops(70, lambda: coded_photos(64, 70, 64)).test.shape == (100, 70, 70, 3)  # the whole side
    with pytest.raises(UserError, match=r"image_size 76 .* at most 70"):
        crops(76, lambda: coded_photos(64, 70, 64))


@pytest.mark.parametrize("split", range(3))
def test_the_narrowest_part_of_a_photograph_is_its_limit(split):
    parts = [Box(0, 0, 50, 60), Box(50, 0, 110, 50), Box(110, 0, 160, 50)]
    parts[split] = Box(*parts[split][:3], 40)
    assert Photograph(noise(60, 160, 3), *parts).largest == 40


def test_photographs_are_colour_pictures_and_a_stereo_pair_is_its_left_view():
    found = photographs()
    assert len(found) == 8
    assert all(photo.pixels.ndim == 3 and photo.pixels.shape[2] == 3 for photo in found.values())
    assert all(photo.pixels.dtype == np.uint8 for photo in found.values())
    left, right, _ = skimage.data.stereo_motorcycle()
    assert np.array_equal(found["motorcycle"].pixels, left)
    assert not np.array_equal(left, right)


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_takes_any_mode_size_depth_and_ending(tmp_path):
    modes = {"grey.PNG": "L", "palette.gif": "P", "alpha.webp": "RGBA", "print.JPG": "CMYK", "bits.tif": "1"}
    (tmp_path / "a" / "b").mkdir(parents=True)
    for number, (name, mode) in enumerate(modes.items()):
        Image.fromarray(noise(30 + number, 17, 3)).convert(mode).save(tmp_path / "a" / name)
    Image.fromarray(noise(9, 40).astype(np.uint16) * 257).save(tmp_path / "a" / "b" / "deep.tiff")
    Image.fromarray(noise(1, 1, 3)).save(tmp_path / "dot.bmp")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._dot.bmp").write_text("macOS leaves these behind")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(f"folder:{tmp_path}", 16)
    assert (sizes(loaded), loaded.skipped) == ((5, 1, 1), ())
    assert loaded.split == (
        "folder: 5 train / 1 val / 1 test images, central squares resized to 16×16, "
        "split 80 % / 10 % / 10 % by a hash of the path"
    )


def test_hidden_files_and_what_lies_in_hidden_folders_are_no_images(tmp_path):
    """Thumbnails and rubbish bins of file managers, at any depth."""
    for folder in ("shown", ".thumbnails", "shown/.trash/deeper"):
        (tmp_path / folder).mkdir(parents=True)
    seen = ("one.png", "shown/two.png")
    for number, name in enumerate((*seen, ".hidden.png", ".thumbnails/one.png", "shown/.trash/deeper/three.png")):
        Image.fromarray(noise(8 + number, 8, 3)).save(tmp_path / name)
    assert sources.find_images(str(tmp_path)) == list(seen)


def test_sixteen_bits_are_scaled_and_not_clipped():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for image in (Image.fromarray(grey * 257), Image.fromarray((grey * 257).astype(np.int32))):
        assert image.mode in ("I;16", "I")
        assert np.array_equal(np.asarray(to_rgb(image)), np.repeat(grey[..., None], 3, axis=2))
    levels = Image.fromarray(np.array([[128, 129, 65406, 65407]], np.uint16))
    assert np.asarray(to_rgb(levels))[0, :, 0].tolist() == [0, 1, 254, 255]
    beyond = Image.fromarray(np.array([[-300, 70_000]], np.int32))
    assert np.asarray(to_rgb(beyond))[0, :, 0].tolist() == [0, 255]
    with pytest.raises(ValueError, match="no defined white"):
        to_rgb(Image.new("F", (4, 4)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(mode):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0)).convert(mode)
    if mode == "P":
        buffer = io.BytesIO()
        image.save(buffer, "png", transparency=image.getpixel((0, 0)))
        image = Image.open(buffer)
    assert np.asarray(to_rgb(image)).min() == 255


def test_exif_orientation_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert np.array_equal(to_pixels(image, 8), pixels.transpose(1, 0, 2)[:, ::-1])


def test_resizing_crops_the_centre_and_antialiases():
    checkerboard = np.indices((96, 160)).sum(axis=0) % 2 * 255
    pixels = np.repeat(checkerboard[..., None], 3, axis=2).astype(np.uint8)
    pixels[:, :32] = pixels[:, -32:] = 0  # outside the central square, where only tails of the kernel reach
    for picture in (pixels, pixels.transpose(1, 0, 2)):
        assert np.abs(to_pixels(Image.fromarray(picture), 12).astype(int) - 127.5).max() < 10
    small = noise(5, 5, 3)
    assert np.array_equal(to_pixels(Image.fromarray(small), 5), small)
    assert to_pixels(Image.fromarray(small), 16).shape == (16, 16, 3)


@pytest.mark.parametrize(("height", "width"), [(48, 96), (96, 48), (48, 48), (16, 96)])
def test_pixels_are_those_of_the_whole_picture_resized_and_then_cropped(height, width):
    """Resize and centre crop, as everyone has them (bug 11: originals are cropped in one way only)."""
    image = Image.fromarray(noise(height, width, 3))
    for side in (8, 16, min(height, width)):
        scale = min(height, width) // side
        small = image.resize((width // scale, height // scale), Image.Resampling.LANCZOS)
        left, top = (small.width - side) // 2, (small.height - side) // 2
        expected = np.asarray(small.crop((left, top, left + side, top + side)))
        assert np.abs(to_pixels(image, side) - expected.astype(int)).max() <= 1  # Pillow rounds between its two passes


def test_transparency_is_blended_and_not_cut():
    red = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert np.abs(np.asarray(to_rgb(red))[0, 0].astype(int) - (255, 127, 127)).max() <= 1


def test_split_subfolders_are_taken_as_they_are(tmp_path):
    write_images(tmp_path / "train" / "class", 3)
    write_images(tmp_path / "valid", 2, ending=".jpeg")
    write_images(tmp_path / "test", 4)
    loaded = load(f"folder:{tmp_path}", 8)
    assert sizes(loaded) == (3, 2, 4)
    assert loaded.split.endswith(" resized to 8×8, subfolders train / valid / test")
    *splits, _ = sources.folder_source(str(tmp_path), 8).open()
    for split, folder in zip(splits, ("train/class", "valid", "test"), strict=True):
        assert {os.path.dirname(item) for item in split.items} == {folder}


def test_the_names_of_validation_folders_have_an_order(tmp_path):
    """The first of them beside ``test``, the first in place of it; what is in no other is left alone."""
    for number, name in enumerate(("train", "test", "validation", "valid", "val", "more")):
        write_images(tmp_path / name, number + 4)
    for name, count in (("val", 8), ("valid", 7), ("validation", 6)):
        loaded = load(f"folder:{tmp_path}", 8)
        assert sizes(loaded) == (4, count, 5)
        assert loaded.split.endswith(f"subfolders train / {name} / test")
        (tmp_path / "test").rename(tmp_path / "not_test")
        without = load(f"folder:{tmp_path}", 8)
        assert sizes(without) == (3, 1, count)
        assert without.split.endswith(f"subfolders train / {name}, val: a share of train by a hash of the path")
        (tmp_path / "not_test").rename(tmp_path / "test")
        (tmp_path / name).rename(tmp_path / f"not_{name}")
    assert sizes(load(f"folder:{tmp_path}", 8)) == (3, 1, 5)
    (tmp_path / "test").rename(tmp_path / "not_test")
    assert "split 80 % / 10 % / 10 %" in load(f"folder:{tmp_path}", 8).split


@pytest.mark.parametrize(("train", "test", "val"), [(2, 9, 1), (40, 9, 4), (40, 3, 3), (45, 40, 4)])
def test_where_one_folder_is_held_out_validation_is_a_tenth_of_train_and_no_more_than_the_test(
    tmp_path, train, test, val
):
    """Published scores are of what a data set holds out, whatever it calls that."""
    for name in ("test", "val"):
        write_images(tmp_path / name / "train" / "ant", train, size=(1, 1))
        write_images(tmp_path / name / name, test, size=(1, 1))
        *splits, _ = sources.folder_source(str(tmp_path / name), 8).open()
        assert [len(split.items) for split in splits] == [train - val, val, test]
        assert {item.partition("/")[0] for item in splits[2].items} == {name}
        assert {*splits[0].items} | {*splits[1].items} == {f"train/ant/{index:03}.png" for index in range(train)}


def test_a_class_that_is_called_test_is_no_split_where_nothing_is_called_train(tmp_path):
    for name in ("practice", "test"):
        write_images(tmp_path / name, 5)
    loaded = load(f"folder:{tmp_path}", 8)
    assert loaded.split.endswith("split 80 % / 10 % / 10 % by a hash of the path")
    assert loaded.classes == ("practice", "test")


def hashed(paths: list[str]) -> list[list[str]]:
    """The splits of a folder that holds ``paths`` and names no split."""
    with mock.patch.object(sources, "find_images", return_value=paths):
        *splits, _ = sources.folder_source("nowhere", 8).open()
    return [split.items for split in splits]


@given(st.sets(st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])), min_size=3, max_size=60))
def test_the_hash_split_is_a_partition_with_two_tenths_that_ignores_order(paths):
    with mock.patch.object(sources, "stamp", lambda path: (0, path)):
        train, val, test = hashed(sorted(paths))
        assert sorted(train + val + test) == sorted(paths)
        assert len(val) == len(test) == max(1, round(len(paths) / 10))
        assert hashed(sorted(paths, reverse=True)) == [train, val, test]


def test_the_hash_split_is_the_same_on_every_machine_and_moves_few_images_when_some_are_added():
    """A golden value, which runs on disk depend on; and the hash of a path depends on no other path."""
    paths = [f"pets/{number:03}.png" for number in range(100)]
    train, val, test = hashed(paths)
    assert [int(path[5:8]) for path in test] == [8, 23, 39, 54, 59, 62, 64, 71, 79, 87]
    assert [int(path[5:8]) for path in val] == [12, 24, 35, 37, 49, 53, 57, 61, 86, 88]
    later = hashed([*paths, *(f"more/{number}.png" for number in range(10))])
    assert len({*test} - {*later[2]}) <= 2
    assert len({*val} - {*later[1]}) <= 4
    assert len({*train} - {*later[0]}) <= 4


def test_a_few_broken_files_are_skipped_and_named(tmp_path, capsys):
    folder = write_images(tmp_path / "pets", 150, size=(4, 4))
    (folder / "007.png").write_bytes((folder / "008.png").read_bytes()[:60])  # cut short
    loaded = load(f"folder:{folder}", 4)
    assert (loaded.name, loaded.skipped) == (f"folder:{folder}", ("007.png",))
    assert capsys.readouterr().err == "skipped 1 of 150 images that cannot be decoded: 007.png\n"
    assert sum(sizes(loaded)) == 149
    assert load(f"folder:{folder}", 4).skipped == ("007.png",)
    kept = np.concatenate([loaded.train, loaded.val, loaded.test])  # no hole and no shift where the broken file was
    images = [noise(4, 4, 3, seed=index) for index in range(150) if index != 7]
    assert sorted(image.tobytes() for image in kept) == sorted(image.tobytes() for image in images)


def test_many_broken_files_are_an_error_that_names_them_and_leaves_nothing(tmp_path, cache):
    folder = write_images(tmp_path / "pets", 20)
    (folder / "empty.jpg").touch()
    with pytest.raises(UserError, match=r"more than 1 % .*empty\.jpg.*repair"):
        load(f"folder:{folder}", 8)
    assert not [path for path in cache.rglob("*") if path.suffix != ".lock" and path.is_file()]


def test_broken_files_are_named_as_they_are_called_and_three_of_many(tmp_path, capsys):
    folder = write_images(tmp_path / "pets", 400, size=(1, 1))
    for count, told in ((3, "[red]0.png, [red]1.png, [red]2.png"), (4, "[red]0.png, [red]1.png, [red]2.png, …")):
        for number in range(count):
            (folder / f"[red]{number}.png").touch()
        load(f"folder:{folder}", 2)
        assert " ".join(capsys.readouterr().err.split()).endswith(f"cannot be decoded: {told}")


def test_a_folder_that_is_a_link_to_nothing_is_told(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere \(No such file .*\): .* existing folder .* or a link to one"):
        load(f"folder:{tmp_path / 'link'}", 4)


def test_a_link_to_nothing_is_an_unreadable_file(tmp_path):
    write_images(tmp_path, 120, size=(4, 4))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert load(f"folder:{tmp_path}", 4).skipped == ("gone.png",)


def toy(count: int, read=lambda item: np.zeros((4, 4, 3), np.uint8)) -> sources.Source:
    """So many images in each split."""
    split = sources.Split(range(count), read, lambda item: "")
    return sources.Source(count, lambda: (split, split, split, "numbers"))


def test_oddities_that_pillow_warns_of_spoil_no_image():
    def read(item):
        warnings.warn_explicit("strange metadata", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")
        return np.zeros((4, 4, 3), np.uint8)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded("toy", toy(5, read), 4).skipped == ()


def test_progress_counts_every_image_also_the_broken_ones():
    class Bar:
        done = 0

        def advance(self, count):
            self.done += count

    def read(item):
        if item % 100 == 7:
            raise OSError("torn")
        return np.zeros((2, 2, 3), np.uint8)

    bar, labels, skipped = Bar(), [], []
    with ThreadPoolExecutor(2) as pool:
        split = sources.Split(range(600), read, str)
        blocks = list(decoding._decode_blocks("toy", split, pool, bar, labels, skipped, limit=6))
    assert bar.done == 600
    assert skipped == [(name, "") for name in ("7", "107", "207", "307", "407", "507")]
    assert sum(map(len, blocks)) == len(labels) == 594


@pytest.mark.parametrize("broken", [1, 2])
def test_one_percent_of_all_images_may_be_broken_and_no_more(tmp_path, broken):
    for split, count in (("train", 50), ("val", 20), ("test", 30)):
        write_images(tmp_path / split, count, size=(2, 2))
    for split in ("train", "test")[:broken]:
        (tmp_path / split / "000.png").write_bytes(b"")
    if broken == 1:
        assert load(f"folder:{tmp_path}", 2).skipped == ("train/000.png",)
    else:
        with pytest.raises(UserError, match="more than 1 %"):
            load(f"folder:{tmp_path}", 2)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_whose_images_are_all_broken_is_an_error(tmp_path, split):
    write_images(tmp_path / "train", 120, size=(2, 2))
    write_images(tmp_path / ("val" if split == "test" else "test"), 2, size=(2, 2))
    (tmp_path / split).mkdir()
    (tmp_path / split / "broken.png").touch()
    with pytest.raises(UserError, match=rf"no readable image \({split}/broken\.png\)"):
        load(f"folder:{tmp_path}", 4)


def test_a_decompression_bomb_is_an_unreadable_file_and_told_as_one(tmp_path, monkeypatch, capsys):
    write_images(tmp_path, 120, size=(4, 4))
    Image.new("RGB", (12, 12)).save(tmp_path / "bomb.png")  # 144 pixels: between the limit and its double
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load(f"folder:{tmp_path}", 4).skipped == ("bomb.png",)
    told = "cannot be decoded: bomb.png (more than 100 pixels, which Pillow takes for a bomb)"
    assert " ".join(capsys.readouterr().err.split()) == f"skipped 1 of 121 images that {told}"
    Image.new("RGB", (99, 99)).save(tmp_path / "greater.png")  # beyond the double
    with pytest.raises(UserError, match=r"\(the first: bomb\.png \(more than 100 pixels, .*\), greater\.png \(more"):
        load(f"folder:{tmp_path}", 4)


def test_the_order_of_images_is_not_the_file_systems(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_images(tmp_path / name / "train", 3)
        write_images(tmp_path / name / "val", 2)
    walk = os.walk

    def backwards(*arguments, **options):
        for folder, subfolders, files in walk(*arguments, **options):
            yield folder, subfolders, sorted(files, reverse=True)

    before = load(f"folder:{tmp_path / 'a'}", 4).fingerprint
    monkeypatch.setattr(os, "walk", backwards)
    assert load(f"folder:{tmp_path / 'b'}", 4).fingerprint == before


def test_symlink_loops_end_and_linked_folders_count_once(tmp_path):
    folder = write_images(tmp_path / "pets", 4)
    other = write_images(tmp_path / "other", 3)
    (folder / "again").symlink_to(folder)
    (folder / "more").symlink_to(other)
    loaded = load(f"folder:{folder}", 8)
    assert sum(sizes(loaded)) == 7


def test_what_is_wrong_with_a_folder_is_said_in_one_sentence(tmp_path, monkeypatch):
    write_images(tmp_path / "one", 1)
    write_images(tmp_path / "two", 2)
    write_images(tmp_path / "single" / "train", 1)
    write_images(tmp_path / "single" / "test", 3)
    for name in ("train", "val"):
        write_images(tmp_path / "untested" / name, 3)
    (tmp_path / "untested" / "test").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "val").mkdir(parents=True)
    write_images(tmp_path / "half" / "train", 3)
    for name, message in {
        "missing": "No such file.*existing folder of images",
        "one/000.png": "Not a directory.*existing folder of images",
        "empty": r"no images in .*empty: put some there, .*\(\.bmp \.gif \.jpeg \.jpg \.png \.tif \.tiff \.webp\)",
        "one": r"too few images in .*one \(1\): add some, train, val and test need one each",
        "two": r"too few images in .*two \(2\): add some",
        "single": "only one image in .*single/train: add another, validation takes its share",
        "untested": "no images in .*untested/test: put some there",
        "half": "no images in .*val: put some there",
    }.items():
        with pytest.raises(UserError, match=message):
            load(f"folder:{tmp_path / name}", 8)
    for name in ("folder:", "folder", "imagenet", "photos:64", str(tmp_path)):
        with pytest.raises(UserError, match=r"unknown data .*photos, .*cifar10.*or folder:PATH"):
            load(name, 8)

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"one \(Permission denied\).*that you may read"):
        load(f"folder:{tmp_path / 'one'}", 8)


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_images(tmp_path / "pets", 3)
    assert sizes(load("folder:~/pets", 8)) == (1, 1, 1)


def test_images_come_in_the_order_of_their_names_whatever_the_chunk(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "pets" / "train", 11, size=(4, 4)).parent
    write_images(folder / "val", 3, size=(4, 4))
    write_images(folder / "test", 5, size=(4, 4))
    monkeypatch.setattr(decoding, "DECODING_CHUNK", 4)
    loaded = load(f"folder:{folder}", 4)
    for images, count in ((loaded.train, 11), (loaded.val, 3), (loaded.test, 5)):
        assert np.array_equal(images, [noise(4, 4, 3, seed=index) for index in range(count)])
    assert (loaded.train.dtype, loaded.train.flags.writeable) == (np.uint8, False)


# --- classes --------------------------------------------------------------------------------------------------------


def painted(folder: Path, colours: dict[str, int], count: int) -> None:
    """``count`` files in a subfolder for each of ``colours``, in the one grey that is its value."""
    for name, level in colours.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(np.full((2, 2, 3), level, np.uint8)).save(folder / name / f"{index:02}.png")


def assert_labels_name_the_colours(loaded: Data, colours: dict[str, int]) -> None:
    assert loaded.classes == tuple(sorted(colours))
    for images, labels in zip((loaded.train, loaded.val, loaded.test), loaded.labels, strict=True):
        assert (labels.dtype, labels.shape) == (np.int64, (len(images),))
        assert [colours[loaded.classes[label]] for label in labels] == images[:, 0, 0, 0].tolist()
        assert set(labels) == set(range(len(colours)))


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "val"), ("",)])
def test_labels_name_the_folder_also_behind_broken_files(tmp_path, splits):
    colours = {"zebra": 10, "ant": 20, "ant-hill": 30}  # whose paths are sorted otherwise
    for split in splits:
        painted(tmp_path / split, colours, 70)
    for name in ("ant/03.png", "ant-hill/00.png"):
        (tmp_path / splits[0] / name).write_bytes(b"")
    loaded = load(f"folder:{tmp_path}", 2)
    assert len(loaded.skipped) == 2
    assert_labels_name_the_colours(loaded, colours)
    assert_labels_name_the_colours(load(f"folder:{tmp_path}", 2), colours)  # read from the cache


def test_an_image_that_is_broken_in_one_split_keeps_its_namesake_in_the_other():
    """Data sets of packages name images by number, and all splits have a number 5."""
    levels = {number: np.full((4, 4, 3), number, np.uint8) for number in range(150)}

    def split(broken: int) -> sources.Split:
        readable = {number: image for number, image in levels.items() if number != broken}
        return sources.Split(range(150), readable.__getitem__, lambda number: "odd" if number % 2 else "even")

    loaded = decoded("toy", sources.Source("toy", lambda: (split(5), split(-1), split(7), "numbers")), 4)
    assert (sizes(loaded), loaded.skipped) == ((149, 150, 149), ("5", "7"))
    for images, labels in zip((loaded.train, loaded.val, loaded.test), loaded.labels, strict=True):
        assert [loaded.classes[label] for label in labels] == [
            "odd" if level % 2 else "even" for level in images[:, 0, 0, 0]
        ]


def test_labels_of_photos_are_their_photographs():
    loaded = crops(64)
    assert loaded.classes == ("photo0", "photo1", "photo2")
    for images, labels in zip((loaded.train, loaded.val, loaded.test), loaded.labels, strict=True):
        assert np.array_equal(labels, images[:, 0, 0, 2])


def test_there_are_no_classes_unless_every_image_has_one_and_they_differ(tmp_path):
    painted(tmp_path / "one", {"only": 10}, 4)
    painted(tmp_path / "some", {"ant": 20, "bee": 30}, 4)
    write_images(tmp_path / "some", 1)
    for name in ("one", "some"):
        loaded = load(f"folder:{tmp_path / name}", 2)
        assert (loaded.classes, loaded.labels) == ((), None)


def test_packages_name_classes_in_three_ways_and_minus_one_is_none():
    class Labelled(list):
        """Two images and whatever a package says of them."""

        def __init__(self, **attributes):
            super().__init__([None, None])
            self.__dict__ |= attributes

        def labels_of_both(self) -> list[str]:
            split = sources._torchvision_split(self, 8)
            return [split.label(index) for index in split.items]

    for word in ("targets", "labels", "_labels"):
        assert Labelled(**{word: [2, 0]}, classes=["a", "b", "c"]).labels_of_both() == ["c", "a"]
        assert Labelled(**{word: torch.tensor([7, -1])}).labels_of_both() == ["7", ""]
    assert Labelled().labels_of_both() == ["", ""]


# --- the cache ------------------------------------------------------------------------------------------------------


def test_the_cache_is_used_until_a_file_or_the_size_changes(tmp_path, decodes):
    folder = write_images(tmp_path / "pets", 5)
    first, again = load(f"folder:{folder}", 8), load(f"folder:{folder}", 8)
    assert len(decodes) == 1
    assert np.array_equal(first.train, again.train)
    assert (first.fingerprint, first.split, first.skipped) == (again.fingerprint, again.split, again.skipped)
    load(f"folder:{folder}", 6)
    assert len(decodes) == 2
    Image.fromarray(noise(9, 9, 3)).save(folder / "000.png")
    assert load(f"folder:{folder}", 8).fingerprint != first.fingerprint
    assert len(decodes) == 3


def test_a_folder_has_one_cache_whatever_way_leads_to_it(tmp_path, decodes, monkeypatch):
    folder = write_images(tmp_path / "pets", 5)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for path in (folder, tmp_path / "link", "pets", "../" + str(tmp_path.name) + "/pets"):
        load(f"folder:{path}", 8)
    assert len(decodes) == 1


def test_whatever_may_change_pixels_or_labels_is_decoded_anew(tmp_path, decodes, monkeypatch):
    """Each on its own: the bytes or the time of a file, its name, its class, its split, the version of decoding."""
    folder = tmp_path / "pets"
    for split in SPLITS:
        painted(folder / split, {"ant": 20, "bee": 30}, 3)

    def decoded_anew(change) -> bool:
        load(f"folder:{folder}", 2)
        before = len(decodes)
        change()
        load(f"folder:{folder}", 2)
        return len(decodes) > before

    image = folder / "train" / "ant" / "00.png"
    status = os.stat(image)
    assert not decoded_anew(lambda: None)
    assert decoded_anew(lambda: os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1)))  # the same size
    longer = image.read_bytes() + b"more"
    assert decoded_anew(lambda: (image.write_bytes(longer), os.utime(image, ns=(0, status.st_mtime_ns + 1))))
    for split in ("val", "test"):
        assert decoded_anew(partial(os.utime, folder / split / "ant" / "01.png", ns=(0, 1)))
    assert decoded_anew(lambda: (folder / "train" / "bee").rename(folder / "train" / "cat"))  # in the same order
    assert decoded_anew(lambda: image.rename(folder / "train" / "ant" / "99.png"))
    assert decoded_anew(lambda: (folder / "train" / "ant" / "99.png").rename(folder / "train" / "cat" / "99.png"))
    assert decoded_anew(lambda: (folder / "train" / "cat" / "99.png").rename(folder / "val" / "bee" / "99.png"))
    assert decoded_anew(lambda: (folder / "val" / "bee" / "99.png").rename(folder / "test" / "bee" / "99.png"))
    assert decoded_anew(lambda: (folder / "test" / "bee" / "99.png").unlink())
    assert decoded_anew(lambda: (folder / "test").rename(folder / "rest"))
    assert decoded_anew(lambda: monkeypatch.setattr(decoding, "DECODING_VERSION", decoding.DECODING_VERSION + 1))


def test_an_image_in_whose_place_another_was_put_is_decoded_anew(tmp_path):
    """Also of the same size, by a copy that keeps the time of its writing."""
    folder = write_images(tmp_path / "pets", 3)
    image, other = folder / "000.png", write_images(tmp_path / "other", 8) / "007.png"
    first = load(f"folder:{folder}", 8)
    status = os.stat(image)
    content = other.read_bytes()[: status.st_size].ljust(status.st_size, b" ")
    image.write_bytes(content)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (os.stat(image).st_size, os.stat(image).st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert load(f"folder:{folder}", 8).fingerprint != first.fingerprint


def test_a_stamp_is_of_a_size_and_two_times(monkeypatch):
    """To the nanosecond; each counts, for there are systems on which one of them does not change."""

    def stamp(**changed: int) -> object:
        status = SimpleNamespace(**{"st_size": 1, "st_mtime": 2, "st_mtime_ns": 2, "st_ctime_ns": 3} | changed)
        monkeypatch.setattr(sources, "os", SimpleNamespace(stat=lambda path: status))
        return sources.stamp("x.png")

    stamps = {stamp(), stamp(st_size=9), stamp(st_mtime_ns=9), stamp(st_ctime_ns=9)}
    assert len(stamps) == 4


def test_data_sets_and_numbers_of_crops_do_not_share_a_cache(decodes):
    counts = []
    asked = [(20, 9, 5), (21, 9, 5), (20, 10, 5), (20, 9, 6), (20, 9, 5)]
    for name, numbers in zip(("photos", "photos", "photos", "photos", "others"), asked, strict=True):
        counts.append(sizes(decoded(name, photos.photo_source(16, coded_photos, numbers), 16)))
    assert counts == asked
    assert len(decodes) == 5


def test_the_fingerprint_is_that_of_the_pixels_of_all_splits_in_order(tmp_path):
    """Equal for copies elsewhere; another for one grey level in any split, for two images exchanged, and for an image
    that moves from one split to another."""

    def fingerprint(name: str, *levels_of_splits: list[int]) -> str:
        for split, levels in zip(SPLITS, levels_of_splits, strict=True):
            (tmp_path / name / split).mkdir(parents=True)
            for index, level in enumerate(levels):
                path = tmp_path / name / split / f"{index}.png"
                Image.fromarray(np.full((2, 2, 3), level, np.uint8)).save(path)
        return load(f"folder:{tmp_path / name}", 2).fingerprint

    assert fingerprint("a", [1, 2, 3], [4, 5], [6]) == fingerprint("b", [1, 2, 3], [4, 5], [6])
    variants = [
        *(([1, 2, 3], [4, 5], [6]), ([9, 2, 3], [4, 5], [6]), ([1, 2, 3], [4, 9], [6]), ([1, 2, 3], [4, 5], [9])),
        *(([2, 1, 3], [4, 5], [6]), ([1, 2], [3, 4, 5], [6]), ([1, 2, 3], [4], [5, 6])),
    ]
    found = {fingerprint(f"c{number}", *variant) for number, variant in enumerate(variants)}
    assert len(found) == len(variants)


def test_two_loads_at_once_decode_once(tmp_path, decodes):
    folder = write_images(tmp_path / "pets", 40)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: load(f"folder:{folder}", 8), range(2))
    assert len(decodes) == 1
    assert np.array_equal(one.train, two.train)


@pytest.mark.parametrize(
    "failure",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), OSError("No space left on device")],
)
def test_an_interrupted_decode_leaves_nothing_that_counts_as_complete(tmp_path, cache, monkeypatch, failure):
    folder = write_images(tmp_path / "pets", 5)
    write = decoding._write_npy

    def fail_on_the_second(path, *rest):
        if path.name.startswith(".part-val"):
            path.write_bytes(b"half")
            raise failure
        return write(path, *rest)

    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_write_npy", fail_on_the_second)
        with pytest.raises(expected) as raised:
            load(f"folder:{folder}", 8)
    assert not [path for path in cache.rglob("*") if path.suffix != ".lock" and path.is_file()]
    if expected is UserError:
        assert str(cache) in str(raised.value)
        assert "No space left on device" in str(raised.value)
        assert "VQBENCH_CACHE" in str(raised.value)
    assert sizes(load(f"folder:{folder}", 8)) == (3, 1, 1)


def test_a_disk_that_is_too_small_is_noticed_before_decoding(tmp_path, cache, monkeypatch):
    """The disk of the cache: one byte too few is too few, as many as pixels are enough."""
    folder = write_images(tmp_path / "pets", 5)
    free = {cache / "data": 5 * 8 * 8 * 3 - 1}
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[path]}))
    with pytest.raises(UserError, match=r"takes 0\.00 GB and .* free some space"):
        load(f"folder:{folder}", 8)
    free[cache / "data"] += 1
    assert sizes(load(f"folder:{folder}", 8)) == (3, 1, 1)
    free[cache / "data"] = 1_500_000_000
    with pytest.raises(UserError, match=r"decoding toy takes 18\.43 GB and .* has 1\.50 GB left"):
        decoded("toy", toy(500_000), 64)


@pytest.mark.parametrize("kind", ["link", "lock"])
def test_what_is_in_the_way_of_the_cache_is_named(tmp_path, monkeypatch, kind):
    """A link that leads nowhere; a folder where a lock belongs."""
    folder, cache = write_images(tmp_path / "pets", 5), tmp_path / "cache"
    monkeypatch.setenv("VQBENCH_CACHE", str(cache))
    load(f"folder:{folder}", 2)
    (lock,) = (cache / "data").glob("*.lock")
    shutil.rmtree(cache / "data")
    if kind == "link":
        (cache / "data").symlink_to(tmp_path / "nowhere")
        told = f"{cache / 'data'} is a link that leads nowhere"
    else:
        lock.mkdir(parents=True)
        told = f"Is a directory: {lock}"
    with pytest.raises(UserError, match=rf"cannot use the cache folder .* \({told}\): .* set VQBENCH_CACHE"):
        load(f"folder:{folder}", 2)


def test_a_cache_folder_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "pets", 5)
    monkeypatch.setenv("VQBENCH_CACHE", str(folder / "000.png"))
    with pytest.raises(UserError, match=r"cannot use the cache folder .*000\.png.*set VQBENCH_CACHE"):
        load(f"folder:{folder}", 8)


# --- torchvision ----------------------------------------------------------------------------------------------------


def test_fashion_mnist_through_torchvision(cache):
    """It has no split for validation, so that is a share of those to train on."""
    raw = cache / "torchvision" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    given = {"train": [3, 0, 4, 4, 1], "t10k": [9, 1, 3]}
    for name, count in (("train", 5), ("t10k", 3)):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 0x803, count, 28, 28) + noise(count, 28, 28).tobytes()
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + bytes(given[name]))
    loaded = load("fashion_mnist", 28)
    assert sizes(loaded) == (4, 1, 3)
    assert loaded.split == (
        "fashion_mnist: 4 train / 1 val / 3 test images, central squares resized to 28×28, "
        "train=True / train=False, val: a share of train by a hash of the place"
    )
    everything = [image.tobytes() for image in np.repeat(noise(5, 28, 28)[..., None], 3, axis=3)]
    places = [everything.index(image.tobytes()) for images in (loaded.train, loaded.val) for image in images]
    assert sorted(places) == [0, 1, 2, 3, 4]
    assert np.array_equal(loaded.test, np.repeat(noise(3, 28, 28)[..., None], 3, axis=3))
    names = {0: "T-shirt/top", 1: "Trouser", 3: "Dress", 4: "Coat", 9: "Ankle boot"}  # as its authors number them
    numbers = [given["train"][place] for place in places] + given["t10k"]
    assert [loaded.classes[label] for label in np.concatenate(loaded.labels)] == [names[number] for number in numbers]


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist", "stl10", "celeba", "flowers102"])
def test_no_package_data_set_is_scored_on_what_it_trains_on(name):
    """Which split is which, as torchvision calls them; labels do not matter, so STL-10 trains on what has none."""
    kind, splits = DATASETS[name].args
    assert kind.lower() == name.replace("_", "")
    two, three = ({"train": True}, {"train": False}), ({"split": "train"}, {"split": "val"}, {"split": "test"})
    known = {
        **{"cifar10": two, "fashion_mnist": two, "flowers102": three},
        "stl10": ({"split": "unlabeled"}, {"split": "train"}, {"split": "test"}),
        "celeba": ({"split": "train"}, {"split": "valid"}, {"split": "test"}),
    }
    assert tuple(splits[split] for split in SPLITS if split in splits) == known[name]


class Package:
    """Images whose grey is their number, of a data set that names its splits ``part``."""

    counts = {"train": 40, "val": 7, "test": 6}  # noqa: RUF012
    first = {"train": 0, "val": 100, "test": 200}  # noqa: RUF012

    def __init__(self, root: str, part: str, download: bool):
        assert (root, download) == (str(cache_dir() / "torchvision"), True)
        self.part = part
        self.targets = [number % 3 for number in range(len(self))]

    def __len__(self) -> int:
        return self.counts[self.part]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (4, 4), self.first[self.part] + index), 0


@pytest.mark.parametrize("named", [SPLITS, ("train", "test")])
def test_every_image_of_a_package_is_in_one_split(monkeypatch, named):
    monkeypatch.setattr(datasets, "Package", Package, raising=False)
    options = {split: {"part": split} for split in named}
    loaded = decoded("package", sources.torchvision_source("Package", options, 4), 4)
    greys = [getattr(loaded, split)[:, 0, 0, 0].tolist() for split in SPLITS]
    assert greys[2] == list(range(200, 206))
    if "val" in named:
        assert greys[:2] == [list(range(40)), list(range(100, 107))]
        assert loaded.split.endswith("4×4, part=train / part=val / part=test")
    else:
        assert (len(greys[1]), sorted(greys[0] + greys[1])) == (4, list(range(40)))
        assert loaded.split.endswith("4×4, part=train / part=test, val: a share of train by a hash of the place")
    for shown, labels in zip(greys, loaded.labels, strict=True):
        assert [loaded.classes[label] for label in labels] == [str(grey % 100 % 3) for grey in shown]


def test_a_validation_share_is_no_larger_than_the_test(monkeypatch):
    monkeypatch.setattr(datasets, "Package", Package, raising=False)
    monkeypatch.setattr(Package, "counts", {"train": 40, "test": 2})
    options = {split: {"part": split} for split in ("train", "test")}
    assert sizes(decoded("package", sources.torchvision_source("Package", options, 4), 4)) == (38, 2, 2)


def test_the_identity_of_a_package_names_its_splits():
    options = {split: {"part": split} for split in SPLITS}
    source = sources.torchvision_source("Package", options, 4)
    for split in SPLITS:
        other = {**options, split: {"part": "other"}}
        assert sources.torchvision_source("Package", other, 4).identity != source.identity


def test_no_network_is_one_sentence_with_the_fix(cache, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    for name in ("cifar10", "fashion_mnist", "stl10", "flowers102"):
        with pytest.raises(UserError, match=r"no route to host.*torchvision yourself.*folder:PATH") as raised:
            load(name, 32)
        assert "\n" not in str(raised.value)
        kind = name.replace("_", "")
        assert re.match(rf"cannot get {kind} \((URLError|RuntimeError): ", str(raised.value), re.IGNORECASE)


# --- batches --------------------------------------------------------------------------------------------------------

IMAGES = noise(50, 16, 16, 3)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_batch_is_a_pure_function_of_seed_and_step(augment):
    first = batch(IMAGES, 3, 7, 20, augment, "cpu")
    batch(IMAGES, 3, 8, 20, augment, "cpu")
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert torch.equal(first, batch(IMAGES, 3, 7, 20, augment, "cpu"))
    for seed, step in ((3, 8), (4, 7), (7, 3)):
        assert not torch.equal(first, batch(IMAGES, seed, step, 20, augment, "cpu"))
    assert first.shape == (20, 3, 16, 16)
    assert first.dtype == torch.float32
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert first.min() >= -1
    assert first.max() <= 1


@given(seed=st.integers(0, 2**40), count=st.integers(1, 50), batch_size=st.integers(1, 70), epochs=st.integers(1, 3))
def test_every_image_comes_exactly_once_an_epoch(seed, count, batch_size, epochs):
    steps = -(-epochs * count // batch_size)
    batches = [batch_indices(seed, step, batch_size, count) for step in range(steps)]
    assert {len(rows) for rows in batches} == {batch_size}
    walk = np.concatenate(batches)[: epochs * count].reshape(epochs, count)
    assert (np.sort(walk) == np.arange(count)).all()


def test_every_epoch_has_its_own_order():
    one, two = (batch_indices(0, step, 1000, 1000) for step in (0, 1))
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, batch_indices(1, 0, 1000, 1000))


@pytest.mark.parametrize("augment", ["flip", "blog"])
def test_every_step_and_seed_augments_differently(augment):
    batches = [batch(IMAGES[:1], seed, step, 20, augment, "cpu") for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for number, one in enumerate(batches):  # the same image 20 times
        assert not any(torch.equal(one, other) for other in batches[number + 1 :])


def test_none_is_the_identity_and_float_is_exact():
    rows = batch_indices(5, 2, 20, len(IMAGES))
    plain = batch(IMAGES, 5, 2, 20, "none", "cpu")
    assert np.array_equal(((plain.double() + 1) * 127.5).round().numpy(), IMAGES[rows].transpose(0, 3, 1, 2))
    assert from_uint8(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_eval_batches_are_the_images_themselves_in_order():
    batches = list(eval_batches(IMAGES, 20))
    assert [len(x) for x in batches] == [20, 20, 10]
    assert torch.cat(batches).dtype == torch.uint8
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1).numpy(), IMAGES)


def test_a_batch_may_be_written_to_whatever_it_was_read_from():
    """Images on disk are mapped read-only."""
    images = IMAGES.copy()
    images.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (batch(images, 0, 0, 20, "none", "cpu"), *eval_batches(images, 20)):
            x.zero_()
    assert np.array_equal(images, IMAGES)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_batch_is_made_on_its_device(augment):
    x = batch(IMAGES, 0, 0, 20, augment, "meta")
    assert (x.device.type, x.shape, x.dtype) == ("meta", (20, 3, 16, 16), torch.float32)


# --- a subset to train on -------------------------------------------------------------------------------------------


def numbered(count: int = 90) -> Data:
    """Images whose grey is their number, of the classes even and odd."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 3))
    labels = tuple(np.arange(size) % 2 for size in (count, 6, 7))
    return Data("toy", images, images[:6], images[:7], "f" * 64, "toy", (), ("even", "odd"), labels)


def numbers_of(images: np.ndarray | Subset) -> list[int]:
    return images[:][:, 0, 0, 0].tolist()


@given(st.integers(1, 90), st.integers(1, 90))
def test_a_subset_has_those_of_every_smaller_one_and_their_labels(one, two):
    whole = numbered()
    few, many = (whole.with_train(count) for count in sorted((one, two)))
    for data, count in zip((few, many), sorted((one, two)), strict=True):
        chosen = numbers_of(data.train)
        assert len(data.train) == len(set(chosen)) == count
        assert data.train.shape == (count, 4, 4, 3)
        assert data.labels_of("train").tolist() == [number % 2 for number in chosen]
        for split in ("val", "test"):
            assert data.images(split) is whole.images(split)
            assert data.labels_of(split) is whole.labels_of(split)
        assert (data.fingerprint, data.split, data.classes) == (whole.fingerprint, whole.split, whole.classes)
    assert set(numbers_of(few.train)) <= set(numbers_of(many.train))


def test_splits_and_their_labels_are_told_by_name():
    data = numbered()
    assert data.images("val") is data.val
    assert data.images("test") is data.test
    assert [len(data.labels_of(split)) for split in SPLITS] == [90, 6, 7]
    assert replace(data, labels=None).labels_of("test") is None


def test_a_subset_is_drawn_once_for_all_and_the_same_on_every_machine():
    """A golden value, which stored runs depend on; neither the first images nor those of a seed."""
    assert numbers_of(numbered().with_train(6).train) == [5, 13, 20, 27, 73, 81]


def test_no_number_takes_all_images_and_too_large_a_one_is_told():
    data = numbered()
    assert data.with_train(0) is data
    assert numbers_of(data.with_train(90).train) == list(range(90))
    with pytest.raises(UserError, match=r"^train_images is 91 and toy has 90 to train on; 0 takes all$"):
        data.with_train(91)
    assert replace(data, labels=None).with_train(5).labels is None


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches_of_a_subset_see_no_other_image(augment):
    data = numbered().with_train(7)
    seen = [batch(data.train, 3, step, 5, augment, "cpu") for step in range(14)]
    levels = ((torch.cat(seen) + 1) * 127.5).round().flatten(1)
    assert (levels == levels[:, :1]).all()
    assert sorted(levels[:, 0].tolist()) == sorted(numbers_of(data.train) * 10)  # each once an epoch
    assert torch.equal(
        torch.cat(seen), torch.cat([batch(data.train[:], 3, step, 5, augment, "cpu") for step in range(14)])
    )
    assert numbers_of(torch.cat(list(eval_batches(data.train, 3))).permute(0, 2, 3, 1)) == numbers_of(data.train)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_parts_of_a_batch_are_those_of_the_whole(augment):
    """Whoever takes a share of a batch reads no other image, and draws what the others draw."""
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    whole = batch(images, 3, 2, 12, augment, "cpu")
    parts = [batch(images, 3, 2, 12, augment, "cpu", slice(begin, begin + 4)) for begin in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_subset_copies_no_more_than_is_asked_for():
    """Of a set that is mapped and larger than memory."""

    class Mapped(np.ndarray):
        asked = []  # noqa: RUF012

        def __getitem__(self, rows):
            self.asked.append(len(rows))
            return np.asarray(super().__getitem__(rows))

    data = numbered()
    data = replace(data, train=data.train.view(Mapped)).with_train(40)
    batch(data.train, 0, 0, 8, "none", "cpu")
    assert len(data.train) == 40
    assert Mapped.asked == [8]


# --- augmentations --------------------------------------------------------------------------------------------------


def augmented(name: str, x: torch.Tensor) -> torch.Tensor:
    return AUGMENTATIONS[name](x, batches.Draws(torch.Generator().manual_seed(0), len(x)))


def test_flip_mirrors_half_of_the_images_and_changes_nothing_else():
    x = torch.from_numpy(noise(1000, 3, 4, 4))
    y = augmented("flip", x)
    same, mirrored = ((y == other).flatten(1).all(dim=1) for other in (x, x.flip(-1)))
    assert (same | mirrored).all()
    assert 430 < mirrored.sum() < 570


def test_blog_keeps_a_constant_image_constant():
    levels = torch.arange(256, dtype=torch.uint8)
    x = torch.stack([levels, levels.flip(0), levels], 1)[:, :, None, None].expand(-1, -1, 16, 16)
    assert torch.equal(augmented("blog", x), x)


def test_blog_windows_are_distributed_like_torchvisions():
    """Ramps show the window: their slope is its width or height, their middle its centre; a falling one is flipped."""
    count, size = 2000, 64
    ramp = torch.arange(size, dtype=torch.uint8) * 4
    x = torch.stack(torch.broadcast_tensors(ramp, ramp[:, None], torch.tensor(0, dtype=torch.uint8)))
    draws = batches.Draws(torch.Generator().manual_seed(0), count)
    y = batches._random_resized_crop_and_flip(x.expand(count, -1, -1, -1), draws, flip=0.3).double()
    across, down = (y[:, 0].mean(dim=1) + 2) / (4 * size), (y[:, 1].mean(dim=2) + 2) / (4 * size)
    first, last = size // 4, 3 * size // 4 - 1  # away from the border, where the outermost pixels are repeated
    width, height = ((values[:, last] - values[:, first]) * size / (last - first) for values in (across, down))
    centre, middle = ((values[:, first] + values[:, last]) / 2 for values in (across, down))

    from torchvision.transforms import RandomResizedCrop  # not above: bench has to repair torchvision first

    torch.manual_seed(0)
    image = torch.empty(3, 1000, 1000)
    windows = [RandomResizedCrop.get_params(image, [0.8, 1], [3 / 4, 4 / 3]) for _ in range(count)]
    top, left, tall, wide = torch.tensor(windows).double().T / 1000
    assert abs((width < 0).double().mean() - 0.3) < 0.03
    width = width.abs()
    places = (centre, left + wide / 2), (middle, top + tall / 2)
    for ours, theirs in ((width * height, wide * tall), (width / height, wide / tall), *places):
        for figure in (torch.mean, torch.std, torch.amin, torch.amax):
            assert abs(figure(ours) - figure(theirs)) < 0.02
    for place, extent in ((centre, width), (middle, height)):  # inside the image, and anywhere in it
        assert ((place - 0.5).abs() <= (1 - extent) / 2 + 0.01).all()
        shift = ((place - 0.5) / (1 - extent))[extent < 0.9]
        assert (shift.min(), shift.max()) == (pytest.approx(-0.5, abs=0.05), pytest.approx(0.5, abs=0.05))
    rows = torch.stack([centre, middle, width, height])
    assert torch.corrcoef(rows)[0, 1].abs() < 0.1  # left and top are drawn one by one


def test_blog_sharpens_and_stretches_three_in_ten_each():
    x = torch.from_numpy(noise(2000, 3, 8, 8) // 2 + 60)
    crop = batches._random_resized_crop_and_flip(x, batches.Draws(torch.Generator().manual_seed(0), len(x)), flip=0.3)
    sharp = TF.adjust_sharpness(crop, 2)
    y = augmented("blog", x)
    outcomes = (crop, sharp, TF.autocontrast(crop), TF.autocontrast(sharp))
    is_crop, is_sharp, is_stretched, is_both = ((y == outcome).flatten(1).all(dim=1) for outcome in outcomes)
    assert (is_crop | is_sharp | is_stretched | is_both).all()
    assert abs((is_sharp | is_both).float().mean() - 0.3) < 0.04
    assert abs((is_stretched | is_both).float().mean() - 0.3) < 0.04


# -- damaged caches ---------------------------------------------------------------------------------------------------


ARRAYS = (*(f"{split}{kind}.npy" for split in SPLITS for kind in ("", "_labels")), "meta.json")


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "noise", "gone"])
def test_a_damaged_cache_is_decoded_again_and_says_so(tmp_path, cache, capsys, name, damage):
    """Whatever happened to it, scores are those of the images; a whole one is read without a word."""
    folder = write_images(tmp_path / "pets", 6)
    first = load(f"folder:{folder}", 8)
    whole = [np.array(images) for images in (first.train, first.val, first.test)]
    (path,) = cache.rglob(name)
    content = bytearray(path.read_bytes())
    content[-2] ^= 64 if "labels" in name else 1
    damaged = {"flip": content, "cut": content[: len(content) // 2], "empty": b"", "noise": b"noise" * 30}
    path.unlink() if damage == "gone" else path.write_bytes(damaged[damage])
    decoding._fingerprint.cache_clear()
    capsys.readouterr()
    again = load(f"folder:{folder}", 8)
    assert all(map(np.array_equal, whole, (again.train, again.val, again.test)))
    assert again.fingerprint == first.fingerprint
    assert ("is decoded again" in capsys.readouterr().err) == ((name, damage) != ("meta.json", "gone"))
    load(f"folder:{folder}", 8)
    assert "again" not in capsys.readouterr().err


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_lies_in_the_place_of_decoded_images_is_replaced(tmp_path, cache, what):
    folder = write_images(tmp_path / "pets", 6)
    first = load(f"folder:{folder}", 8)
    (place,) = (path.parent for path in cache.rglob("meta.json"))
    shutil.rmtree(place)
    place.symlink_to("nowhere") if what == "link" else place.write_text("")
    assert load(f"folder:{folder}", 8).fingerprint == first.fingerprint
    assert place.is_dir()


def test_folders_beside_the_splits_are_named(tmp_path, cache, capsys):
    """Also one that would be a split, were there not another of that kind."""
    for split in (*SPLITS, "other", "Valid"):
        write_images(tmp_path / "pets" / split, 6)
    (tmp_path / "pets" / ".cache").mkdir()
    assert sizes(load(f"folder:{tmp_path / 'pets'}", 8)) == (6, 6, 6)
    assert f"left out: Valid, other in {tmp_path / 'pets'}, beside the splits" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "pets" / "Valid")
    shutil.rmtree(tmp_path / "pets" / "other")
    load(f"folder:{tmp_path / 'pets'}", 8)
    assert "beside the splits" not in capsys.readouterr().err


def test_a_pipe_that_is_called_an_image_is_passed_over(tmp_path, cache, capsys):
    """It would be waited for for ever; a link that leads nowhere is an image that cannot be read."""
    folder = write_images(tmp_path / "pets", 6)
    os.mkfifo(folder / "pipe.png")
    assert sizes(load(f"folder:{folder}", 8)) == (4, 1, 1)
    assert f"left out: {folder / 'pipe.png'} is called an image and is no file" in capsys.readouterr().err


def as_older(meta: Path) -> None:
    """Has it as an older version wrote it: with no digest but the fingerprint."""
    meta.write_text(json.dumps({name: value for name, value in unseal(meta).items() if name != "labels"}))


@pytest.mark.parametrize("labels", [[0], [0, 1, 1], [0, 2], [-2, 1]])
def test_labels_that_are_not_those_of_the_images_are_made_again(tmp_path, cache, decodes, labels):
    """Too few, too many, of a class that there is not, or of one before the first; -1 stands for an image of none."""
    for split in SPLITS:
        painted(tmp_path / "pets" / split, {"ant": 20, "bee": 30}, 1)
    first = load(f"folder:{tmp_path / 'pets'}", 4)
    assert first.labels[1].tolist() == [0, 1]
    (path,) = cache.rglob("val_labels.npy")
    as_older(path.with_name("meta.json"))  # of which a digest says more
    np.save(path, np.array([-1, 1], dtype=first.labels[1].dtype))
    assert load(f"folder:{tmp_path / 'pets'}", 4).labels[1].tolist() == [-1, 1]
    np.save(path, np.array(labels, dtype=first.labels[1].dtype))
    assert load(f"folder:{tmp_path / 'pets'}", 4).labels[1].tolist() == [0, 1]
    assert len(decodes) == 2


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("train.npy", b"'|u1'", b"'|i1'"),
        ("train.npy", b"'|u1'", b"'|b1'"),
        ("train.npy", b"(2, 4, 4, 3)", b"(2, 4, 3, 4)"),
        ("train.npy", b"(2, 4, 4, 3), }", b"(2, 48), }     "),
        ("train.npy", b"(2, 4, 4, 3), }", b"(96,), }       "),
        ("train_labels.npy", b"\n" + bytes(8) + b"\1", b"\n" + b"\1" + bytes(7) + b"\1"),
        ("train_labels.npy", b"'<i8'", b"'<u8'"),
        ("meta.json", b'"ant",\n   "bee"', b'"bee",\n   "ant"'),
        ("meta.json", b"2 train", b"3 train"),
        ("meta.json", b'"skipped": []', b'"skipped": ["x.png"]'),
    ],
)
def test_whatever_the_cache_says_of_the_same_bytes_is_noticed(tmp_path, cache, capsys, name, old, new):
    """Of another type or shape, of other classes, or in other words: it is decoded again, of which a line tells."""
    for split in SPLITS:
        painted(tmp_path / "pets" / split, {"ant": 20, "bee": 30}, 1)

    def found() -> tuple:
        data = load(f"folder:{tmp_path / 'pets'}", 4)
        arrays = [(array.dtype.str, array.tolist()) for array in (data.train, data.val, data.test, *data.labels)]
        return arrays, data.fingerprint, data.split, data.skipped, data.classes

    first = found()
    (path,) = cache.rglob(name)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    capsys.readouterr()
    assert found() == first
    assert "is decoded again" in capsys.readouterr().err


def test_a_cache_of_an_older_version_is_used_as_it_is(tmp_path, cache, decodes):
    folder = write_images(tmp_path / "pets", 6)
    first = load(f"folder:{folder}", 8)
    (meta,) = cache.rglob("meta.json")
    as_older(meta)
    again = load(f"folder:{folder}", 8)
    assert len(decodes) == 1
    assert (again.fingerprint, again.split, again.classes) == (first.fingerprint, first.split, first.classes)


def test_images_that_change_while_a_process_runs_are_noticed(tmp_path, cache, decodes):
    """Their digest is computed once in a process, but not of another file in their place."""
    folder = write_images(tmp_path / "pets", 6)
    first = load(f"folder:{folder}", 8)
    whole = np.array(first.val)
    (path,) = cache.rglob("val.npy")
    status = os.stat(path)
    np.save(path, 255 - whole)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert np.array_equal(load(f"folder:{folder}", 8).val, whole)
    assert len(decodes) == 2


def test_names_that_steer_a_terminal_or_are_no_text_do_not_spoil_the_cache(tmp_path, cache, decodes):
    """Of classes, and of images that cannot be decoded; the images are decoded once."""
    root = tmp_path / "pets"
    for split in SPLITS:
        painted(root / split, {"ant\x07": 120, os.fsdecode(b"b\xe9e"): 30}, 101)
    (root / "train" / "ant\x07" / os.fsdecode(b"\x1b[2J\xe9.png")).write_bytes(b"no image")
    for _ in range(2):
        found = load(f"folder:{root}", 4)
        assert found.classes == ("ant\ufffd", "b?e")
        assert found.skipped == ("train/ant\ufffd/\ufffd[2J?.png",)
    assert len(decodes) == 1


@pytest.mark.parametrize("names", [("Train", "Val", "Test"), ("TRAIN", "validation", "test")])
def test_split_subfolders_are_known_in_any_case(tmp_path, names):
    for name, count in zip(names, (4, 2, 3), strict=True):
        write_images(tmp_path / name, count)
    loaded = load(f"folder:{tmp_path}", 8)
    assert sizes(loaded) == (4, 2, 3)
    assert loaded.split.endswith(f"subfolders {names[0]} / {names[1]} / {names[2]}")


@pytest.mark.parametrize("how", ["a link to the folder", "hard links"])
def test_one_file_in_two_splits_is_refused(tmp_path, how):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "val", 2)
    if how == "hard links":
        (tmp_path / "test").mkdir()
        for number, path in enumerate(sorted((tmp_path / "train").iterdir())):
            os.link(path, tmp_path / "test" / f"{number}{path.suffix}")
    else:
        (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(
        UserError, match=r"^train/.* and test/.* in .* are one file, in two splits: remove one of them$"
    ):
        load(f"folder:{tmp_path}", 8)
