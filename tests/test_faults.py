"""What goes wrong while a run is under way: a kill, a full disk, a signal, a clock, a damaged file, other images.

The same faults for every kind of run, at every place where they can strike: what is there afterwards is whole, what
went wrong is one sentence, and the same call again ends with the same bytes in every file as a run that nothing ever
disturbed. Runs are of three steps, on a clock that moves with the steps; their training, checkpoints and files are the
real ones, their scores are few and their pictures empty.
"""

import errno
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench.core import files
from bench.core.cli import guarded
from bench.core.errors import Interrupted
from bench.core.store import Run, Store
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
QUICK = ("ema", "rnn")  # the others are slow
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS]
)
learned = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS if name != "independent"],
)
quick = pytest.mark.parametrize("name", QUICK)


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
        shutil.rmtree(self.root / place, ignore_errors=True)
        store = Store(self.root / place)
        if isinstance(RUNS[name], PriorConfig):
            put(store.run(TAUGHT).folder, self.undisturbed("ema"))
        return store.run(RUNS[name])

    def go(self, run: Run) -> Run:
        """Trains and scores it, as the commands do."""
        config, store = next(one for one in RUNS.values() if one.run_id() == run.folder.name), Store(run.folder.parents[1])
        if isinstance(config, PriorConfig):
            return prior_trial.run_prior(config, store.named(config.tokenizer), store)
        return trial.run_trial(config, store)

    def undisturbed(self, name: str) -> dict[str, bytes]:
        """Every file of a run to which nothing happens."""
        if name not in self.whole:
            run = self.start(name, "undisturbed")
            self.whole[name] = contents(self.go(run).folder)
        return self.whole[name]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder by name, its lock left out; hidden ones, too."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def put(folder: Path, found: dict[str, bytes]) -> None:
    """The same again elsewhere."""
    folder.mkdir(parents=True)
    for name, content in found.items():
        (folder / name).write_bytes(content)


STEP_SEED = loop.step_seed


def scored(codec, codebook_size, images, *rest):
    """What takes no time of ``score``, on real reconstructions."""
    x = from_uint8(torch.from_numpy(images[:8]).permute(0, 3, 1, 2))
    with torch.no_grad():
        error = (codec.decode(codec.encode(x)) - x).square().mean((1, 2, 3)).numpy()
    return {"psnr": float(error.mean())}, {"psnr": error}


def generated(prior, tokenizer, codes, data, config, known, fid_weights):
    """The same of ``score_prior``: a real rate and real samples."""
    rate, grids = generate.rate(prior, codes.val, None, None), generate.draw(prior, config, None)
    images = generate.decode(tokenizer, grids, "cpu").permute(0, 2, 3, 1).numpy()
    return generate.Generated({"coded_bits_per_token": rate}, grids.numpy(), images, images)


def small(config, codebook_size, grid_size, classes):
    """A prior of a width that need not be looked for."""
    return PRIORS[config.prior](codebook_size, grid_size, *(() if config.prior == "independent" else (8, 1, 0.1)), classes)


def picture(path, *rest):
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(b"picture")


@pytest.fixture(scope="module")
def worlds(images, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        world = World(tmp_path_factory.mktemp("faults"))
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
        replaced = {"score": scored, "kmeans_reference": lambda *given: {"psnr": 1.0}}
        replaced |= {"score_untrained": lambda *given: {}, "throughput": lambda given: {}, "static_costs": lambda given: {}}
        for name, value in replaced.items():
            patch.setattr(trial, name, value)
        patch.setattr(weights, "trunk_state", lambda net: None)
        patch.setattr(weights, "inception", lambda path: None)
        for module in (prior_trial, prior_training):
            patch.setattr(module, "build", small)
        patch.setattr(prior_trial, "score_prior", generated)
        patch.setattr(generate, "_references", lambda *given: {"nearest_val_psnr": 20.0, "nearest_val_psnr_95": 30.0})
        patch.setattr(around, "environment", dict)
        patch.setattr(os, "fsync", lambda handle: None)  # a busy disk takes seconds
        for name in ("reconstructions", "curves", "samples", "neighbours", "prior_curve"):
            patch.setattr(f"bench.core.plots.{name}", picture)
        yield world


@pytest.fixture
def world(worlds, images):
    """The same for a test of its own."""
    worlds.at, worlds.clock, worlds.images = {}, 0.0, images
    return worlds


# -- killed, and no room left -----------------------------------------------------------------------------------------


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


def strikes(world: World, name: str) -> list[int]:
    """Which renames of a run to disturb: all, or of the many that are slow the last checkpoint, weights and scores."""
    with pytest.MonkeyPatch.context() as patch:
        renamed = kill(patch)
        world.go(world.start(name))
    assert renamed[-1] == "metrics.json"
    last = {Path(file).suffix: place for place, file in enumerate(renamed)}
    return [*range(len(renamed))] if name in QUICK else [last[kind] for kind in (".pt", ".safetensors", ".json") if kind in last]


@every
def test_killed_at_any_rename_it_ends_with_the_same_bytes(world, name):
    """Just before a file has its name, and after the last has; a kill removes no temporary file, the next run does."""
    places = strikes(world, name)
    for place, after in [*((place, False) for place in places), (places[-1], True)]:
        run = world.start(name)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill(patch, place, after)
            world.go(run)
        check_nothing_is_half(run)
        assert after or list(run.folder.parents[1].rglob(".part-*"))
        assert contents(world.go(run).folder) == world.undisturbed(name), (place, after)
        assert not list(run.folder.parents[1].rglob(".part-*")), (place, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gan", "mamba"])
def test_killed_by_the_system_while_it_writes_a_checkpoint(world, name):
    """With a real SIGKILL, after which nothing is cleaned up."""
    run = world.start(name)
    if not (child := os.fork()):
        world.at[1] = lambda: setattr(os, "replace", lambda *names: os.kill(os.getpid(), signal.SIGKILL))
        world.go(run)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.suffix for path in run.folder.glob(".part-*")] == [".pt"]
    check_nothing_is_half(run)
    assert contents(world.go(run).folder) == world.undisturbed(name)


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


def told(world: World, run: Run, capsys) -> str:
    """The one sentence that the command ends with."""
    assert guarded(lambda: world.go(run) and 0) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("encoding")]
    assert len(lines) == 1, lines
    return lines[0]


@every
def test_a_disk_that_refuses_any_file_is_told_and_nothing_is_lost(world, name, capsys):
    """One that is full, and one that has turned read-only; each time with the name of the file."""
    for turn, place in enumerate(strikes(world, name)):
        number = (errno.ENOSPC, errno.EROFS)[turn % 2]
        run = world.start(name)
        with pytest.MonkeyPatch.context() as patch:
            refused = refuse(patch, place, number)
            said = told(world, run, capsys)
        assert said == f"error: {os.strerror(number)} while writing {refused[0]}; free or choose another --results"
        check_nothing_is_half(run)
        assert contents(world.go(run).folder) == world.undisturbed(name), place


@learned
def test_a_history_that_has_no_room_is_named(world, name, capsys):
    """By a real device that takes nothing, in its place."""
    run = world.start(name)

    def fill() -> None:
        for handle in Path("/proc/self/fd").iterdir():
            if os.path.exists(handle) and os.readlink(handle) == str(run.folder / "history.jsonl"):
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, int(handle.name))
                os.close(full)

    world.at[1] = fill
    reason = f"{os.strerror(errno.ENOSPC)} while writing {run.folder / 'history.jsonl'}"
    assert told(world, run, capsys) == f"error: {reason}; free or choose another --results"
    world.at.clear()
    check_nothing_is_half(run)
    assert contents(world.go(run).folder) == world.undisturbed(name)


# -- stopped, and the clock put back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@learned
def test_a_signal_stops_any_run_with_a_checkpoint(world, name, number):
    run = stopped(world, name, number)
    assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["at"] == (2, 2 * STEP_SECONDS)
    world.at = {0: lambda: 1 / 0, 1: lambda: 1 / 0}  # steps that it has made
    assert contents(world.go(run).folder) == world.undisturbed(name)


def stopped(world: World, name: str, number: int = signal.SIGTERM) -> Run:
    """A run that was stopped in its second step."""
    run = world.start(name)
    world.at[1] = lambda: os.kill(os.getpid(), number)
    with pytest.raises(Interrupted, match="stopped at step 2 of 3"):
        world.go(run)
    world.at.clear()
    check_nothing_is_half(run)
    return run


@every
def test_a_clock_that_is_put_back_changes_no_result(world, name, monkeypatch):
    """By a day, in the middle: no time is negative, a checkpoint is still written, and everything else is the same."""
    run, now = world.start(name), time.time()

    def back() -> None:
        world.clock -= 86400
        monkeypatch.setattr(time, "time", lambda: now - 86400)

    world.at[1] = back
    world.at[2] = lambda: seen.append((run.folder / "checkpoint.pt").exists())
    seen: list[bool] = []
    world.go(run)
    assert seen in ([], [True])
    assert all(value >= 0 for key, value in run.metrics().items() if key.endswith("seconds"))
    assert all(row["seconds"] >= 0 for row in run.history())
    same = contents(run.folder).keys() - {"history.jsonl", "metrics.json"}
    assert {file: contents(run.folder)[file] for file in same} == {file: world.undisturbed(name)[file] for file in same}


# -- damaged ----------------------------------------------------------------------------------------------------------


def damaged(whole: bytes, how: str) -> bytes:
    """``whole``, damaged; a bit flips in the middle of it."""
    middle = len(whole) // 2
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


HOW = ("emptied", "cut", "flipped", "a folder")


@pytest.mark.parametrize("how", HOW)
@quick
def test_what_is_damaged_in_the_middle_of_a_run_is_told_or_made_again(world, name, how, capsys):
    """A checkpoint is made again, from the first step; rows that a history has lost are no reason for that."""
    for file in ("config.json", "history.jsonl", "checkpoint.pt"):
        run = stopped(world, name)
        damage(run.folder / file, how)
        if file == "config.json" or how == "a folder":
            assert str(run.folder / file) in told(world, run, capsys)
            continue
        found, said = contents(world.go(run).folder), capsys.readouterr().err
        kept = {file for file in found if file != "history.jsonl" or how == "flipped" or file == "checkpoint.pt"}
        assert said.startswith(f"{run.folder / file} is damaged: ")
        assert {file: found[file] for file in kept} == {file: world.undisturbed(name)[file] for file in kept}
