"""What goes wrong while a run is under way: a kill, a full disk, a signal, a clock, a damaged file, other images.

The same faults for every kind of run, at every place where they can strike: what is there afterwards is whole, what
went wrong is one sentence, and the same call again ends with the same bytes in every file as a run that nothing ever
disturbed.
"""

import errno
import json
import os
import shutil
import signal
import time
from dataclasses import asdict, make_dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load, save

from bench import data
from bench.analysis import galleries
from bench.analysis.frames import read
from bench.core import files
from bench.core.cli import guarded
from bench.core.errors import Damaged, UserError
from bench.core.runs import Changed, Run
from bench.core.store import Store
from bench.priors import codes as prior_codes
from bench.priors.models import Prior
from bench.sweeps import workers
from bench.sweeps.definition import Ablation
from bench.sweeps.outcome import Outcome, outcome_of
from bench.tokenizers import trial
from bench.tokenizers.config import Config, make_config
from bench.tokenizers.curves import METRICS as CURVES
from bench.tokenizers.tokenizer import Tokenizer
from tests.disturbed import (
    RUNS,
    SMALL,
    STEP_SECONDS,
    STEPS,
    TAUGHT,
    Killed,
    World,
    check_nothing_is_half,
    contents,
    damage,
    flips,
    kill,
    live,
    put,
    refuse,
)
from tests.fabricate import fabricate

pytestmark = pytest.mark.xdist_group("faults")
QUICK = ("ema", "rnn")  # all others are slow
PARAMS = {name: pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS}
every = pytest.mark.parametrize("name", PARAMS.values())
learned = pytest.mark.parametrize("name", [param for name, param in PARAMS.items() if name != "independent"])
both = pytest.mark.parametrize("name", ["ema", pytest.param("rnn", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def worlds(images, tmp_path_factory):
    with live(tmp_path_factory.mktemp("faults"), images) as world:
        yield world


@pytest.fixture
def world(worlds, images):
    """The same for a test of its own."""
    worlds.at, worlds.clock, worlds.images = {}, 0.0, images
    return worlds


# -- killed, and no room left -----------------------------------------------------------------------------------------


def strikes(world: World, name: str) -> list[int]:
    """Which renames of a run to disturb: the last of each file, or of the many that are slow of what resuming needs."""
    world.undisturbed(name)  # what the cache remembers of a first run is written once
    last = {file: place for place, file in enumerate(world.renames(name)) if not file.endswith(".png")}
    assert [*last][-1] == "metrics.json"
    return [place for file, place in last.items() if name in QUICK or file in ("checkpoint.pt", "metrics.json")]


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
        left = {path.name[:16] for path in run.folder.parents[1].rglob(".part-*")}
        assert left <= {".part-references"}, (place, after)  # which another process may be writing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gan", "mamba"])
def test_killed_by_the_system_while_it_writes_a_checkpoint(world, name):
    """With a real SIGKILL, after which nothing is cleaned up."""
    run = world.start(name)
    if not (child := os.fork()):
        try:
            world.at[1] = lambda: setattr(os, "replace", lambda *names: os.kill(os.getpid(), signal.SIGKILL))
            world.go(run)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.suffix for path in run.folder.glob(".part-*")] == [".pt"]
    check_nothing_is_half(run)
    assert contents(world.go(run).folder) == world.undisturbed(name)


@every
def test_a_disk_that_refuses_any_file_is_told_and_nothing_is_lost(world, name, capsys):
    """One that is full, and one that has turned read-only; each time with the name of the file."""
    for turn, place in enumerate(strikes(world, name)):
        number = (errno.ENOSPC, errno.EROFS)[turn % 2]
        run = world.start(name)
        with pytest.MonkeyPatch.context() as patch:
            refused = refuse(patch, place, number)
            said = world.told(run, capsys)
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
    assert world.told(run, capsys) == f"error: {reason}; free or choose another --results"
    world.at.clear()
    check_nothing_is_half(run)
    assert contents(world.go(run).folder) == world.undisturbed(name)


# -- stopped, and the clock put back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@learned
def test_a_signal_stops_any_run_with_a_checkpoint(world, name, number):
    run = world.stopped(name, number)
    assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["at"] == (2, 2 * STEP_SECONDS)
    world.at = {0: lambda: 1 / 0, 1: lambda: 1 / 0}  # steps that it has made
    assert contents(world.go(run).folder) == world.undisturbed(name)


@every
def test_a_clock_that_is_put_back_changes_no_result(world, name, monkeypatch):
    """By a day, in the middle: no time is negative, a checkpoint is still written, and everything else is the same."""
    run, now = world.start(name), time.time()

    def back() -> None:
        world.clock -= 86400
        monkeypatch.setattr(time, "time", lambda: now - 86400)

    world.at[1] = back
    world.at[2] = lambda: made.append(torch.load(run.folder / "checkpoint.pt", weights_only=True)["at"][0])
    made: list[int] = []
    world.go(run)
    assert made == ([] if name == "independent" else [2])
    assert all(value >= 0 for key, value in run.metrics().items() if key.endswith("seconds"))
    assert all(row["seconds"] >= 0 for row in run.history())
    same = contents(run.folder).keys() - {"history.jsonl", "metrics.json"}
    assert {file: contents(run.folder)[file] for file in same} == {file: world.undisturbed(name)[file] for file in same}


# -- damaged ----------------------------------------------------------------------------------------------------------


HOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("emptied", "cut")]
any_damage = pytest.mark.parametrize("how", [*HOW, "flipped", "a folder"])


@any_damage
@both
def test_what_is_damaged_in_the_middle_of_a_run_is_told_or_made_again(world, name, how, capsys):
    """A checkpoint is made again, from the first step; a history that has lost rows, which no score is made from but
    those of curves, which there are none of then, is no reason for that."""
    for file in ("config.json", "history.jsonl", "checkpoint.pt"):
        run = world.stopped(name)
        damage(run.folder / file, how)
        if file == "config.json" or how == "a folder":
            assert str(run.folder / file) in world.told(run, capsys)
            continue
        found, said = contents(world.go(run).folder), capsys.readouterr().err
        assert said.startswith(f"{run.folder / file} is damaged: ")
        if file == "history.jsonl":
            assert found.pop(file).splitlines()[-1] == world.undisturbed(name)[file].splitlines()[-1]
            assert run.history()[-1]["step"] == STEPS
            metrics = json.loads(found.pop("metrics.json"))["metrics"]
            whole = json.loads(world.undisturbed(name)["metrics.json"])["metrics"]
            assert metrics == {key: value for key, value in whole.items() if key not in CURVES}
        assert world.undisturbed(name).items() >= found.items()
        assert len(found) >= len(world.undisturbed(name)) - 2


@any_damage
@both
def test_what_is_damaged_in_a_finished_run_is_named(world, name, how, capsys):
    """By whoever reads it next: the same call, or who loads the weights."""
    weights = {"ema": "tokenizer.safetensors", "rnn": "prior.safetensors"}[name]
    for file in ("config.json", "metrics.json", "failure.json", weights):
        run = world.start(name)
        put(run.folder, world.undisturbed(name))
        if file == "failure.json":
            (run.folder / "metrics.json").unlink()
            run.fail("crashed", 40 * "for a reason, ")
        damage(run.folder / file, how)
        if file == weights:
            with pytest.raises(UserError, match=str(run.folder)):
                {"ema": Tokenizer, "rnn": Prior}[name].from_run(run.folder)
            if how != "a folder":
                assert world.told(run, capsys).startswith(f"error: {run.folder / file} does not hold the weights of ")
        else:
            assert world.told(run, capsys).startswith(f"error: {run.folder / file} is damaged: ")


@any_damage
@both
def test_no_file_of_a_finished_run_is_taken_for_what_it_ended_with(world, name, how):
    """None but pictures, which nothing reads."""
    run = world.start(name)
    put(run.folder, world.undisturbed(name))
    assert run.altered() == []
    beside = {file for file in world.undisturbed(name) if Path(file).suffix in (".npz", ".jsonl")}
    assert len(beside) == {"ema": 4, "rnn": 2}[name]
    for file in beside:
        damage(run.folder / file, how)
    assert {sentence.partition(" is damaged: ")[0] for sentence in run.altered()} == {
        str(run.folder / file) for file in beside
    }


@pytest.mark.slow
def test_no_flipped_bit_of_scores_is_read_as_others(world):
    """At any place of a finished run's JSON, and of the archives around its arrays."""
    run = world.start("ema")
    put(run.folder, world.undisturbed("ema"))
    known = run.metrics(), run.protocol(), run.config(), run.digests()
    arrays = [values.tobytes() for values in run.per_image().values()]
    for file in ("metrics.json", "config.json", "per_image.npz", "samples.npz"):
        path, whole = run.folder / file, world.undisturbed("ema")[file]
        bits = 8 * len(whole)
        places = [*range(0, 1200, 16), *range(bits - 1200, bits, 4)] if path.suffix == ".npz" else range(0, bits, 59)
        for flipped in flips(whole, places):
            path.write_bytes(flipped)
            scores = [values.tobytes() for values in run.per_image().values()]
            assert scores in (([], arrays) if file in ("per_image.npz", "metrics.json") else (arrays,))
            list(galleries.pictures_of(pd.DataFrame({"folder": [str(run.folder)]}), [], "x"))
            assert run.status == "damaged" or (run.metrics(), run.protocol(), run.config(), run.digests()) == known
        path.write_bytes(whole)


@pytest.mark.slow
@any_damage
def test_codes_that_are_damaged_are_made_again_with_the_same_scores(world, how, capsys):
    for file in ("meta.json", "train.npy", "held_out.npy", "references"):
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


@pytest.mark.slow
def test_no_flipped_bit_of_codes_is_read_as_others(tmp_path):
    """Nor of what tells their type: in the other order of bytes, the same bytes are other codes."""
    grids = np.arange(300, 332, dtype=np.uint16).reshape(2, 4, 4)
    for split in ("train", "held_out"):
        np.save(tmp_path / f"{split}.npy", grids)
    about = {"tokenizer": "x", "mirrored": False, "codebook_size": 512, "digest": files.sha256_arrays(grids, grids)}
    (tmp_path / "meta.json").write_text(files.seal(about))
    path, whole = tmp_path / "train.npy", (tmp_path / "train.npy").read_bytes()
    noticed = 0
    for flipped in flips(whole, [*range(512), *range(1024, 8 * len(whole))]):
        path.write_bytes(flipped)
        try:
            assert np.array_equal(prior_codes._read(tmp_path / "meta.json")[1], grids)
        except Damaged:
            noticed += 1
    assert noticed >= 8 * grids.nbytes


# -- other images, and other versions of the code ---------------------------------------------------------------------


def test_a_run_does_not_go_on_with_other_images(world, images):
    """Than it was begun on: what it came to would be a run of neither. With those back it goes on."""
    run = world.stopped("ema")
    before = contents(run.folder)
    world.images = replace(images, fingerprint="1" * 64)
    change = f"what {run.folder} is trained on has changed since it was begun, from {'0' * 16} to {'1' * 16}"
    with pytest.raises(Changed, match=change) as error:
        world.go(run)
    assert outcome_of(error.value).status == "blocked"  # a study fails nobody for it
    assert contents(run.folder) == before
    world.images = images
    assert contents(world.go(run).folder) == world.undisturbed("ema")


def test_a_prior_does_not_go_on_over_another_tokenizer(world, capsys):
    """One that was trained again since, on another machine."""
    run = world.stopped("rnn")
    taught = run.folder.parents[1] / "runs" / TAUGHT.run_id()
    other = contents(world.go(world.start("standard", "other")).folder)["tokenizer.safetensors"]
    shutil.rmtree(taught / "codes")
    stored, whole = load(other), load(contents(taught)["tokenizer.safetensors"])
    (taught / "tokenizer.safetensors").write_bytes(save({name: stored.get(name, whole[name]) for name in whole}))
    Run(taught).write("metrics.json", {"metrics": Run(taught).metrics(), "protocol": Run(taught).protocol()})
    assert f"what {run.folder} is trained on has changed since it was begun" in world.told(run, capsys)


@pytest.mark.slow
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
            return outcome_of(error)
        shutil.copy(other, image)
        return Outcome("finished")

    monkeypatch.setattr(trial, "load", data.load)
    monkeypatch.setattr(workers, "run_in_child", child)
    study = Ablation("beta", sweep={"beta": (0.25, 0.5)}, backbones=("cnn",), seeds=(0,))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    place = ["--preset", "smoke", "--data", f"folder:{folder}", "--results", str(tmp_path), "--metric", "psnr"]
    assert workers.main(study, "", [*place, *flags]) == 2
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
