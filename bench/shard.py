"""Write a folder of images as shards, the tar files of WebDataset, which training reads without decoding them first.

    python -m bench.shard photos/ --to shards/ --per-shard 10000
    python -m bench.run --data shards:shards/

SOURCE is a folder as --data folder:SOURCE takes it. Its train, val and test, or the parts that its images are split
into, become the folders train, val and test of DIR, so both have the same splits, labels and order. Image files are
copied as they are, after a look whether they can be decoded; beside each stand its class and its name (.cls, .json).
The same command again writes what is missing, and the same images always give the same bytes.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, NamedTuple

import tyro
from rich.markup import escape

from bench.core.cli import command, command_line
from bench.core.errors import UserError
from bench.core.files import atomic_path, remove_parts, seal, sha256_json, unseal
from bench.core.progress import Bar, say, stdout
from bench.data.shards import LISTING
from bench.data.sources import SPLITS, decode, folder_source, needed

CHUNK = 64  # images in memory
OVERHEAD = 4096  # bytes at most that a sample takes besides its image


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """a folder of images, with subfolders train, val and test or without"""
    to: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """the folder of the shards, which holds nothing else"""
    per_shard: int = 10_000
    """images in each; a file of 100 MB to 1 GB is read best"""


class Shard(NamedTuple):
    """One that is to be written."""

    path: Path
    first: int  # number of its first image in the split
    names: list[str]  # of its images, relative to the source


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what the user can fix."""
    return command(work, arguments)


def work(arguments: list[str]) -> int:
    """Parses the command line, writes the shards that are not there, and says where they are. Returns the exit code."""
    options = command_line(Options, arguments, "python -m bench.shard", __doc__)
    needed("webdataset", "python -m bench.shard")
    if options.per_shard < 1:
        raise UserError(f"--per-shard is {options.per_shard}; take 1 or more, such as 10000")
    root = Path(os.path.realpath(os.path.expanduser(options.source.removeprefix("folder:"))))
    source = folder_source(str(root), 1)
    *splits, _ = source.open()
    shards = list(planned(options.to, [list(split.items) for split in splits], options.per_shard))
    classes = {name: splits[0].label(name) for split in splits for name in split.items}
    begin(options.to, root, shards, classes)
    missing = [shard for shard in shards if not shard.path.is_file()]
    if (free := shutil.disk_usage(options.to).free) < (size := need(root, missing)):
        told = f"shards take {size / 1e9:.2f} GB and {options.to} has {free / 1e9:.2f} GB left"
        raise UserError(f"{told}; free some space, or name a folder on a larger disk")
    skipped = write(root, missing, classes, limit=len(classes) / 100)
    for told in skipped[:3]:
        say(f"[yellow]skipped:[/] {escape(told)}, {len(skipped)} of {len(classes)} images")
    counts = " / ".join(f"{len(split.items)} {name}" for name, split in zip(SPLITS, splits, strict=True))
    how = f"{len(missing)} written" if missing else "already written"
    stdout.print(
        f"{len(shards)} shards, {how}: {counts} images; use them by --data shards:{options.to}", soft_wrap=True
    )
    return 0


def planned(folder: Path, splits: list[list[str]], per_shard: int) -> Iterator[Shard]:
    """The shards of the names in each of the ``splits``, so many images in each, in order."""
    for split, names in zip(SPLITS, splits, strict=True):
        for number, first in enumerate(range(0, len(names), per_shard)):
            yield Shard(folder / split / f"{split}-{number:06}.tar", first, names[first : first + per_shard])


def begin(folder: Path, root: Path, shards: list[Shard], classes: dict[str, str]) -> None:
    """Writes the list of ``shards`` into ``folder``, by which one that is missing is known. Raises UserError where
    something else is there than a part of them."""
    about = {
        "images": sha256_json([(name, size_of(root / name), label) for name, label in classes.items()]),
        "shards": [shard.path.relative_to(folder).as_posix() for shard in shards],
        "first": [shard.first for shard in shards],
    }
    listing = folder / LISTING
    if listing.is_file():
        if unseal(listing, *about) != about:
            raise UserError(f"{folder} has shards of other images or of another --per-shard; name an empty folder")
        for path in {shard.path.parent for shard in shards}:
            remove_parts(path)
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a folder for nothing but shards")
    with atomic_path(listing) as path:
        path.write_text(seal(about))


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none, as behind a link that leads nowhere."""
    return path.stat().st_size if path.exists() else 0


def need(root: Path, shards: list[Shard]) -> int:
    """Bytes that ``shards`` take at most."""
    return sum(size_of(root / name) + OVERHEAD for shard in shards for name in shard.names)


def write(root: Path, shards: list[Shard], classes: dict[str, str], limit: float) -> list[str]:
    """Writes ``shards``, each at once; returns the images that were skipped as they cannot be decoded. Raises UserError
    where these are more than ``limit``."""
    from webdataset import TarWriter

    labels = sorted({*classes.values()})
    places = {label: place for place, label in enumerate(labels)} if "" not in labels and len(labels) > 1 else {}
    skipped: list[str] = []

    def look(name: str) -> bytes | Exception:
        try:
            content = (root / name).read_bytes()
            decode(content, 1)
            return content
        except Exception as error:  # Pillow's decoders raise nearly every kind for broken files
            return error

    with (
        Bar("writing shards", sum(len(shard.names) for shard in shards)) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for shard in shards:
            with (
                atomic_path(shard.path) as path,
                open(path, "wb") as file,
                TarWriter(file, encoder=False, mtime=0) as tar,
            ):
                for start in range(0, len(shard.names), CHUNK):
                    names = shard.names[start : start + CHUNK]
                    for number, (name, content) in enumerate(zip(names, pool.map(look, names), strict=True)):
                        if isinstance(content, Exception):
                            skipped.append(f"{name} cannot be decoded ({content})")
                            continue
                        about = {"file": name} | ({"label": classes[name]} if places else {})
                        label = {"cls": str(places[classes[name]]).encode()} if places else {}
                        image = {PurePath(name).suffix[1:].lower(): content, "json": json.dumps(about).encode()}
                        tar.write({"__key__": f"{shard.first + start + number:09}"} | image | label)
                    bar.advance(len(names))
                    if len(skipped) > limit:
                        told = f"more than 1 % of the images of {root} cannot be decoded (the first: {skipped[0]})"
                        raise UserError(f"{told}; repair or remove them")
    return skipped


if __name__ == "__main__":
    sys.exit(main())
