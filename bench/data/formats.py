"""Images of one's own in tables: arrays of NumPy, Parquet, and data sets of the package ``datasets``."""

import bisect
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.markup import escape

from bench.core.errors import UserError
from bench.core.files import UNREADABLE, told
from bench.core.progress import say

from .sources import SPLITS, VALIDATION_FOLDERS, Source, Split, by_split, decode, divided, needed, stamp, to_pixels

Splits = tuple[Split, Split, Split, str]
LABELS = ("label", "labels", "class", "cls")  # what a column of labels may be called


class Row(NamedTuple):
    """An image of a table; what it is called in messages does not depend on the machine, and so neither do splits."""

    table: str  # its file, or its split
    number: int

    def __str__(self) -> str:
        return f"row {self.number} of {os.path.basename(self.table)}"


def _splits(
    found: dict[str, list[Row]],
    where: str,
    image_size: int,
    read: Callable[[Row], np.ndarray],
    label: Callable[[Row], str],
) -> Splits:
    *parts, how = divided(found, where)
    splits = [Split(rows, read, label) for rows in parts]
    return *splits, f"images, central squares resized to {image_size}×{image_size}, {how}"


def _real(where: str) -> str:
    return os.path.realpath(os.path.expanduser(where))


# --- arrays of NumPy ------------------------------------------------------------------------------------------------


def find_arrays(where: str) -> dict[str, str]:
    """The .npy files of the splits at ``where``, a folder, by split; of a file that one, under an empty name. Raises
    UserError where there are none."""
    path = _real(where)
    if os.path.isfile(path):
        return {"": path}
    found = {split: os.path.join(path, f"{split}.npy") for split in SPLITS}
    found = {split: path for split, path in found.items() if os.path.isfile(path)}
    if "train" not in found or len(found) < 2:
        raise UserError(
            f"no arrays in {path}: name an .npy file, or a folder with train.npy, test.npy and perhaps val.npy"
        )
    return found


def npy_source(where: str, image_size: int) -> Source:
    """The images of arrays (N, H, W, 3) uint8, without labels. Raises UserError for any other array; nothing in a file
    is unpickled."""
    files = find_arrays(where)
    arrays = {path: _array(path) for path in files.values()}

    def read(row: Row) -> np.ndarray:
        return to_pixels(Image.fromarray(np.ascontiguousarray(arrays[row.table][row.number])), image_size)

    found = {split: [Row(path, number) for number in range(len(arrays[path]))] for split, path in files.items()}
    return Source(
        [(path, stamp(path)) for path in files.values()],
        lambda: _splits(found, where, image_size, read, lambda row: ""),
    )


def _array(path: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, *UNREADABLE) as error:
        raise UserError(f"{path} is no array of numbers ({told(error)}); save one with numpy.save") from error
    shape = getattr(array, "shape", ())  # an .npz has none
    if len(shape) != 4 or shape[-1] != 3 or array.dtype != np.uint8 or not all(shape):
        what = f"{getattr(array, 'dtype', 'several arrays')} {'×'.join(map(str, shape))}".strip()
        raise UserError(f"{path} holds {what}; images are one array N×H×W×3 of uint8")
    return array


# --- Parquet --------------------------------------------------------------------------------------------------------


def find_parquet(where: str) -> list[str]:
    """The real paths of the Parquet files at ``where``, a file or a folder, sorted. Raises UserError where there are
    none."""
    path = _real(where)
    found = sorted(str(file) for file in Path(path).rglob("*.parquet")) if os.path.isdir(path) else [path]
    if not found or not os.path.isfile(found[0]):
        raise UserError(f"no Parquet in {path}: name a .parquet file, or a folder of such files")
    return found


def parquet_source(where: str, image_size: int) -> Source:
    """The images of Parquet files, each in the first column of bytes, or of structs with ``bytes`` as on Hugging Face's
    hub, with the labels of a column that is called so. Files belong to splits as ``by_split`` says."""
    paths = find_parquet(where)
    tables = {path: _Parquet(path) for path in paths}

    def read(row: Row) -> np.ndarray:
        return decode(tables[row.table].image(row.number), image_size)

    def opened() -> Splits:
        files = by_split(paths)
        found = {
            split: [Row(path, n) for path in those for n in range(len(tables[path]))] for split, those in files.items()
        }
        return _splits(found, where, image_size, read, lambda row: tables[row.table].label(row.number))

    return Source([where, [(path, stamp(path)) for path in paths]], opened)


class _Parquet:
    """One file, of which a few groups of rows are in memory. Raises UserError where it cannot be read, or has no
    column of images."""

    def __init__(self, path: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self.file = pq.ParquetFile(path, memory_map=True)
            schema = self.file.schema_arrow
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is no Parquet file ({str(error).partition(':')[0]}); name another") from error
        images = [field.name for field in schema if _holds_images(field.type)]
        if not images:
            named = ", ".join(schema.names)
            raise UserError(f"{path} has no column of images, which are bytes, or structs with bytes; it has {named}")
        self.column = images[0]
        self.labels = next((name for name in LABELS if name in schema.names), None)
        groups = [self.file.metadata.row_group(number).num_rows for number in range(self.file.num_row_groups)]
        self.begins = [0, *np.cumsum(groups).tolist()]
        self.lock, self.group = Lock(), lru_cache(maxsize=2)(self._group)

    def __len__(self) -> int:
        return self.begins[-1]

    def _group(self, number: int) -> Any:
        return self.file.read_row_group(number, columns=[self.column, *([self.labels] if self.labels else [])])

    def _cell(self, column: str, row: int) -> Any:
        number = bisect.bisect_right(self.begins, row) - 1
        with self.lock:  # else several threads would read the same group
            group = self.group(number)
        return group.column(column)[row - self.begins[number]].as_py()

    def image(self, row: int) -> bytes:
        """The image file in a row."""
        found = self._cell(self.column, row)
        return found["bytes"] if isinstance(found, dict) else found

    def label(self, row: int) -> str:
        """The label in a row; empty where there is none."""
        found = self._cell(self.labels, row) if self.labels else None
        return "" if found is None else str(found)


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind)


# --- the package datasets -------------------------------------------------------------------------------------------


def check_hub(where: str) -> None:
    """Raises UserError where the package that reads ``where`` is not installed."""
    needed("datasets", "hf:")


def hub_source(where: str, image_size: int) -> Source:
    """The images of a data set of the package ``datasets`` with their labels: a folder that ``save_to_disk`` made or
    that the package can read, or a name on the hub, from where it is downloaded. NAME:SPLIT takes that split alone."""
    check_hub(where)
    name, split = (where, "") if os.path.isdir(_real(where)) or ":" not in where else where.rsplit(":", 1)
    local = os.path.isdir(_real(name))
    name = _real(name) if local else name
    files = sorted(str(path) for path in Path(name).rglob("*") if path.is_file()) if local else []
    return Source([name, split, [(path, stamp(path)) for path in files]], partial(_open_hub, name, split, image_size))


def _open_hub(name: str, split: str, image_size: int) -> Splits:
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # nobody is told what is loaded
    import datasets

    try:
        saved = any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))
        tables = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # network, files, names: it raises nearly every kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"cannot load hf:{name} ({reason}); name a folder or a data set of the hub") from error
    tables = dict(tables) if isinstance(tables, dict) else {"": tables}
    if split and split not in tables:
        raise UserError(f"hf:{name} has no split {split!r}; it has {', '.join(tables)}")
    columns = {known: _hub_columns(name, table) for known, table in tables.items()}
    found = {known: [Row(known, number) for number in range(len(table))] for known, table in tables.items()}

    def read(row: Row) -> np.ndarray:
        cell = columns[row.table][0][row.number]
        content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        return decode(content, image_size)

    def label(row: Row) -> str:
        _, labels, names = columns[row.table]
        value = labels[row.number] if labels is not None else None
        return "" if value in (None, -1) else names[value] if names else str(value)

    return _splits({"": found[split]} if split else _by_name(found), name, image_size, read, label)


def _by_name(found: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """What is ``found`` by the names of the splits here; all that is there, under an empty one, where it is one."""
    named = {"val" if split in VALIDATION_FOLDERS else split: rows for split, rows in found.items()}
    if "train" not in named or len({*named} & {*SPLITS}) < 2:
        return {"": [row for rows in found.values() for row in rows]}
    if others := [split for split in named if split not in SPLITS]:
        say(f"[yellow]left out:[/] {escape(', '.join(others))}, beside the splits")
    return {split: rows for split, rows in named.items() if split in SPLITS}


def _hub_columns(name: str, table: Any) -> tuple[Any, Any, Sequence[str]]:
    """The image files and labels of a ``table``, and the names of labels. Raises UserError where it has no images."""
    import datasets

    images = [column for column, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise UserError(
            f"hf:{name} has no column of images; it has {', '.join(table.features)}; cast one to datasets.Image"
        )
    classes = [column for column, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = next(iter([*classes, *(column for column in LABELS if column in table.features)]), None)
    files = table.cast_column(images[0], datasets.Image(decode=False))[images[0]]
    names = table.features[labels].names if classes else ()
    return files, table[labels] if labels else None, names
