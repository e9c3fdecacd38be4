"""One trial, or what instruments see of a run, in a process of its own: a crash, a lack of memory or a time-out costs
that trial and nothing else.

The child is forked from a server process that has everything imported (import takes longer than a small trial). How
it failed comes through a pipe; its output goes to ``log.txt`` in the run's folder, for people. It stops by itself, with
a checkpoint, when its parent dies.
"""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from bench.core.cli import refusal
from bench.core.environment import environment
from bench.core.errors import Interrupted
from bench.core.runs import FAILURES, Run
from bench.core.store import Store
from bench.tokenizers.config import Config
from bench.tokenizers.trial import run_trial

from .kinds import KINDS, AnyConfig, Row
from .outcome import Outcome, outcome_of
from .together import train_together

POLL_SECONDS = 0.2
FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)  # of a log; nobody waits for a pipe
GRACE_SECONDS = 30.0  # from asking a child to stop, while it writes its checkpoint, until it is killed


def run_in_child(
    config: AnyConfig,
    store: Store,
    fid_weights: Path | None = None,
    threads: int | None = None,
    watch: Callable[[list[Row]], str | None] = lambda rows: None,
    timeout: float | None = None,
    track: str | None = None,
    processes: int = 1,
) -> Outcome:
    """Runs one trial, of a tokenizer or of a prior over one in ``store``, in a child process and tells how it ended.
    The child of a tokenizer's may start several ``processes``, each with so many ``threads``.

    ``watch`` is called a few times a second with the rows that the history gained since; when it returns "interrupted"
    or "pruned", the child is stopped with that outcome; after ``timeout`` seconds, with "timed_out". Failures are
    recorded in the run's folder. ``track`` is ``run_trial``'s.
    """
    run, seen, began = store.run(config), 0, time.monotonic()
    run.folder.mkdir(parents=True, exist_ok=True)

    def ask() -> str | None:
        nonlocal seen
        rows = [row for row in run.history() if row["step"] > seen]
        seen = rows[-1]["step"] if rows else seen
        return watch(rows) or ("timed_out" if timeout and time.monotonic() - began > timeout else None)

    work = partial(train_together, processes, track) if processes > 1 else partial(_train, track)
    outcome = _in_child(work, config, store, fid_weights, threads, ask)
    if run.finished:
        return Outcome("finished")
    if outcome.status == "finished":
        left = "it left no scores; see {}/log.txt" if run.folder.exists() else "{} was removed as its trial ended"
        outcome = Outcome("crashed", left.format(run.folder))
    elif outcome.status == "timed_out":
        advice = "--retry-failed goes on with it, or take fewer --steps"
        outcome = outcome._replace(reason=f"not finished after {timeout:.0f} s; {advice}")
    elif outcome.status == "pruned":
        reason = f"given up at step {seen}: worse than others of its study were at that step"
        outcome = outcome._replace(reason=reason)
        (run.folder / "checkpoint.pt").unlink(missing_ok=True)
    if outcome.status in FAILURES:
        try:
            if not (run.folder / "config.json").is_file():  # it fell before it could write that itself
                run.write("config.json", {"config": asdict(config.resolved().stored()), "environment": environment()})
            run.fail(*outcome)
        except OSError as error:  # the disk that was full for the child
            return Outcome("blocked", refusal(error))
    return outcome


def look_in_child(
    config: Config,
    store: Store,
    instruments: Sequence[str],
    fid_weights: Path | None = None,
    threads: int | None = None,
    ask: Callable[[], str | None] = lambda: None,
) -> Outcome:
    """Has ``instruments`` look at the finished run of ``config`` in a child process and tells how that ended, which is
    recorded nowhere. ``ask`` is called a few times a second; what it returns stops the child, and is the outcome."""
    return _in_child(partial(_look, tuple(instruments)), config, store, fid_weights, threads, ask)


def _in_child(
    work: Callable[[AnyConfig, Store, Path | None], None],
    config: AnyConfig,
    store: Store,
    fid_weights: Path | None,
    threads: int | None,
    ask: Callable[[], str | None],
) -> Outcome:
    """Does ``work`` in a child process and tells how it ended; as soon as ``ask`` returns a status, with that one."""
    run, killed_before, context = store.run(config), _memory_kills(), _context()
    told, tell = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(work, config, store.root, fid_weights, threads, tell), daemon=False)
    asked, alive = None, True
    with _unterminated():
        try:
            child.start()
        except (EOFError, ConnectionError):  # the server that forks was killed; this starts another
            child.start()
    tell.close()
    try:
        while alive and asked is None:
            wait([child.sentinel], POLL_SECONDS)
            alive = child.is_alive()  # asked first: what it wrote last is read once more
            asked = ask()
    finally:
        if asked is not None or sys.exc_info()[0] is not None:
            child.terminate()  # asks it to stop, and gives it time to write its checkpoint
            child.join(GRACE_SECONDS)
            if child.is_alive():
                child.kill()
        child.join()

    if asked is not None:
        return Outcome(asked)
    if child.exitcode == 0:
        return Outcome("finished")
    return _ended(told, child.exitcode, run, _memory_kills() > killed_before)


def _train(track: str | None, config: AnyConfig, store: Store, fid_weights: Path | None) -> None:
    KINDS[config.SHELF].train(config, store, fid_weights, track)


def _look(instruments: Sequence[str], config: Config, store: Store, fid_weights: Path | None) -> None:
    def stop(number: int, frame: object) -> None:
        raise Interrupted("stopped")  # in place of an end that would leave half a file behind

    signal.signal(signal.SIGTERM, stop)
    run_trial(config, store, fid_weights, instruments=instruments)


@contextmanager
def _unterminated() -> Iterator[None]:
    """Has what is started here outlive a SIGTERM to all processes of a job, as clusters send it: the server that forks,
    since how its children end is known to it alone. Those heed it again."""
    blocks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]) if blocks else ()
    try:
        yield
    finally:
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.sweeps.child"])
    return context


def _child(
    work: Callable[[AnyConfig, Store, Path | None], None],
    config: AnyConfig,
    root: Path,
    fid_weights: Path | None,
    threads: int | None,
    tell: Connection,
) -> None:
    """The child's whole life; says through ``tell`` how it ended unless it ended well."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal reaches the parent alone, which then asks children to stop
        # tqdm's lock then has no name that could outlive the child
        multiprocessing.set_start_method("fork", force=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    store = Store(root)
    try:
        log = os.open(store.run(config).folder / "log.txt", FLAGS, 0o666)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    try:
        work(config, store, fid_weights)
    except BaseException as error:
        outcome = outcome_of(error)
        with suppress(BrokenPipeError):  # of a parent that has died
            tell.send(outcome)
        with suppress(OSError):  # the log is for people, and may have no room left
            if outcome.status == "crashed":
                traceback.print_exception(error)
            print(f"{outcome.status}: {outcome.reason}", file=sys.stderr, flush=True)
        os._exit(1)  # without flushing what the log has no room for


def _stop_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _ended(told: Connection, exitcode: int, run: Run, memory_kill: bool) -> Outcome:
    """Outcome of a child that was not asked to stop and left no metrics: what it said, or else what its exit code
    means."""
    outcome = None
    with suppress(EOFError):  # it said nothing
        outcome = told.recv() if told.poll() else None
    if exitcode == -signal.SIGTERM or (outcome and outcome.status == "interrupted"):
        return Outcome("crashed", "terminated from outside")
    if outcome:
        return outcome
    name = signal.Signals(-exitcode).name if exitcode < 0 else ""
    if memory_kill and name == "SIGKILL":
        return Outcome("out_of_memory", "killed for lack of memory; try a smaller --batch-size or fewer --workers")
    maybe = " (often the system's, for lack of memory)" if name == "SIGKILL" else ""
    how = f"ended by {name}{maybe}" if name else f"exit code {exitcode}"
    return Outcome("crashed", f"{how}; see {run.folder}/log.txt")


def _memory_kills(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Processes that the kernel has killed for lack of memory in the control group of this one, which the file
    ``groups`` names, or in the outermost that is ``mounted`` here; 0 where it does not tell."""
    with suppress(OSError, ValueError):
        for line in groups.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue  # version 1 has a hierarchy per controller, version 2 a single one without a name
            top, file = (mounted / "memory", "memory.oom_control") if controllers else (mounted, "memory.events")
            for folder in (top / name.lstrip("/"), top):  # a container may see its own group as the outermost
                with suppress(OSError, TypeError):
                    return int(re.search(r"^oom_kill (\d+)", (folder / file).read_text(), re.M)[1])
    return 0
