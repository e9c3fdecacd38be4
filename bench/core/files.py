"""The cache folder, atomic writes, reading what may be damaged, digests."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

import numpy as np

from .errors import Damaged

Found = TypeVar("Found")

FILES = ("folder", "shards", "parquet", "npy")  # data that is known by a path
PART = ".part-"  # how the names of files begin that are still being written
DIGEST = "sha256:"  # how the name of a content begins
SPARE = 1 << 20  # bytes: a disk that does not take so many is full
# Bytes of JSON that stand for characters which would steer a terminal; an even number of backslashes is no escape.
CONTROL = re.compile(rb"(?<!\\)(?:\\\\)*\\(?:[bf]|u00(?:[01][0-9a-fA-F]|7[fF]|[89][0-9a-fA-F]))|\x7f|\xc2[\x80-\x9f]")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # one alone is no text; a pair is one character
LONGEST = 20  # characters of a whole number
LAST_STEP = 2**31 - 1
# What NumPy and the archives below it raise on a file that is not as it was written; a flipped bit is enough for each.
UNREADABLE = (ValueError, TypeError, KeyError, EOFError, SyntaxError, tokenize.TokenError, struct.error, OverflowError)
UNREADABLE += (RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def cache_dir() -> Path:
    """Folder for decoded data and pretrained weights: ``$VQBENCH_CACHE`` or the user's own; it may not exist yet."""
    import platformdirs

    return Path(os.environ.get("VQBENCH_CACHE") or platformdirs.user_cache_dir("vqbench"))


def located(data: str) -> str:
    """``data``, of files and folders such as folder:PATH with the real path: what such images go by, wherever a command
    is started. A name on a hub is what it is, unless a folder is called so here."""
    kind, _, path = data.partition(":")
    split = ""
    if kind == "hf" and not os.path.isdir(os.path.expanduser(path)):
        path, colon, split = path.rpartition(":")  # of a folder's split
        split = colon + split
    known = kind in FILES or (kind == "hf" and os.path.isdir(os.path.expanduser(path)))
    return f"{kind}:{os.path.realpath(os.path.expanduser(path))}{split}" if known and path else data


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; on success it is flushed to disk and renamed to ``path``.

    A reader sees the old file or the whole new one, never a part, also after a crash or a full disk.
    Works for any writer that takes a path. Creates the parent folder. Raises an OSError that names ``path`` where the
    disk takes no more, whatever the writer raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=f"{PART}{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
        except Exception as error:
            if getattr(error, "errno", None) is None:  # NumPy, torch and safetensors have their own for a full disk
                _check_room(temporary, error)
            raise
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _share(temporary, 0o666)
        os.replace(temporary, path)
    except OSError as error:
        named = [Path(str(name)).name for name in (error.filename, error.filename2) if name is not None]
        if error.errno is not None and (not named or any(name.startswith(PART) for name in named)):
            error.filename, error.filename2 = str(path), None  # writers leave it open, or name the temporary file
        raise
    finally:
        if temporary is not None:
            with suppress(OSError):  # what the disk said first is told
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside ``folder`` to write into; on success it takes the place of ``folder`` and of all that
    this held. So there is the old one, or for a moment none, or the whole new one. Creates the parent folder. An
    OSError that names a file of the new folder names it in ``folder``."""
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = (Path(tempfile.mkdtemp(prefix=f"{PART}{folder.name}-", dir=folder.parent)) for _ in range(2))
    try:
        yield part
        _share(part, 0o777)
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
    except OSError as error:
        error.filename = error.filename and str(error.filename).replace(str(part), str(folder))
        raise
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


def _share(path: Path, mode: int) -> None:
    """Gives ``path``, which tempfile made private, to everyone the umask allows: results are for others, too."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def _check_room(path: Path, error: Exception) -> None:
    """Raises the OSError of a disk that takes no more, if that is why writing ``path`` ended in ``error``."""
    try:
        with open(path, "ab") as file:
            file.write(bytes(SPARE))
            os.fsync(file.fileno())
    except OSError as full:
        raise full from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an OSError that names no file, such as that of one which is open, name ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def reason(error: OSError, place: Path | None = None) -> str:
    """What the system says is wrong, with the file that it names unless that is ``place``; of a link that leads
    nowhere, of which it says that it exists, that it is one."""
    name = None if error.filename is None else os.fsdecode(error.filename)
    if name is not None and os.path.islink(name) and not os.path.exists(name):
        return f"{name} is a link that leads nowhere"
    what = error.strerror or str(error)
    return what if name in (None, str(place)) else f"{what}: {name}"


def remove_parts(folder: Path, stem: str = "") -> None:
    """Removes what killed writers left behind in ``folder``, of files with that ``stem`` if one is given, to which
    nobody may be writing."""
    for path in folder.glob(f"{PART}{stem and f'{stem}-'}*"):
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``. Raises FileNotFoundError, and Damaged unless it holds one of finite numbers
    and without control characters."""
    content = _content(path)
    try:
        if (b"\\" in content or b"\x7f" in content or not content.isascii()) and CONTROL.search(content):
            raise ValueError("control characters")
        found = json.loads(content.decode(), parse_float=_finite, parse_constant=_finite, parse_int=_whole)
        if SURROGATE.search(content):
            json.dumps(found, ensure_ascii=False).encode()  # raises UnicodeEncodeError
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} where an object belongs")
    except (ValueError, RecursionError) as error:
        raise Damaged(path, str(error) if content.strip() else "it is empty") from error
    return found


def read_signed(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path`` without its ``sha256``, which older versions have not written. Raises
    FileNotFoundError, and Damaged also where that is the digest of other content."""
    content = read_json(path)
    if content.pop("sha256", None) not in (None, sha256_json(content)):
        raise Damaged(path, "its digest is that of other content")
    return content


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of numbers with a ``step``, from 0 to LAST_STEP, in a file of JSON lines; none where there is no file.
    Left out are damaged lines and one that is still being written."""
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            row = json.loads(line, parse_int=_whole)
            numbers = isinstance(row, dict) and {*map(type, row.values())} <= {int, float}
            if numbers and 0 <= row.get("step", -1) <= LAST_STEP:
                rows.append(row)
    return rows


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays in the file ``path``, by name. Raises FileNotFoundError, and Damaged where it is not as it was
    written."""
    content = _content(path)
    try:
        with np.load(io.BytesIO(content)) as file:
            return dict(file)
    except (OSError, *UNREADABLE) as error:
        raise Damaged(path, told(error)) from error


def told(error: Exception) -> str:
    """What NumPy said of a file, in one line, but for its advice to trust a stranger's."""
    line = str(error).partition("\n")[0]
    return "it holds something else than arrays" if "pickle" in line else line


def _content(path: Path) -> bytes:
    try:
        if S_ISREG(os.stat(path).st_mode):
            return path.read_bytes()
        raise Damaged(path, "it is not a file")  # reading a pipe would wait for ever
    except FileNotFoundError:
        if os.path.lexists(path):
            raise Damaged(path, "it is not a file but a link that leads nowhere") from None
        raise
    except OSError as error:
        raise Damaged(path, f"it cannot be read ({error.strerror})") from error


def cached(path: Path, make: Callable[[Path], None], read: Callable[[Path], Found]) -> Found:
    """What ``read`` finds in the file ``path``, which ``make`` wrote: now where there is none, and where it is damaged
    once more, of which a line tells. ``read`` raises Damaged, or what numpy does, on a file that is not as it was
    written."""
    from rich.markup import escape

    from .progress import say

    if os.path.lexists(path):
        try:
            if not path.is_file():
                raise Damaged(path, "it is not a file")
            return read(path)
        except (Damaged, *UNREADABLE) as error:
            what = str(error) if isinstance(error, Damaged) else f"{path} is damaged: {told(error)}"
            say(f"[yellow]{escape(what.partition(';')[0])}; it is made again[/]")
    with atomic_path(path) as temporary:
        make(temporary)
    return read(path)


def seal(content: dict[str, Any]) -> str:
    """JSON of ``content`` with a digest of it, for ``unseal``."""
    return json.dumps({"content": content, "sha256": sha256_json(content)}, indent=1, allow_nan=False)


def unseal(path: Path, *names: str) -> dict[str, Any]:
    """What was sealed in the file ``path``, or written without a seal by an older version. Raises Damaged where it is
    not as it was written, or has none of ``names``."""
    stored = read_json(path)
    content = stored.get("content") if "sha256" in stored else stored
    if stored.get("sha256", sha256_json(content)) != sha256_json(content):
        raise Damaged(path, "its digest is that of other content")
    if not isinstance(content, dict):
        raise Damaged(path, "its content is no object")
    if missing := {*names} - content.keys():
        raise Damaged(path, f"it has no {', '.join(sorted(missing))}")
    return content


def unseal_numbers(path: Path, *names: str) -> dict[str, float]:
    """The same, of what is numbers alone; Damaged where anything else is among them."""
    content = unseal(path, *names)
    if others := [name for name, value in content.items() if type(value) not in (int, float)]:
        raise Damaged(path, f"{others[0]} is no number")
    return content


def sha256_json(content: Any) -> str:
    """Hex SHA-256 of ``content``, the same after it was written as JSON and read again."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _whole(text: str) -> int:
    if len(text) > LONGEST:
        raise ValueError(f"a number of {len(text)} characters")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} where a finite number belongs")
    return value


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def named_by_content(path: Path) -> str:
    """What stands for the content of the file ``path``, wherever that lies: ``sha256:`` and 16 digits. Raises OSError
    where there is none."""
    stat = path.stat()
    return _named(path, stat.st_mtime_ns, stat.st_size)


@cache
def _named(path: Path, time: int, size: int) -> str:
    """The same of a file as it was at that time: a study asks for the identity of each of its runs."""
    return f"{DIGEST}{sha256_file(path)[:16]}"


def sha256_arrays(*arrays: np.ndarray) -> str:
    """Hex SHA-256 of the values of contiguous arrays, mapped ones too, and of their shapes, one array after another."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array)
        digest.update(repr(array.shape).encode())
    return digest.hexdigest()
