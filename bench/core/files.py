"""The cache folder, atomic writes, digests."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Folder for decoded data and pretrained weights: ``$VQBENCH_CACHE`` or the user's own; it may not exist yet."""
    return Path(os.environ.get("VQBENCH_CACHE") or platformdirs.user_cache_dir("vqbench"))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; on success it is flushed to disk and renamed to ``path``.

    A reader sees the old file or the whole new one, never a part, also after a crash or a full disk.
    Works for any writer that takes a path. Creates the parent folder. Raises OSError as the writer does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; results are for everyone the umask allows
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
