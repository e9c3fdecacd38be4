"""The ground under all files: whole or not at all, where they belong, and told apart by their bytes."""

import errno
import hashlib
import os
from pathlib import Path

import platformdirs
import pytest

from bench.core import files
from bench.core.files import atomic_path, cache_dir, sha256_file


def test_a_file_appears_whole_and_alone(tmp_path):
    """In a folder that is made for it; nothing of the name is there before the last byte."""
    path = tmp_path / "new/folder/file.json"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # renaming is atomic within one folder
        assert temporary.suffix == ".json"  # writers look at it
        assert temporary.name.startswith(".file-")  # hidden; what a kill leaves behind says of which file it was
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "file.json"
    path.write_text("old")

    def stop_half_way():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(type(failure)):
        stop_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_are_on_the_disk_before_they_have_the_name(tmp_path, monkeypatch):
    """Else a crash of the machine could leave an empty file of that name."""
    path, happened = tmp_path / "file.json", []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: happened.append(os.fstat(handle).st_size) or sync(handle))
    monkeypatch.setattr(files.os, "replace", lambda *names: happened.append("renamed") or rename(*names))
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    assert happened == [5, "renamed"]


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "file.json"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # it was the last to finish


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_for_whom_the_umask_allows(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("x")
        assert os.umask(umask) == umask  # put back
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 7])
def test_digest_is_that_of_all_bytes(tmp_path, size):
    path = tmp_path / "file"
    content = bytes(number % 251 for number in range(min(size, 1000))) * (size // 1000 + 1)
    path.write_bytes(content[:size])
    assert sha256_file(path) == hashlib.sha256(content[:size]).hexdigest()


def test_the_cache_is_where_the_environment_says_or_the_user_s_own(monkeypatch, tmp_path):
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    for unset in (lambda: monkeypatch.setenv("VQBENCH_CACHE", ""), lambda: monkeypatch.delenv("VQBENCH_CACHE")):
        unset()
        assert cache_dir() == Path(platformdirs.user_cache_dir("vqbench"))
