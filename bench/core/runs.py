"""One run: a folder whose files are the truth.

A tokenizer's folder, ``results/runs/<run_id>/``, holds config.json, history.jsonl, metrics.json (written last: its
presence *means* finished), tokenizer.safetensors, per_image.npz (scores of every image that was scored), samples.npz (a
few images and their reconstructions, uint8), untrained.npz (those of the weights that training starts from) and two
pictures; what instruments found in instruments.json, with their pictures; log.txt if a study ran it; while it trains a
checkpoint; failure.json if it failed. A prior's, ``results/priors/<run_id>/``, is laid out alike. JSON has a digest
beside it, and metrics.json those of the files in KEPT.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from .errors import Copied, Damaged, UserError
from .files import atomic_path, read_arrays, read_rows, read_signed, sha256_file, sha256_json
from .settings import HUGE, check_values
from .text import printable

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


HELD_OUT = {"test": "test", "val": "validation"}  # splits that runs are scored on, and what they are called
RENAMED = {"copies": "copy_rate"}  # metrics that older runs were written with
KEPT = ("*.safetensors", "*.npz", "history.jsonl")  # files of a finished run that are read again
ROUNDING = 1e-6  # of a mean, whoever sums
LARGEST = 2**24  # codebook_size, and far beyond the sides of any grid
BOTH_SIDES = (("params", "params_encoder", "params_decoder"), ("flops", "flops_encode", "flops_decode"))
# By the folder that a finished run lies in: metrics and parts of its protocol that every version has written.
SCORED = {
    "runs": (*(side for _, *sides in BOTH_SIDES for side in sides), "tokens", "bits_per_image", "psnr", "perplexity"),
    "priors": (
        *("coded_bits_per_token", "coded_bits_per_image", "coded_bits_per_pixel", "coded_bits_per_token_independent"),
        *("gfid_vgg16", "nearest_train_psnr", "nearest_val_psnr", "sampling_speedup", "params_prior", "train_seconds"),
    ),
}
# Of them, by quantizer, what latents that are no codes cannot have.
UNDEFINED = {"none": ("tokens", "bits_per_image", "perplexity"), "kl": ("tokens", "perplexity")}
NUMBERS = {
    "runs": ("count", "image_size", "skipped"),
    "priors": ("count", "image_size", "samples", "temperature", "top_k"),
}
TOLD = ("version", "data", "fingerprint", "split", "rounding", "precision", "extractor_vgg16", "extractor_inception")


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

    def snapshot(self) -> "Run":
        """The same run as its files are now: each of them is read once, whatever is asked."""
        return _Snapshot(self.folder)

    @property
    def started(self) -> bool:
        """Whether there is a run: its settings, or what is left of one that has lost them."""
        return any(map(self._has, ("config.json", "metrics.json")))

    @property
    def elsewhere(self) -> bool:
        """Whether it was trained elsewhere, and only scored here."""
        return self.config().get("trained") == "elsewhere"

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
            if begun := self._has("config.json"):
                self._read("config.json", "config", "environment")
            if self._has("metrics.json"):
                self._scores()
                if not begun:
                    raise Damaged(self.folder / "config.json", "it is gone, and its scores are there")
                return "finished", ""
            if self._has("failure.json"):
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
        """Of a prior: ``codebook_size``, ``grid`` (rows, columns) and ``classes`` of what it is a prior over."""
        codes, path = self._read("config.json", "codes")["codes"], self.folder / "config.json"
        size, grid = codes.get("codebook_size"), codes.get("grid", [codes.get("grid_size")] * 2)  # as in older runs
        if not _is_size(size):
            raise Damaged(path, f"the codebook_size of its codes is {size!r}")
        if not isinstance(grid, list) or len(grid) != 2 or not all(map(_is_size, grid)):
            raise Damaged(path, f"the grid of its codes is {grid!r}")
        if not isinstance(codes.get("classes"), list):
            raise Damaged(path, "its codes have no classes")
        return {"codebook_size": size, "grid": tuple(grid), "classes": codes["classes"]}

    def tokenizer(self) -> dict[str, Any]:
        """Of a prior: the Config of its tokenizer as a dict; empty when it failed before it could read that."""
        tokenizer = self._read("config.json").get("tokenizer", {})
        if not isinstance(tokenizer, dict):
            raise Damaged(self.folder / "config.json", "its tokenizer is no object")
        return tokenizer

    def settings(self, kind: type[Settings], part: str = "config") -> Settings:
        """``config`` as Config or PriorConfig, or the ``tokenizer`` of a prior as Config; a field that the run was made
        without has its default. Raises Damaged where a value cannot be that of its field."""
        stored = self._read("config.json", part)[part]
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
        """The scores, costs and reference scores that a finished run has, by their present names; a tokenizer's
        ``params`` and ``flops`` are of both sides."""
        return self._scores()[0]

    def protocol(self) -> dict[str, Any]:
        """How the scores were measured."""
        return self._scores()[1]

    def digests(self) -> dict[str, str]:
        """SHA-256 by name of the files that a finished run ended with, see KEPT; of older ones of weights, or none."""
        stored = self._read("metrics.json") if self._has("metrics.json") else {}
        stored = stored.get("files", stored.get("weights", {}))
        return stored if isinstance(stored, dict) else {}

    def check_file(self, name: str) -> None:
        """Raises Damaged where the file ``name``, if it is there, is not the one that the finished run ended with."""
        path = self.folder / name
        if not self._has(name) or (known := self.digests().get(name)) is None:
            return
        if not path.is_file():
            raise Damaged(path, "it is not a file")
        try:
            found = sha256_file(path)
        except OSError as error:
            raise Damaged(path, f"it cannot be read ({error.strerror})") from error
        if found != known:
            raise Damaged(path, "its digest is that of another file" if path.stat().st_size else "it is empty")

    def altered(self) -> list[str]:
        """A sentence on each file, but for weights, that is gone or not the one that the finished run ended with."""
        sentences = []
        for name in self.digests():
            if not name.endswith(".safetensors"):
                if not os.path.lexists(self.folder / name):
                    sentences.append(f"{self.folder / name} is gone, and what shows it does without")
                try:
                    self.check_file(name)
                except Damaged as error:
                    sentences.append(str(error))
        return sentences

    def _scores(self) -> tuple[dict[str, Any], dict[str, Any]]:
        stored, path = self._read("metrics.json", "metrics", "protocol"), self.folder / "metrics.json"
        metrics = {RENAMED.get(name, name): value for name, value in stored["metrics"].items() if value is not None}
        protocol = {"scored_on": "val", **stored["protocol"]}  # as versions before 3 were, which did not say so
        shelf = self.folder.absolute().parent.name
        for name, value in metrics.items():
            if type(value) not in (int, float) or abs(value) > HUGE:
                raise Damaged(path, f"{name} is {value!r}, which is no number of use")
        if missing := [name for name in SCORED.get(shelf, ()) if name not in metrics]:
            undefined = UNDEFINED.get(str(self.config().get("quantizer")), ()) if shelf == "runs" else ()
            if missing := [name for name in missing if name not in undefined and not self._may_lack(name)]:
                raise Damaged(path, f"it has no {missing[0]}")
        if any(isinstance(value, (list, dict)) for value in protocol.values()):
            raise Damaged(path, "its protocol has lists")
        if protocol["scored_on"] not in HELD_OUT:
            raise Damaged(path, f"its scored_on is {protocol['scored_on']!r}, which is no split")
        if missing := [name for name in TOLD if shelf in SCORED and name not in protocol]:
            raise Damaged(path, f"its protocol has no {missing[0]}")
        if missing := [name for name in NUMBERS.get(shelf, ()) if type(protocol.get(name)) not in (int, float)]:
            raise Damaged(path, f"its protocol has no {missing[0]}")
        for both, first, second in BOTH_SIDES:
            if first in metrics and second in metrics:
                metrics[both] = metrics[first] + metrics[second]
        return metrics, protocol

    def _may_lack(self, name: str) -> bool:
        """Whether a run may lack the metric ``name``, which it cannot where it was trained elsewhere."""
        return self.elsewhere and name != "psnr"

    def instruments(self) -> dict[str, dict[str, Any]]:
        """What instruments found with the weights that the run was scored with: by name ``version``, ``seconds``,
        ``weights`` (their digest) and ``metrics``; none where no instrument has looked at it."""
        path = self.folder / "instruments.json"
        if not os.path.lexists(path):
            return {}
        found = self._read("instruments.json", "instruments")["instruments"]
        for name, reading in found.items():
            metrics = reading.get("metrics") if isinstance(reading, dict) else None
            if not isinstance(metrics, dict) or not isinstance(reading.get("weights"), str):
                raise Damaged(path, f"what {name} found is not there")
            if wrong := [key for key, read in metrics.items() if type(read) not in (int, float) or abs(read) > HUGE]:
                raise Damaged(path, f"{wrong[0]} is {metrics[wrong[0]]!r}, which is no number of use")
        scored = set(self.digests().values())  # older runs have none
        return {name: reading for name, reading in found.items() if not scored or reading["weights"] in scored}

    def history(self) -> list[dict[str, float]]:
        """One row of numbers per logged step; none before the first, and none when the file is not that of the
        finished run. A damaged line is left out."""
        try:
            self.check_file("history.jsonl")
        except Damaged:
            return []
        return read_rows(self.folder / "history.jsonl")

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What the file ``name`` has by name. Raises FileNotFoundError, and Damaged where it is not as it was written
        or, in a finished run, another."""
        self.check_file(name)
        return read_arrays(self.folder / name)

    def per_image(self) -> dict[str, np.ndarray]:
        """Of a finished run the scores of every scored image, (N,) each; none when the file is missing, damaged or
        of another run."""
        try:
            metrics, protocol = self._scores()
            return self.scores_of_images(protocol.get("count"), metrics)
        except (FileNotFoundError, Damaged):
            return {}

    def scores_of_images(self, count: float, means: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The same of a run that was scored on ``count`` images, with ``means``. Raises Damaged where the file has
        others."""
        path = self.folder / "per_image.npz"
        scores = self.arrays(path.name)
        if {column.shape if column.dtype.kind == "f" else None for column in scores.values()} != {(count,)}:
            raise Damaged(path, f"it has no scores of {count} images")
        for name, column in scores.items():
            mean = float(column.mean(dtype=np.float64))
            if name in means and not math.isclose(mean, means[name], rel_tol=ROUNDING, abs_tol=ROUNDING):
                raise Damaged(path, f"its mean {name} is {mean:g} and that of the run {means[name]:g}")
        return scores

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file into the folder, atomically."""
        with atomic_path(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False))

    def seal(self, name: str, content: dict[str, Any]) -> None:
        """The same with the run's id and a digest of it all, by which any other number, or run, is noticed."""
        bound = {**content, "run": self.folder.name}
        self.write(name, {**bound, "sha256": sha256_json(bound)})

    def _has(self, name: str) -> bool:
        return os.path.lexists(f"{self.folder}/{name}")

    def _read(self, name: str, *parts: str) -> dict[str, Any]:
        """The file ``name``, in which each of ``parts`` is an object."""
        content = self._content(name)
        for part in parts:
            if not isinstance(content.get(part), dict):
                raise Damaged(self.folder / name, f"it has no {part}")
        return content

    def _content(self, name: str) -> dict[str, Any]:
        """The file ``name``, sealed or of an older version."""
        content = read_signed(self.folder / name)
        owner = content.pop("run", self.folder.name)
        if owner != self.folder.name and self.folder.parent.name in SCORED:  # elsewhere it may be called anything
            if self._owners() == {owner}:
                raise Copied(self.folder, owner)
            raise Damaged(self.folder / name, f"it is of the run {owner}")
        return content

    def _owners(self) -> set[str | None]:
        """Whose its settings and scores say that they are."""
        paths = (self.folder / name for name in ("config.json", "metrics.json"))
        return {read_signed(path).get("run") for path in paths if path.exists()}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process. Raises Busy when another one has it."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise Busy(f"another process is working on {self.folder}; wait until it is done") from error
        try:
            yield
        finally:
            lock.release()


@dataclass(frozen=True)
class _Snapshot(Run):
    read: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    def _content(self, name: str) -> dict[str, Any]:
        if name not in self.read:
            self.read[name] = super()._content(name)
        return self.read[name]

    @cached_property
    def _checked(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return super()._scores()

    def _scores(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._checked


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST


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
