"""The catalogue: gives what the folders hold, whatever happened to them or to it, and reads no folder twice."""

import json
import os
import sqlite3
import time
from pathlib import Path

import pytest

from bench.core import catalogue
from bench.core.catalogue import entries, statuses
from bench.core.runs import Run
from bench.core.store import Store

COUNT = 7
READ = ("config.json", "instruments.json", "metrics.json", "failure.json")


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> list[Run]:
    """Run folders that were written long ago, more than one batch of them."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalogue, "BATCH", 3)
    monkeypatch.setattr(catalogue, "SETTLED", -60.0)
    runs = [Store(tmp_path / "results").named(f"run-{number}") for number in range(COUNT)]
    for number, run in enumerate(runs):
        run.folder.mkdir(parents=True)
        write(run, "config.json", number)
    return runs


class Reader:
    """Reads the number in a run's files, and remembers which it was asked for."""

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, run: Run) -> dict:
        self.asked.append(run.folder.name)
        names = [name for name in READ if (run.folder / name).exists()]
        return {
            "status": [*"-", *names][-1],
            "found": [(run.folder / name).read_text() for name in names],
            "none": None,
        }


def write(run: Run, name: str, content: object) -> None:
    """Leaves the file as atomic writers do: another one under the same name."""
    part = run.folder / "part"
    part.write_text(json.dumps(content))
    part.replace(run.folder / name)


def database(runs: list[Run]) -> Path:
    (path,) = (runs[0].folder.parents[2] / "cache" / "catalogues").glob("*.db")
    return path


def look(runs: list[Run]) -> tuple[list[str], list[dict]]:
    """Which folders are read for the entries of ``runs``, and the entries."""
    reader = Reader()
    found = list(entries(runs, reader))
    assert found == [Reader()(run) for run in runs]  # the truth
    return reader.asked, found


def endings(runs: list[Run], reader: Reader | None = None) -> list[str]:
    """The statuses alone."""
    return list(statuses(runs[0].folder.parent, (run.folder.name for run in runs), reader or Reader()))


def test_what_was_read_once_is_not_read_again(shelf):
    assert look(shelf)[0] == [run.folder.name for run in shelf]
    assert look(shelf)[0] == []
    reader = Reader()
    assert endings(shelf, reader) == ["config.json"] * COUNT
    assert not reader.asked
    assert look(shelf[::-1])[0] == []  # in whatever order


def test_statuses_alone_fill_it_too(shelf):
    endings(shelf)
    assert look(shelf)[0] == []


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("how", ["replaced", "in place", "appeared", "gone"])
def test_a_run_whose_files_changed_is_read_again(shelf, name, how):
    run = shelf[4]
    if how != "appeared":
        write(run, name, "old")
    look(shelf)
    if how == "gone":
        (run.folder / name).unlink()
    elif how == "in place":
        (run.folder / name).write_text('"new"')  # of equal length
    else:
        write(run, name, "new")
    assert look(shelf)[0] == [run.folder.name]
    assert endings(shelf) == [Reader()(one)["status"] for one in shelf]


def test_a_file_with_its_old_size_and_time_is_another_one_still(shelf):
    look(shelf)
    path = shelf[2].folder / "config.json"
    before = path.stat()
    path.write_text("9")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert look(shelf)[0] == ["run-2"]


def test_what_is_too_young_to_tell_its_changes_is_not_remembered(shelf, monkeypatch):
    """A file may change twice within one tick of the clock, and a clock may go back."""
    monkeypatch.setattr(catalogue, "SETTLED", 2.0)
    assert look(shelf)[0] == look(shelf)[0] == [run.folder.name for run in shelf]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86400)
    assert len(look(shelf)[0]) == COUNT
    monkeypatch.setattr(time, "time", lambda: now + 3)
    look(shelf)
    assert look(shelf)[0] == []


def test_other_code_reads_everything_again(shelf, monkeypatch):
    look(shelf)
    monkeypatch.setattr(catalogue, "_code", lambda: "another")
    assert len(look(shelf)[0]) == COUNT


def test_a_small_store_is_just_read(shelf):
    assert len(look(shelf[:2])[0]) == len(look(shelf[:2])[0]) == 2
    assert not (shelf[0].folder.parents[2] / "cache").exists()


def test_each_folder_of_runs_has_its_own(shelf, tmp_path):
    others = [Store(tmp_path / "others").named(run.folder.name) for run in shelf]
    for number, run in enumerate(others):
        run.folder.mkdir(parents=True)
        write(run, "config.json", number + 100)
    look([*shelf, *others])
    assert look([*shelf, *others])[0] == []


def test_runs_without_a_folder_are_asked_for_every_time(shelf):
    missing = [Run(shelf[0].folder.parent / f"missing-{number}") for number in range(4)]
    reader = Reader()
    read = lambda run: reader(run) if run.folder.exists() else {"status": "unfinished"}  # noqa: E731
    for _ in range(2):
        assert [entry["status"] for entry in entries([*shelf, *missing], read)][-4:] == ["unfinished"] * 4


@pytest.mark.parametrize("damage", ["noise", "cut", "empty", "folder", "another's", "flipped"])
def test_a_damaged_catalogue_is_forgotten(shelf, damage):
    look(shelf)
    path = database(shelf)
    content = path.read_bytes()
    if damage == "noise":
        path.write_bytes(bytes(range(256)) * 64)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "another's":
        path.unlink()
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE entries (name TEXT)")
    else:
        for place in range(0, len(content), 97):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            assert endings(shelf) == ["config.json"] * COUNT
            look(shelf)
        return
    look(shelf)
    if damage != "folder":
        assert len(look(shelf)[0]) in (0, COUNT)  # made anew by now, or by the next
        assert look(shelf)[0] == []


def test_without_a_place_to_keep_it_everything_is_read(shelf, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    assert len(look(shelf)[0]) == len(look(shelf)[0]) == COUNT


def test_entries_come_as_they_are_read(shelf):
    """A table of a large store is not held twice."""
    reader = Reader()
    found = entries(iter(shelf), reader)
    next(found)
    assert reader.asked == ["run-0"]


@pytest.mark.parametrize("entry", [{"status": "damaged"}, {"status": "finished", "lacking": ["what is damaged"]}])
def test_damage_is_looked_at_every_time(shelf, entry):
    """A disk may answer again, or a file be readable again, without a trace in its times."""

    def failing(run: Run) -> dict:
        return entry if run == shelf[3] else Reader()(run)

    list(entries(shelf, failing))
    assert look(shelf)[0] == ["run-3"]


@pytest.mark.parametrize(
    "change",
    [
        *("ALTER TABLE {} ADD COLUMN more TEXT", "UPDATE statuses SET status = NULL", "DELETE FROM {}"),
        "UPDATE statuses SET status = 'config.jsom'",
    ],
)
def test_a_catalogue_of_another_version_is_read_or_made_anew(shelf, change):
    look(shelf)
    with sqlite3.connect(database(shelf)) as other:
        for table in ("statuses", "entries"):
            other.execute(change.format(table))
    assert endings(shelf) == ["config.json"] * COUNT
    look(shelf)


def test_what_an_editor_leaves_beside_the_code_is_no_code(monkeypatch, tmp_path):
    """Such as a link that leads nowhere."""
    (tmp_path / "core").mkdir()
    monkeypatch.setattr(catalogue, "__file__", str(tmp_path / "core" / "catalogue.py"))
    (tmp_path / "core" / "one.py").write_text("a = 1")
    digests = [catalogue._code.__wrapped__()]
    (tmp_path / "core" / ".#one.py").symlink_to("nowhere")
    digests.append(catalogue._code.__wrapped__())
    (tmp_path / "core" / "one.py").write_text("a = 2")
    digests.append(catalogue._code.__wrapped__())
    assert digests[0] == digests[1] != digests[2]
