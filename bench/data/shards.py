"""Images that stay in tar files by WebDataset's conventions, and are decoded when a batch asks for them.

A shard is an uncompressed tar; files whose names agree up to their first dot are one sample: an image, and perhaps its
label as ``.cls`` or in ``.json``. An index of 32 bytes an image says where each lies, so that any image is one read,
any batch can be made without those before it, and nothing else is held in memory.
"""

import hashlib
import json
import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.markup import escape

from bench.core.errors import UserError
from bench.core.files import UNREADABLE, unseal
from bench.core.progress import Bar, say

from .batches import RUN
from .sources import ENDINGS, Source, Split, by_split, decode, divided, needed, stamp

PLACE = np.dtype([("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("label", "<i4"), ("digest", "u1", 12)])
LISTING = "shards.json"  # beside shards that bench.shard wrote: which they are
LABELS = ("label", "class")  # what the label may be called in a sample's JSON
TASK = 4  # images that a thread decodes at a time
BROKEN = (OSError, tarfile.TarError, *UNREADABLE)


class Sample(NamedTuple):
    """An image in a shard."""

    shard: str
    offset: int  # of its first byte
    size: int  # in bytes
    digest: bytes  # how its SHA-256 begins
    label: str = ""

    def __str__(self) -> str:
        return f"{self.shard} at byte {self.offset}"

    def read(self, image_size: int) -> np.ndarray:
        """(image_size, image_size, 3) uint8. Raises ValueError where other bytes lie there than were indexed, and
        whatever Pillow does on those that are no image."""
        with open(self.shard, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), self.size, self.offset)
        if digest(content) != self.digest:
            raise ValueError("its bytes have changed")
        return decode(content, image_size)


def digest(content: bytes) -> bytes:
    """How an image is known whose file has this ``content``: 12 bytes of its SHA-256."""
    return hashlib.sha256(content).digest()[:12]


class Shards:
    """The images at ``places`` (N,) PLACE of the files ``paths``, as squares of ``image_size``, for those who index the
    first axis of an array (N, H, W, 3) uint8. What they ask for is decoded, in threads.

    In place of one that cannot be decoded stands the next that can, always the same; it is named. UserError for more
    than 1 % of these."""

    run = RUN  # so many neighbours are read close together in time, see ``batch_indices``

    def __init__(self, paths: Sequence[str], places: np.ndarray, image_size: int):
        self.paths, self.places = paths, places
        self.shape = (len(places), image_size, image_size, 3)
        self.broken: set[int] = set()
        self.lock = threading.Lock()
        self.begun: tuple[bytes, list[Future]] = (b"", [])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        of, tasks = self.begun
        self.begun = (b"", [])
        tasks = tasks if of == rows.tobytes() else self._start(rows)
        images = [image for task in tasks for image in task.result()]
        return np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)

    def ahead(self, rows: np.ndarray) -> None:
        """Begins to decode ``rows``, which are asked for next."""
        self.begun = (rows.tobytes(), self._start(rows))

    def _start(self, rows: np.ndarray) -> list[Future]:
        parts = [rows[start : start + TASK] for start in range(0, len(rows), TASK)]
        return [_threads().submit(lambda part: [self._image(int(row)) for row in part], part) for part in parts]

    def _image(self, row: int) -> np.ndarray:
        for place in range(row, row + len(self)):
            place %= len(self)
            if place in self.broken:
                continue
            sample = sample_at(self.paths, self.places[place])
            try:
                return sample.read(self.shape[1])
            except Exception as error:  # Pillow's decoders raise nearly every kind for broken files
                self._skip(place, sample, error)
        raise UserError(f"no image of {self.paths[0]} can be decoded; write these shards again")

    def _skip(self, place: int, sample: Sample, error: Exception) -> None:
        """Remembers and tells that an image cannot be decoded. Raises UserError where that is so of too many."""
        with self.lock:
            known, count = place in self.broken, len(self.broken | {place})
            self.broken.add(place)
        if count > len(self) / 100:
            told = (
                f"more than 1 % of the {len(self)} images to train on cannot be decoded (the last: {sample}, {error})"
            )
            raise UserError(f"{told}; write these shards again, or remove those that are broken")
        if not known:
            say(f"[yellow]skipped:[/] {escape(f'{sample} cannot be decoded ({error})')}; {count} so far")


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "decoding")


def sample_at(paths: Sequence[str], place: np.ndarray, names: Sequence[str] = ()) -> Sample:
    """The sample at one ``place``, a PLACE, with its label where ``names`` has those."""
    label = names[place["label"]] if names and place["label"] >= 0 else ""
    return Sample(paths[place["shard"]], int(place["offset"]), int(place["size"]), place["digest"].tobytes(), label)


# --- from files to an index -----------------------------------------------------------------------------------------


def find_shards(where: str) -> list[str]:
    """The real paths of the tar files that ``where`` means, sorted: those at any depth of a folder, or a pattern with
    braces such as ``DIR/{000..099}.tar``, of which some may be missing. Raises UserError where none is there."""
    needed("webdataset", "shards:")
    from webdataset.shardlists import expand_urls

    if "://" in where or where.startswith("pipe:"):
        told = "shards are read by place, from files of this machine or of a mounted folder, and not from an address"
        raise UserError(f"{told}; copy or mount them, and give shards:DIR")
    where = os.path.realpath(os.path.expanduser(where))
    if os.path.isdir(where):
        found = [str(path) for path in Path(where).rglob("*.tar") if not path.name.startswith(".")]
        listing = Path(where, LISTING)
        named = unseal(listing, "shards")["shards"] if listing.is_file() else []
        found = sorted({*found, *(os.path.join(where, name) for name in named)})
    else:
        try:
            found = sorted(set(expand_urls(where)))
        except ValueError as error:
            raise UserError(f"shards:{where} is no pattern ({error}); write DIR/{{000..099}}.tar") from error
    if not any(map(os.path.isfile, found)):
        raise UserError(
            f"no shards in {where}: name a folder with .tar files, or a pattern such as DIR/{{000..099}}.tar"
        )
    return found


def shard_source(where: str, image_size: int) -> Source:
    """The samples of the shards that ``where`` means, of which those to train on are not decoded beforehand.

    A shard belongs to the split that its folder is called by, or a word of its name (``by_split``); of shards without
    such words, a tenth of the images each, at most 10,000, is for validation and the test, by a digest of the image.
    """
    paths = find_shards(where)
    return Source([where, [(path, stamp(path)) for path in paths]], partial(_open, where, paths, image_size))


def _open(where: str, paths: list[str], image_size: int) -> tuple[Split, Split, Split, str]:
    indexed, names = _indexed(where, paths)
    places = dict(zip(paths, indexed, strict=True))
    found = {split: np.concatenate([places[path] for path in those]) for split, those in by_split(paths).items()}
    *parts, how = divided(found, where, _held_out)

    def read(sample: Sample) -> np.ndarray:
        return sample.read(image_size)

    held = [[sample_at(paths, place, names) for place in part] for part in parts[1:]]
    label = [*names, ""]  # the last is that of -1
    kept = Split(parts[0], read, lambda place: label[place["label"]], tuple(paths))
    splits = [Split(samples, read, lambda sample: sample.label) for samples in held]
    return kept, *splits, f"images, central squares resized to {image_size}×{image_size}, {how}"


def _held_out(places: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """``places`` without ``count`` of them, and these: those of the least digests, so the same however images are
    spread over shards."""
    chosen = np.zeros(len(places), dtype=bool)
    leading = np.ascontiguousarray(places["digest"][:, :8]).view(">u8")[:, 0]
    chosen[np.argsort(leading, kind="stable")[:count]] = True
    return places[~chosen], places[chosen]


def _indexed(where: str, paths: list[str]) -> tuple[list[np.ndarray], list[str]]:
    """Where the images of every shard lie, and the names of their labels. Shards that are missing or cannot be read
    are named and have none; UserError where these are more than 1 %."""
    places, names, broken = [], {}, []
    with Bar("indexing shards", len(paths)) as bar, ThreadPoolExecutor(os.cpu_count()) as threads:
        for number, (path, found) in enumerate(zip(paths, threads.map(_try_index, paths), strict=True)):
            if isinstance(found, Exception):
                broken.append(f"{path} ({getattr(found, 'strerror', None) or found})")
                found = []
            rows = [
                (number, size, offset, names.setdefault(label, len(names)) if label else -1, list(known))
                for offset, size, known, label in found
            ]
            places.append(np.array(rows, dtype=PLACE))
            bar.advance()
    if len(broken) > len(paths) / 100:
        what = f"{len(broken)} of {len(paths)} shards are missing or no tar files without compression: {broken[0]}"
        raise UserError(f"{what}; write or copy them again")
    for told in broken:
        say(f"[yellow]skipped:[/] {escape(told)}, {len(broken)} of {len(paths)} shards")
    if not any(map(len, places)):
        endings = " ".join(sorted(ENDINGS))
        raise UserError(
            f"no images in the shards of {where}; samples are files such as 000.jpg and 000.cls ({endings})"
        )
    return places, list(names)


def _try_index(path: str) -> list[tuple[int, int, bytes, str]] | Exception:
    try:
        return list(samples(path))
    except BROKEN as error:
        return error


def samples(path: str) -> Iterator[tuple[int, int, bytes, str]]:
    """Offset, size, digest and label of the first image of every sample in a shard, in order; all of it is read.
    Raises OSError or tarfile.TarError where that cannot be done."""
    from webdataset.tariterators import base_plus_ext

    if not os.path.isfile(path):
        raise FileNotFoundError(None, "no such file", path)
    with tarfile.open(path, "r:") as tar:
        current, image, label = None, None, ""
        while (member := tar.next()) is not None:
            tar.members.clear()  # else it remembers every file
            key, ending = base_plus_ext(member.name)
            if not member.isfile() or key is None:
                continue
            if key != current:
                if image:
                    yield *image, label
                current, image, label = key, None, ""
            content = tar.extractfile(member).read()
            if len(content) != member.size:
                raise tarfile.ReadError("it is cut off")
            if f".{ending.lower()}" in ENDINGS:
                image = image or (member.offset_data, member.size, digest(content))
            elif ending.lower() == "json":
                label = _label(content) or label
            elif ending.lower() == "cls":
                label = label or content.decode(errors="replace").strip()
        if image:
            yield *image, label


def _label(content: bytes) -> str:
    """The label in the JSON of a sample; empty where there is none."""
    try:
        known: Any = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    found = [known[name] for name in LABELS if name in known] if isinstance(known, dict) else []
    return str(found[0]) if found and isinstance(found[0], (str, int)) else ""
