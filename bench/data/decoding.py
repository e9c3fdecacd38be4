"""Decode once: the images of a source become uint8 arrays on disk, which later calls and processes map.

Arrays are (N, H, W, 3): what decoders give, and one image is one contiguous read.
"""

import hashlib
import json
import os
import shlex
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from rich.markup import escape

from backbones.plugins import version_of
from bench.core.errors import Damaged, UserError
from bench.core.files import UNREADABLE, atomic_path, cache_dir, reason, seal, sha256_arrays, unseal
from bench.core.progress import Bar, console, say
from bench.core.text import printable

from .batches import batch_indices
from .datasets import DATASETS, FORMATS
from .shards import PLACE, Shards
from .sources import SPLITS, Source, Split

DECODING_VERSION = 3  # part of the cache key: raise it when the same files would decode to other pixels
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
DECODING_CHUNK = 256  # images in flight, so that memory does not grow with the data
MOST = 0.8  # of a disk's free space that arrays may take without a word
SHARE = 16  # of them that a thread takes at a time: each hand-over costs as much as a small image


Skipped = tuple[str, str]  # name of an image that cannot be decoded, and why where its file is not at fault


class Subset:
    """Some of ``images`` (N, H, W, 3), those in ``rows``, as an array for those who index its first axis. What they
    ask for is copied, not all of it."""

    def __init__(self, images: np.ndarray | Shards, rows: np.ndarray):
        self.images, self.rows, self.run = images, rows, getattr(images, "run", 0)
        self.shape = (len(rows), *images.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        return self.images[self.rows[places]]

    def ahead(self, places: np.ndarray) -> None:
        """Begins to decode what is asked for next, of images that stay on disk."""
        self.images.ahead(self.rows[places])


@dataclass(frozen=True, eq=False)
class Data:
    """Three splits of equally sized images, and what a protocol has to say about them."""

    name: str  # as given to load()
    train: np.ndarray | Subset | Shards  # (N, H, W, 3) uint8, a read-only memory map unless they stay in shards
    val: np.ndarray  # the same: for choosing between settings
    test: np.ndarray  # the same: for the scores of what was chosen
    fingerprint: str  # SHA-256 of all pixels, or files in shards: equal on any machine that decodes to equal pixels
    split: str  # e.g. "photos: 4096 train / 512 val / 512 test crops of 8 photographs, …"
    skipped: tuple[str, ...]  # files that could not be decoded, relative to the folder
    classes: tuple[str, ...] = ()  # names of what the images show, sorted; none where they have no labels
    labels: tuple[np.ndarray, ...] | None = None  # of the splits in their order, (N,) int64 each: places in ``classes``

    def images(self, split: str) -> np.ndarray:
        """Those of a split that runs are scored on: ``val`` or ``test``."""
        return {"val": self.val, "test": self.test}[split]

    def labels_of(self, split: str) -> np.ndarray | None:
        """(N,) int64 of train, val or test; None where the images have no labels."""
        return None if self.labels is None else self.labels[SPLITS.index(split)]

    def with_train(self, count: int) -> "Data":
        """The same with only ``count`` of the images to train on, drawn once for all seeds; 0 takes all. A smaller
        number takes some of those of a larger one. Raises UserError when there are fewer."""
        if not count:
            return self
        if count > len(self.train):
            raise UserError(f"train_images is {count} and {self.name} has {len(self.train)} to train on; 0 takes all")
        rows = np.sort(batch_indices(0, 0, count, len(self.train)))
        labels = self.labels and (self.labels[0][rows], *self.labels[1:])
        return replace(self, train=Subset(self.train, rows), labels=labels)


def load(data: str, image_size: int) -> Data:
    """The images of ``data``, a name in DATASETS or of FORMATS with a place, as squares of ``image_size``.

    The first call decodes (and downloads if need be) into ``cache_dir()/data``; later calls and other processes map the
    same files. Raises UserError for an unknown name, a folder without images, more than 1 % unreadable images, an
    image_size beyond what ``photos`` has, a failed download, and a cache folder that is full or cannot be written.
    """
    check_name(data)
    if data in DATASETS:
        return decoded(data, DATASETS[data](image_size), image_size)
    name, _, where = data.partition(":")
    return decoded(data, FORMATS[name].source(where, image_size), image_size)


def check_name(data: str) -> None:
    """Raises UserError unless ``data`` is a name in DATASETS, or of FORMATS with a place that can be read."""
    name, _, where = data.partition(":")
    if data not in DATASETS and not (name in FORMATS and where):
        there = f"; {data} is there: write folder:{data}" if os.path.isdir(data) else ""
        formats = ", ".join(f"{name}:{kind.place}" for name, kind in FORMATS.items())
        raise UserError(f"unknown data {data!r}: choose one of {', '.join(DATASETS)}, or {formats}{there}")
    if data not in DATASETS:
        FORMATS[name].check(where)


def decoded(data: str, source: Source, image_size: int) -> Data:
    """The same, of the images of a ``source`` that is called ``data``."""
    name = data.partition(":")[0]
    package = filter(None, [version_of("data", name)])
    identity = json.dumps([DECODING_VERSION, name, image_size, source.identity, *package])
    key = f"{name}-{image_size}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    folder = cache_dir() / "data" / key
    try:
        if (folder / "meta.json").exists() and (found := _intact(data, folder)):
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # another process may be decoding, or just have finished
            if (folder / "meta.json").exists():
                if found := _intact(data, folder):
                    return found
                say(f"[yellow]{escape(str(folder))} is damaged; {escape(data)} is decoded again[/]")
            _decode(data, source, image_size, folder)
            return _read(data, folder)
    except OSError as error:  # those of single images and downloads do not come this far
        raise UserError(
            f"cannot use the cache folder {folder.parent} ({reason(error, folder.parent)}): "
            "free space or fix permissions there, or set VQBENCH_CACHE to another folder"
        ) from error


def _intact(data: str, folder: Path) -> Data | None:
    """What ``folder`` holds, or None where that is not what was written."""
    try:
        return _read(data, folder)
    except (FileNotFoundError, Damaged, *UNREADABLE):
        return None


def _read(data: str, folder: Path) -> Data:
    """What ``_decode`` wrote into ``folder``. Raises Damaged, or what NumPy does, where it is not as it was written."""
    meta = unseal(folder / "meta.json")  # written last: where it exists, the arrays are complete
    if not all(path.is_file() for path in folder.glob("*.npy")):
        raise Damaged(folder, "a part of it is not a file")
    paths = [folder / f"{split}.npy" for split in SPLITS]
    images = [np.load(path, mmap_mode="r") for path in paths]
    labels = tuple(np.load(folder / f"{split}_labels.npy") for split in SPLITS)
    shards = meta.get("shards")
    if shards and (images[0].dtype != PLACE or sha256_arrays(images[0]) != meta["places"]):
        raise Damaged(folder, "its index is not the one that was written")
    for shown in images[bool(shards) :]:  # of which a fingerprint knows the bytes, their number and one side
        side = shown.shape[1:2]
        if shown.dtype != np.uint8 or shown.shape[1:] != (*side, *side, 3):
            raise Damaged(folder, "its images are of another type or shape")
    if _fingerprint(*((path, path.stat().st_mtime_ns) for path in paths)) != meta["fingerprint"]:
        raise Damaged(folder, "its images are not those that were decoded")
    classes = tuple(meta["classes"])
    for shown, places in zip(images, labels, strict=True):
        known = (places >= -1) & (places < len(classes))
        if places.dtype != np.int64 or len(places) != len(shown) or not known.all():
            raise Damaged(folder, "its labels are not those of its images")
    if meta.get("labels", found := sha256_arrays(*labels)) != found:  # older versions wrote none
        raise Damaged(folder, "its labels are not those that were written")
    if shards:
        images[0] = Shards(shards, images[0], images[1].shape[1])
    about = (meta["fingerprint"], meta["split"], tuple(meta["skipped"]))
    return Data(data, *images, *about, classes, labels if classes else None)


@cache
def _fingerprint(*files: tuple[Path, int]) -> str:
    """Digest of the pixels and shapes in ``files``, computed once in a process until one of them has another time. Of
    an index of shards it is that of the images' digests, wherever they lie."""
    digest = hashlib.sha256()
    for path, _ in files:
        images = np.load(path, mmap_mode="r")
        digest.update(images if images.dtype != PLACE else images["digest"].tobytes())
        digest.update(_shape(*images.shape[:2]))
    return digest.hexdigest()


def _shape(count: int, image_size: int = 0) -> bytes:
    """What a fingerprint says of an array after its pixels."""
    return repr((count, image_size)).encode()


def _decode(data: str, source: Source, image_size: int, folder: Path) -> None:
    """Writes an array per split and then meta.json into ``folder``; leaves nothing behind if it does not get there."""
    name = data.partition(":")[0]
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left behind
    if os.path.lexists(folder) and not folder.is_dir():
        folder.unlink()  # a file, or a link that leads nowhere
    *splits, how = source.open()
    total = sum(len(split.items) for split in splits if not split.kept)
    _check_disk(data, source, splits, image_size, folder.parent)

    digest = hashlib.sha256()
    skipped: list[Skipped] = []
    kept: dict[str, Any] = {}  # what is known of images that stay in shards
    labels: dict[str, list[str]] = {split: [] for split in SPLITS}  # of the images that can be decoded
    try:
        workers = ThreadPoolExecutor(os.cpu_count())
        with Bar(f"decoding {name}", total) as bar, workers as pool, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # oddities of single files
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for (part, found), split in zip(labels.items(), splits, strict=True):
                if split.kept:
                    found += map(split.label, split.items)
                    kept = {"shards": split.kept, "places": _write_places(folder / f"{part}.npy", split.items, digest)}
                    continue
                blocks = _decode_blocks(data, split, pool, bar, found, skipped, limit=total / 100)
                with atomic_path(folder / f"{part}.npy") as path:
                    _write_npy(path, blocks, image_size, digest)
        if not all(labels.values()):
            raise UserError(f"a split of {data} has no readable image ({_first(skipped)}): repair or replace them")
        classes, written = _write_labels(folder, labels)
        what = f"{name}: {' / '.join(f'{len(found)} {split}' for split, found in labels.items())} {how}"
        with atomic_path(folder / "meta.json") as path:
            about = {"fingerprint": digest.hexdigest(), "split": what, "skipped": [name for name, _ in skipped]}
            path.write_text(seal({**about, **kept, "classes": classes, "labels": written}))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if skipped:
        message = f"skipped {len(skipped)} of {total} images that cannot be decoded: {_first(skipped)}"
        console.print(message, markup=False)


def _check_disk(data: str, source: Source, splits: Sequence[Split], image_size: int, place: Path) -> None:
    """Raises UserError where arrays of ``splits`` do not fit the disk of the folder ``place``, and warns where they
    take most of what is free there; both tell what the images of a folder would take as shards."""
    counts = [0 if split.kept else len(split.items) for split in splits]
    required, free = sum(counts) * image_size**2 * 3, shutil.disk_usage(place).free
    if required <= free * MOST:
        return
    what = f"decoding {data} takes {required / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB left"
    fix, arrays = (
        "free some space, or set VQBENCH_CACHE to a folder on a larger disk",
        sum(counts[1:]) * image_size**2 * 3,
    )
    if source.files:
        size = f"{source.files / 1e9:.2f} GB and arrays of {arrays / 1e9:.2f} GB to score"
        where = shlex.quote(data.partition(":")[2])
        fix += f"; as shards they take {size}: python -m bench.shard {where} --to DIR, then --data shards:DIR"
    if required > free:
        raise UserError(f"{what}: {fix}")
    say(f"[yellow]the disk fills:[/] {escape(f'{what}: {fix}')}")


def _write_labels(folder: Path, labels: dict[str, list[str]]) -> tuple[list[str], str]:
    """Writes the class of each image; returns all classes, none unless every image has one and there are several, and
    the digest of what it wrote."""
    classes = sorted(set().union(*labels.values()))
    if "" in classes or len(classes) < 2:
        classes = []
    places = {name: place for place, name in enumerate(classes)}
    written = [np.array([places.get(name, -1) for name in names], dtype=np.int64) for names in labels.values()]
    for part, array in zip(labels, written, strict=True):
        with atomic_path(folder / f"{part}_labels.npy") as path:
            np.save(path, array)
    return classes, sha256_arrays(*written)


def _text(name: Any) -> str:
    """``name`` as meta.json can have it."""
    return printable(str(name).encode(errors="replace").decode())


def _first(skipped: list[Skipped]) -> str:
    names = [f"{name} ({why})" if why else name for name, why in skipped[:3]]
    return ", ".join(names) + (", …" if len(skipped) > 3 else "")


def _decode_blocks(
    data: str, split: Split, pool: ThreadPoolExecutor, bar: Bar, labels: list[str], skipped: list[Skipped], limit: float
) -> Iterator[np.ndarray]:
    """Yields the images that can be decoded, in order, as (n, H, W, 3) blocks. Appends their classes to ``labels`` and
    all others to ``skipped``; UserError for more than ``limit`` of these."""

    def try_read(item: Any) -> np.ndarray | str:
        try:
            return split.read(item)
        except BOMBS:
            return f"more than {Image.MAX_IMAGE_PIXELS} pixels, which Pillow takes for a bomb"
        except Exception:  # Pillow's decoders raise nearly every kind for broken files
            return ""

    for start in range(0, len(split.items), DECODING_CHUNK):
        chunk = split.items[start : start + DECODING_CHUNK]
        shares = [chunk[i : i + SHARE] for i in range(0, len(chunk), SHARE)]
        images = [image for share in pool.map(lambda items: list(map(try_read, items)), shares) for image in share]
        for item, image in zip(chunk, images, strict=True):
            if isinstance(image, str):
                skipped.append((_text(item), image))
            else:
                labels.append(_text(split.label(item)))
        if len(skipped) > limit:
            raise UserError(
                f"more than 1 % of the images of {data} cannot be decoded (the first: {_first(skipped)}): "
                "repair or remove them"
            )
        bar.advance(len(chunk))
        if readable := [image for image in images if not isinstance(image, str)]:
            yield np.stack(readable)


def _write_places(path: Path, places: np.ndarray, digest: Any) -> str:
    """Writes an index of shards as an .npy file, the images' digests and number into ``digest``; returns that of the
    whole index."""
    with atomic_path(path) as temporary:
        np.save(temporary, places)
    digest.update(places["digest"].tobytes())
    digest.update(_shape(len(places)))
    return sha256_arrays(places)


def _write_npy(path: Path, blocks: Iterator[np.ndarray], image_size: int, digest: Any) -> None:
    """Streams uint8 blocks into an .npy file, pixels and shape into ``digest``. Through a writable memory map a full
    disk would be a SIGBUS instead of an OSError."""

    def write_header(count: int) -> None:  # of constant length: NumPy leaves room for the first axis to grow
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, image_size, image_size, 3)}
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
    digest.update(_shape(count, image_size))
