"""Images: decoded once to uint8 arrays on disk, served as batches that are a pure function of (seed, step).

Arrays are (N, H, W, 3): what decoders give, one image is one contiguous read, and the permuted view of a gathered batch
is already a channels_last (B, 3, H, W) tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets

from bench.core.errors import UserError
from bench.core.files import atomic_path, cache_dir
from bench.core.progress import Bar, console

DECODING_VERSION = 2  # part of the cache key: raise it when the same files would decode to other pixels
DECODING_CHUNK = 256  # images in flight, so that memory does not grow with the data
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
PHOTO_TRAIN, PHOTO_VAL = 4096, 512
PHOTO_TRIES, PHOTO_CONTRAST = 100, 4  # a crop in which no channel's standard deviation reaches 4 levels is redrawn


@dataclass(frozen=True, eq=False)
class Data:
    """Two splits of equally sized images, and what a protocol has to say about them."""

    name: str  # as given to load()
    train: np.ndarray  # (N, H, W, 3) uint8, a read-only memory map
    val: np.ndarray  # the same
    fingerprint: str  # SHA-256 of the pixels of both splits: equal on any machine that decodes to equal pixels
    split: str  # e.g. "photos: 4096 train / 512 val crops of 64×64, left 75 % / right 25 %"
    skipped: tuple[str, ...]  # files that could not be decoded, relative to the folder
    classes: tuple[str, ...] = ()  # names of what the images show, sorted; none where they have no labels
    labels: tuple[np.ndarray, np.ndarray] | None = None  # of both splits, (N,) int64 each: places in ``classes``


@dataclass(frozen=True)
class Split:
    """Images yet to be decoded: ``read(item)`` gives (H, W, 3) uint8 or raises; ``str(item)`` names it in messages.
    ``label(item)`` names its class; empty for none."""

    items: Sequence[Any]
    read: Callable[[Any], np.ndarray]
    label: Callable[[Any], str] = lambda item: ""


@dataclass(frozen=True)
class Source:
    """A data set yet to be opened: ``identity`` is a cheap JSON value that changes whenever the pixels may have.

    ``open()`` gives (train, val, how), where ``how`` completes the sentence "photos: 4096 train / 512 val …".
    """

    identity: Any
    open: Callable[[], tuple[Split, Split, str]]


# --- pictures to pixels ---------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB: turned as its EXIF says, transparency over white, 16-bit grey scaled to 8 bits.

    Raises ValueError for floating-point pixels, whose white is undefined, and what Pillow raises for broken files.
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
    names = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina")
    photos = {name: getattr(skimage.data, name)() for name in (*names, "colorwheel")}
    return photos | {"stereo_motorcycle": skimage.data.stereo_motorcycle()[0]}  # left view, right view, disparity


def _is_flat(crop: np.ndarray) -> bool:
    """Whether no channel varies: retina's black border, sky. In integers, so that every machine rejects the same."""
    values = crop.reshape(-1, 3).astype(np.int64)
    count = len(values)
    variance = count * (values**2).sum(axis=0) - values.sum(axis=0) ** 2  # times count²
    return bool(variance.max() < (PHOTO_CONTRAST * count) ** 2)


def _draw_crops(photos: dict[str, np.ndarray], image_size: int, train: bool) -> list[tuple[str, int, int]]:
    """(photograph, top, left) of every crop of a split: the photographs in turn, a random place in the split's part.

    Crops stay inside the left 75 % of the width (train) or the right 25 %, so the splits share no pixel.
    """
    draw = np.random.PCG64(0 if train else 1).random_raw  # NumPy promises this stream for ever, not a Generator's
    crops, names = [], list(photos)
    for index in range(PHOTO_TRAIN if train else PHOTO_VAL):
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


def _open_photos(image_size: int) -> tuple[Split, Split, str]:
    photos = photographs()
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

    splits = [Split(_draw_crops(photos, image_size, train), read, lambda crop: crop[0]) for train in (True, False)]
    return *splits, f"crops of {image_size}×{image_size}, left 75 % / right 25 %"


def _photos(image_size: int) -> Source:
    return Source((PHOTO_TRAIN, PHOTO_VAL), partial(_open_photos, image_size))


# --- torchvision's datasets -----------------------------------------------------------------------------------------


def _open_torchvision(kind: type, train: dict, val: dict, image_size: int) -> tuple[Split, Split, str]:
    root = cache_dir() / "torchvision"
    try:
        root.mkdir(parents=True, exist_ok=True)
        opened = [kind(str(root), **which, download=True) for which in (train, val)]
    except Exception as error:  # network, checksum, torn archive, no gdown for CelebA: it raises nearly every kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"cannot get {kind.__name__} ({reason}): mend that, place its files below {root} yourself, "
            "or give your images as folder:PATH"
        ) from error

    def reader(dataset: Sequence[tuple[Image.Image, Any]]) -> Callable[[int], np.ndarray]:
        return lambda index: to_pixels(dataset[index][0], image_size)

    splits = [Split(range(len(dataset)), reader(dataset), _labeller(dataset)) for dataset in opened]
    names = " / ".join(f"{option}={value}" for which in (train, val) for option, value in which.items())
    return *splits, f"images, central squares resized to {image_size}×{image_size}, {names}"


def _labeller(dataset: Any) -> Callable[[int], str]:
    """Names the class of an image without decoding it; torchvision's classes have several words for that."""
    targets = next((getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), [])
    names = getattr(dataset, "classes", None)

    def label(index: int) -> str:
        target = int(targets[index]) if len(targets) else -1  # STL-10's unlabelled images have -1
        return "" if target < 0 else str(names[target] if names else target)

    return label


def _torchvision(kind: type, train: dict, val: dict, image_size: int) -> Source:
    return Source((train, val), partial(_open_torchvision, kind, train, val, image_size))  # its files have checksums


# --- a folder of images ---------------------------------------------------------------------------------------------


def _find_images(root: str, below: str = "") -> list[str]:
    """Sorted paths, relative to ``root`` and with slashes, of the image files at any depth in its subfolder ``below``.

    Hidden files and folders are left out (macOS leaves unreadable ``._x.jpg`` behind), links are followed once.
    Raises UserError where a folder cannot be listed or nothing is found.
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
        found += [PurePath(os.path.relpath(os.path.join(folder, name), root)).as_posix() for name in names]
    if not found:
        endings = " ".join(sorted(ENDINGS))
        raise UserError(f"no images in {top}: put some there, or give folder:PATH another path ({endings})")
    return sorted(found)


def _split_by_hash(paths: list[str]) -> tuple[list[str], list[str]]:
    """90 % / 10 % by a hash of the relative path: the same on any machine, and at least one image on either side."""
    shuffled = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
    count = max(1, round(len(paths) / 10))
    return sorted(shuffled[count:]), sorted(shuffled[:count])


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: decoding will name it
        return None
    return status.st_size, status.st_mtime_ns


def _folder(path: str, image_size: int) -> Source:
    root = os.path.realpath(os.path.expanduser(path))
    held_out = [name for name in VALIDATION_FOLDERS if os.path.isdir(os.path.join(root, name))]
    if held_out and os.path.isdir(os.path.join(root, "train")):
        train, val = _find_images(root, "train"), _find_images(root, held_out[0])
        split_folders = 1
        how = f"subfolders train / {held_out[0]}"
    else:
        paths = _find_images(root)
        if len(paths) < 2:
            raise UserError(f"only one image in {root}: add another, one is needed to train and one to validate")
        train, val = _split_by_hash(paths)
        split_folders = 0
        how = "split 90 % / 10 % by a hash of the path"

    def read(name: str) -> np.ndarray:
        with Image.open(os.path.join(root, name)) as image:
            return to_pixels(image, image_size)

    def label(name: str) -> str:  # the images of a class lie in a folder of its name
        folders = PurePath(name).parts[split_folders:-1]
        return folders[0] if folders else ""

    how = f"images, central squares resized to {image_size}×{image_size}, {how}"
    stamps = [(name, _stamp(os.path.join(root, name))) for name in train + val]
    return Source((root, len(train), stamps), lambda: (Split(train, read, label), Split(val, read, label), how))


# --- decode once ----------------------------------------------------------------------------------------------------

DATASETS: dict[str, Callable[[int], Source]] = {
    "photos": _photos,
    "cifar10": partial(_torchvision, datasets.CIFAR10, {"train": True}, {"train": False}),
    "fashion_mnist": partial(_torchvision, datasets.FashionMNIST, {"train": True}, {"train": False}),
    "stl10": partial(_torchvision, datasets.STL10, {"split": "unlabeled"}, {"split": "test"}),  # 100,000 to train on
    "celeba": partial(_torchvision, datasets.CelebA, {"split": "train"}, {"split": "test"}),
    "flowers102": partial(_torchvision, datasets.Flowers102, {"split": "train"}, {"split": "test"}),
}
"""Data sets by name: image_size -> Source. Beside them ``folder:PATH`` takes any folder of images."""


def load(data: str, image_size: int) -> Data:
    """The images of ``data``, a name in DATASETS or ``folder:PATH``, as squares of ``image_size``.

    The first call decodes (and downloads, where there is a need) into ``cache_dir()/data``; later calls and other
    processes map the same files. Unreadable files are skipped, and listed in ``Data.skipped``.

    Raises UserError for an unknown name, a folder without images, more than 1 % unreadable images, an image_size
    beyond what ``photos`` has, a failed download, and a cache folder that is full or cannot be written.
    """
    name, _, path = data.partition(":")
    if name == "folder" and path:
        source = _folder(path, image_size)
    elif data in DATASETS:
        source = DATASETS[data](image_size)
    else:
        raise UserError(f"unknown data {data!r}: choose one of {', '.join(DATASETS)}, or folder:PATH")

    identity = json.dumps([DECODING_VERSION, name, image_size, source.identity])
    key = f"{name}-{image_size}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    folder = cache_dir() / "data" / key
    meta = folder / "meta.json"  # written last: where it exists, the arrays are complete
    try:
        if not meta.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # another process may be decoding, or just have finished
                if not meta.exists():
                    _decode(data, source, image_size, folder)
        train, val = (np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "val"))
        fields = json.loads(meta.read_text())
        labels = tuple(np.load(folder / f"{split}_labels.npy") for split in ("train", "val"))
    except OSError as error:  # those of single images and downloads do not come this far
        raise UserError(
            f"cannot use the cache folder {folder.parent} ({error.strerror or error}): "
            "free space or mend permissions there, or set VQBENCH_CACHE to another folder"
        ) from error
    classes = tuple(fields["classes"])
    skipped = tuple(fields["skipped"])
    return Data(data, train, val, fields["fingerprint"], fields["split"], skipped, classes, labels if classes else None)


def _decode(data: str, source: Source, image_size: int, folder: Path) -> None:
    """Writes train.npy, val.npy and then meta.json into ``folder``; leaves nothing behind if it does not get there."""
    name = data.partition(":")[0]
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left behind
    *splits, how = source.open()
    total = sum(len(split.items) for split in splits)
    required, free = total * image_size**2 * 3, shutil.disk_usage(folder.parent).free
    if required > free:
        raise UserError(
            f"decoding {data} takes {required / 1e9:.2f} GB and {folder.parent} has {free / 1e9:.2f} GB left: "
            "free some space, or set VQBENCH_CACHE to a folder on a larger disk"
        )

    digest, skipped, counts, names = hashlib.sha256(), [], [], []
    try:
        with Bar(f"decoding {name}", total) as bar, ThreadPoolExecutor() as pool, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # oddities of single files
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for part, split in zip(("train", "val"), splits, strict=True):
                before = len(skipped)
                with atomic_path(folder / f"{part}.npy") as path:
                    blocks = _decode_blocks(data, split, pool, bar, skipped, limit=total / 100)
                    counts.append(_write_npy(path, blocks, image_size, digest))
                unreadable = set(skipped[before:])
                names.append([split.label(item) for item in split.items if str(item) not in unreadable])
        if 0 in counts:
            raise UserError(f"a split of {data} has no readable image ({_first(skipped)}): repair or replace them")
        classes = _write_labels(folder, names)
        what = f"{name}: {counts[0]} train / {counts[1]} val {how}"
        with atomic_path(folder / "meta.json") as path:
            fields = {"fingerprint": digest.hexdigest(), "split": what, "skipped": skipped, "classes": classes}
            path.write_text(json.dumps(fields))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if skipped:
        message = f"skipped {len(skipped)} of {total} images that cannot be decoded: {_first(skipped)}"
        console.print(message, markup=False)


def _write_labels(folder: Path, names: list[list[str]]) -> list[str]:
    """Writes what class each image of both splits is of, and returns the classes: none unless every image has one and
    there are several."""
    classes = sorted({name for split in names for name in split})
    if "" in classes or len(classes) < 2:
        classes = []
    places = {name: place for place, name in enumerate(classes)}
    for part, split in zip(("train", "val"), names, strict=True):
        with atomic_path(folder / f"{part}_labels.npy") as path:
            np.save(path, np.array([places.get(name, -1) for name in split], dtype=np.int64))
    return classes


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _decode_blocks(
    data: str, split: Split, pool: ThreadPoolExecutor, bar: Bar, skipped: list[str], limit: float
) -> Iterator[np.ndarray]:
    """Yields the decoded images in order as (n, H, W, 3) blocks; appends to ``skipped``, UserError beyond ``limit``."""

    def try_read(item: Any) -> np.ndarray | None:
        try:
            return split.read(item)
        except Exception:  # Pillow's decoders raise nearly every kind for broken files
            return None

    for start in range(0, len(split.items), DECODING_CHUNK):
        chunk = split.items[start : start + DECODING_CHUNK]
        images = list(pool.map(try_read, chunk))
        skipped += [str(item) for item, image in zip(chunk, images, strict=True) if image is None]
        if len(skipped) > limit:
            raise UserError(
                f"more than 1 % of the images of {data} cannot be decoded (the first: {_first(skipped)}): "
                "repair or remove them"
            )
        bar.advance(len(chunk))
        if readable := [image for image in images if image is not None]:
            yield np.stack(readable)


def _write_npy(path: Path, blocks: Iterator[np.ndarray], image_size: int, digest: Any) -> int:
    """Streams uint8 blocks into an .npy file, feeds pixels and shape to ``digest``, returns the number of images.

    Through a file and not a writable memory map: there a full disk is a SIGBUS instead of an OSError.
    """

    def write_header(count: int) -> None:  # of constant length: NumPy leaves room for the first axis to grow
        shape = (count, image_size, image_size, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

    count = 0
    with open(path, "wb") as file:
        write_header(0)
        for block in blocks:
            file.write(block)
            digest.update(block)
            count += len(block)
        file.seek(0)
        write_header(count)  # known only now: unreadable files have no row
    digest.update(repr((count, image_size)).encode())
    return count


# --- batches --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """Rows of batch number ``step``: (batch_size,) int64 in [0, count). A pure function of its arguments.

    Batches walk through one fresh permutation an epoch, so every image comes exactly once an epoch; a batch may end
    one epoch and begin the next.
    """
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    return np.concatenate([_permutation(seed, int(e), count)[places[epochs == e]] for e in np.unique(epochs)])


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1], the range of every model here; keeps shape and memory format."""
    return pixels.to(torch.float32).div(127.5).sub_(1)


def batch(
    images: np.ndarray, seed: int, step: int, batch_size: int, augment: str, device: torch.device | str
) -> Tensor:
    """Training batch number ``step``: (batch_size, 3, H, W) float32 in [-1, 1] on ``device``, channels_last.

    A pure function of (images, seed, step): global random states play no part, and the random draws are those of the
    CPU on any device. ``images`` is (N, H, W, 3) uint8, ``augment`` a name in AUGMENTATIONS.
    """
    rows = batch_indices(seed, step, batch_size, len(images))
    pixels = torch.from_numpy(images[rows]).to(device).permute(0, 3, 1, 2)
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    rng = torch.Generator().manual_seed(int(state[0]))
    return to_float(AUGMENTATIONS[augment](pixels, rng).contiguous(memory_format=torch.channels_last))


def eval_batches(images: np.ndarray, batch_size: int) -> Iterator[Tensor]:
    """All of (N, H, W, 3) ``images`` in order, as uint8 (B, 3, H, W) tensors on the CPU; the last may be shorter."""
    for start in range(0, len(images), batch_size):
        yield torch.from_numpy(np.array(images[start : start + batch_size])).permute(0, 3, 1, 2)


# --- augmentations: uint8 (B, 3, H, W) -> the same, so the range holds and resampled images stay images -------------


def _uniform(rng: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)


def _sometimes(x: Tensor, effect: Callable[[Tensor], Tensor], probability: float, rng: torch.Generator) -> Tensor:
    rows = (_uniform(rng, len(x)) < probability).nonzero().squeeze(1).to(x.device)
    return x.index_copy(0, rows, effect(x[rows]))  # only the chosen are computed, and no device has to be waited for


def _flip(x: Tensor, rng: torch.Generator) -> Tensor:
    return _sometimes(x, TF.hflip, 0.5, rng)


def _random_resized_crop_and_flip(x: Tensor, rng: torch.Generator, flip: float) -> Tensor:
    """Torchvision's RandomResizedCrop(scale (0.8, 1), ratio (3/4, 4/3)) and a flip, as one bilinear resampling.

    The window is never larger than the image, so there is nothing to antialias.
    """
    batch_size, tries = len(x), 10
    area = _uniform(rng, batch_size, tries, low=0.8, high=1.0)
    ratio = _uniform(rng, batch_size, tries, low=math.log(3 / 4), high=math.log(4 / 3)).exp()
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()])  # (2, B, tries): width and height
    size[:, :, -1] = 1  # like torchvision: the first window that fits, else the whole image
    first = (size <= 1).all(dim=0).float().argmax(dim=1)
    width, height = size[:, torch.arange(batch_size), first]

    theta = torch.zeros(batch_size, 2, 3)  # output to input coordinates, both in [-1, 1]
    theta[:, 0, 0] = torch.where(_uniform(rng, batch_size) < flip, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * _uniform(rng, batch_size, low=-1.0)
    theta[:, 1, 2] = (1 - height) * _uniform(rng, batch_size, low=-1.0)
    grid = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False).round().to(torch.uint8)


def _blog(x: Tensor, rng: torch.Generator) -> Tensor:
    x = _random_resized_crop_and_flip(x, rng, flip=0.3)
    x = _sometimes(x, partial(TF.adjust_sharpness, sharpness_factor=2.0), 0.3, rng)
    return _sometimes(x, TF.autocontrast, 0.3, rng)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": lambda x, rng: x,
    "flip": _flip,
    "blog": _blog,
}
"""Augmentations of a whole batch by name: (uint8 (B, 3, H, W), generator on the CPU) -> uint8 of the same shape."""
