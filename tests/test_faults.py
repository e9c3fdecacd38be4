"""What goes wrong while a run is under way: a kill, a full disk, a signal, a clock, a damaged file, other images.

The same faults for every kind of run, at every place where they can strike: what is there afterwards is whole, what
went wrong is one sentence, and the same call again ends with the same bytes in every file as a run that nothing ever
disturbed. Runs are of three steps, on a clock that moves with the steps; their training, checkpoints and files are the
real ones, their scores are few and their pictures empty.
"""

import errno
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, make_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save

from bench import data
from bench.analysis import galleries
from bench.analysis.frames import read
from bench.core import files
from bench.core.cli import guarded
from bench.core.errors import Damaged, Interrupted, UserError
from bench.core.store import Run, Store
from bench.metrics import from_uint8, weights
from bench.priors import codes as prior_codes
from bench.priors import generate
from bench.priors import train as prior_training
from bench.priors import trial as prior_trial
from bench.priors.config import PriorConfig
from bench.priors.models import PRIORS, Prior
from bench.quantizers import QUANTIZERS
from bench.sweeps import workers
from bench.sweeps.child import Outcome, _outcome
from bench.sweeps.definition import Ablation
from bench.tokenizers import trial
from bench.tokenizers.config import Config, make_config
from bench.tokenizers.tokenizer import Tokenizer
from bench.training import loop
from bench.training import trial as around
from tests.fabricate import fabricate

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
        store = Store(run.folder.parents[1])
        config = next(config for config in RUNS.values() if store.run(config) == run)
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
    return {"psnr": float(error.mean()), "perplexity": 3.0}, {"psnr": error}


def generated(prior, tokenizer, codes, data, config, known, fid_weights):
    """The same of ``score_prior``: a real rate and real samples."""
    rate, grids = generate.rate(prior, codes.val, None, None), generate.draw(prior, config, None)
    images = generate.decode(tokenizer, grids, "cpu").permute(0, 2, 3, 1).numpy()
    return generate.Generated({"coded_bits_per_token": rate}, grids.numpy(), images, images)


def small(config, codebook_size, grid_size, classes):
    """A prior of a width that need not be looked for."""
    shape = () if config.prior == "independent" else (8, 1, 0.1)
    return PRIORS[config.prior](codebook_size, grid_size, *shape, classes)


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
        patch.setattr(trial, "score", scored)
        for name in ("kmeans_reference", "score_untrained", "throughput", "static_costs"):
            patch.setattr(trial, name, lambda *given: {})
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
    kinds = sorted({".pt", ".safetensors", ".json"} & last.keys(), key=last.get)
    return [*range(len(renamed))] if name in QUICK else [last[kind] for kind in kinds]


@every
def test_killed_at_any_rename_it_ends_with_the_same_bytes(world, name):
    """Just before a file has its name, and after the last has; a kill removes no temporary file, the next run does."""
    places = strikes(world, name)
    for place, after in [*((place, False) for place in places), (places[-1], True)]:
        run = world.start(name)
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, place, after)
            with pytest.raises(Killed):
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
    """A checkpoint is made again, from the first step; a history that has lost rows, which no score is made from, is
    no reason for that."""
    for file in ("config.json", "history.jsonl", "checkpoint.pt"):
        run = stopped(world, name)
        damage(run.folder / file, how)
        if file == "config.json" or how == "a folder":
            assert str(run.folder / file) in told(world, run, capsys)
            continue
        found, said = contents(world.go(run).folder), capsys.readouterr().err
        assert said.startswith(f"{run.folder / file} is damaged: ")
        if file == "history.jsonl":
            assert found.pop(file).splitlines()[-1] == world.undisturbed(name)[file].splitlines()[-1]
            assert run.history()[-1]["step"] == STEPS
        assert world.undisturbed(name).items() >= found.items()
        assert len(found) >= len(world.undisturbed(name)) - 1


@pytest.mark.parametrize("how", HOW)
@quick
def test_what_is_damaged_in_a_finished_run_is_named(world, name, how, capsys):
    """By whoever reads it next: the same call, or who loads the weights. What is beside the scores is left out."""
    for file in ("config.json", "metrics.json", "failure.json", "weights", "per_image.npz", "samples.npz"):
        run = world.start(name)
        put(run.folder, world.undisturbed(name))
        if file == "failure.json":
            (run.folder / "metrics.json").unlink()
            run.fail("crashed", "for a reason")
        path = next(run.folder.glob("*.safetensors")) if file == "weights" else run.folder / file
        if not path.exists():
            continue
        damage(path, how)
        if file.endswith(".npz"):
            assert run.per_image() == {} or file == "samples.npz"
            assert galleries._kept(str(run.folder), "x") == [] or file == "per_image.npz"
        elif file == "failure.json" and how == "flipped":
            assert run.status in ("crashed", "damaged")
        else:
            read = (
                {"ema": Tokenizer, "rnn": Prior}[name].from_run
                if file == "weights"
                else lambda _, run=run: world.go(run)
            )
            assert guarded(lambda read=read, run=run: read(run.folder) and 0) == 2
            assert str(run.folder if how == "a folder" else path) in (said := capsys.readouterr().err)
            assert said.count("\n") == 1


def flips(whole: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """``whole`` with one bit flipped, at each of ``places`` in turn."""
    for place in places:
        yield whole[: place // 8] + bytes([whole[place // 8] ^ 1 << place % 8]) + whole[place // 8 + 1 :]


def test_no_flipped_bit_of_scores_is_read_as_others(world):
    """At any place of a finished run's JSON, and of the archives around its arrays."""
    run = world.start("ema")
    put(run.folder, world.undisturbed("ema"))
    known = run.metrics(), run.protocol(), run.config(), run.weights()
    arrays = {name: values.tobytes() for name, values in run.per_image().items()}
    for file in ("metrics.json", "config.json", "per_image.npz", "samples.npz"):
        path, whole = run.folder / file, world.undisturbed("ema")[file]
        bits = 8 * len(whole)
        places = [*range(0, 1200, 5), *range(bits - 1200, bits, 5)] if path.suffix == ".npz" else range(0, bits, 29)
        for flipped in flips(whole, places):
            path.write_bytes(flipped)
            if file == "samples.npz":
                galleries._kept(str(run.folder), "x")
            elif file == "per_image.npz":
                found = {name: values.tobytes() for name, values in run.per_image().items()}
                assert found == {} or list(found.values()) == list(arrays.values())
            else:
                status = run.status
                assert status == "damaged" or (run.metrics(), run.protocol(), run.config(), run.weights()) == known
        path.write_bytes(whole)


@pytest.mark.parametrize("how", HOW)
def test_codes_that_are_damaged_are_made_again_with_the_same_scores(world, how, capsys):
    for file in ("meta.json", "train.npy", "val.npy", "references"):
        run = world.start("independent")
        world.go(run)
        place = run.folder.parents[1] / "runs" / TAUGHT.run_id() / "codes"
        shutil.rmtree(run.folder)
        path = next(place.glob("references-*.json")) if file == "references" else place / file
        damage(path, how)
        capsys.readouterr()
        if how == "a folder":
            assert guarded(lambda run=run: world.go(run) and 0) == 2
            assert str(path) in capsys.readouterr().err.splitlines()[-1]
            path.rmdir()
        else:
            assert contents(world.go(run).folder) == world.undisturbed("independent")
            assert "is damaged: " in (said := capsys.readouterr().err)
            assert said.endswith("; it is made again\n")
        assert contents(world.go(run).folder) == world.undisturbed("independent")


def test_no_flipped_bit_of_codes_is_read_as_others(tmp_path):
    """Nor of what tells their type: in the other order of bytes, the same bytes are other codes."""
    grids = np.arange(300, 332, dtype=np.uint16).reshape(2, 4, 4)
    for split in ("train", "val"):
        np.save(tmp_path / f"{split}.npy", grids)
    about = {"tokenizer": "x", "mirrored": False, "codebook_size": 512, "digest": files.sha256_arrays(grids, grids)}
    (tmp_path / "meta.json").write_text(files.seal(about))
    path, whole = tmp_path / "train.npy", (tmp_path / "train.npy").read_bytes()
    noticed = 0
    for flipped in flips(whole, range(8 * len(whole))):
        path.write_bytes(flipped)
        try:
            assert np.array_equal(prior_codes._read(tmp_path / "meta.json")[1], grids)
        except Damaged:
            noticed += 1
    assert noticed >= 8 * grids.nbytes


# -- other images, and other versions of the code ---------------------------------------------------------------------


def test_a_run_does_not_go_on_with_other_images(world, images, capsys):
    """Than it was begun on: what it came to would be a run of neither. With those back it goes on."""
    run = stopped(world, "ema")
    before = contents(run.folder)
    world.images = replace(images, fingerprint="1" * 64)
    said = told(world, run, capsys)
    assert f"what {run.folder} is trained on has changed since it was begun, from {'0' * 16} to {'1' * 16}" in said
    assert contents(run.folder) == before
    world.images = images
    assert contents(world.go(run).folder) == world.undisturbed("ema")


def test_a_prior_does_not_go_on_over_another_tokenizer(world, capsys):
    """One that was trained again since, on another machine."""
    run = stopped(world, "rnn")
    taught = run.folder.parents[1] / "runs" / TAUGHT.run_id()
    other = contents(world.go(world.start("standard", "other")).folder)["tokenizer.safetensors"]
    shutil.rmtree(taught / "codes")
    stored = load(other)
    whole = load(contents(taught)["tokenizer.safetensors"])
    (taught / "tokenizer.safetensors").write_bytes(save({name: stored.get(name, whole[name]) for name in whole}))
    metrics = files.read_json(taught / "metrics.json")
    Run(taught).write("metrics.json", {name: metrics[name] for name in ("metrics", "protocol")})
    assert f"what {run.folder} is trained on has changed since it was begun" in told(world, run, capsys)


STUDY = Ablation("beta", sweep={"beta": (0.25, 0.5)}, backbones=("cnn",), seeds=(0,))


def test_a_study_does_not_go_on_with_other_images(world, image_folder, tmp_path, monkeypatch, capsys):
    """An image is replaced between two trials: the next is refused by the fingerprints, and fails nobody. What was
    scored before stays, and with the image back the trial is run."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    image, other = folder / "train/000.png", folder / "train/001.png"
    kept, runs = image.read_bytes(), []

    def child(config, store, *rest):
        try:
            runs.append(store.run(config))
            trial.run_trial(config, store)
        except UserError as error:
            return _outcome(error)
        shutil.copy(other, image)
        return Outcome("finished")

    monkeypatch.setattr(trial, "load", data.load)
    monkeypatch.setattr(workers, "run_in_child", child)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    place = ["--preset", "smoke", "--data", f"folder:{folder}", "--results", str(tmp_path), "--metric", "psnr"]
    assert workers.main(STUDY, "", [*place, *flags]) == 2
    first, second = runs
    before = first.protocol()["fingerprint"]
    now = data.load(f"folder:{folder}", 32).fingerprint
    said = capsys.readouterr().err.splitlines()[-1]
    change = f"folder:{folder} has other images now (fingerprint {now[:16]}) than when study"
    assert said.startswith(f"error: {change} beta-smoke")
    assert f"began ({before[:16]}); put those back" in said
    assert (first.status, second.status) == ("finished", "unfinished")
    assert first.protocol()["fingerprint"] == first.trained_on() == before != now
    image.write_bytes(kept)
    assert trial.run_trial(first.settings(Config), Store(tmp_path)) == first
    assert trial.run_trial(replace(first.settings(Config), beta=0.5), Store(tmp_path)) == second
    assert second.protocol() == first.protocol()


def test_what_another_version_wrote_besides_is_read_reported_and_left(tmp_path):
    """Further settings, metrics, files and studies' keys; and what an older one did not know yet has its default."""
    store, config = Store(tmp_path), make_config("cnn", "smoke")
    run = fabricate(store, config)
    (plain,) = read([run])[0].to_dict("records")
    for name, part in (("config.json", "config"), ("metrics.json", "metrics")):
        content = files.read_json(run.folder / name)
        content[part] |= {"further": 3}
        del content[part]["r1_weight" if part == "config" else "usage"]
        run.seal(name, content | {"further": {"a": [1]}})
    (run.folder / "further.bin").write_bytes(b"?")
    before = contents(run.folder)
    table, unread = read([run])
    (row,) = table.to_dict("records")
    assert not unread
    assert run.settings(Config) == config.resolved()
    assert row.pop("further") == 3
    assert np.isnan(row.pop("usage"))
    assert {name: row[name] for name in row if row[name] == row[name]}.items() <= plain.items()
    assert contents(run.folder) == before


def test_a_setting_that_this_version_does_not_know_makes_another_run():
    """Also where it has its default: no version takes a run of another for its own, or overwrites it."""
    config = make_config("cnn", "smoke")
    newer = make_dataclass("Newer", [("further", int, 0)], bases=(Config,), frozen=True)
    ids = [config.run_id(), newer(**asdict(config)).run_id(), newer(**asdict(config), further=1).run_id()]
    assert len(set(ids)) == 3


def test_a_study_keeps_what_another_version_wrote_of_it(tmp_path):
    store = Store(tmp_path)
    header = {"kind": "ablation", "sweep": ["beta"], "metrics": ["psnr"]}
    store.extend_study("one", {**header, "further": {"a": [1]}}, {"x": {"beta": 1}})
    store.extend_study("one", header, {"y": {"beta": 2}})
    assert store.study("one") == {
        "name": "one",
        **header,
        "further": {"a": [1]},
        "runs": {"x": {"beta": 1}, "y": {"beta": 2}},
    }
