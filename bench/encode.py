"""Write the codes of a tokenizer's whole data set, once: what priors are trained on.

    python -m bench.encode results/runs/RUN

Into RUN/codes/ go train.npy and held_out.npy, (N, h, w) unsigned integers, and meta.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bench.core.cli import command, command_line
from bench.core.device import check_device, resolve_device
from bench.core.errors import UserError
from bench.core.progress import stdout
from bench.core.store import find_tokenizer
from bench.priors.codes import encode, load_data
from bench.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    run: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """folders or ids of finished tokenizer runs"""
    results: Path = Path("results")
    """where ids are looked up, in runs/"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what the user can fix."""
    return command(work, arguments)


def work(arguments: list[str]) -> int:
    """Parses the command line, encodes, and says where the codes are. Returns the exit code."""
    options = command_line(Options, arguments, "python -m bench.encode", __doc__)
    if not options.run:
        raise UserError("name the run of a tokenizer: python -m bench.encode RUN")
    device = resolve_device(options.device)
    check_device(device)
    for name in options.run:
        folder = find_tokenizer(name, options.results).folder
        tokenizer = Tokenizer.from_run(folder, device)
        before = written(folder)
        codes = encode(folder, tokenizer, load_data(folder, tokenizer))
        how = "already encoded" if written(folder) == before else "encoded"
        size = (codes.train.nbytes + codes.held_out.nbytes) / 1e6
        stdout.print(
            f"{how}: {folder / 'codes'}, {len(codes.train)} train / "
            f"{len(codes.held_out)} {tokenizer.config.split} grids of {'×'.join(map(str, codes.grid))} "
            f"as {codes.train.dtype}, {size:.1f} MB",
            soft_wrap=True,
        )
    return 0


def written(folder: Path) -> int | None:
    """Which file tells of the codes of the run in ``folder``; None where there is none."""
    meta = folder / "codes" / "meta.json"
    return meta.stat().st_ino if meta.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
