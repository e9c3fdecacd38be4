"""A trial of a study on two processes: it ends, stops and goes on as one on one process does."""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from bench.core.errors import Interrupted, Lost
from bench.core.runs import Busy, NoSpace
from bench.core.store import Store
from bench.sweeps import together
from bench.sweeps.child import run_in_child
from bench.sweeps.outcome import Ended, Outcome, outcome_of
from bench.tokenizers.config import make_config

STEPS = 300


# -- what is told, by processes that do not train ---------------------------------------------------------------------

LOSS = {"outcome": ["crashed", "gone"], "lost": True}


@pytest.mark.parametrize(
    ("told", "outcome"),
    [
        ([{"outcome": ["refused", "a"], "lost": False}], ("refused", "a")),
        ([LOSS, {"outcome": ["diverged", "b"], "lost": False}], ("diverged", "b")),
        ([LOSS, {}], ("crashed", "gone")),
        ([{"outcome": ["busy", "a"], "lost": False}, {"outcome": ["busy", "b"], "lost": False}], ("busy", "a")),
        ([{"message": "<NONE>"}], ("crashed", "a process ended without a word; see log.txt")),
    ],
)
def test_the_loss_of_another_is_no_cause_where_any_other_is_told(told, outcome):
    assert together.cause(told) == outcome


def test_an_outcome_that_was_told_is_taken_as_it_is():
    outcome = Outcome("diverged", "not finite by step 3")
    assert outcome_of(Ended(outcome)) == outcome


def failing(**codes: int) -> ChildFailedError:
    """As torchrun says that processes ended, by rank."""
    return ChildFailedError("a", {int(rank[1:]): ProcessFailure(0, 1, code, "") for rank, code in codes.items()})


@pytest.fixture
def torchrun(monkeypatch):
    """Has torchrun raise an error in place of starting anything; the words it was given."""
    given = []

    def put(error):
        def main(words):
            given.append(words)
            if error is not None:
                raise error

        monkeypatch.setattr(torch.distributed.run, "main", main)
        return given

    return put


def test_how_torchrun_ends_is_how_a_child_ends(torchrun, monkeypatch, tmp_path):
    """By what it says, or by the signal that ended a process."""
    signals, config = [], make_config("cnn", "smoke")

    def train():
        together.train_together(2, None, config, Store(tmp_path), None)

    given = torchrun(None)
    train()
    words = given[0]
    assert words[:3] == ["--standalone", "--nproc-per-node", "2"]
    assert words[-3:-1] == ["-m", "bench.sweeps.together"]
    task = {"config": asdict(config), "results": str(tmp_path), "fid_weights": None, "track": None}
    assert json.loads(words[-1]) == task
    assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    torchrun(SignalException("stopped", signal.SIGTERM))
    with pytest.raises(Interrupted):
        train()
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    torchrun(failing(_1=1))
    with pytest.raises(Ended) as ended:
        train()
    assert outcome_of(ended.value).status == "crashed"
    assert not signals
    torchrun(failing(_0=1, _1=-9))
    with pytest.raises(Ended):
        train()
    assert signals == [(os.getpid(), signal.SIGKILL)]


@pytest.mark.parametrize(
    ("error", "told", "lost", "traced"),
    [
        (Busy("another"), ["busy", "another"], False, False),
        (NoSpace("0 MB"), ["blocked", "0 MB"], False, False),
        (Lost("gone; again"), ["crashed", "gone; again"], True, False),
        (ValueError("a shape"), ["crashed", "ValueError: a shape"], False, True),
    ],
)
def test_a_process_says_how_it_ended(monkeypatch, tmp_path, capsys, error, told, lost, traced):
    """With a traceback where nobody else knows of the reason."""
    trained = []

    def run_trial(*arguments, track):
        trained.append((*arguments, track))
        raise error

    task = {"config": asdict(make_config("cnn", "smoke", device="cpu")), "results": "here"}
    task |= {"fid_weights": "w.pth", "track": "wandb"}
    monkeypatch.setattr(sys, "argv", ["together", json.dumps(task)])
    monkeypatch.setenv(together.TOLD, str(tmp_path / "error.json"))
    monkeypatch.setattr(together, "run_trial", run_trial)
    monkeypatch.setattr(together, "_stop_with", lambda launcher: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        together.main()
    assert trained == [(make_config("cnn", "smoke", device="cpu"), "here", Path("w.pth"), "wandb")]
    said = json.loads((tmp_path / "error.json").read_text())
    assert (said["outcome"], said["lost"]) == (told, lost)
    assert ("Traceback" in capsys.readouterr().err) == traced
    assert ProcessFailure(0, 1, 1, str(tmp_path / "error.json")).error_file_data["outcome"] == told  # torchrun reads it


def test_without_torchrun_a_process_stops_and_then_ends(monkeypatch):
    """Within the time that a checkpoint takes."""
    done = []
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(os, "kill", lambda pid, number: done.append((pid, number)))
    monkeypatch.setattr(os, "_exit", done.append)
    monkeypatch.setattr(together.time, "sleep", lambda seconds: done.append(seconds))
    together._stop_with(17)
    assert done == [(os.getpid(), signal.SIGTERM), together.GRACE_SECONDS, 1]


# -- what trains ------------------------------------------------------------------------------------------------------


def processes_of(results: Path) -> list[int]:
    """Those that train a trial of ``results``, the first of them first."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"bench.sweeps.together" in words and str(results).encode() in b" ".join(words):
                environment = (folder / "environ").read_bytes().split(b"\0")
                found[next(word for word in environment if word.startswith(b"RANK="))] = int(folder.name)
    return [found[name] for name in sorted(found)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_what_is_killed_stopped_or_left_alone_goes_on_and_ends_finished(tiny, image_folder, tmp_path):
    """One of two is killed, two are stopped, the launcher of two is killed, and one process ends it."""
    store = Store(tmp_path)
    config = replace(tiny, data=f"folder:{image_folder}", steps=STEPS)
    run, seen = store.run(config), []

    def until(count: int, then):
        """Has ``then`` come at a row of at least so many steps."""
        return lambda rows: then() if rows and rows[-1]["step"] >= count else None

    def kill():
        seen.extend(processes_of(tmp_path))
        os.kill(processes_of(tmp_path)[1], signal.SIGKILL)

    def kill_launcher():
        launcher = int(Path(f"/proc/{processes_of(tmp_path)[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(launcher, signal.SIGKILL)

    def attempt(watch, processes: int = 2) -> Outcome:
        return run_in_child(config, store, threads=1, watch=watch, processes=processes)

    outcome = attempt(until(20, kill))
    assert len(seen) == 2
    assert outcome.status == "crashed"
    assert "ended by SIGKILL" in outcome.reason
    assert not processes_of(tmp_path)
    assert run.environment()["processor"].startswith("2 × ")
    run.forgive()

    first = run.history()[-1]["step"]
    assert attempt(until(first + 20, lambda: "interrupted")).status == "interrupted"
    assert not processes_of(tmp_path)
    assert (run.folder / "checkpoint.pt").is_file()

    second = run.history()[-1]["step"]
    assert first < second < STEPS
    assert attempt(until(second + 20, kill_launcher)).status == "crashed"
    run.forgive()
    while processes_of(tmp_path):  # which end by themselves, with a checkpoint
        time.sleep(0.1)
    assert attempt(lambda rows: None, 1).status == "finished"
    assert [row["step"] for row in run.history()] == [*range(1, STEPS + 1)]
    assert "Traceback" not in (run.folder / "log.txt").read_text()
