"""Would a test notice? Puts wrong versions of the code in place, one at a time, and runs the tests that should fail.

    python -m tests.mutants                      all of them; about a quarter of an hour on two cores
    python -m tests.mutants --only statistics    those whose file, edit, tests or property contain the word
    python -m tests.mutants --list               show them, run nothing

The edits are data, in the ``.toml`` files beside this one: which file, what to find there (exactly once), what to put
in its place, which tests should notice, and the property that those tests state. Each edit is made in a copy of the
checkout, in a process of its own with an empty cache; processes are forked from one that has the libraries imported but
nothing of the project. Before the edits, the same tests have to pass on the code as it is.

killed: a named test failed. survived: all of them passed, so they do not state the property. inapplicable: the text to
find is not there exactly once, or the edited code does not import. Exits with 1 when an edit survived or is
inapplicable, or when a test fails without any edit. A full run writes its summary to ``tests/mutants.md``.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

import platformdirs
import pytest
import tyro
from rich.console import Console
from rich.markup import escape

from bench.core.progress import Bar

ROOT = Path(__file__).parents[2]
NOT_COPIED = (".git", ".venv", "*.egg-info", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "runs")
# Imported once for all edits. Nothing of the project, so that each process imports it edited.
LIBRARIES = (
    *(
        "torch",
        "torchvision",
        "timm",
        "lpips",
        "torch_fidelity",
        "torchmetrics.functional.image",
        "pandas",
        "skimage.data",
    ),
    *(
        "seaborn",
        "matplotlib.pyplot",
        "scipy.stats",
        "optuna",
        "optuna_dashboard",
        "hypothesis",
        "vector_quantize_pytorch",
    ),
    *(
        "safetensors.torch",
        "torch.utils.flop_counter",
        "torch.optim.swa_utils",
        "sklearn.ensemble",
        "sqlalchemy",
        "jinja2",
    ),
)
SECONDS = 300.0  # after which the tests of an edit are stopped; an edit that makes them hang is noticed, too
PASSED, FAILED = 0, 1  # exit codes of pytest; all others mean that no test was judged


class Edit(NamedTuple):
    """One wrong version: ``find`` becomes ``put`` in ``file``; one of ``tests`` must fail, since it ``states`` this."""

    file: str
    find: str
    put: str
    tests: tuple[str, ...]
    states: str

    def applied(self, root: Path) -> str | None:
        """The text of the edited file; None unless ``find`` is there exactly once."""
        path = root / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return text.replace(self.find, self.put) if text.count(self.find) == 1 else None


def edits(folder: Path = Path(__file__).parent) -> list[Edit]:
    """All edits below ``folder``, those of one file after another."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        for row in tomllib.loads(path.read_text(encoding="utf-8"))["edit"]:
            found.append(Edit(**{**row, "tests": tuple(row["tests"])}))
    return sorted(found, key=lambda edit: edit.file)


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    only: str = ""
    """edits whose file, texts, tests or property contain this"""
    workers: int = os.cpu_count() or 1
    """edits to try at a time"""
    list: bool = False
    """show the edits and stop"""


@dataclass
class Job:
    """Tests to run in one process, on the code as it is or with ``edit`` in place."""

    tests: tuple[str, ...]
    edit: Edit | None = None
    outcome: str = ""
    output: str = ""
    process: multiprocessing.process.BaseProcess | None = None
    place: Path | None = None
    before: str = ""
    began: float = field(default_factory=time.monotonic)


def main() -> int:
    """The command line. Returns the exit code."""
    options = tyro.cli(Options, prog="python -m tests.mutants", description=__doc__)
    chosen = [edit for edit in edits() if any(options.only in text for text in (*edit[:3], *edit.tests, edit.states))]
    console = Console(highlight=False, soft_wrap=True)
    if options.list:
        for edit in chosen:
            console.print(
                escape(f"{edit.file}: {edit.states}\n  - {edit.find}\n  + {edit.put}\n  {' '.join(edit.tests)}")
            )
        return 0
    if not chosen:
        console.print(f"no edit contains {options.only!r}; --list shows them")
        return 2
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    began = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers: threads of one would wait for the other
    _kept = preload()
    jobs, healthy = run(chosen, ROOT, options.workers, console)
    gc.unfreeze()
    minutes = (time.monotonic() - began) / 60
    if not healthy:
        console.print("no edit was tried: these tests fail without any; fix them first")
        return 1
    console.print(f"{len(jobs)} edits: {counted(jobs)}; {minutes:.0f} min with {options.workers} workers")
    if not options.only:
        Path(__file__).parent.with_suffix(".md").write_text(
            summary(jobs, commit.strip(), minutes, options.workers), encoding="utf-8"
        )
    return 0 if all(job.outcome == "killed" for job in jobs) else 1


def run(chosen: list[Edit], root: Path, workers: int, console: Console) -> tuple[list[Job], bool]:
    """Tries ``chosen`` on copies of ``root``. Returns a job per edit with its outcome, and whether all tests pass
    without any; where they do not, no edit is tried."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        places = [Path(folder) / str(number) for number in range(workers)]
        for place in places:
            shutil.copytree(root, place / "checkout", ignore=shutil.ignore_patterns(*NOT_COPIED))
        by_file: dict[str, list[str]] = {}
        for test in dict.fromkeys(test for edit in chosen for test in edit.tests):
            by_file.setdefault(test.partition("::")[0], []).append(test)
        plain = [Job(tuple(tests)) for tests in by_file.values()]
        for job in completed(plain, places, "tests on the code as it is"):
            if job.outcome != "survived":
                console.print(f"[red]without any edit[/] {escape(' '.join(job.tests))}:\n{escape(job.output)}")
        if any(job.outcome != "survived" for job in plain):
            return [], False
        jobs = [Job(edit.tests, edit) for edit in chosen]
        for job in completed(jobs, places, "edits"):
            if job.outcome != "killed":
                edit = job.edit
                console.print(f"[red]{job.outcome}[/] {escape(f'{edit.file}: {edit.states}')}")
                console.print(escape(f"  - {edit.find}\n  + {edit.put}\n  {' '.join(edit.tests)}"))
            if job.outcome == "inapplicable":
                console.print(escape(job.output))
    return jobs, True


def preload() -> object:
    """Imports LIBRARIES, those of them that are installed, and forgets what of the project was imported. Returns what
    has to be kept: torchvision's missing operators live as long as the module that defines them."""
    repair = importlib.import_module("backbones.torchvision_repair")
    repair.repair()
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("backbones", "bench", "studies", "tests")]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # else every process would look through all of this again: most of the time of a quick test
    return repair


def completed(jobs: list[Job], places: list[Path], label: str) -> Iterator[Job]:
    """Runs ``jobs``, one at a time in each of ``places``, and yields each as it ends."""
    waiting, free, running = deque(jobs), list(places), []
    with Bar(label, len(jobs)) as bar:
        while waiting or running:
            while waiting and free:
                job = waiting.popleft()
                if start(job, free[-1]):
                    free.pop()
                    running.append(job)
                else:
                    bar.advance()
                    yield job
            wait([job.process.sentinel for job in running], timeout=0.5)
            for job in [job for job in running if not job.process.is_alive() or time.monotonic() - job.began > SECONDS]:
                finish(job)
                running.remove(job)
                free.append(job.place)
                bar.advance()
                yield job


def start(job: Job, place: Path) -> bool:
    """Makes the edit of ``job`` in ``place`` and starts its tests there; False, with the outcome, if it cannot be."""
    if job.edit is not None:
        path = place / "checkout" / job.edit.file
        text = job.edit.applied(place / "checkout")
        if text is None:
            job.outcome, job.output = (
                "inapplicable",
                "  the text to find is not there exactly once: find its new place in tests/mutants/*.toml",
            )
            return False
        job.before = path.read_text(encoding="utf-8")
        path.write_text(text, encoding="utf-8")
    job.place, job.began = place, time.monotonic()
    job.process = multiprocessing.get_context("fork").Process(target=judge, args=(job.tests, place))
    job.process.start()
    return True


def judge(tests: tuple[str, ...], place: Path) -> None:
    """In the child: runs ``tests`` on the checkout in ``place``. Its exit code is pytest's."""
    os.setsid()
    output = os.open(place / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    checkout, cache = str(place / "checkout"), place / "cache"
    os.chdir(checkout)
    sys.path.insert(0, checkout)
    sys.dont_write_bytecode = True  # else a second edit in the same second, of the same size, would not be seen
    os.environ |= {"PYTHONPATH": checkout, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    weights = Path(os.environ.get("VQBENCH_CACHE") or platformdirs.user_cache_dir("vqbench")) / "weights"
    os.environ["VQBENCH_CACHE"] = str(cache)
    cache.mkdir()
    if weights.is_dir():
        (cache / "weights").symlink_to(weights)  # which no edit shall fetch again
    options = (
        "-x",
        "-q",
        "-m",
        "slow or not slow",
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(place / "tmp"),
    )
    os._exit(int(pytest.main([*options, *(f"tests/{test}" for test in tests)])))


def finish(job: Job) -> None:
    """Ends the process of ``job``, reads its outcome, and takes its edit back."""
    hung = job.process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.process.pid, signal.SIGKILL)  # and whatever its tests left running
    job.process.join()
    job.output = (job.place / "output.txt").read_text(errors="replace")[-3000:]
    code = FAILED if hung else job.process.exitcode
    job.outcome = {PASSED: "survived", FAILED: "killed"}.get(code, "inapplicable")
    for leftover in ("cache", "tmp"):
        shutil.rmtree(job.place / leftover, ignore_errors=True)
    if job.edit is not None:
        (job.place / "checkout" / job.edit.file).write_text(job.before, encoding="utf-8")


def counted(jobs: list[Job]) -> str:
    """How many of ``jobs`` ended in which way, in words."""
    counts = Counter(job.outcome for job in jobs)
    return ", ".join(f"{counts[name]} {name}" for name in ("killed", "survived", "inapplicable"))


def summary(jobs: list[Job], commit: str, minutes: float, workers: int) -> str:
    """The page that a full run of ``commit`` leaves behind."""
    rows = []
    for file in dict.fromkeys(job.edit.file for job in jobs):
        counts = Counter(job.outcome for job in jobs if job.edit.file == file)
        rows.append(f"| `{file}` | {sum(counts.values())} | {counts['killed']} | {counts['survived'] or '–'} |")
    lines = [
        "# Wrong versions that the tests notice",
        "",
        f"`python -m tests.mutants` on {datetime.date.today()}, commit {commit}: {len(jobs)} edits, "
        f"{counted(jobs)}; {minutes:.0f} minutes with {workers} workers.",
        "",
        "The edits, what each breaks and the tests that say so are in the `.toml` files of [mutants](mutants).",
        "",
        "| file | edits | killed | survived |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
