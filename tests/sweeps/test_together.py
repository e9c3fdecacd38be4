"""A trial of a study on two processes: it ends, stops and goes on as one on one process does."""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.run

from bench.core.errors import Interrupted, Lost, UserError
from bench.core.runs import Busy, NoSpace
from bench.core.store import Store
from bench.sweeps import together
from bench.sweeps.child import run_in_child
from bench.sweeps.outcome import Ended, Outcome, outcome_of
from bench.tokenizers.config import make_config

STEPS = 600


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
    """On two processes, of which one is killed, on two that are stopped, on two whose launcher is killed, and on one."""
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

    outcome = attempt(until(50, kill))
    assert len(seen) == 2
    assert outcome.status == "crashed"
    assert "ended by SIGKILL" in outcome.reason
    assert not processes_of(tmp_path)
    assert run.environment()["processor"].startswith("2 × ")
    run.forgive()

    first = run.history()[-1]["step"]
    assert attempt(until(first + 50, lambda: "interrupted")).status == "interrupted"
    assert not processes_of(tmp_path)
    assert (run.folder / "checkpoint.pt").is_file()

    second = run.history()[-1]["step"]
    assert first < second < STEPS
    assert attempt(until(second + 50, kill_launcher)).status == "crashed"
    run.forgive()
    while processes_of(tmp_path):  # which end by themselves, with a checkpoint
        time.sleep(0.1)
    assert attempt(lambda rows: None, 1).status == "finished"
    assert [row["step"] for row in run.history()] == [*range(3, STEPS + 1, 3)]
    assert "Traceback" not in (run.folder / "log.txt").read_text()
