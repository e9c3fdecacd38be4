"""Runs of every kind that take a tenth of a second, on a disk and a clock that a test may spoil.

Their training, checkpoints and files are the real ones; their scores are few and their pictures empty.
"""

import errno
import io
import os
import re
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench.core import files
from bench.core.cli import guarded
from bench.core.errors import Interrupted
from bench.core.runs import SCORED, Run
from bench.core.store import Store
from bench.data import Data
from bench.metrics import from_uint8, weights
from bench.priors import codes as prior_codes
from bench.priors import generate
from bench.priors import train as prior_training
from bench.priors import trial as prior_trial
from bench.priors.config import PriorConfig
from bench.priors.models import PRIORS
from bench.quantizers import QUANTIZERS
from bench.tokenizers import trial
from bench.tokenizers.config import Config, make_config
from bench.training import loop
from bench.training import trial as around

STEPS, STEP_SECONDS = 3, 3.0  # which is long enough for a checkpoint after each
SMALL = {"width": 8, "depth": 1, "codebook_size": 16, "code_dim": 4, "steps": STEPS, "batch_size": 4, "warmup": 2}
SMALL |= {"lpips_weight": 0.0, "precision": "fp32", "device": "cpu"}
GAN = {"gan_weight": 0.5, "gan_start": 0.4, "gan_warmup": 0.4, "gan_ramp": 0.3, "gan_width": 4, "gan_layers": 1}

TOKENIZERS = {name: make_config("cnn", "smoke", quantizer=name, **SMALL).resolved() for name in QUANTIZERS}
TOKENIZERS["gan"] = replace(TOKENIZERS["standard"], **GAN)
TAUGHT = TOKENIZERS["ema"]  # over whose codes the priors are
SHAPE = {"depth": 1, "parameters": 5000, "steps": STEPS, "batch_size": 4, "warmup": 2, "samples": 4}
OVER = {"tokenizer": TAUGHT.run_id(), "precision": "fp32", "device": "cpu"}
RUNS: dict[str, Config | PriorConfig] = {
    **TOKENIZERS,
    **{name: PriorConfig(prior=name, **OVER, **SHAPE).resolved() for name in PRIORS},
}
STEP_SEED = loop.step_seed
READERS = {
    **{".json": files.read_json, ".npy": np.load, ".npz": lambda path: dict(np.load(path))},
    **{".safetensors": load_file, ".pt": lambda path: torch.load(path, weights_only=True)},
}


class Killed(BaseException):
    """Stands for SIGKILL: after it this process changes no file any more."""


class World:
    """Runs below one folder, and what happens to them: ``at[step]`` as that step begins."""

    def __init__(self, root: Path):
        self.root, self.at, self.clock, self.images = root, {}, 0.0, None
        self.whole: dict[str, dict[str, bytes]] = {}

    def monotonic(self) -> float:
        """Seconds on a clock that steps alone move."""
        return self.clock

    def begin(self, seed: int, step: int) -> int:
        """What the loop asks at the beginning of every step."""
        self.clock += STEP_SECONDS
        self.at.get(step, lambda: None)()
        return STEP_SEED(seed, step)

    def start(self, name: str, place: str = "here") -> Run:
        """The folder of a run that has not begun, in a store of its own."""
        taught = self.undisturbed("ema") if isinstance(RUNS[name], PriorConfig) else {}  # in that very place, perhaps
        shutil.rmtree(self.root / place, ignore_errors=True)
        store = Store(self.root / place)
        if taught:
            put(store.run(TAUGHT).folder, taught)
        return store.run(RUNS[name])

    def go(self, run: Run) -> Run:
        """Trains and scores it, as the commands do."""
        store = Store(run.folder.parents[1])
        config = next(config for config in RUNS.values() if store.run(config) == run)
        if isinstance(config, PriorConfig):
            return prior_trial.run_prior(config, store.named(config.tokenizer), store)
        return trial.run_trial(config, store)

    def undisturbed(self, name: str) -> dict[str, bytes]:
        """Every file of a run to which nothing happens."""
        if name not in self.whole:
            run, at, self.at = self.start(name, "undisturbed"), self.at, {}
            self.whole[name] = contents(self.go(run).folder)
            self.at = at
        return self.whole[name]

    def stopped(self, name: str, number: int = signal.SIGTERM) -> Run:
        """A run that was stopped in its second step."""
        run = self.start(name)
        self.at[1] = lambda: os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match="stopped at step 2 of 3"):
            self.go(run)
        self.at.clear()
        check_nothing_is_half(run)
        return run

    def told(self, run: Run, capsys: pytest.CaptureFixture[str]) -> str:
        """The one sentence that the command ends with."""
        assert guarded(lambda: self.go(run) and 0) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("encoding"))
        return line

    def renames(self, name: str) -> list[str]:
        """The names of the files that a run puts in their places, in that order."""
        run = self.start(name)
        with pytest.MonkeyPatch.context() as patch:
            renamed = kill(patch)
            self.go(run)
        return renamed


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder by name, its lock left out; hidden ones, too."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def put(folder: Path, found: dict[str, bytes]) -> None:
    """The same again elsewhere."""
    folder.mkdir(parents=True)
    for name, content in found.items():
        (folder / name).write_bytes(content)


def scored(codec, codebook_size, images, *rest, **options):
    """What takes no time of ``score``, on real reconstructions."""
    x = from_uint8(torch.from_numpy(images[:8]).permute(0, 3, 1, 2))
    with torch.no_grad():
        error = (codec.decode(codec.encode(x)) - x).square().mean((1, 2, 3)).numpy()
    return {**dict.fromkeys(SCORED["runs"], 3.0), "psnr": float(error.mean())}, {"psnr": error}


def generated(prior, tokenizer, codes, data, config, known, fid_weights):
    """The same of ``score_prior``: a real rate and real samples."""
    rate, grids = generate.rate(prior, codes.held_out, None, None), generate.draw(prior, config, None)
    images = generate.decode(tokenizer, grids, "cpu").permute(0, 2, 3, 1).numpy()
    scores = {**dict.fromkeys(SCORED["priors"], 3.0), "coded_bits_per_token": rate}
    return generate.Generated(scores, grids.numpy(), images, images)


def small(config, codebook_size, grid, classes):
    """A prior of a width that need not be looked for."""
    shape = () if config.prior == "independent" else (8, 1, 0.1)
    return PRIORS[config.prior](codebook_size, grid, *shape, classes)


def picture(path, *rest):
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(b"picture")


@contextmanager
def live(root: Path, images: Data) -> Iterator[World]:
    """A world below ``root`` whose runs are of ``images``."""
    with pytest.MonkeyPatch.context() as patch:
        world = World(root)
        patch.setenv("VQBENCH_CACHE", str(world.root / "cache"))
        world.images = images
        for name in ("time", "step_seed"):
            patch.setattr(loop, name, {"time": world, "step_seed": world.begin}[name])
        patch.setattr(trial, "time", world)
        patch.setattr(prior_training, "time", world)
        for module in (trial, prior_codes):
            patch.setattr(module, "load", lambda data, image_size: world.images)
        for module in (trial, prior_trial):
            patch.setattr(module, "peak_memory", lambda device: nullcontext(lambda: 1.0))
        patch.setattr(trial, "score", scored)
        for name in ("kmeans_reference", "format_references", "throughput", "static_costs"):
            patch.setattr(trial, name, lambda *given: {})
        patch.setattr(trial, "score_untrained", lambda config, images: ({}, images[:1]))
        patch.setattr(weights, "trunk_state", lambda net: None)
        for name in ("inception", "dinov2"):
            patch.setattr(weights, name, lambda path: None)
        for module in (prior_trial, prior_training):
            patch.setattr(module, "build", small)
        patch.setattr(prior_trial, "score_prior", generated)
        patch.setattr(generate, "_references", lambda *given: {"nearest_val_psnr": 20.0, "nearest_val_psnr_95": 30.0})
        patch.setattr(around, "environment", dict)
        patch.setattr(os, "fsync", lambda handle: None)  # a busy disk takes seconds
        for name in ("reconstructions", "curves", "samples", "neighbours", "prior_curve"):
            patch.setattr(f"bench.core.plots.{name}", picture)
        yield world


def kill(patch: pytest.MonkeyPatch, place: int = -1, after: bool = False) -> list[str]:
    """Has this process die at the rename number ``place``, just before or ``after`` it. The names of those before."""
    renamed, rename, unlink, dead = [], os.replace, Path.unlink, []

    def die(source: Path, target: Path) -> None:
        if not dead and (len(renamed) != place or after):
            rename(source, target)
        if dead or len(renamed) == place:
            dead.append(True)
            raise Killed
        renamed.append(Path(target).name)

    patch.setattr(os, "replace", die)
    patch.setattr(Path, "unlink", lambda path, missing_ok=False: dead or unlink(path, missing_ok))
    return renamed


def check_nothing_is_half(run: Run) -> None:
    """No file of the store is, and the run looks finished only where it is."""
    assert run.status == ("finished" if (run.folder / "metrics.json").exists() else "unfinished")
    for path in run.folder.parents[1].rglob("[!.]*.*"):
        READERS.get(path.suffix, Path.read_bytes)(path)


def refuse(patch: pytest.MonkeyPatch, place: int, number: int) -> list[str]:
    """Has the disk refuse file number ``place``, and where it has turned read-only every later one; their names."""
    asked, refused, make = [], [], tempfile.mkstemp

    def ask(part: str, *name: str) -> None:
        asked.append(re.sub(rf"{re.escape(files.PART)}(.*)-[^-]*(\.\w+)$", r"\1\2", part))
        if len(asked) == place + 1 or (refused and number == errno.EROFS):
            refused.append(asked[-1])
            raise OSError(number, os.strerror(number), *name)

    def open_part(prefix: str, suffix: str, dir: Path) -> tuple[int, str]:
        part = f"{dir}/{prefix}x{suffix}"
        ask(part, part)
        return make(prefix=prefix, suffix=suffix, dir=dir)

    if number == errno.EROFS:
        patch.setattr(tempfile, "mkstemp", open_part)
    else:  # which is found out when bytes are to be on the disk
        patch.setattr(os, "fsync", lambda handle: ask(os.readlink(f"/proc/self/fd/{handle}")))
    return refused


def damaged(whole: bytes, how: str) -> bytes:
    """``whole``, damaged; a bit flips in the middle of it, or of the largest file in an archive, which has padding that
    nobody reads between its files."""
    middle = len(whole) // 2
    if zipfile.is_zipfile(io.BytesIO(whole)):
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            largest = archive.read(max(archive.infolist(), key=lambda one: one.file_size))
        middle = whole.find(largest) + len(largest) // 2 if largest in whole else middle
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    return {"emptied": b"", "cut": whole[:middle], "flipped": flipped}[how]


def damage(path: Path, how: str) -> None:
    """Damages the file ``path``, or puts a folder in its place."""
    whole = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    else:
        path.write_bytes(damaged(whole, how))


def flips(whole: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """``whole`` with one bit flipped, at each of ``places`` in turn."""
    for place in places:
        yield whole[: place // 8] + bytes([whole[place // 8] ^ 1 << place % 8]) + whole[place // 8 + 1 :]
