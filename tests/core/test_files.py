"""The ground under all files: whole or not at all, where they belong, and told apart by their bytes."""

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import platformdirs
import pytest

from bench.core import files
from bench.core.errors import Damaged
from bench.core.files import (
    atomic_path,
    cache_dir,
    cached,
    read_arrays,
    read_json,
    read_rows,
    remove_parts,
    seal,
    sha256_arrays,
    sha256_file,
    unseal,
    unseal_numbers,
)

ROOT = Path(__file__).parents[2]


def test_a_file_appears_whole_and_alone(tmp_path):
    """In a folder that is made for it; nothing of the name is there before the last byte."""
    path = tmp_path / "new/folder/file.json"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # renaming is atomic within one folder
        assert temporary.suffix == ".json"  # writers look at it
        assert temporary.name.startswith(".part-file-")  # hidden; what a kill leaves behind says of which file it was
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


class WritersOwn(Exception):
    """As torch's and safetensors' writers have for a disk that is full."""


def write_until_full(write, path, limit="4096"):
    """What writing ``path`` raises, in a process whose files may have ``limit`` bytes."""
    code = f"""
import resource
from pathlib import Path
from bench.core.files import atomic_path
{write}
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    with atomic_path(Path({str(path)!r})) as temporary:
        fill(temporary)
except OSError as error:
    print(type(error.__cause__).__name__, error.errno, error.filename)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("write", "cause"),
    [
        ("def fill(path): path.write_bytes(bytes(9999))", "NoneType"),
        ("import torch\ndef fill(path): torch.save(torch.zeros(9999), path)", "RuntimeError"),
        (
            "import torch, safetensors.torch\n"
            "def fill(path): safetensors.torch.save_model(torch.nn.Linear(99, 99), str(path))",
            "SafetensorError",
        ),
    ],
    ids=["python", "torch", "safetensors"],
)
def test_a_disk_that_is_full_is_told_as_such_by_every_writer(tmp_path, write, cause):
    """With the file that was to be written; here a limit on the size of files stands for the end of the disk."""
    path = tmp_path / "weights.bin"
    path.write_text("old")
    assert write_until_full(write, path) == [cause, str(errno.EFBIG), str(path)]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_on_a_disk_with_room_is_not_excused(tmp_path):
    with pytest.raises(WritersOwn), atomic_path(tmp_path / "file"):
        raise WritersOwn
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_by_the_file(tmp_path):
    """And not by the temporary one, which nobody knows."""
    path = tmp_path / "file"
    path.mkdir()
    (path / "full").touch()
    with pytest.raises(OSError) as error, atomic_path(path) as temporary:  # noqa: PT011
        temporary.touch()
    assert (error.value.filename, error.value.filename2) == (str(path), None)


def test_a_disk_that_turns_read_only_is_told_with_the_file(tmp_path, monkeypatch):
    """Though the temporary one, which is not to be named, cannot be removed from it either."""

    def refuse(path: Path, **options: bool) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    path = tmp_path / "file"
    with pytest.raises(OSError, match="Read-only") as error, atomic_path(path) as temporary:
        refuse(temporary)
    assert error.value.filename == str(path)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "file.json").touch()
    (tmp_path / ".lock").touch()
    with atomic_path(tmp_path / "half.npz") as temporary:
        left = temporary
    (tmp_path / "half.npz").rename(left)  # as if it had been killed before the other way round
    remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "file.json"]


def test_json_of_a_backslash_before_a_u_is_text(tmp_path):
    """An escaped backslash is one; only the escape of a control character is refused."""
    for text, good in ((r"C:\\u001b", True), (r"\u001b", False), (r"\\\u0007", False), ("é ü × \\n \\t", True)):
        (tmp_path / "x.json").write_text(f'{{"x": "{text}"}}', encoding="utf-8")
        if good:
            assert read_json(tmp_path / "x.json") == json.loads(f'{{"x": "{text}"}}')
        else:
            with pytest.raises(Damaged, match="control characters"):
                read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "y.json")


# -- files that are read ----------------------------------------------------------------------------------------------


def test_a_history_that_is_not_there_has_no_rows_and_a_line_without_numbers_is_none(tmp_path):
    path = tmp_path / "history.jsonl"
    assert read_rows(path) == []
    path.write_text('3\n{"loss": 0.5}\n{"step": 1, "loss": 2}\n{"step": 2, "loss": true}\n{"step": 3, "loss": 0.5')
    assert read_rows(path) == [{"step": 1, "loss": 2}]


@pytest.mark.parametrize("line", ['{"step": 1e30}', '{"step": -1}', '{"step": 1, "loss": %s}' % ("9" * 400)])
def test_a_row_of_numbers_that_no_run_writes_is_left_out(tmp_path, line):
    path = tmp_path / "history.jsonl"
    path.write_text(line + '\n{"step": 2147483647}\n{"step": 0}\n')
    assert [row["step"] for row in read_rows(path)] == [2**31 - 1, 0]


ERRORS = [
    Damaged("x", "a digest"),
    ValueError("a header"),
    EOFError(),
    KeyError("vgg"),
    zipfile.BadZipFile(),
    zlib.error(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_is_damaged_in_a_cache_is_made_again_and_told_in_one_line(tmp_path, capsys, error):
    """However it is noticed; what is whole is read, and an error that says nothing about the file is raised."""
    path, made, errors = tmp_path / "cache" / "x", [], []

    def make(temporary: Path) -> None:
        made.append(temporary)
        temporary.write_text("whole")

    def read(path: Path) -> str:
        if errors:
            raise errors.pop()
        return path.read_text()

    for _ in range(2):
        assert cached(path, make, read) == "whole"
    assert (len(made), capsys.readouterr().err) == (1, "")
    errors.append(error)
    assert cached(path, make, read) == "whole"
    assert len(made) == 2
    said = capsys.readouterr().err
    assert said.endswith("; it is made again\n")
    assert "is damaged: " in said
    assert "move it away" not in said
    errors.append(MemoryError())
    with pytest.raises(MemoryError):
        cached(path, make, read)
    assert len(made) == 2


def test_what_was_sealed_comes_back_and_any_other_number_is_noticed(tmp_path):
    path, content = tmp_path / "x.json", {"psnr": 20.5, "names": ["a"]}
    path.write_text(seal(content))
    assert unseal(path) == unseal(path, "psnr", "names") == content
    path.write_text(seal(content).replace("20.5", "20.6"))
    with pytest.raises(Damaged, match="its digest is that of other content"):
        unseal(path)
    with pytest.raises(ValueError, match="JSON"):
        seal({"psnr": float("nan")})


@pytest.mark.parametrize("write", [seal, json.dumps], ids=["sealed", "of an older version"])
def test_what_lacks_a_name_is_damaged(tmp_path, write):
    path = tmp_path / "x.json"
    path.write_text(write({"psnr": 20.5}))
    assert unseal(path, "psnr") == {"psnr": 20.5}
    with pytest.raises(Damaged, match=r"is damaged: it has no lpips, ssim;"):
        unseal(path, "ssim", "psnr", "lpips")


@pytest.mark.parametrize("write", [seal, json.dumps], ids=["sealed", "of an older version"])
@pytest.mark.parametrize("other", ["20.5", None, True, [20.5]])
def test_what_is_no_number_is_damaged(tmp_path, write, other):
    path = tmp_path / "x.json"
    path.write_text(write({"psnr": 20.5, "codes": 16}))
    assert unseal_numbers(path, "psnr") == {"psnr": 20.5, "codes": 16}
    path.write_text(write({"psnr": 20.5, "codes": other}))
    with pytest.raises(Damaged, match=r"is damaged: codes is no number;"):
        unseal_numbers(path, "psnr")


def test_a_digest_of_arrays_is_that_of_values_shapes_and_their_order():
    one, other = np.arange(6, dtype=np.uint8), np.arange(6, 9, dtype=np.uint8)
    arrays = [(one, other), (other, one), (one.reshape(2, 3), other), (one, other + 1), (np.concatenate([one, other]),)]
    assert len({sha256_arrays(*each) for each in arrays}) == len(arrays)
    assert sha256_arrays(one, other) == sha256_arrays(one.copy(), other.copy())


def test_a_writer_that_wrote_too_little_without_a_number_of_its_error_met_a_full_disk(tmp_path):
    """As NumPy does."""
    path = tmp_path / "codes.npy"
    write = "import numpy\ndef fill(path): numpy.save(path, numpy.zeros(9999))"
    assert write_until_full(write, path) == ["OSError", str(errno.EFBIG), str(path)]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"x": 1' + 400 * "0" + "}", "a number of 401 characters"),
        ('{"x": "\\ud800"}', "'utf-8' codec can't encode character"),
        ('{"x": "\\udfff\\ud83d"}', "'utf-8' codec can't encode character"),
    ],
)
def test_numbers_and_texts_that_nothing_can_show_are_damage(tmp_path, content, what):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(Damaged, match=what):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"x": "\\ud83d\\ude00", "y": -1234567890123456789}')  # a pair is a picture
    assert read_json(tmp_path / "x.json") == {"x": "\U0001f600", "y": -1234567890123456789}


def test_a_pipe_in_the_cache_is_replaced_and_not_waited_for(tmp_path, capsys):
    path = tmp_path / "cached.json"
    os.mkfifo(path)
    assert cached(path, lambda path: path.write_text(seal({"psnr": 20.0})), unseal) == {"psnr": 20.0}
    assert "is damaged: it is not a file; it is made again" in capsys.readouterr().err


def test_nobody_is_advised_to_trust_a_file(tmp_path, capsys):
    """NumPy's advice for what it does not know is to unpickle it."""
    path = tmp_path / "x.npz"
    for content in (b"noise that is no archive", {"x": np.array([{}])}):
        path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
        with pytest.raises(Damaged) as error:
            read_arrays(path)
        assert str(error.value).startswith(f"{path} is damaged: it holds something else than arrays; move it away")
        cached(path, lambda made: made.write_text("y"), lambda found: found.stat().st_size < 9 or np.load(found))
        assert "pickle" not in capsys.readouterr().err


def test_a_seal_of_something_else_than_an_object_is_damage(tmp_path):
    """Though its digest is right."""
    (tmp_path / "x.json").write_text(seal([1]))
    with pytest.raises(Damaged, match="its content is no object"):
        unseal(tmp_path / "x.json")


def test_arrays_that_are_not_as_they_were_written_are_damaged(tmp_path):
    """Cut off, empty, a bare array, one of objects, bytes changed within it, marked as encrypted, a folder, a pipe."""
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError):
        read_arrays(path)
    np.savez_compressed(path, x=np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    assert read_arrays(path)["x"].shape == (8, 32, 32, 3)
    whole = path.read_bytes()
    bare, objects = io.BytesIO(), io.BytesIO()
    np.save(bare, np.zeros(3))
    np.savez(objects, x=np.array([None], dtype=object))
    central = whole.rindex(b"PK\x01\x02")
    encrypted = whole[: central + 8] + b"\x01" + whole[central + 9 :]
    changed = whole[:2000] + b"\xff" * 100 + whole[2100:]
    for content in (b"", whole[:-30], b"noise", bare.getvalue(), objects.getvalue(), changed, encrypted):
        path.write_bytes(content)
        with pytest.raises(Damaged, match=r"x\.npz is damaged: .*; move it away and run the same command again$"):
            read_arrays(path)
    path.unlink()
    for make in (os.mkdir, os.mkfifo):
        make(path)
        with pytest.raises(Damaged, match="it is not a file"):
            read_arrays(path)
        path.rmdir() if path.is_dir() else path.unlink()
