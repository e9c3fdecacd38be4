"""The run store: one folder per run, and the studies that runs belong to."""

import errno
import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from .errors import Damaged, UserError
from .files import atomic_path, read_signed, reason, sha256_json
from .runs import Changed, Identity, NoSpace, Run, check_whole

LISTED = 8  # run ids that a message names
STUDY = {"kind": str, "sweep": list, "metrics": list, "runs": dict}  # what its file says


class Store:
    """All runs below ``root`` (``results`` by default): tokenizers in ``runs/``, priors in ``priors/``; in ``studies/``
    the studies they belong to."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def run(self, config: Identity) -> Run:
        """The folder of ``config``, whether it exists yet or not."""
        return Run(self.root / config.SHELF / config.run_id())

    def named(self, run_id: str, shelf: str = "runs") -> Run:
        """The folder of the tokenizer (or, on the shelf ``priors``, of the prior) that goes by ``run_id``, whether it
        exists yet or not."""
        return Run(self.root / f"{shelf}/{run_id}")

    def runs(self) -> list[Run]:
        """Every tokenizer that has been started, by name, damaged or not."""
        return self._started("runs")

    def priors(self) -> list[Run]:
        """Every prior that has been started, by name."""
        return self._started("priors")

    def _started(self, shelf: str) -> list[Run]:
        folder = self.root / shelf
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        return [run for run in (Run(folder / name) for name in names) if run.started]

    def find(self, name: str) -> Run:
        """The run that ``name`` means: a run folder, a tokenizer's id, or the beginning of one id only. Raises
        UserError when there is none or several."""
        if (Path(name) / "config.json").is_file():
            return Run(Path(name))
        head = name.rstrip("/") or name  # as a shell completes the name of a folder
        runs = [run for run in self.runs() if run.folder.name.startswith(head)]
        exact = [run for run in runs if run.folder.name == head]
        if len(exact or runs) == 1:
            return (exact or runs)[0]
        if runs:
            known = _some([f"{run.folder.name} ({run.status})" for run in runs[: LISTED + 1]])
            raise UserError(f"{name!r} is the beginning of {known}; give more of it")
        for folder in (Path(name), self.named(name).folder):
            if folder.is_dir():
                raise UserError(f"{folder} has no config.json, so it is no run; name a folder like results/runs/RUN_ID")
        known = _some([run.folder.name for run in self.runs()])
        raise UserError(f"unknown run {name!r}; below {self.root / 'runs'} there are {known}")

    def studies(self) -> list[str]:
        """Names of all studies that have been planned here."""
        return sorted(path.stem for path in self.root.glob("studies/[!.]*.json"))  # no half-written ones

    def study(self, name: str) -> dict[str, Any]:
        """What a study consists of: ``name``, ``kind`` (ablation or search), ``sweep`` (Config fields), ``metrics``,
        ``runs`` (run_id → backbone, seed and the values of the swept fields) and, where it has any, ``priors`` (run_id
        → prior and the same of its tokenizer, be that among ``runs`` or ``confirmed``) and ``confirmed`` (runs that
        confirm a search, with their role). Raises UserError on an unknown name, and Damaged.
        """
        path = self.root / "studies" / f"{name}.json"
        if name not in self.studies():
            known = ", ".join(self.studies()) or "none yet; start one with python -m studies.beta"
            raise UserError(f"there is no study {name!r} in {self.root}; known studies: {known}")
        study = read_signed(path)
        for part, kind in STUDY.items():
            if type(study.get(part)) is not kind:
                raise Damaged(path, f"it does not tell the {part} of the study")
        if not study["metrics"] or not all(isinstance(name, str) for name in study["metrics"] + study["sweep"]):
            raise Damaged(path, "its metrics and what it sweeps are no names")
        more = {part: study.get(part, {}) for part in ("priors", "confirmed")}
        for part, rows in more.items():
            if not isinstance(rows, dict):
                raise Damaged(path, f"it does not tell the {part} of the study")
        for run_id, row in {**study["runs"], **more["priors"], **more["confirmed"]}.items():
            plain = isinstance(row, dict) and not any(isinstance(value, (list, dict)) for value in row.values())
            if not plain or os.path.basename(run_id) != run_id or run_id in ("", ".", ".."):
                raise Damaged(path, f"{run_id!r} is no run with its settings")
        return study

    def extend_study(
        self, name: str, header: dict[str, Any], runs: dict[str, dict[str, Any]], shelf: str = "runs"
    ) -> None:
        """Adds ``runs`` to the part ``shelf`` of a study, creating it with ``header``; several processes may do so at
        once. What other versions of the code have written there besides is kept."""
        path = self.root / "studies" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            before = self.study(name) if os.path.lexists(path) else {"runs": {}}
            content = {**before, "name": name, **header, shelf: {**before.get(shelf, {}), **runs}}
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps({**content, "sha256": sha256_json(content)}, indent=1))

    def check_images(self, run: Run, data: str, image_size: int, fingerprint: str) -> None:
        """Raises Changed where a study that ``run`` belongs to has begun on ``data`` with another ``fingerprint``:
        what is compared was trained on the same images."""
        for name in self.studies():
            try:
                runs = self.study(name)["runs"]
            except Damaged:  # which whoever runs that study is told
                continue
            others = runs.keys() - {run.folder.name} if run.folder.name in runs else ()
            known = (self.named(run_id).fingerprint(data, image_size) for run_id in others)
            if (first := next(filter(None, known), fingerprint)) != fingerprint:
                raise Changed(
                    f"{data} has other images now (fingerprint {fingerprint[:16]}) than when study {name} began "
                    f"({first[:16]}); put those back, or start again with another --results"
                )

    def check_writable(self, megabytes: int) -> None:
        """Raises NoSpace unless runs can be written here and ``megabytes`` are free. Makes no folder."""
        folder = self.root / "runs"
        place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        try:
            if not place.is_dir():
                number = errno.EEXIST if place == folder else errno.ENOTDIR
                raise OSError(number, os.strerror(number), str(place))
            with tempfile.TemporaryFile(dir=place):
                pass
            free = shutil.disk_usage(place).free >> 20
        except OSError as error:
            what = f"cannot write to {folder}: {reason(error, folder)}"
            raise NoSpace(f"{what}; choose another --results folder") from error
        if free < megabytes:
            raise NoSpace(f"{folder} has {free} MB free and the run needs {megabytes}; free some or change --results")


def find_tokenizer(name: str, results: Path) -> Run:
    """The finished tokenizer that ``name`` means to ``Store.find``. Raises UserError when there is none."""
    run = Store(results).find(name)
    run = Run(run.folder.resolve())
    if run.folder.parent.name == "priors":
        raise UserError(f"{name} is the run of a prior; name that of a tokenizer: {known_tokenizers(results)}")
    check_whole(run)
    if not run.finished:
        recipe, words = run.folder / "config.toml", ["python", "-m", "bench.run"]
        if recipe.is_file():  # older runs have none
            words += ["--config", str(recipe), "--results", str(run.folder.parent.parent)]
        raise UserError(f"the tokenizer run {run.folder} is {run.status}; finish it with {shlex.join(words)} first")
    if run.elsewhere:
        raise UserError(f"{run.folder} was trained elsewhere, and its scores alone are here; name a tokenizer of ours")
    if not (run.folder / "tokenizer.safetensors").is_file():
        raise UserError(f"{run.folder} has lost its tokenizer.safetensors; move that folder and train it again")
    return run


def known_tokenizers(results: Path) -> str:
    """Which finished tokenizers ``results`` has, for a message."""
    names = [run.folder.name for run in Store(results).runs() if run.finished]
    return f"{results} has {_some(names)}" if names else f"{results} has none; train one with python -m bench.run"


def _some(names: list[str]) -> str:
    return ", ".join([*names[:LISTED], *(["..."] if len(names) > LISTED else [])]) or "none"
