"""Times our hot paths against what others have for the same work and against what bounds it.

    python -m bench.speed                        everything, about a quarter of an hour on two quiet cores
    python -m bench.speed quantizer mamba        some of it
    python -m bench.speed --check                exit code 1 where a number misses its goal
    python -m bench.speed --device cuda

Ours and the others take turns in one process (commands in their own), on the same inputs, after results that both have
were seen to agree; a number is the median over rounds of how they stand to each other in that round. Peers are packages
that are used where they are installed: vector-quantize-pytorch, transformers, lpips, torchmetrics, torchvision. Nothing
else should run meanwhile.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from bench.core.cli import command, command_line
from bench.core.device import check_device, resolve_device
from bench.core.errors import UserError
from bench.core.progress import say, stdout


@dataclass(frozen=True)
class Options:
    """The command line."""

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """quantizer, look-up, mamba, step, scoring, decoding, sampling, start, study, or growth: how times grow with sizes;
    all unless named"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    seconds: float = 10.0
    """for each comparison; more rounds, less noise"""
    check: bool = False
    """exit code 1 where a number misses its goal"""
    out: Path = Path("results/speed")
    """where tables and pictures go; what is named is replaced there, the rest stays"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, with --check 1 when a goal is missed, 2 for what the user can fix."""
    return command(work, arguments)


def work(arguments: list[str]) -> int:
    """Parses the command line, times what it names, and prints and writes what was found."""
    options = command_line(Options, arguments, "python -m bench.speed", __doc__)
    from bench import speeds  # and all that is timed: not for --help

    known = (*speeds.PATHS, "growth")
    if unknown := [name for name in options.paths if name not in known]:
        raise UserError(f"there is no path {unknown[0]!r}; choose from {', '.join(known)}")
    if not options.seconds > 0:
        raise UserError(f"seconds is {options.seconds:g}; it must be above 0")
    device = resolve_device(options.device)
    check_device(device)
    about, failed = speeds.machine(device), []
    for name in (name for name in known if name in (options.paths or known)):
        if name == "growth":
            for one, growth in speeds.GROWTH.items():
                grown = [{**row, **about} for row in speeds.grow(one, growth, device)]
                speeds.keep(options.out / speeds.GROWTH_FILE, grown, growth=one, device=device)
            continue
        rows, of = [], name
        try:
            for contest in speeds.PATHS[name](device):
                of = f"{name}, {contest.name}"
                found = speeds.compete(name, contest, device, options.seconds)
                for row in found:
                    stdout.print(escape(speeds.line(row)), soft_wrap=True)
                failed += [of for row in found if speeds.met(row) is False]
                rows += [{**row, **about} for row in found]
        except Exception as error:  # of a peer whatever it may raise; the other paths have nothing to do with it
            say(f"[red]not timed:[/] {escape(f'{of}: {error}')}")
            failed.append(of)
        speeds.keep(options.out / speeds.SPEED_FILE, rows, path=name, device=device)
    speeds.publish(options.out)
    say(escape(f"tables and pictures: {options.out}"))
    if failed:
        say(escape(f"missed: {'; '.join(dict.fromkeys(failed))}"))
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
