"""Run studies: take what is missing of a plan, each trial in a process of its own, and report.

    python -m studies.beta --backbone cnn vit --preset smoke    run a study (see studies/)
    python -m bench.study list                                  all studies and how far they are
    python -m bench.study rebuild                               make Optuna's database again from the runs

The same command continues what was stopped, killed or extended; started on several machines that share the results
folder and the storage, it divides the work.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table
from tyro.extras import subcommand_cli_from_dict

from bench.core import catalogue
from bench.core.cli import command, parsed
from bench.core.errors import Damaged, UserError
from bench.core.progress import runnable, say, stdout
from bench.core.runs import Run
from bench.core.store import Store

ALL = tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="")
WIDEST = 10_000  # characters of a table in a file
URL = tyro.conf.arg(metavar="URL", help_behavior_hint="")

# What a study file needs, and imports: seconds, which the list of a hundred thousand runs is shown in.
_HOMES = {
    "PRIORS": "bench.priors.models",
    "Ablation": "bench.sweeps.definition",
    "Claim": "bench.analysis.claims",
    "Range": "bench.sweeps.definition",
    "Search": "bench.sweeps.definition",
    "main": "bench.sweeps.workers",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def rebuild(
    names: Annotated[tuple[str, ...], tyro.conf.Positional, ALL] = (),
    results: Path = Path("results"),
    storage: Annotated[str | None, URL] = None,
) -> int:
    """Makes Optuna's database again from the run folders, with each study's page on all backbones; studies that it has
    already are completed.

    Args:
        names: studies to rebuild; all of them by default
        results: the folder with runs/ and studies/
        storage: Optuna storage URL; $VQBENCH_STORAGE or else SQLite below --results by default
    """
    from bench.sweeps import index, overview
    from bench.sweeps.address import storage_url, without_password

    store = Store(results)
    if not (results / "studies").is_dir():
        raise UserError(f"there are no studies in {results}; name the folder with --results")
    built = index.Index(storage_url(storage, results), results / "studies")
    for name in names or store.studies():
        try:
            added = index.rebuild(built, store, name)
            overview.write(built, store, name)
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
        shown = name
        status = Counter(catalogue.statuses(results / "runs", record["runs"], _entry))
        over = [run_id for run_id, row in record.get("priors", {}).items() if "role" not in row]  # none that confirms
        priors = Counter(catalogue.statuses(results / "priors", over, _entry))
        backbones = dict.fromkeys(str(row.get("backbone", "?")) for row in record["runs"].values())
        counts = [", ".join(f"{count} {how}" for how, count in each.items()) for each in (status, priors) if each]
        told = "; priors: ".join(counts)
        table.add_row(name, record["kind"], ", ".join(record["sweep"]), ", ".join(backbones), told)
    if not table.row_count:
        none = f"no studies below {results}; start one with python -m studies.beta"
        stdout.print(escape(runnable(none)), soft_wrap=True)
        return 0
    if not stdout.is_terminal:  # where programs read it: a name is one word, whatever its length
        table.width = Measurement.get(stdout, stdout.options.update(max_width=WIDEST), table).maximum
    stdout.print(table, crop=False)
    words = ("python", "-m", "bench.report", shown, "--results", str(results))
    stdout.print(escape(runnable(f"Tables and charts of one: {shlex.join(words)}")), soft_wrap=True)
    return 0


def _entry(run: Run) -> catalogue.Entry:
    """What the catalogue remembers of a run that it does not know."""
    from bench.analysis.frames import entry
    from bench.sweeps.kinds import kind_of

    return entry(run, kind_of(run).frame)


def run(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what the user can fix."""
    known = {"list": _later(show), "rebuild": _later(rebuild)}
    prog = "python -m bench.study"

    def work(words: list[str]) -> int:
        if any("://" in word for word in words):
            from bench.sweeps.address import hide_misplaced

            words = hide_misplaced(words)
        if words and not words[0].startswith("-") and words[0] not in known:
            raise UserError(f"unknown command {words[0]!r}; choose from {', '.join(known)}")
        options = {"args": words, "prog": prog, "description": __doc__}
        return parsed(lambda: subcommand_cli_from_dict(known, **options), prog)()

    return command(work, arguments, addresses=True)


def _later(work: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """``work`` with the same command line, which is done after that has been read."""
    return wraps(work)(lambda *arguments, **options: partial(work, *arguments, **options))


if __name__ == "__main__":
    sys.exit(run())
