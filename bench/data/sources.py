"""Where images come from: scikit-image's photographs, torchvision's data sets, any folder.

To add a data set: write a function ``image_size -> Source`` and add a line to ``DATASETS``.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from backbones.torchvision_repair import repair
from bench.core.errors import UserError
from bench.core.files import cache_dir

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
PHOTO_TRIES, PHOTO_CONTRAST = 100, 4  # a crop in which no channel's standard deviation reaches 4 levels is redrawn


@dataclass(frozen=True)
class Split:
    """Images yet to be decoded."""

    items: Sequence[Any]  # whose str() names them in messages
    read: Callable[[Any], np.ndarray]  # item → (H, W, 3) uint8, or it raises
    label: Callable[[Any], str]  # item → name of its class; empty for none


@dataclass(frozen=True)
class Source:
    """A data set yet to be opened."""

    identity: Any  # a cheap JSON value that changes whenever the pixels may have
    open: Callable[[], tuple[Split, Split, str]]  # train, val, and what completes "photos: 4096 train / 512 val …"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB: turned as its EXIF says, transparency over white, 16-bit grey scaled to 8 bits.

    ValueError for floating-point pixels, whose white is undefined.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.mode.startswith("I"):  # I;16 and its relatives; convert() would clip them at 255
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:  # hidden colours may be anything
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, image_size: int) -> np.ndarray:
    """The central square of a picture, resized to (image_size, image_size, 3) uint8 by Pillow's antialiased Lanczos."""
    image = to_rgb(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box))


# --- scikit-image's photographs -------------------------------------------------------------------------------------


def photographs() -> dict[str, np.ndarray]:
    """The colour photographs inside scikit-image's wheel: name -> (H, W, 3) uint8. Nothing is downloaded."""
    import skimage.data

    names = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina")
    photos = {name: getattr(skimage.data, name)() for name in (*names, "colorwheel")}
    return photos | {"stereo_motorcycle": skimage.data.stereo_motorcycle()[0]}  # left view, right view, disparity


def _is_flat(crop: np.ndarray) -> bool:
    """Whether no channel varies: retina's black border, sky. In integers, so that every machine rejects the same."""
    values = crop.reshape(-1, 3).astype(np.int64)
    count = len(values)
    variance = count * (values**2).sum(axis=0) - values.sum(axis=0) ** 2  # times count²
    return bool(variance.max() < (PHOTO_CONTRAST * count) ** 2)


def _draw_crops(photos: dict[str, np.ndarray], image_size: int, count: int, train: bool) -> list[tuple[str, int, int]]:
    """(photograph, top, left) of every crop of a split: the photographs in turn, anywhere in the split's part, which is
    the left 75 % of the width (train) or the right 25 %, so that the splits share no pixel."""
    draw = np.random.PCG64(0 if train else 1).random_raw  # NumPy promises this stream for ever, not a Generator's
    crops, names = [], list(photos)
    for index in range(count):
        photo = photos[name := names[index % len(names)]]
        height, width = photo.shape[:2]
        first, last = (0, width * 3 // 4) if train else (width * 3 // 4, width)
        for _ in range(PHOTO_TRIES):
            top = draw() % (height - image_size + 1)
            left = first + draw() % (last - first - image_size + 1)
            if not _is_flat(photo[top : top + image_size, left : left + image_size]):
                break
        crops.append((name, top, left))
    return crops


def _open_photos(photos: dict[str, np.ndarray], counts: tuple[int, int], image_size: int) -> tuple[Split, Split, str]:
    limits = {name: min(photo.shape[0], photo.shape[1] // 4) for name, photo in photos.items()}
    photos = {name: photo for name, photo in photos.items() if limits[name] >= image_size}
    if not photos:
        raise UserError(
            f"image_size {image_size} is larger than photos allows: use at most {max(limits.values())}, "
            "or give larger images as folder:PATH"
        )

    def read(crop: tuple[str, int, int]) -> np.ndarray:
        name, top, left = crop
        return photos[name][top : top + image_size, left : left + image_size]

    crops = (_draw_crops(photos, image_size, count, train) for count, train in zip(counts, (True, False), strict=True))
    splits = [Split(places, read, lambda crop: crop[0]) for places in crops]
    return *splits, f"crops of {image_size}×{image_size}, left 75 % / right 25 %"


def photo_source(
    image_size: int, photos: Callable[[], dict[str, np.ndarray]] = photographs, counts: tuple[int, int] = (4096, 512)
) -> Source:
    """So many crops to train on and to validate with, drawn from ``photos``."""
    return Source(counts, lambda: _open_photos(photos(), counts, image_size))


# --- torchvision's datasets -----------------------------------------------------------------------------------------


def _open_torchvision(kind: str, train: dict, val: dict, image_size: int) -> tuple[Split, Split, str]:
    repair()
    from torchvision import datasets

    root = cache_dir() / "torchvision"
    try:
        root.mkdir(parents=True, exist_ok=True)
        opened = [getattr(datasets, kind)(str(root), **which, download=True) for which in (train, val)]
    except Exception as error:  # network, checksum, torn archive, no gdown for CelebA: it raises nearly every kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"cannot get {kind} ({reason}): fix that, place its files below {root} yourself, "
            "or give your images as folder:PATH"
        ) from error

    splits = [_torchvision_split(dataset, image_size) for dataset in opened]
    names = " / ".join(f"{option}={value}" for which in (train, val) for option, value in which.items())
    return *splits, f"images, central squares resized to {image_size}×{image_size}, {names}"


def _torchvision_split(dataset: Any, image_size: int) -> Split:
    """Names the class of an image without decoding it; torchvision's classes have several words for that."""
    targets = next((getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), [])
    names = getattr(dataset, "classes", None)

    def label(index: int) -> str:
        target = int(targets[index]) if len(targets) else -1  # STL-10's unlabelled images have -1
        return "" if target < 0 else str(names[target] if names else target)

    return Split(range(len(dataset)), lambda index: to_pixels(dataset[index][0], image_size), label)


def _torchvision(kind: str, train: dict, val: dict, image_size: int) -> Source:
    return Source((train, val), partial(_open_torchvision, kind, train, val, image_size))  # its files have checksums


# --- a folder of images ---------------------------------------------------------------------------------------------


def _find_images(root: str, below: str = "") -> list[str]:
    """Sorted paths, relative to ``root`` and with slashes, of the image files at any depth in its subfolder ``below``.

    What is hidden is left out (macOS leaves unreadable ``._x.jpg`` behind), links are followed once. UserError where a
    folder cannot be listed or nothing is found.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"cannot read the folder {error.filename} ({error.strerror}): "
            "folder:PATH needs an existing folder of images that you may read"
        ) from error

    top = Path(root, below)
    found, visited = [], set()
    for folder, subfolders, files in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back to a folder that was walked already
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        names = (name for name in files if not name.startswith(".") and PurePath(name).suffix.lower() in ENDINGS)
        paths = (os.path.join(folder, name) for name in names)
        found += [PurePath(os.path.relpath(path, root)).as_posix() for path in paths if not _waits(path)]
    if not found:
        endings = " ".join(sorted(ENDINGS))
        raise UserError(f"no images in {top}: put some there, or give folder:PATH another path ({endings})")
    return sorted(found)


def _waits(path: str) -> bool:
    """Whether reading it could take for ever: of a pipe or a device. A link that leads nowhere will just fail."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _split_by_hash(paths: list[str]) -> tuple[list[str], list[str]]:
    """90 % / 10 % by a hash of the relative path: the same on any machine, and at least one image on either side."""
    shuffled = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
    count = max(1, round(len(paths) / 10))
    return sorted(shuffled[count:]), sorted(shuffled[:count])


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: decoding will name it
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns  # a copy may keep all but the last


def folder_source(path: str, image_size: int) -> Source:
    """The images at any depth below ``path``: those of its subfolders ``train`` and ``val``, ``valid``, ``validation``
    or ``test``, or else split by a hash of their paths. Raises UserError where there are too few, or none."""
    root = os.path.realpath(os.path.expanduser(path))
    held_out = [name for name in VALIDATION_FOLDERS if os.path.isdir(os.path.join(root, name))]
    if held_out and os.path.isdir(os.path.join(root, "train")):
        train, val = _find_images(root, "train"), _find_images(root, held_out[0])
        split_folders, how = 1, f"subfolders train / {held_out[0]}"
    else:
        paths = _find_images(root)
        if len(paths) < 2:
            raise UserError(f"only one image in {root}: add another, one is needed to train and one to validate")
        train, val = _split_by_hash(paths)
        split_folders, how = 0, "split 90 % / 10 % by a hash of the path"

    def read(name: str) -> np.ndarray:
        with Image.open(os.path.join(root, name)) as image:
            return to_pixels(image, image_size)

    def label(name: str) -> str:  # the images of a class lie in a folder of its name
        folders = PurePath(name).parts[split_folders:-1]
        return folders[0] if folders else ""

    how = f"images, central squares resized to {image_size}×{image_size}, {how}"
    stamps = [(name, _stamp(os.path.join(root, name))) for name in train + val]
    return Source((root, len(train), stamps), lambda: (Split(train, read, label), Split(val, read, label), how))


DATASETS: dict[str, Callable[[int], Source]] = {
    "photos": photo_source,
    "cifar10": partial(_torchvision, "CIFAR10", {"train": True}, {"train": False}),
    "fashion_mnist": partial(_torchvision, "FashionMNIST", {"train": True}, {"train": False}),
    "stl10": partial(_torchvision, "STL10", {"split": "unlabeled"}, {"split": "test"}),  # 100,000 to train on
    "celeba": partial(_torchvision, "CelebA", {"split": "train"}, {"split": "test"}),
    "flowers102": partial(_torchvision, "Flowers102", {"split": "train"}, {"split": "test"}),
}
"""Data sets by name: image_size -> Source. Besides them ``folder:PATH`` takes any folder of images."""
