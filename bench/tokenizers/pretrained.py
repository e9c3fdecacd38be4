"""A tokenizer in a folder of its own, laid out as the Hugging Face Hub has models: out of a run, and back from there.

``config.json`` has the settings, the run's id, its protocol and digests; ``model.safetensors`` the weights that were
scored. What is read may come from anybody: nothing of it is executed, and every part is checked before the next.
"""

import json
import os
import re
import textwrap
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.core.errors import Damaged, UserError
from bench.core.files import atomic_path, read_signed, sha256_file, sha256_json
from bench.core.runs import Run
from bench.core.settings import check_values

from .config import Config

FORMAT = 1  # of config.json
SETTINGS, WEIGHTS = "config.json", "model.safetensors"
ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # what a model there is called
AGAIN = "export the run again: python -m bench.export RUN --to DIR"


def write(run: Run, weights: Path, folder: Path) -> None:
    """Writes what ``read`` reads into ``folder``: of the finished ``run`` its settings, of a folder of images the last
    name and not where it lies, and the file of its ``weights``."""
    config, protocol = run.settings(Config), run.protocol()
    with atomic_path(folder / WEIGHTS) as temporary:
        temporary.write_bytes(weights.read_bytes())
    content = {
        "format": FORMAT,
        "library_name": "vqbench",
        "run": run.folder.resolve().name,
        "protocol": {**protocol, "data": unplaced(protocol["data"])},
        "config": {**asdict(config), "data": unplaced(config.data)},
        "files": {WEIGHTS: sha256_file(folder / WEIGHTS)},
    }
    with atomic_path(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps({**content, "sha256": sha256_json(content)}, indent=1, allow_nan=False))


def unplaced(data: str) -> str:
    """``data``, of folder:PATH the last name alone: where it lies is nobody's business."""
    kind, colon, path = data.partition(":")
    return kind + colon + Path(path).name


def read(folder: Path) -> tuple[Config, Path]:
    """Settings and the file of weights of the tokenizer that ``folder`` holds. Raises UserError where either is missing
    or not what ``write`` wrote."""
    stored = content(folder)
    config, weights, known = stored.get("config"), folder / WEIGHTS, stored.get("files")
    if not isinstance(config, dict) or not isinstance(known, dict):
        raise UserError(f"{folder / SETTINGS} has no config and files; {AGAIN}")
    if unknown := config.keys() - {field.name for field in fields(Config)}:
        told = f"{folder / SETTINGS} has the setting {min(unknown)!r}, which this version does not know"
        raise UserError(f"{told}; install the version of vqbench that wrote it")
    try:
        settings = Config(**config)
        check_values(settings)
    except (TypeError, UserError) as error:  # a setting without a default is missing, or a value is wrong
        raise UserError(f"{folder / SETTINGS} holds no settings of a tokenizer ({error}); {AGAIN}") from error
    if not weights.is_file():
        raise UserError(f"{weights} {'is no file' if os.path.lexists(weights) else 'is missing'}; {AGAIN}")
    if sha256_file(weights) != known.get(WEIGHTS):
        raise UserError(f"{weights} holds other weights than its config.json was written for; {AGAIN}")
    return settings, weights


def content(folder: Path) -> dict[str, Any]:
    """What config.json of the export in ``folder`` says. Raises UserError where there is none."""
    path = folder / SETTINGS
    try:
        stored = read_signed(path)
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no exported tokenizer (no {SETTINGS}); {AGAIN}") from error
    except Damaged as error:
        raise UserError(f"{str(error).partition(';')[0]}; {AGAIN}") from error
    if stored.get("library_name") != "vqbench":
        raise UserError(f"{path} is not of a tokenizer that bench.export wrote; name one that it did")
    if stored.get("format") != FORMAT:
        told = f"{path} is of format {stored.get('format')!r}, and this version of vqbench reads {FORMAT}"
        raise UserError(f"{told}; install the one that wrote it")
    return stored


def located(source: str | Path) -> Path:
    """The folder ``source``, or that into which the model of this name on the Hub was fetched, with the user's token if
    there is one. Raises UserError where there is neither."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not ON_THE_HUB.fullmatch(str(source)):
        raise UserError(f"there is no folder {source}; name one that bench.export made, or USER/NAME of the Hub")
    fetch = the_hub(f"there is no folder {source}, and to look for it on the Hub").hf_hub_download
    try:
        fetch(str(source), WEIGHTS)
        return Path(fetch(str(source), SETTINGS)).parent
    except Exception as error:  # its clients raise what they like
        told = f"there is no folder {source}, and the Hub does not give it ({in_a_line(error)})"
        raise UserError(f"{told}; name a folder, or log in with hf auth login if it is private") from error


def the_hub(wish: str) -> ModuleType:
    """huggingface_hub, which ``wish`` needs. Raises UserError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{wish} takes a package; pip install 'vqbench[hub]'") from error
    return huggingface_hub


def in_a_line(error: Exception) -> str:
    """What a client of the Hub said, in one line of bounded length."""
    return textwrap.shorten(str(error) or type(error).__name__, 160)
