"""Where images come from: torchvision's data sets, any folder; ``photos`` has the embedded photographs.

Every source has three splits: train, val for choosing between settings, test for the scores that are published.
"""

import hashlib
import importlib.util
import io
import os
import re
import stat
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from rich.markup import escape

from backbones.torchvision_repair import repair
from bench.core.errors import UserError
from bench.core.files import cache_dir
from bench.core.progress import say

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
ORIENTATION = 0x0112  # EXIF's tag
SPLITS = ("train", "val", "test")
VALIDATION_FOLDERS = ("val", "valid", "validation")
MOST_HELD = 10_000  # images of a share that is held out, where nobody says which; a folder's is a tenth


class Split(NamedTuple):
    """Images yet to be decoded."""

    items: Sequence[Any]  # whose str() names them in messages
    read: Callable[[Any], np.ndarray]  # item → (H, W, 3) uint8, or it raises
    label: Callable[[Any], str]  # item → name of its class; empty for none
    kept: tuple[str, ...] = ()  # shards that images stay in, whose places the items are then: they are not decoded


class Source(NamedTuple):
    """A data set yet to be opened."""

    identity: Any  # a cheap JSON value that changes whenever the pixels may have
    open: Callable[[], tuple[Split, Split, Split, str]]  # train, val, test, and how they were made, in words
    files: int = 0  # bytes of its image files, if it is a folder, which could be written as shards


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB: turned as its EXIF says, transparency over white, 16-bit grey scaled to 8 bits.

    ValueError for floating-point pixels, whose white is undefined.
    """
    if image.getexif().get(ORIENTATION, 1) != 1:  # of one that is upright already it would make a copy
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.mode.startswith("I"):  # I;16 and its relatives; convert() would clip them at 255
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:  # hidden colours may be anything
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies, too


def to_pixels(image: Image.Image, image_size: int) -> np.ndarray:
    """The central square of a picture, resized to (image_size, image_size, 3) uint8 by Pillow's antialiased Lanczos."""
    image = to_rgb(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box))


def decode(content: bytes, image_size: int) -> np.ndarray:
    """The same, of a picture that is the ``content`` of a file. Raises nearly every kind where it is none."""
    with Image.open(io.BytesIO(content)) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels")
        return to_pixels(image, image_size)


# --- torchvision's datasets -----------------------------------------------------------------------------------------


def torchvision_source(kind: str, splits: dict[str, dict[str, Any]], image_size: int) -> Source:
    """The data set ``kind`` of torchvision, whose class takes ``splits[split]`` as options. Where it has no split for
    validation, a share of training is taken."""
    return Source(splits, partial(_open_torchvision, kind, splits, image_size))  # its files have checksums


def _open_torchvision(kind: str, splits: dict[str, dict[str, Any]], image_size: int) -> tuple[Split, Split, Split, str]:
    repair()
    from torchvision import datasets

    root = cache_dir() / "torchvision"
    try:
        root.mkdir(parents=True, exist_ok=True)
        opened = {split: getattr(datasets, kind)(str(root), **which, download=True) for split, which in splits.items()}
    except Exception as error:  # network, checksum, torn archive, no gdown for CelebA: it raises nearly every kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"cannot get {kind} ({reason}): fix that, place its files below {root} yourself, "
            "or give your images as folder:PATH"
        ) from error

    found = {split: _torchvision_split(dataset, image_size) for split, dataset in opened.items()}
    how = " / ".join(f"{option}={value}" for which in splits.values() for option, value in which.items())
    if "val" not in found:
        items = found["train"].items
        rest, val = _held_out(items, min(_tenth(items), len(found["test"].items)))
        found |= {"train": found["train"]._replace(items=rest), "val": found["train"]._replace(items=val)}
        how += ", val: a share of train by a hash of the place"
    return *(found[split] for split in SPLITS), f"images, central squares resized to {image_size}×{image_size}, {how}"


def _torchvision_split(dataset: Any, image_size: int) -> Split:
    """Names the class of an image without decoding it; torchvision's classes have several words for that."""
    targets = next((getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), [])
    names = getattr(dataset, "classes", None)

    def label(index: int) -> str:
        target = int(targets[index]) if len(targets) else -1  # STL-10's unlabelled images have -1
        return "" if target < 0 else str(names[target] if names else target)

    return Split(range(len(dataset)), lambda index: to_pixels(dataset[index][0], image_size), label)


# --- a folder of images ---------------------------------------------------------------------------------------------


def check_folder(path: str) -> None:
    """Raises UserError where ``path`` is no folder that can be listed."""
    try:
        os.scandir(os.path.realpath(os.path.expanduser(path))).close()
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> None:
    raise UserError(
        f"cannot read the folder {error.filename} ({error.strerror}): "
        "folder:PATH needs an existing folder of images that you may read, or a link to one"
    ) from error


def find_images(root: str, below: str = "") -> list[str]:
    """Sorted paths, relative to ``root`` and with slashes, of the image files at any depth in its subfolder ``below``.

    What is hidden is left out (macOS leaves unreadable ``._x.jpg`` behind), links are followed once. UserError where a
    folder cannot be listed or nothing is found.
    """
    top = Path(root, below)
    found, visited = [], set()
    for folder, subfolders, files in os.walk(top, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back to a folder that was walked already
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        names = (name for name in files if not name.startswith(".") and PurePath(name).suffix.lower() in ENDINGS)
        for path in (os.path.join(folder, name) for name in names):
            if _waits(path):
                say(f"[yellow]left out:[/] {escape(path)} is called an image and is no file")
            else:
                found.append(PurePath(os.path.relpath(path, root)).as_posix())
    if not found:
        endings = " ".join(sorted(ENDINGS))
        raise UserError(f"no images in {top}: put some there, or name another folder ({endings})")
    return sorted(found)


def _waits(path: str) -> bool:
    """Whether reading it could take for ever: of a pipe or a device. A link that leads nowhere will just fail."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _tenth(items: Sequence[Any]) -> int:
    return max(1, round(len(items) / 10))


def _held_out(items: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    """``items`` without ``count`` of them, and these: by a hash of their names, so the same on any machine."""
    ordered = sorted(items, key=lambda item: hashlib.sha256(os.fsencode(str(item))).digest())
    return sorted(ordered[count:]), sorted(ordered[:count])


def stamp(path: str) -> tuple[int, int, int] | None:
    """What changes with the content of the file ``path``; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: decoding will name it
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns  # a copy may keep all but the last


def _split_folders(root: str) -> dict[str, str]:
    """What the subfolders of ``root`` that are splits are called, by their name in small letters."""
    known = ("train", *VALIDATION_FOLDERS, "test")
    names = sorted(os.listdir(root)) if os.path.isdir(root) and os.access(root, os.R_OK | os.X_OK) else []
    folders = [name for name in names if name.lower() in known and os.path.isdir(os.path.join(root, name))]
    return {name.lower(): name for name in folders}  # of several in small letters, which sort last


def _tell_others(root: str, used: Collection[str]) -> None:
    """Says which folders of ``root`` are left out, where those ``used`` are its splits."""
    names = sorted(one.name for one in os.scandir(root) if one.is_dir() and not one.name.startswith("."))
    if others := [name for name in names if name not in used]:
        say(f"[yellow]left out:[/] {escape(', '.join(others))} in {escape(root)}, beside the splits")


def _check_apart(root: str, *splits: Sequence[str]) -> None:
    """Raises UserError where one file, by links, is in two of ``splits``, which are paths below ``root``."""
    seen: dict[tuple[int, int], tuple[int, str]] = {}
    for number, names in enumerate(splits):
        for name in names:
            try:
                status = os.stat(os.path.join(root, name))
            except (OSError, ValueError):  # a dangling link: decoding will name it
                continue
            other, first = seen.setdefault((status.st_dev, status.st_ino), (number, name))
            if other != number:
                raise UserError(f"{first} and {name} in {root} are one file, in two splits: remove one of them")


def folder_source(path: str, image_size: int) -> Source:
    """The images at any depth below ``path``.

    Its subfolders ``train``, ``val`` (or ``valid``, ``validation``) and ``test`` are the splits. Where only one of them
    is beside ``train``, that is the test, as scores are published on what a data set holds out, and validation takes a
    tenth of train, no more than the test has. Anything else is split 80 / 10 / 10 % by a hash of the paths. Raises
    UserError where there are too few, or none.
    """
    root = os.path.realpath(os.path.expanduser(path))
    there = _split_folders(root)
    named = [there[name] for name in (*VALIDATION_FOLDERS, "test") if name in there]
    split_folders = int(bool(named) and "train" in there)
    if split_folders:
        _tell_others(root, {there["train"], named[0], named[-1]})
        train, test = find_images(root, there["train"]), find_images(root, named[-1] if "test" in there else named[0])
        if "test" in there and len(named) > 1:
            val, how = find_images(root, named[0]), f"subfolders {there['train']} / {named[0]} / {there['test']}"
        else:
            if len(train) < 2:
                place = os.path.join(root, there["train"])
                raise UserError(f"only one image in {place}: add another, validation takes its share of them")
            train, val = _held_out(train, min(_tenth(train), len(test)))
            how = f"subfolders {there['train']} / {named[0]}, val: a share of train by a hash of the path"
    else:
        train = find_images(root)
        if len(train) < 3:
            raise UserError(f"too few images in {root} ({len(train)}): add some, train, val and test need one each")
        count = _tenth(train)
        train, test = _held_out(train, count)
        train, val = _held_out(train, count)
        how = "split 80 % / 10 % / 10 % by a hash of the path"
    _check_apart(root, train, val, test)

    def read(name: str) -> np.ndarray:
        with Image.open(os.path.join(root, name)) as image:
            return to_pixels(image, image_size)

    def label(name: str) -> str:  # the images of a class lie in a folder of its name
        folders = PurePath(name).parts[split_folders:-1]
        return folders[0] if folders else ""

    how = f"images, central squares resized to {image_size}×{image_size}, {how}"
    stamps = [(name, stamp(os.path.join(root, name))) for name in train + val + test]
    sizes = len(train), len(val)
    splits = [Split(names, read, label) for names in (train, val, test)]
    return Source((root, *sizes, stamps), lambda: (*splits, how), sum(known[0] for _, known in stamps if known))


# --- what formats of several files share ----------------------------------------------------------------------------


def needed(package: str, what: str) -> None:
    """Raises UserError where an optional ``package`` is not installed, which ``what`` needs."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs the package {package}; pip install 'vqbench[data]'")


def by_split(paths: Sequence[str]) -> dict[str, list[str]]:
    """Which of ``paths`` belong to train, val and test: those that have that word, or another for val, among the words
    of their name and of the folders that not all share, such as ``train/000.tar`` or ``x-validation-07.tar``. Where
    that gives nothing to train on or nothing else, all of them under an empty name."""
    top = os.path.commonpath([os.path.dirname(path) for path in paths])
    found: dict[str, list[str]] = {}
    for path in paths:
        words = {*re.split("[^a-z]+", os.path.relpath(path, top).lower())} & {"train", *VALIDATION_FOLDERS, "test"}
        split = words.pop() if len(words) == 1 else ""
        found.setdefault("val" if split in VALIDATION_FOLDERS else split, []).append(path)
    if "train" not in found or not {"val", "test"} & {*found}:
        return {"": list(paths)}
    for path in found.pop("", []):
        say(f"[yellow]left out:[/] {escape(path)}, whose name is of no split")
    return found


def divided(
    found: dict[str, Sequence[Any]], where: str, hold_out: Callable[[Any, int], tuple[Any, Any]] = _held_out
) -> tuple[Any, Any, Any, str]:
    """Items to train on, to validate and to test with, and how they were made, in words, from those of the splits that
    are ``found`` in ``where``, as a folder's are. Raises UserError where there are too few."""
    if "" in found:
        items = found[""]
        if len(items) < 3:
            raise UserError(f"too few images in {where} ({len(items)}): add some, train, val and test need one each")
        count = min(_tenth(items), MOST_HELD)
        train, test = hold_out(items, count)
        return *hold_out(train, count), test, f"{count} each for val and test by a hash"
    train, held = found["train"], [found[name] for name in ("val", "test") if name in found]
    if len(train) < 2 or not all(map(len, held)):
        raise UserError(f"too few images in {where}: two to train on, and one of every other split, are needed")
    if len(held) == 2:
        return train, *held, "its train / val / test"
    count = min(_tenth(train), len(held[0]), MOST_HELD)
    return (
        *hold_out(train, count),
        held[0],
        f"its train / {'test' if 'test' in found else 'val'}, val: a share of train",
    )
