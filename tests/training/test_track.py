"""Where runs can be watched: every step once, whatever stopped it; and nothing that fails there costs a run."""

import importlib
import json
import struct
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bench import prior, run
from bench.core import group
from bench.core.errors import UserError
from bench.core.runs import Run
from bench.core.store import Store
from bench.sweeps import workers
from bench.tokenizers.trial import run_trial
from bench.training import track
from bench.training.track import SINKS, Tracker, check_sink, tracked
from tests.commands import TINY
from tests.fabricate import fabricate
from tests.watched import Crash, rows, same

BLOCK = 32768  # bytes in which LevelDB writes


@pytest.fixture
def tiny(tiny):
    """In the same arithmetic on every machine."""
    return replace(tiny, precision="fp32")


@pytest.fixture
def scored(tiny, tmp_path) -> Run:
    """A finished run, of which scores and a picture can be told."""
    return fabricate(Store(tmp_path / "store"), tiny)


def told(run: Run):
    """What TensorBoard shows of ``run``."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def curve(events, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


class Recorded:
    """A sink that keeps what it is told, and fails at the call ``fails``."""

    fails = ""

    def __init__(self, run: Run, settings: dict):
        self.calls: list[str] = []
        self._call("begin")

    def row(self, row: dict) -> None:
        self._call("row")

    def scores(self, metrics: dict, picture: Path) -> None:
        self._call("scores")

    def close(self, finished: bool) -> None:
        self._call(f"close {finished}")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name.startswith(self.fails or "-"):
            raise OSError("no way\nout [of] here")


@pytest.fixture
def recorded(monkeypatch) -> type[Recorded]:
    monkeypatch.setitem(SINKS, "tensorboard", Recorded)
    monkeypatch.setattr(Recorded, "fails", "")
    return Recorded


# ---------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_each_step_once_however_often_a_run_was_stopped(watch, tiny, scored):
    """The history, to the digit of its float32: also what was trained twice, or before anybody watched."""
    for stop, watched in ((4, None), (7, "tensorboard"), (10, "tensorboard"), (None, "tensorboard")):
        with tracked(watched, scored, {}) as tracker:
            if stop is None:
                trained = watch.train(tiny, tell=tracker.row, checkpoint_seconds=3)
            else:
                with pytest.raises(Crash):
                    watch.train(tiny, crash_at=stop, tell=tracker.row, checkpoint_seconds=3)
    events = told(scored)
    assert len(trained.rows) == 12
    for name in trained.rows[-1].keys() - {"step"}:
        known = [(row["step"], np.float32(row[name])) for row in trained.rows if name in row]
        assert curve(events, f"train/{name}") == known, name
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("train/")} == {
        f"train/{name}" for row in trained.rows for name in row if name != "step"
    }


def test_tensorboard_shows_scores_and_a_picture(scored):
    with tracked("tensorboard", scored, {}) as tracker:
        tracker.row({"step": 7, "reconstruction": 0.5})
        tracker.scores("reconstructions.png")
    events = told(scored)
    for name, value in scored.metrics().items():
        assert curve(events, f"scores/{name}") == [(7, np.float32(value))]
    (shown,) = events.Images("reconstructions")
    with Image.open(scored.folder / "reconstructions.png") as picture:
        assert (shown.step, shown.width, shown.height) == (7, *picture.size)


# ----------------------------------------------------------------------------------------------------- Weights & Biases


def kept(folder: Path) -> list:
    """The records of a run that has ended, of which W&B's own process may still be writing the last."""
    for _ in range(300):
        found = records(folder)
        if found and found[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    return found


def records(folder: Path) -> list:
    """What W&B keeps offline, record by record: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, found, data, place = next(folder.glob("*.wandb")).read_bytes(), [], b"", 7
    while place + 7 <= len(content):
        if (left := BLOCK - place % BLOCK) < 7:  # no header fits
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(data))
            data = b""
    return found


@pytest.mark.slow
def test_wandb_keeps_curves_scores_and_pictures_offline(watch, tiny, scored, monkeypatch):
    """Each part of a run's training has all of its steps so far, of one id: the last one is the whole."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(Crash), tracked("wandb", scored, {"beta": 0.25}) as tracker:
        watch.train(tiny, crash_at=7, tell=tracker.row)
    with tracked("wandb", scored, {"beta": 0.25}) as tracker:
        trained = watch.train(tiny, tell=tracker.row)
        tracker.scores("reconstructions.png")
    first, second = (kept(path) for path in sorted(scored.folder.glob("wandb/offline-run-*")))
    for found, count, ended in ((first, 7, 1), (second, 12, 0)):
        runs = [one.run for one in found if one.WhichOneof("record_type") == "run"]
        assert {(one.run_id, one.project) for one in runs} == {(scored.folder.name, "vqbench")}
        history = [one.history for one in found if one.WhichOneof("record_type") == "history"]
        shown = {}
        for row in history:
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
            shown[row.step.num] = shown.get(row.step.num, {}) | items
        assert Counter(row.step.num for row in history) == Counter(range(1, count + 1))
        for row in trained.rows[:count]:
            assert shown[row["step"]]["train/reconstruction"] == row["reconstruction"]
        assert [one.exit.exit_code for one in found if one.WhichOneof("record_type") == "exit"] == [ended]
    assert any("reconstructions" in key for key in shown[12])
    summary = [item for one in second if one.WhichOneof("record_type") == "summary" for item in one.summary.update]
    assert {item.key: item.value_json for item in summary}["scores/psnr"] == json.dumps(scored.metrics()["psnr"])


def test_what_a_server_has_already_is_not_sent_again(scored, monkeypatch):
    import wandb

    sent: list[tuple[int, set]] = []
    known = SimpleNamespace(
        step=5,
        log=lambda what, step: sent.append((step, {*what})),
        finish=lambda exit_code: sent.append((exit_code, set())),
        summary={},
    )
    monkeypatch.setattr(wandb, "init", lambda **options: known)
    with tracked("wandb", scored, {}) as tracker:
        for step in range(1, 8):
            tracker.row({"step": step, "lr": 0.1})
        tracker.scores("reconstructions.png")
    assert sent == [(step, {"train/lr"}) for step in (5, 6, 7)] + [(7, {"reconstructions"}), (0, set())]


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("fails", ["begin", "row", "scores", "close"])
def test_a_sink_that_fails_costs_a_line_and_nothing_else(watch, tiny, scored, recorded, monkeypatch, capsys, fails):
    plain = watch.train(tiny, "plain")
    capsys.readouterr()
    monkeypatch.setattr(recorded, "fails", fails)
    with tracked("tensorboard", scored, {}) as tracker:
        trained = watch.train(tiny, "told", tell=tracker.row)
        tracker.scores("reconstructions.png")
    assert same(trained.weights, plain.weights)
    assert trained.rows == plain.rows
    said = [line for line in capsys.readouterr().err.splitlines() if "no way" in line]
    assert said == [f"tensorboard is told no more of {scored.folder.name}: no way"]


def test_a_picture_that_is_not_there_costs_a_line_too(scored, recorded, capsys):
    (scored.folder / "metrics.json").write_text("{")
    with tracked("tensorboard", scored, {}) as tracker:
        tracker.scores("reconstructions.png")
    assert "tensorboard is told no more of" in capsys.readouterr().err


def test_a_run_that_ends_early_is_not_told_to_be_finished(scored, recorded):
    with suppress(KeyboardInterrupt), tracked("tensorboard", scored, {}) as tracker:
        tracker.row({"step": 1})
        raise KeyboardInterrupt
    assert tracker.sink.calls == ["begin", "row", "close False"]
    with tracked("tensorboard", scored, {}) as tracker:
        tracker.scores("reconstructions.png")
    assert tracker.sink.calls == ["begin", "scores", "close True"]


def test_of_several_processes_the_first_tells(scored, recorded, monkeypatch):
    monkeypatch.setattr(group, "first", lambda: False)
    assert Tracker("tensorboard", scored, {}).sink is None
    monkeypatch.undo()
    assert Tracker(None, scored, {}).sink is None


def test_packages_are_named_with_the_extra_that_brings_them(tiny, tmp_path, monkeypatch):
    for name in SINKS:
        check_sink(name)
    check_sink(None)
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    for name in SINKS:
        with pytest.raises(UserError, match=rf"^track is {name}, a package that .*; pip install 'vqbench\[track\]'$"):
            run_trial(tiny, tmp_path / "results", track=name)
    with pytest.raises(UserError, match="unknown track 'mlflow'; choose from tensorboard, wandb"):
        run_trial(tiny, tmp_path / "results", track="mlflow")
    study = importlib.import_module("studies.beta")
    for main, words in (
        (run.main, ["--backbone", "cnn"]),
        (lambda words: workers.main(study.STUDY, study.__doc__, words), ["--backbone", "cnn"]),
    ):
        assert main([*words, "--preset", "smoke", "--track", "wandb", "--results", str(tmp_path / "results")]) == 2
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_studies_and_priors_tell_and_their_runs_know_nothing_of_it(image_folder, tmp_path):
    """A trial in a process of its own, and a prior over its codes, each with curves, picture and scores."""
    store, words = Store(tmp_path), ["--results", str(tmp_path)]
    words += ["--track", "tensorboard"]
    study = importlib.import_module("studies.beta")
    line = ["--backbone", "cnn", "--beta", "0.5", "--seeds", "0", *TINY, "--lpips-weight", "0"]
    assert workers.main(study.STUDY, study.__doc__, [*line, "--data", f"folder:{image_folder}", *words]) == 0
    (one,) = store.runs()
    small = ["--prior", "rnn", "--steps", "3", "--parameters", "20000", "--samples", "8", "--device", "cpu"]
    assert prior.main([one.folder.name, *small, *words]) == 0
    shown = ((one, "reconstruction", "reconstructions"), (*store.priors(), "bits_per_token", "samples"))
    for found, loss, picture in shown:
        events = told(found)
        assert [step for step, _ in curve(events, f"train/{loss}")] == [row["step"] for row in rows(found.folder)]
        assert len(events.Images(picture)) == 1
        name = "psnr" if found == one else "coded_bits_per_token"
        assert curve(events, f"scores/{name}") == [(3, np.float32(found.metrics()[name]))]
        assert "track" not in found.config()


def test_torch_is_seeded_alike_whoever_watches(watch, tiny, scored):
    """Sinks draw nothing that training would miss."""
    with tracked("tensorboard", scored, {}) as tracker:
        told_of = watch.train(tiny, "told", tell=lambda row: (tracker.row(row), torch.rand(3)))
    assert same(told_of.weights, watch.train(tiny, "plain").weights)
