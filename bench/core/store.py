"""The run store: one folder per run, files are the truth.

A tokenizer's folder, ``results/runs/<run_id>/``, holds config.json, history.jsonl, metrics.json (written last: its
presence *means* finished), tokenizer.safetensors, per_image.npz (scores of every validation image), samples.npz (a few
images and their reconstructions, uint8) and two pictures; log.txt if a study ran it; while it trains a checkpoint;
failure.json if it failed. A prior's, ``results/priors/<run_id>/``, is laid out alike. JSON has a digest beside it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from .errors import Damaged, UserError
from .files import UNREADABLE, atomic_path, read_json, read_rows, sha256_json
from .progress import printable
from .settings import check_values

# How a run can end without scores.
FAILURES = {
    "diverged": "a loss or gradient was not finite",
    "crashed": "an error that is not the settings' fault, or a signal",
    "out_of_memory": "the memory of the machine or the GPU did not suffice",
    "timed_out": "training took longer than allowed",
    "refused": "the settings cannot work",
    "pruned": "a search gave it up early, being worse than others at the same step",
    "damaged": "a file of it does not hold what was written there",
}


RENAMED = {"copies": "copy_rate"}  # metrics that older runs were written with
LARGEST = 2**24  # codebook_size, and far beyond any grid_size
LISTED = 8  # run ids that a message names
STUDY = {"kind": str, "sweep": list, "metrics": list, "runs": dict}  # what its file says
BOTH_SIDES = (("params", "params_encoder", "params_decoder"), ("flops", "flops_encode", "flops_decode"))


class NoSpace(UserError):
    """Runs cannot be written here: nothing to do with the run itself."""


class Changed(UserError):
    """What a run or a study is trained on is not what it was: nothing to do with the settings of the run."""


class Busy(UserError):
    """Another process is working on the run."""


Settings = TypeVar("Settings")


class Identity(Protocol):
    """A config, as far as the store is concerned: the subfolder that its runs lie in, and the name of its own."""

    SHELF: ClassVar[str]

    def run_id(self) -> str:
        """Equal for equal configs, and different for different ones."""
        ...


@dataclass(frozen=True)
class Run:
    """One run folder. Reading a file that is not there yet raises OSError; one that is damaged, Damaged."""

    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the run was trained and scored to the end."""
        return self.status == "finished"

    @property
    def status(self) -> str:
        """finished, unfinished, or why it failed: a key of FAILURES."""
        return self.ending()[0]

    @property
    def reason(self) -> str:
        """Why the run failed, in one sentence; empty when it did not."""
        return self.ending()[1]

    def ending(self) -> tuple[str, str]:
        """``status`` and ``reason``."""
        try:
            if os.path.lexists(self.folder / "config.json"):
                self._read("config.json", "config", "environment")
            if os.path.lexists(self.folder / "metrics.json"):
                self._scores()
                return "finished", ""
            if os.path.lexists(self.folder / "failure.json"):
                failure = self._read("failure.json")
                told = all(isinstance(failure.get(name), str) for name in ("status", "reason"))
                if not told or failure["status"] in ("finished", "unfinished"):
                    raise Damaged(self.folder / "failure.json", "it tells no status and reason")
                return failure["status"], failure["reason"]
            return "unfinished", ""
        except Damaged as error:
            return "damaged", str(error)

    def fail(self, status: str, reason: str) -> None:
        """Records why the run failed; ``status`` is a key of FAILURES."""
        self.seal("failure.json", {"status": status, "reason": printable(reason)})

    def forgive(self) -> None:
        """Takes a recorded failure back."""
        (self.folder / "failure.json").unlink(missing_ok=True)

    def config(self) -> dict[str, Any]:
        """The run's Config as a dict."""
        return self._read("config.json", "config")["config"]

    def codes(self) -> dict[str, Any]:
        """Of a prior: ``codebook_size``, ``grid_size`` and ``classes`` of what it is a prior over."""
        codes, path = self._read("config.json", "codes")["codes"], self.folder / "config.json"
        for name in ("codebook_size", "grid_size"):
            if type(codes.get(name)) is not int or not 0 < codes[name] <= LARGEST:
                raise Damaged(path, f"the {name} of its codes is {codes.get(name)!r}")
        if not isinstance(codes.get("classes"), list):
            raise Damaged(path, "its codes have no classes")
        return codes

    def tokenizer(self) -> dict[str, Any]:
        """Of a prior: the Config of its tokenizer as a dict; empty when it failed before it could read that."""
        tokenizer = self._read("config.json").get("tokenizer", {})
        if not isinstance(tokenizer, dict):
            raise Damaged(self.folder / "config.json", "its tokenizer is no object")
        return tokenizer

    def settings(self, kind: type[Settings]) -> Settings:
        """``config`` as Config or PriorConfig; a field that the run was made without has its default. Raises Damaged
        where a value cannot be that of its field."""
        stored = self.config()
        try:
            settings = kind(**{field.name: stored[field.name] for field in fields(kind) if field.name in stored})
            check_values(settings)
        except (TypeError, UserError) as error:  # a field that has no default is missing, or a value is wrong
            raise Damaged(self.folder / "config.json", str(error)) from error
        return settings

    def trained_on(self) -> str | None:
        """Digest of the images, or of a prior the tokenizer, that the run is made from; None of an older one."""
        stored = self._read("config.json").get("trained_on")
        return stored if isinstance(stored, str) else None

    def fingerprint(self, data: str, image_size: int) -> str | None:
        """That of the images of a tokenizer's run, where it has begun and they are ``data`` of that size."""
        with suppress(OSError, Damaged):
            config = self.config()
            if (config.get("data"), config.get("image_size")) == (data, image_size):
                return self.trained_on() or self.protocol().get("fingerprint")
        return None

    def environment(self) -> dict[str, Any]:
        """Versions, commit and machine that the run was made with, or last went on with."""
        return self.environments()[-1]

    def environments(self) -> list[dict[str, Any]]:
        """The same of all parts of its training, each of which went on with another, oldest first."""
        stored = self._read("config.json", "environment")
        earlier = stored.get("earlier", [])
        every = [*earlier, stored["environment"]] if isinstance(earlier, list) else [earlier]
        if not all(isinstance(one, dict) and isinstance(one.get("versions", {}), dict) for one in every):
            raise Damaged(self.folder / "config.json", "its environments are none")
        return every

    def metrics(self) -> dict[str, Any]:
        """The scores, costs and reference scores of a finished run, by their present names; a tokenizer's ``params``
        and ``flops`` are of both sides."""
        return self._scores()[0]

    def protocol(self) -> dict[str, Any]:
        """How the scores were measured."""
        return self._scores()[1]

    def weights(self) -> dict[str, str]:
        """SHA-256 of each file of weights that a finished run was scored with; none of older ones."""
        stored = self._read("metrics.json").get("weights", {})
        return stored if isinstance(stored, dict) else {}

    def _scores(self) -> tuple[dict[str, Any], dict[str, Any]]:
        stored, path = self._read("metrics.json", "metrics", "protocol"), self.folder / "metrics.json"
        metrics = {RENAMED.get(name, name): value for name, value in stored["metrics"].items()}
        for name, value in metrics.items():
            if value is not None and type(value) not in (int, float):
                raise Damaged(path, f"{name} is {value!r}, which is no number")
        if any(isinstance(value, (list, dict)) for value in stored["protocol"].values()):
            raise Damaged(path, "its protocol has lists")
        if "params_encoder" in metrics:
            for both, first, second in BOTH_SIDES:
                if metrics.get(first) is None or metrics.get(second) is None:
                    raise Damaged(path, f"it has no {first} or no {second}")
                metrics[both] = metrics[first] + metrics[second]
        return metrics, stored["protocol"]

    def history(self) -> list[dict[str, float]]:
        """One row of numbers per logged step; none before the first. A damaged line is left out."""
        return read_rows(self.folder / "history.jsonl")

    def per_image(self) -> dict[str, np.ndarray]:
        """Scores of every validation image, (N,) each; none when the file is missing or damaged."""
        path = self.folder / "per_image.npz"
        if not path.is_file():
            return {}
        try:
            with np.load(path) as file:
                scores = dict(file)
        except (OSError, *UNREADABLE):
            return {}
        alike = {(column.shape, column.dtype.kind) for column in scores.values()}
        return scores if len(alike) == 1 and all(len(shape) == 1 and kind == "f" for shape, kind in alike) else {}

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file into the folder, atomically."""
        with atomic_path(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False))

    def seal(self, name: str, content: dict[str, Any]) -> None:
        """The same with a digest beside ``content``, by which any other number in it is noticed."""
        self.write(name, {**content, "sha256": sha256_json(content)})

    def _read(self, name: str, *parts: str) -> dict[str, Any]:
        """The file ``name``, sealed or of an older version, in which each of ``parts`` is an object."""
        content = read_json(self.folder / name)
        if content.pop("sha256", None) not in (None, sha256_json(content)):
            raise Damaged(self.folder / name, "its digest is that of other content")
        for part in parts:
            if not isinstance(content.get(part), dict):
                raise Damaged(self.folder / name, f"it has no {part}")
        return content

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process. Raises Busy when another one has it."""
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise Busy(f"another process is working on {self.folder}; wait until it is done") from error
        try:
            yield
        finally:
            lock.release()


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
        return Run(self.root / shelf / run_id)

    def runs(self) -> list[Run]:
        """Every tokenizer that has been started, by name: each folder with a config.json, damaged or not."""
        return [Run(path.parent) for path in sorted(self.root.glob("runs/*/config.json"))]

    def priors(self) -> list[Run]:
        """Every prior that has been started, by name."""
        return [Run(path.parent) for path in sorted(self.root.glob("priors/*/config.json"))]

    def find(self, name: str) -> Run:
        """The run that ``name`` means: a run folder, a tokenizer's id, or the beginning of one id only. Raises
        UserError when there is none or several."""
        if (Path(name) / "config.json").is_file():
            return Run(Path(name))
        runs = [run for run in self.runs() if run.folder.name.startswith(name)]
        exact = [run for run in runs if run.folder.name == name]
        if len(exact or runs) == 1:
            return (exact or runs)[0]
        if runs:
            raise UserError(f"{name!r} is the beginning of {_some([run.folder.name for run in runs])}; give more of it")
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
        → prior and the same of its tokenizer). Raises UserError on an unknown name, and Damaged.
        """
        path = self.root / "studies" / f"{name}.json"
        if name not in self.studies():
            known = ", ".join(self.studies()) or "none yet; start one with python -m studies.beta"
            raise UserError(f"there is no study {name!r} in {self.root}; known studies: {known}")
        study = read_json(path)
        for part, kind in STUDY.items():
            if type(study.get(part)) is not kind:
                raise Damaged(path, f"it does not tell the {part} of the study")
        if not study["metrics"] or not all(isinstance(name, str) for name in study["metrics"] + study["sweep"]):
            raise Damaged(path, "its metrics and what it sweeps are no names")
        if not isinstance(study.get("priors", {}), dict):
            raise Damaged(path, "it does not tell the priors of the study")
        for run_id, row in {**study["runs"], **study.get("priors", {})}.items():
            plain = isinstance(row, dict) and not any(isinstance(value, (list, dict)) for value in row.values())
            if not plain or Path(run_id).name != run_id or run_id in ("", ".."):
                raise Damaged(path, f"{run_id!r} is no run with its settings")
        return study

    def extend_study(
        self, name: str, header: dict[str, Any], runs: dict[str, dict[str, Any]], shelf: str = "runs"
    ) -> None:
        """Adds ``runs``, or those of another ``shelf``, to a study, creating it with ``header``; several processes may
        do so at once. What other versions of the code have written there besides is kept."""
        path = self.root / "studies" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            before = self.study(name) if path.exists() else {}
            shelves = {key: before[key] for key in ("runs", "priors") if key in before}
            shelves = {"runs": {}, **shelves, shelf: {**shelves.get(shelf, {}), **runs}}
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps({**before, "name": name, **header, **shelves}, indent=1))

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
        """Raises NoSpace unless runs can be written here and ``megabytes`` are free."""
        folder = self.root / "runs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            free = shutil.disk_usage(folder).free >> 20
        except OSError as error:
            raise NoSpace(f"cannot write to {folder}: {error.strerror}; choose another --results folder") from error
        if free < megabytes:
            raise NoSpace(f"{folder} has {free} MB free and the run needs {megabytes}; free some or change --results")


def check_whole(run: Run) -> None:
    """Raises UserError where a file of ``run`` is damaged: somebody has to look before anything is overwritten."""
    status, reason = run.ending()
    if status == "damaged":
        raise UserError(reason)


def check_finished(run: Run) -> None:
    """Raises UserError unless ``run`` is finished."""
    check_whole(run)
    if not run.finished:
        raise UserError(f"{run.folder} holds no finished run (no metrics.json); train one with python -m bench.run")


def find_tokenizer(name: str, results: Path) -> Run:
    """The finished tokenizer that ``name`` means to ``Store.find``. Raises UserError when there is none."""
    run = Store(results).find(name)
    run = Run(run.folder.resolve())
    if run.folder.parent.name == "priors":
        raise UserError(f"{name} is the run of a prior; name that of a tokenizer: {known_tokenizers(results)}")
    check_whole(run)
    if not run.finished:
        raise UserError(f"the tokenizer run {run.folder} is {run.status}; finish it with python -m bench.run first")
    if not (run.folder / "tokenizer.safetensors").is_file():
        raise UserError(f"{run.folder} has lost its tokenizer.safetensors; move that folder and train it again")
    return run


def known_tokenizers(results: Path) -> str:
    """Which finished tokenizers ``results`` has, for a message."""
    names = [run.folder.name for run in Store(results).runs() if run.finished]
    return f"{results} has {_some(names)}" if names else f"{results} has none; train one with python -m bench.run"


def _some(names: list[str]) -> str:
    return ", ".join([*names[:LISTED], *(["..."] if len(names) > LISTED else [])]) or "none"
