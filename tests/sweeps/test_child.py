"""A trial in a process of its own: however it ends, it is told apart, recorded, and costs nothing else."""

import errno
import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.core.environment import environment
from bench.core.errors import Diverged, Interrupted, Lost, UserError
from bench.core.files import atomic_path
from bench.core.runs import FAILURES, Busy, NoSpace, Run
from bench.core.store import Store
from bench.priors.config import PriorConfig
from bench.sweeps import child, kinds
from bench.sweeps.child import look_in_child, run_in_child
from bench.sweeps.kinds import KINDS
from bench.sweeps.outcome import ENDINGS, LONGEST, outcome_of
from bench.tokenizers.config import make_config
from bench.tokenizers.trial import run_trial
from tests.fabricate import least


@pytest.fixture
def config(tiny, image_folder):
    return replace(tiny, data=f"folder:{image_folder}")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


# -- how a child ends, with trials that do not train -----------------------------------------------------------------

ROWS = [{"step": step, "reconstruction": 1 / step} for step in (1, 2, 3)]


@pytest.fixture
def trial(monkeypatch):
    """Has children forked from here, which is quick, with ``trial(work)`` in place of training: work(run folder)."""
    monkeypatch.setattr(child, "_context", lambda: multiprocessing.get_context("fork"))

    def put(work):
        def trial(config, store, fid_weights, track):
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  (pytest has put another there)
            work(store.run(config))

        def prior(config, tokenizer, store, fid_weights, track):
            (store.run(config).folder / "over.txt").write_text(tokenizer.folder.name)
            trial(config, store, fid_weights, track)

        monkeypatch.setitem(KINDS, "runs", KINDS["runs"]._replace(train=trial))
        monkeypatch.setattr(kinds, "run_prior", prior)

    return put


def raising(error):
    def work(run):
        raise error

    return work


def finishing(run: Run) -> None:
    run.write("config.json", {"config": {}, "environment": {}})
    (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run.write("metrics.json", least(run.folder.parent.name))


def waiting(run: Run) -> None:
    """Trains until it is asked to stop, and writes a checkpoint then."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    (run.folder / "checkpoint.pt").write_text("")
    (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    while not stopped:
        time.sleep(0.01)
    raise Interrupted("stopped at step 3")


ENDED = [
    (UserError("wrong, choose another"), "refused", "wrong, choose another"),
    (Lost("gone; the same continues"), "crashed", "gone; the same continues"),
    (Diverged("not finite by step 3"), "diverged", "not finite by step 3"),
    (Busy("another"), "busy", None),
    (NoSpace("0 MB free"), "blocked", "0 MB free"),
    (MemoryError(), "out_of_memory", "MemoryError"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out_of_memory", "CUDA out of memory. Tried"),
    (RuntimeError("[enforce fail] can't allocate memory: 4 TB"), "out_of_memory", "allocate memory"),
    (RuntimeError("DefaultCPUAllocator: not enough memory"), "out_of_memory", "not enough memory"),
    (OSError(12, "Cannot allocate memory"), "out_of_memory", "Cannot allocate memory"),
    (ValueError("a shape"), "crashed", "ValueError: a shape"),
    (SystemExit(9), "crashed", "9"),
]


def test_a_signal_to_all_of_a_job_leaves_the_server_that_forks_but_not_its_children(trial, store):
    """It is started with SIGTERM blocked, which its children heed again."""
    masks = []
    with child._unterminated():
        masks.append(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    masks.append(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    assert masks == [True, False]
    trial(lambda run: print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()), file=sys.stderr))
    config = make_config("cnn", "smoke")
    run_in_child(config, store)
    assert (store.run(config).folder / "log.txt").read_text() == "False\n"


@pytest.mark.parametrize(("error", "status", "reason"), ENDED, ids=[type(error).__name__ for error, *_ in ENDED])
def test_every_error_has_its_outcome(trial, store, error, status, reason):
    """Failures are recorded with their reason; what is nobody's failure leaves the run as it was."""
    trial(raising(error))
    config = make_config("cnn", "smoke")
    outcome, run = run_in_child(config, store), store.run(config)
    assert outcome.status == status
    assert reason is None or reason in outcome.reason
    assert run.status == (status if status in FAILURES else "unfinished")
    assert run.reason == (outcome.reason if status in FAILURES else "")
    assert (run in store.runs()) == (status in FAILURES)  # it counts, also when it fell before it had a config.json
    if status in FAILURES:
        assert run.config()["backbone"] == "cnn"


def test_the_log_keeps_what_earlier_attempts_said(trial, store):
    """The reason of an attempt is its own, the log is that of all."""
    config = make_config("cnn", "smoke")
    for words in ("the first", "the second"):
        trial(raising(ValueError(words)))
        assert run_in_child(config, store).reason == f"ValueError: {words}"
    log = (store.run(config).folder / "log.txt").read_text()
    assert log.index("the first") < log.index("the second")


def test_a_child_computes_on_the_threads_that_it_was_given(trial, store):
    trial(lambda run: (run.folder / "threads.txt").write_text(str(torch.get_num_threads())))
    config = make_config("cnn", "smoke")
    for threads in (3, 2):
        run_in_child(config, store, threads=threads)
        assert (store.run(config).folder / "threads.txt").read_text() == str(threads)


def test_a_trial_may_be_pruned_before_its_first_checkpoint(trial, store):
    """There is nothing to drop then."""

    def endless(run: Run) -> None:
        while True:
            time.sleep(0.01)

    trial(endless)
    config = make_config("cnn", "smoke")
    assert run_in_child(config, store, watch=lambda rows: "pruned").status == "pruned"
    assert store.run(config).status == "pruned"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_signal_from_outside_is_a_crash(trial, store, number):
    def work(run):
        faulthandler.disable()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    trial(work)
    config = make_config("cnn", "smoke")
    outcome = run_in_child(config, store)
    assert outcome.status == store.run(config).status == "crashed"
    assert "outside" in outcome.reason if number == signal.SIGTERM else number.name in outcome.reason


def test_stopped_by_itself_is_a_crash_for_who_did_not_ask(trial, store):
    """Somebody else asked the child: to the study that is no interruption of its own."""
    trial(raising(Interrupted("stopped at step 3")))
    assert run_in_child(make_config("cnn", "smoke"), store) == ("crashed", "terminated from outside")


@pytest.mark.parametrize(("before", "after", "status"), [(3, 4, "out_of_memory"), (3, 3, "crashed")])
def test_a_kill_for_lack_of_memory_is_told_from_others(trial, store, monkeypatch, before, after, status):
    counts = iter([before, after])
    monkeypatch.setattr(child, "_memory_kills", lambda: next(counts))
    trial(lambda run: os.kill(os.getpid(), signal.SIGKILL))
    assert run_in_child(make_config("cnn", "smoke"), store).status == status


def test_scores_are_the_last_word(trial, store):
    """Whatever happens to a child after metrics.json is written: the run is finished."""

    def work(run):
        finishing(run)
        os.kill(os.getpid(), signal.SIGKILL)

    trial(work)
    config = make_config("cnn", "smoke")
    assert run_in_child(config, store) == ("finished", "")
    assert store.run(config).status == "finished"


def test_a_prior_is_trained_over_its_tokenizer(trial, store):
    trial(finishing)
    config = PriorConfig("cnn-ema-0", "rnn")
    assert run_in_child(config, store).status == "finished"
    assert (store.run(config).folder / "over.txt").read_text() == "cnn-ema-0"


@pytest.mark.parametrize("asked", ["pruned", "interrupted", "timed_out"])
def test_who_asks_a_child_to_stop_says_what_that_means(trial, store, monkeypatch, asked):
    """Only a pruned run is given up: the others can go on from their checkpoint. An interrupted one is no failure."""
    trial(waiting)
    config, seen = make_config("cnn", "smoke"), []
    monkeypatch.setattr(
        child, "time", SimpleNamespace(monotonic=lambda: 51.0 if seen and asked == "timed_out" else 0.0)
    )

    def watch(rows):
        seen.extend(row["step"] for row in rows)
        return asked if seen and asked != "timed_out" else None

    outcome, run = run_in_child(config, store, watch=watch, timeout=50), store.run(config)
    assert outcome.status == asked
    assert seen == [1, 2, 3]
    assert run.status == {"interrupted": "unfinished"}.get(asked, asked)
    assert (run.folder / "checkpoint.pt").exists() == (asked != "pruned")
    if asked == "pruned":
        assert "at step 3" in outcome.reason
    if asked == "timed_out":
        assert "after 50 s" in outcome.reason


def test_a_child_that_does_not_listen_is_ended(trial, store, monkeypatch):
    def deaf(run):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (run.folder / "history.jsonl").write_text('{"step": 1}\n')
        time.sleep(20)
        (run.folder / "late").write_text("")

    trial(deaf)
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.1)
    config = make_config("cnn", "smoke")
    assert run_in_child(config, store, watch=lambda rows: "interrupted" if rows else None).status == "interrupted"
    assert not multiprocessing.active_children()
    assert not (store.run(config).folder / "late").exists()


def test_the_last_rows_are_given_also_when_the_child_ends_between_two_looks(trial, store, monkeypatch):
    read, looks, seen = Run.history, [], []

    def work(run):
        while not (run.folder / "looked").exists():
            time.sleep(0.01)
        finishing(run)

    def look(run):
        looks.append(run)
        if len(looks) > 1:
            return read(run)
        (run.folder / "looked").write_text("")
        for process in multiprocessing.active_children():
            process.join()  # all that it writes it writes after this look
        return []

    trial(work)
    monkeypatch.setattr(Run, "history", look)
    outcome = run_in_child(make_config("cnn", "smoke"), store, watch=lambda rows: seen.extend(rows))
    assert (outcome.status, seen) == ("finished", ROWS)


def test_rows_are_given_once_and_only_when_whole(trial, store):
    """A line that is still being written comes with the next look."""
    lines, looks = [json.dumps(row) + "\n" for row in ROWS], []

    def work(run):
        with (run.folder / "history.jsonl").open("w") as history:
            history.write(lines[0] + lines[1] + lines[2][:5])
            history.flush()
            while not (run.folder / "looked").exists():
                time.sleep(0.01)
            history.write(lines[2][5:])
        finishing(run)

    def watch(rows):
        looks.extend([rows] if rows else [])
        if rows:
            (store.run(config).folder / "looked").write_text("")

    trial(work)
    config = make_config("cnn", "smoke")
    assert store.run(config).history() == []
    assert run_in_child(config, store, watch=watch).status == "finished"
    assert looks == [ROWS[:2], ROWS[2:]]


def test_what_a_child_can_say_is_a_failure_or_one_of_three_that_are_none():
    said = {*ENDINGS.values(), "crashed"}
    assert said - set(FAILURES) == {"interrupted", "busy", "blocked"}
    assert set(FAILURES) - said == {"timed_out", "pruned", "damaged"}  # which the parent decides, and the store


@pytest.mark.parametrize("error", [UserError("wrong, choose another"), ValueError("a shape")])
def test_the_reason_arrives_though_the_log_cannot_be_written(trial, store, error):
    trial(raising(error))
    config = make_config("cnn", "smoke")
    (store.run(config).folder / "log.txt").mkdir(parents=True)
    outcome = run_in_child(config, store)
    assert outcome.status == store.run(config).status == ("refused" if isinstance(error, UserError) else "crashed")
    assert str(error) in outcome.reason == store.run(config).reason


def test_a_pipe_in_the_place_of_a_log_is_not_waited_for(trial, store):
    trial(raising(UserError("wrong, choose another")))
    config = make_config("cnn", "smoke")
    store.run(config).folder.mkdir(parents=True)
    os.mkfifo(store.run(config).folder / "log.txt")
    assert run_in_child(config, store) == ("refused", "wrong, choose another")


def test_the_reason_arrives_though_the_disk_of_the_log_is_full(trial, store):
    trial(raising(UserError("wrong, choose another")))
    config = make_config("cnn", "smoke")
    store.run(config).folder.mkdir(parents=True)
    (store.run(config).folder / "log.txt").symlink_to("/dev/full")
    assert run_in_child(config, store) == ("refused", "wrong, choose another")


def test_a_reason_is_the_first_line_and_no_longer_than_a_pipe_takes(trial, store):
    """However much an error says: nobody reads before the child has ended."""
    for told, reason in (("one line\nmore", "one line"), ("x" * 1_000_000, "x" * LONGEST)):
        trial(raising(UserError(told)))
        assert run_in_child(make_config("cnn", "smoke"), store) == ("refused", reason)


def test_the_log_tells_people_why(trial, store):
    """With the traceback of a crash, and without one where the reason says it all."""
    for error, traced in ((ValueError("a shape"), True), (UserError("wrong, choose another"), False)):
        config = make_config("cnn", "smoke", seed=int(traced))
        trial(raising(error))
        outcome = run_in_child(config, store)
        log = (store.run(config).folder / "log.txt").read_text()
        assert log.endswith(f"{outcome.status}: {outcome.reason}\n")
        assert ("Traceback" in log) == traced


def test_an_unknown_exit_code_is_a_crash(store):
    run = store.run(make_config("cnn", "smoke"))
    told, tell = multiprocessing.Pipe(duplex=False)
    tell.close()  # without a word
    outcome = child._ended(told, 1, run, memory_kill=False)
    assert outcome.status == "crashed"
    assert re.search(r"exit code 1\b", outcome.reason)


# -- what a child and its run are given --------------------------------------------------------------------------------


def test_a_folder_that_is_removed_as_its_trial_ends_is_told(trial, store):
    """And no log of it is referred to."""

    def work(run):
        finishing(run)
        shutil.rmtree(run.folder)

    trial(work)
    config = make_config("cnn", "smoke", device="cpu")
    told = f"{store.run(config).folder} was removed as its trial ended"
    assert run_in_child(config, store) == ("crashed", told)


def test_no_lock_of_a_child_has_a_name_that_outlives_it(trial, store, monkeypatch):
    """Such as tqdm's, of which Python would complain when all is done: a child ends without tidying up."""
    monkeypatch.setattr(multiprocessing.context.ForkProcess, "_start_method", "forkserver")  # as a child of the server
    trial(lambda run: (run.folder / "lock.txt").write_text(str(multiprocessing.RLock()._semlock.name)))
    run_in_child(make_config("cnn", "smoke", device="cpu"), store)
    (lock,) = store.root.glob("runs/*/lock.txt")
    assert lock.read_text() == "None"


def test_a_child_has_a_session_and_a_log_of_its_own(trial, store):
    """Ctrl-C in the terminal reaches the parent alone; all that the child prints goes to the log."""

    def work(run):
        os.write(1, b"said\n")
        os.write(2, b"warned\n")
        (run.folder / "session.txt").write_text(str(os.getsid(0)))
        finishing(run)

    trial(work)
    config = make_config("cnn", "smoke")
    assert run_in_child(config, store).status == "finished"
    folder = store.run(config).folder
    assert int((folder / "session.txt").read_text()) != os.getsid(0)
    assert (folder / "log.txt").read_text() == "said\nwarned\n"


def test_a_child_is_given_its_config_the_store_inceptions_weights_and_where_to_tell(trial, store, monkeypatch):
    def train(config, store, fid_weights, track):
        run = store.run(config)
        (run.folder / "given.txt").write_text(f"{config.seed} {store.root} {fid_weights} {track}")
        finishing(run)

    monkeypatch.setattr(child, "_context", lambda: multiprocessing.get_context("fork"))
    monkeypatch.setitem(KINDS, "runs", KINDS["runs"]._replace(train=train))
    config = make_config("cnn", "smoke", seed=5)
    assert run_in_child(config, store, Path("weights.pth"), track="wandb").status == "finished"
    assert (store.run(config).folder / "given.txt").read_text() == f"5 {store.root} weights.pth wandb"


def test_a_run_that_fell_before_its_first_file_is_described_as_any_other(trial, store):
    """With what every auto means on this machine, and with the machine; what it wrote itself is left alone."""
    trial(raising(ValueError("a shape")))
    config = make_config("cnn", "smoke")
    run_in_child(config, store)
    run = store.run(config)
    assert run.config() == asdict(config.resolved())
    assert run.environment() == environment()
    run.write("config.json", {"config": {"its": "own"}, "environment": {}})
    run_in_child(config, store)
    assert run.config() == {"its": "own"}


def test_a_child_does_not_outlive_an_error_of_who_watches_it(trial, store):
    def work(run):
        (run.folder / "history.jsonl").write_text('{"step": 1}\n')
        time.sleep(20)
        (run.folder / "late").write_text("")

    trial(work)
    config = make_config("cnn", "smoke")
    with pytest.raises(ZeroDivisionError):
        run_in_child(config, store, watch=lambda rows: 1 / 0 if rows else None)
    assert not multiprocessing.active_children()
    assert not (store.run(config).folder / "late").exists()


def test_a_child_asks_itself_to_stop_when_its_parent_has_died(monkeypatch):
    """So that it writes a checkpoint first."""
    ends, asked = multiprocessing.Pipe(duplex=False), []
    ends[1].close()
    monkeypatch.setattr(child.multiprocessing, "parent_process", lambda: SimpleNamespace(sentinel=ends[0]))
    monkeypatch.setattr(child.os, "kill", lambda *given: asked.append(given))
    child._stop_with_parent()
    assert asked == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize(
    ("exitcode", "memory_kill", "status", "reason"),
    [
        (1, False, "crashed", "exit code 1; see {}/log.txt"),
        (1, True, "crashed", "exit code 1; see {}/log.txt"),
        (-11, True, "crashed", "ended by SIGSEGV; see {}/log.txt"),
        (-9, False, "crashed", "ended by SIGKILL (often the system's, for lack of memory); see {}/log.txt"),
        (
            -9,
            True,
            "out_of_memory",
            "killed for lack of memory; try a smaller --batch-size or fewer --workers",
        ),
    ],
)
def test_an_end_without_a_word_is_told_from_its_exit_code(store, exitcode, memory_kill, status, reason):
    run = store.run(make_config("cnn", "smoke"))
    told, tell = multiprocessing.Pipe(duplex=False)
    tell.close()
    assert child._ended(told, exitcode, run, memory_kill) == (status, reason.format(run.folder))


def test_what_an_error_is_and_says_is_its_reason():
    assert outcome_of(KeyError("step")) == ("crashed", "KeyError: 'step'")
    assert outcome_of(RuntimeError()) == ("crashed", "RuntimeError: ")
    assert outcome_of(MemoryError()) == ("out_of_memory", "MemoryError")
    assert outcome_of(Diverged("not finite")) == ("diverged", "not finite")


# -- instruments that look at a run that is finished -------------------------------------------------------------------


@pytest.fixture
def look(monkeypatch, store):
    """``look(work)`` has a child do work(run folder) in place of instruments, at a run that is finished."""
    monkeypatch.setattr(child, "_context", lambda: multiprocessing.get_context("fork"))

    def put(work, **options):
        config = make_config("cnn", "smoke")
        store.run(config).folder.mkdir(parents=True, exist_ok=True)
        finishing(store.run(config))
        monkeypatch.setattr(child, "run_trial", lambda config, store, *_, **words: work(store.run(config), **words))
        return look_in_child(config, store, ("atlas",), **options), store.run(config)

    return put


def test_a_look_is_given_its_instruments_and_threads(look):
    def work(run, instruments):
        (run.folder / "asked.txt").write_text(f"{instruments} {torch.get_num_threads()}")

    outcome, run = look(work, threads=3)
    assert outcome == ("finished", "")
    assert (run.folder / "asked.txt").read_text() == "('atlas',) 3"


@pytest.mark.parametrize(("error", "status", "reason"), ENDED, ids=[type(error).__name__ for error, *_ in ENDED])
def test_a_look_that_fails_has_its_outcome_and_leaves_the_run_finished(look, error, status, reason):
    def work(run, instruments):
        raise error

    outcome, run = look(work)
    assert outcome.status == status
    assert reason is None or reason in outcome.reason
    assert run.status == "finished"
    assert not (run.folder / "failure.json").exists()


def test_a_look_that_is_killed_is_no_look(look):
    outcome, _ = look(lambda run, instruments: os.kill(os.getpid(), signal.SIGKILL))
    assert outcome.status == "crashed"
    assert "SIGKILL" in outcome.reason


def test_a_look_that_is_stopped_leaves_no_part_of_a_file(look):
    def work(run, instruments):
        with atomic_path(run.folder / "atlas.png"):
            (run.folder / "begun").write_text("")
            time.sleep(20)

    begun = []

    def ask():
        begun.extend(folder for folder in store_folder.glob("*/begun"))
        return "interrupted" if begun else None

    store_folder = look(lambda run, instruments: None)[1].folder.parent
    outcome, run = look(work, ask=ask)
    assert outcome.status == "interrupted"
    assert not [path.name for path in run.folder.iterdir() if path.suffix == ".png"]
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_child_sees_what_this_process_does(config, store):
    """Two readings of the same weights, each on one thread: equal to the last digit, the picture too."""
    run = run_trial(config, store, instruments=("robustness", "equivariance"))
    here = {name: reading["metrics"] for name, reading in run.instruments().items()}
    picture = (run.folder / "robustness.png").read_bytes()
    (run.folder / "instruments.json").unlink()
    (run.folder / "robustness.png").unlink()
    outcome = look_in_child(config, store, ("robustness", "equivariance"), threads=torch.get_num_threads())
    assert outcome.status == "finished", outcome.reason
    assert {name: reading["metrics"] for name, reading in run.instruments().items()} == here
    assert (run.folder / "robustness.png").read_bytes() == picture


# -- with trials that train, in children that first wait for torch to be imported ------------------------------------


@pytest.mark.slow
def test_a_finished_trial(config, store):
    steps = []
    outcome = run_in_child(config, store, threads=1, watch=lambda rows: steps.extend(row["step"] for row in rows))
    assert outcome.status == "finished"
    run = store.run(config)
    assert run.finished
    assert run.environment()["threads"] == 1
    assert steps == [row["step"] for row in run.history()]  # each once, in order
    assert (run.folder / "log.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"lr": 1e30, "grad_clip": 0.0, "precision": "fp32"}, "diverged", "--lr"),
        ({"codebook_size": 2**24, "code_dim": 16384}, "refused", "5,498 GB"),  # in training, which no machine has
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


@pytest.mark.slow
def test_a_time_out_keeps_the_checkpoint(config, store):
    config = replace(config, steps=100_000)
    outcome = run_in_child(config, store, threads=1, timeout=4)
    assert outcome.status == "timed_out"
    assert "--retry-failed" in outcome.reason
    assert (store.run(config).folder / "checkpoint.pt").exists()


@pytest.mark.slow
def test_pruning_stops_the_child_and_drops_its_checkpoint(config, store):
    config = replace(config, steps=100_000)
    outcome = run_in_child(config, store, threads=1, watch=lambda rows: "pruned" if rows else None)
    assert outcome.status == store.run(config).status == "pruned"
    assert not (store.run(config).folder / "checkpoint.pt").exists()


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_that_another_process_has_is_busy_and_not_touched(config, store):
    run = store.run(config)
    run.folder.mkdir(parents=True)
    with run.locked():
        assert run_in_child(config, store, threads=1).status == "busy"
    assert run.status == "unfinished"
    assert run_in_child(config, store, threads=1).status == "finished"


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("groups", "files", "kills"),
    [
        ("0::/\n", {"memory.events": "low 0\nmax 8\noom 7\noom_kill 3\noom_group_kill 1\n"}, 3),
        ("0::/user/job\n", {"user/job/memory.events": "oom_kill 5\n", "memory.events": "oom_kill 9\n"}, 5),
        ("0::/outside/the/container\n", {"memory.events": "oom_kill 2\n"}, 2),
        ("9:cpu:/x\n4:memory:/job\n", {"memory/job/memory.oom_control": "under_oom 0\noom_kill 7\n"}, 7),
        ("4:cpu,memory:/job\n0::/\n", {"memory/memory.oom_control": "oom_kill 1\n"}, 1),
        ("9:cpu:/x\n", {"memory.events": "oom_kill 8\n"}, 0),
        ("0::/\n", {"memory.events": "low 0\n"}, 0),
        ("0::/\n", {}, 0),
        ("", {}, 0),
        ("nonsense\n", {}, 0),
    ],
)
def test_kills_for_lack_of_memory_are_those_of_the_own_control_group(tmp_path, groups, files, kills):
    """Nested or not, of either version, and in a container, which sees its own group as the outermost. Counted are
    processes, and neither how often memory ran out nor how often a whole group was killed."""
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text)
    assert child._memory_kills(tmp_path / "cgroup", tmp_path / "mounted") == kills
    assert child._memory_kills(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more_blocks_a_study_and_is_no_failure_of_the_trial(trial, store, number):
    def full(run):
        raise OSError(number, os.strerror(number), str(run.folder / "checkpoint.pt"))

    trial(full)
    config = make_config("cnn", "smoke")
    outcome = run_in_child(config, store)
    assert outcome.status == "blocked"
    assert outcome.reason.startswith(f"{os.strerror(number)} while writing {store.run(config).folder}/checkpoint.pt")
    assert not (store.run(config).folder / "failure.json").exists()


def test_a_failure_that_cannot_be_written_down_blocks_too(trial, store, monkeypatch):
    def crash(run):
        raise ZeroDivisionError

    def full(run, *given):
        raise OSError(errno.ENOSPC, "No space left on device", str(run.folder / "failure.json"))

    trial(crash)
    monkeypatch.setattr(Run, "fail", full)
    outcome = run_in_child(make_config("cnn", "smoke"), store)
    assert outcome.status == "blocked"
    assert outcome.reason.startswith("No space left on device while writing")


def test_how_a_child_ended_does_not_hang_on_its_log(trial, store):
    """A disk that is full for the log as well: here a device that takes nothing."""

    def crash(run):
        full = os.open("/dev/full", os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(full, stream)
        raise ZeroDivisionError("for a reason")

    trial(crash)
    outcome = run_in_child(make_config("cnn", "smoke"), store)
    assert outcome == ("crashed", "ZeroDivisionError: for a reason")


def test_a_server_of_forks_that_was_killed_is_started_again(trial, store, monkeypatch):
    """Such as by the kernel, for lack of memory: one look later a trial can begin."""
    trial(finishing)
    context = multiprocessing.get_context("fork")
    left = [EOFError("unexpected EOF"), None]

    class Process(context.Process):
        def start(self):
            if error := left.pop(0):
                raise error
            super().start()

    monkeypatch.setattr(child, "_context", lambda: SimpleNamespace(Pipe=context.Pipe, Process=Process))
    assert run_in_child(make_config("cnn", "smoke"), store).status == "finished"
    assert left == []
