"""A trial in a process of its own: however it ends, it is told apart, recorded, and costs nothing else."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest

from bench.child import run_in_child
from bench.store import FAILURES, Busy, Store

pytestmark = pytest.mark.slow  # the first child waits for torch to be imported


@pytest.fixture
def config(tiny, image_folder):
    return replace(tiny, data=f"folder:{image_folder}")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_a_finished_trial(config, store):
    steps = []
    outcome = run_in_child(config, store, threads=1, watch=lambda rows: steps.extend(row["step"] for row in rows))
    assert outcome.status == "finished"
    run = store.run(config)
    assert run.finished
    assert run.environment()["threads"] == 1
    assert steps == [row["step"] for row in run.history()]  # each once, in order
    assert (run.folder / "log.txt").exists()


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"lr": 1e30, "grad_clip": 0.0, "precision": "fp32"}, "diverged", "--lr"),
        ({"codebook_size": 10_000_000, "code_dim": 100_000}, "out_of_memory", "allocate"),  # 4 TB, refused at once
        ({"data": "folder:/nowhere"}, "refused", "/nowhere"),
    ],
)
def test_failures_are_told_apart(config, store, changes, status, word):
    config = replace(config, **changes)
    outcome = run_in_child(config, store, threads=1)
    run = store.run(config)
    assert (outcome.status, run.status) == (status, status)
    assert word in outcome.reason
    assert outcome.reason == run.reason
    assert status in FAILURES
    assert run in store.runs()  # it is counted


def test_a_time_out_keeps_the_checkpoint(config, store):
    config = replace(config, steps=100_000)
    outcome = run_in_child(config, store, threads=1, timeout=4)
    assert outcome.status == "timed_out"
    assert "--retry-failed" in outcome.reason
    assert (store.run(config).folder / "checkpoint.pt").exists()


def test_pruning_stops_the_child_and_drops_its_checkpoint(config, store):
    config = replace(config, steps=100_000)
    outcome = run_in_child(config, store, threads=1, watch=lambda rows: "pruned" if rows else None)
    assert outcome.status == store.run(config).status == "pruned"
    assert not (store.run(config).folder / "checkpoint.pt").exists()


def test_an_interrupted_trial_is_no_failure_and_goes_on(config, store):
    config = replace(config, steps=400)
    outcome = run_in_child(config, store, threads=1, watch=lambda rows: "interrupted" if rows else None)
    assert outcome.status == "interrupted"
    run = store.run(config)
    assert run.status == "unfinished"
    reached = run.history()[-1]["step"]
    assert reached < 400
    assert run_in_child(config, store, threads=1).status == "finished"
    assert "stopped at step" in (run.folder / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_killed_child_is_a_crash(config, store, number):
    config = replace(config, steps=100_000)

    def kill(rows):
        if rows:
            for child in multiprocessing.active_children():
                os.kill(child.pid, number)

    outcome = run_in_child(config, store, threads=1, watch=kill)
    assert outcome.status == store.run(config).status == "crashed"
    assert "outside" in outcome.reason if number == signal.SIGTERM else number.name in outcome.reason


def test_a_run_that_another_process_has_is_busy_and_not_touched(config, store):
    run = store.run(config)
    run.folder.mkdir(parents=True)
    with run.locked():
        assert run_in_child(config, store, threads=1).status == "busy"
    assert run.status == "unfinished"
    assert run_in_child(config, store, threads=1).status == "finished"


def test_a_child_outlives_neither_its_parent_nor_an_error_there(config, store):
    config = replace(config, steps=100_000)
    with pytest.raises(ZeroDivisionError):
        run_in_child(config, store, threads=1, watch=lambda rows: 1 / 0 if rows else None)
    assert not multiprocessing.active_children()

    context = multiprocessing.get_context("spawn")
    parent = context.Process(target=run_in_child, args=(config, store), kwargs={"threads": 1})
    parent.start()
    history = store.run(config).folder / "history.jsonl"
    before = history.read_text()
    while history.read_text() == before:
        time.sleep(0.2)
    parent.kill()
    parent.join()
    for _ in range(100):  # the child writes its checkpoint and gives the folder free
        try:
            with store.run(config).locked():
                break
        except Busy:
            time.sleep(0.2)
    else:
        pytest.fail("the child still has the run")
    assert "stopped at step" in (store.run(config).folder / "log.txt").read_text()
