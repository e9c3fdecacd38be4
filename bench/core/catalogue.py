"""What many run folders hold, remembered: of a store of a hundred thousand runs only what changed is read again.

A copy in the cache folder, never the truth. An entry counts while inode, size and times of the run's files are those
that it was made from, and the code is that which made it; what does not count is read from the folder.
"""

import hashlib
import json
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, suppress
from functools import cache
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from .files import cache_dir
from .runs import Run

BATCH = 1000  # runs that are looked up at once; fewer are read in no time
SETTLED = 2.0  # seconds: a file that is younger may change again without its times telling
TABLES = (
    "CREATE TABLE IF NOT EXISTS statuses (name TEXT PRIMARY KEY, status TEXT, stamp TEXT, mark INT) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS entries (name TEXT PRIMARY KEY, entry BLOB)",
)
HASTE = ("PRAGMA synchronous=OFF", "PRAGMA journal_mode=MEMORY")  # it may be lost: every entry is checked
Entry = dict[str, Any]


def entries(runs: Iterable[Run], read: Callable[[Run], Entry]) -> Iterator[Entry]:
    """``read`` of each of ``runs``: JSON with a ``status``, and ``lacking`` where a file beside the scores is damaged,
    made from nothing but the run's JSON files."""
    for parent, shelf in groupby(runs, key=lambda run: run.folder.parent):
        yield from _remembered(parent, ((run.folder.name, run) for run in shelf), read, _Shelf.entries)


def statuses(parent: Path, names: Iterable[str], read: Callable[[Run], Entry]) -> Iterator[str]:
    """The ``status`` alone of what ``entries`` gives, of the runs that go by ``names`` in the folder ``parent``, in a
    small part of the time."""
    return (entry["status"] for entry in _remembered(parent, ((name, None) for name in names), read, _Shelf.statuses))


def _remembered(
    parent: Path, named: Iterable[tuple[str, Run | None]], read: Callable[[Run], Entry], look_up: Callable
) -> Iterator[Entry]:
    named = iter(named)
    first = list(islice(named, BATCH))
    if len(first) < BATCH:
        yield from (read(run or Run(parent / name)) for name, run in first)
        return
    named = chain(first, named)
    with closing(_Shelf(parent)) as copy:
        while batch := list(islice(named, BATCH)):
            stamps = {name: _stamp(f"{parent}/{name}") for name, _ in batch}
            known, new = look_up(copy, stamps), {}
            for name, run in batch:
                entry = known.get(name)
                if entry is None:
                    entry = read(run or Run(parent / name))
                    damaged = entry["status"] == "damaged" or "lacking" in entry  # may pass: the disk's fault
                    if stamps[name] and not damaged:
                        new[name] = stamps[name], entry
                yield entry
            copy.keep(new)


class _Shelf:
    """The copy of what the runs in the folder ``parent`` hold. Where its database fails, it knows nothing."""

    def __init__(self, parent: Path):
        place = hashlib.sha256(f"{parent} {parent.resolve()}".encode(errors="surrogateescape")).hexdigest()
        self.path, self.database = cache_dir() / "catalogues" / f"{place[:16]}.db", None
        with suppress(OSError, sqlite3.Error):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(self.path, isolation_level=None)
        self._tried(lambda: [self.database.execute(line) for line in (*HASTE, *TABLES)])

    def statuses(self, stamps: dict[str, str]) -> dict[str, Entry]:
        """Name → status of those runs whose stamps, given by name, are those of then."""
        return {
            name: {"status": status}
            for name, status, stamp, mark in self._select("name, status, stamp, mark FROM statuses", stamps)
            if stamp == stamps[name] and mark == _mark(name, status, stamp)
        }

    def entries(self, stamps: dict[str, str]) -> dict[str, Entry]:
        """Name → entry of the same."""
        found = {}
        for name, packed in self._select("name, entry FROM entries", stamps):
            with suppress(zlib.error, ValueError, TypeError):  # zlib has a checksum of its own
                stamp, entry = json.loads(zlib.decompress(packed))
                if stamp == [name, stamps[name]]:
                    found[name] = entry
        return found

    def keep(self, new: dict[str, tuple[str, Entry]]) -> None:
        """Remembers entries by name, with the stamps of the files before they were read."""

        def write() -> None:
            self.database.execute("BEGIN IMMEDIATE")
            for name, (stamp, entry) in new.items():
                status = entry["status"]
                row = name, status, stamp, _mark(name, status, stamp)
                packed = zlib.compress(json.dumps([[name, stamp], entry]).encode(), 1)
                self.database.execute("REPLACE INTO statuses VALUES (?, ?, ?, ?)", row)
                self.database.execute("REPLACE INTO entries VALUES (?, ?)", (name, packed))
            self.database.execute("COMMIT")

        if new:
            self._tried(write)

    def close(self) -> None:
        """Lets go of the database."""
        if self.database:
            self.database.close()
            self.database = None

    def _select(self, columns: str, names: Collection[str]) -> list[tuple]:
        query = f"SELECT {columns} WHERE name IN ({', '.join('?' * len(names))})"
        return self._tried(lambda: self.database.execute(query, tuple(names)).fetchall()) or []

    def _tried(self, work: Callable[[], Any]) -> Any:
        if self.database:
            try:
                return work()
            except (sqlite3.Error, UnicodeError):  # damaged, locked, no room: the next command begins anew
                self.close()
                with suppress(OSError):
                    self.path.unlink()
        return None


def _stamp(folder: str) -> str:
    """What tells whether the JSON files of the run in ``folder`` are still the same; empty when they may change without
    its telling."""
    seen, youngest = [_code()], 0.0
    for name in ("config.json", "instruments.json", "metrics.json", "failure.json"):
        try:
            file = os.stat(f"{folder}/{name}")
        except OSError:
            seen.append("-")
            continue
        seen.append(f"{file.st_ino} {file.st_size} {file.st_mtime_ns} {file.st_ctime_ns}")
        youngest = max(youngest, file.st_mtime, file.st_ctime)
        if name == "metrics.json":
            break  # nobody looks for a failure then
    return " ".join(seen) if 0 < youngest < time.time() - SETTLED else ""


@cache
def _code() -> str:
    """Digest of the code that reads and checks what runs hold."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        if path.is_file():  # an editor's lock is none
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _mark(*values: object) -> int:
    return zlib.crc32(repr(values).encode())
