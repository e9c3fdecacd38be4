"""Run studies: take what is missing of a plan, each trial in a process of its own, and report.

    python -m studies.beta --backbone cnn vit --preset smoke    run a study (see studies/)
    python -m bench.study list                                  all studies and how far they are
    python -m bench.study rebuild                               make Optuna's database again from the runs

The same command continues what was stopped, killed or extended; started on several machines that share the results
folder and the storage, it divides the work.
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.markup import escape
from rich.table import Column, Table
from tyro.extras import subcommand_cli_from_dict

from bench.analysis.frames import PRIOR, statuses
from bench.core.cli import command, parsed
from bench.core.errors import Damaged, UserError
from bench.core.progress import runnable, say, stdout
from bench.core.store import Store
from bench.priors.models import PRIORS
from bench.sweeps import index
from bench.sweeps.address import hide_misplaced, storage_url, without_password
from bench.sweeps.definition import Ablation, Range, Search
from bench.sweeps.workers import main

ALL = tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="")
URL = tyro.conf.arg(metavar="URL", help_behavior_hint="")

__all__ = ["PRIORS", "Ablation", "Range", "Search", "main"]  # what a study file needs


def rebuild(
    names: Annotated[tuple[str, ...], tyro.conf.Positional, ALL] = (),
    results: Path = Path("results"),
    storage: Annotated[str | None, URL] = None,
) -> int:
    """Makes Optuna's database again from the run folders; studies that it has already are completed.

    Args:
        names: studies to rebuild; all of them by default
        results: the folder with runs/ and studies/
        storage: Optuna storage URL; $VQBENCH_STORAGE or else SQLite below --results by default
    """
    store = Store(results)
    if not (results / "studies").is_dir():
        raise UserError(f"there are no studies in {results}; name the folder with --results")
    built = index.Index(storage_url(storage, results), results / "studies")
    for name in names or store.studies():
        try:
            added = index.rebuild(built, store, name)
        except Damaged as error:
            if name in names:
                raise
            say(f"[yellow]left out:[/] {escape(str(error))}")
            continue
        say(f"study {name}: {added} trials added to {without_password(built.url)}")
    return 0


def show(results: Path = Path("results")) -> int:
    """Lists all studies and how many of their runs, and of the priors over these, are finished.

    Args:
        results: the folder with runs/ and studies/
    """
    store = Store(results)
    table = Table(Column("study", overflow="fold"), "kind", "swept", "backbones", "runs", box=box.SIMPLE_HEAD)
    for name in store.studies():
        try:
            record = store.study(name)
        except Damaged as error:
            say(f"[yellow]left out:[/] {escape(str(error))}")
            continue
        status = Counter(statuses(map(store.named, record["runs"])))
        over = [run_id for run_id, row in record.get("priors", {}).items() if "role" not in row]  # none that confirms
        priors = Counter(statuses((store.named(run_id, "priors") for run_id in over), PRIOR))
        backbones = dict.fromkeys(str(row.get("backbone", "?")) for row in record["runs"].values())
        counts = [", ".join(f"{count} {how}" for how, count in each.items()) for each in (status, priors) if each]
        told = "; priors: ".join(counts)
        table.add_row(name, record["kind"], ", ".join(record["sweep"]), ", ".join(backbones), told)
    none = runnable(f"no studies below {results}; start one with python -m studies.beta")
    stdout.print(table if table.row_count else none)
    return 0


def run(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what the user can fix."""
    known = {"list": _later(show), "rebuild": _later(rebuild)}
    prog = "python -m bench.study"

    def work(words: list[str]) -> int:
        options = {"args": hide_misplaced(words), "prog": prog, "description": __doc__}
        return parsed(lambda: subcommand_cli_from_dict(known, **options), prog)()

    return command(work, arguments, addresses=True)


def _later(work: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """``work`` with the same command line, which is done after that has been read."""
    return wraps(work)(lambda *arguments, **options: partial(work, *arguments, **options))


if __name__ == "__main__":
    sys.exit(run())
