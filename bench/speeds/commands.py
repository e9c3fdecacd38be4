"""Contests of whole commands, each in a process of its own, as people start them."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .contest import Contest, Disagreement, Other

TRIALS = 8  # of the study
ROOT = Path(__file__).parents[2]  # where bench and studies are imported from


def starts(device: str) -> Iterator[Contest]:
    """What a command takes beyond the import of torch: to say its help, to list, and to find that a run is finished."""

    def beyond(seconds: float) -> dict[str, Other]:
        return {"import torch": Other(_python("-c", "import torch"), "beyond", seconds)}

    yield Contest("bench.run --help", _python("-m", "bench.run", "--help"), beyond(0.8))
    yield Contest("bench.run --list", _python("-m", "bench.run", "--list"), beyond(1.0))
    with tempfile.TemporaryDirectory() as results:
        words = ["-m", "bench.run", "--backbone", "cnn", "--preset", "smoke", "--steps", "5", "--device", device]
        run = _python(*words, "--results", results)
        yield Contest("bench.run that is finished", run, beyond(1.5), agree=run)


def studies(device: str) -> Iterator[Contest]:
    """A study with two trials at a time against the same, one after another."""
    words = ["-m", "studies.beta", "--backbone", "cnn", "--preset", "smoke", "--device", device]
    seeds = ["--beta", "0.25", "--seeds", *map(str, range(TRIALS))]

    def study(workers: int) -> Callable[[], None]:
        def work() -> None:
            with tempfile.TemporaryDirectory() as results:
                _python(*words, *seeds, "--workers", str(workers), "--results", results)()
                if (made := len(list(Path(results).glob("runs/*/metrics.json")))) != TRIALS:
                    raise Disagreement(f"{made} of {TRIALS} trials finished")

        return work

    def prepare() -> None:
        """What the first run of all has to do: images, and what k-means makes of them."""
        with tempfile.TemporaryDirectory() as results:
            _python(*words, "--beta", "0.25", "--seeds", "0", "--steps", "1", "--results", results)()

    others = {"one after another": Other(study(1), "peer", 1.6)}
    yield Contest(f"{TRIALS} smoke trials, 2 workers", study(2), others, prepare, rounds=(1, 1), warm=0)


def _python(*words: str) -> Callable[[], None]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def work() -> None:
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Disagreement(f"{' '.join(words)} ended with exit code {done.returncode}: {done.stderr[-300:]}")

    return work
