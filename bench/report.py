"""One report of many runs: tables, charts and verdicts, as a page, as Markdown and as data.

    python -m bench.report                     # every run below results/
    python -m bench.report beta-cpu            # the study results/studies/beta-cpu.json
    python -m bench.report RUN_ID RUN_ID --out DIR
    python -m bench.report beta-cpu --columns lpips_vgg psnr --verdicts lpips_vgg    # as Markdown, and nothing else

Rows are ranked within a block only: equal protocol and equal bits per image. The same runs give the same report.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bench.analysis.excerpts import excerpt
from bench.analysis.report import write_report
from bench.core.cli import command, command_line
from bench.core.text import printable
from bench.sweeps.importance import importances


@dataclass(frozen=True)
class Options:
    """The command line."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")] = ()
    """studies (NAME, how it begins, or the path of its json), run folders, run ids, results folders; none: all runs"""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder of the report; RESULTS/reports/NAME by default"""
    results: Path = Path("results")
    """where runs/ and studies/ are"""
    columns: tuple[str, ...] = ()
    """in place of a report prints its rankings as Markdown, with these metrics alone"""
    verdicts: tuple[str, ...] = ()
    """the same with the verdicts on these metrics, below the ranking or without one"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what the user can fix."""

    def work(words: list[str]) -> int:
        options = command_line(Options, words, "python -m bench.report", __doc__)
        if options.columns or options.verdicts:
            print(printable(excerpt(options.names, options.results, options.columns, options.verdicts)))
        else:
            write_report(options.names, options.results, options.out, importances)
        return 0

    return command(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
