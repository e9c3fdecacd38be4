"""Score tokenizers that were trained elsewhere, image formats and folders of reconstructions as runs are.

    python -m bench.score diffusers:FOLDER transformers:FOLDER --data folder:DIR --image-size 256
    python -m bench.score codec:webp@2304 codec:jpeg@2304 --data photos
    python -m bench.score python:mine.tokenizers:build --data photos
    python -m bench.score run:RUN --data folder:OTHER
    python -m bench.score --originals DIR --reconstructions DIR

A guest lands in the same store as runs do, and in the same reports, marked as trained elsewhere: with k-means and image
formats at the same bits, its costs and its speed. Rows are ranked at equal bits alone; all meet in the chart of rate
and distortion. A guest is one and has no seeds, so that there is a difference to others and no verdict.
"""

import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table

from bench.core.cli import command, command_line
from bench.core.device import check_device, resolve_device
from bench.core.errors import UserError
from bench.core.files import located
from bench.core.progress import runnable, say, stdout
from bench.core.runs import HELD_OUT, Run
from bench.core.store import Store
from bench.data import check_name, load
from bench.instruments import choose
from bench.tokenizers.arguments import LOOKS

TOKENIZER = "tokenizers to score: run:ID, diffusers:FOLDER, transformers:FOLDER, python:MODULE:FACTORY, codec:webp@2304"


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    tokenizer: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TOKENIZER ...]", help=TOKENIZER)
    ] = ()
    data: str = "photos"
    """images to score on: the name of a data set, or folder:DIR"""
    image_size: int = 64
    """pixels a side of the images that are compared"""
    resize_to: int = 0
    """pixels a side of what tokenizers are shown: images are resized to it and back; 0: as they are"""
    split: str = "test"
    """which images: test, or val"""
    train_images: int = 0
    """of how many training images k-means learns beside them, as runs with that many do; 0: of all"""
    instruments: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help=LOOKS)] = ()
    originals: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder of images, square and of one size, whose --reconstructions are to be scored without any tokenizer"""
    reconstructions: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder of what was made of them, by the same names"""
    bits_per_image: float | None = None
    """bits that an image took, of --reconstructions"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    results: Path = Path("results")
    """where runs are, and guests go, in runs/"""
    fid_weights: Path | None = None
    """file with torch-fidelity's Inception weights or DINOv2's, or a folder with both"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what the user can fix."""
    return command(work, arguments)


def work(arguments: list[str]) -> int:
    """Parses the command line, scores each guest, and prints them side by side. Returns the exit code."""
    options = command_line(Options, arguments, "python -m bench.score", __doc__)
    _check(options)
    device = resolve_device(options.device)
    check_device(device)
    from bench.analysis.finished import alike, apart, protocol_line  # and torch's friends: not for --help
    from bench.analysis.tables import put

    runs = _scored(options, Store(options.results), device)
    for part in alike(runs):
        put(table_of(part), runnable("the runs' metrics.json, or python -m bench.report RUN RUN"))
        stdout.print(escape(protocol_line(part[0]) + apart(part[0], runs[0])), soft_wrap=True)
    folders = shlex.join(str(run.folder) for run in runs)
    stdout.print(escape(runnable(f"Report: python -m bench.report {folders}")), soft_wrap=True)
    return 0


def _check(options: Options) -> None:
    """Raises UserError where options do not go together."""
    folders = options.originals, options.reconstructions
    if (options.originals is None) != (options.reconstructions is None):
        raise UserError("--originals and --reconstructions go together; give both, or tokenizers to score")
    if options.originals is not None and (options.tokenizer or options.instruments or options.resize_to):
        raise UserError(
            "--originals and --reconstructions are scored as they are; leave out tokenizers and what is for them"
        )
    if options.originals is None and not options.tokenizer:
        raise UserError(f"name {TOKENIZER}; or --originals and --reconstructions")
    if options.bits_per_image is not None and (None in folders or not 0 < options.bits_per_image < math.inf):
        raise UserError(
            f"--bits-per-image is {options.bits_per_image:g}; it is a number above 0, and of --reconstructions"
        )
    if options.split not in HELD_OUT:
        raise UserError(f"--split is {options.split}; choose from {', '.join(HELD_OUT)}")
    for flag, value, least in (("--image-size", options.image_size, 1), ("--resize-to", options.resize_to, 0)):
        if value < least:
            raise UserError(f"{flag} is {value}; it is a number of pixels, from {least}")


def _scored(options: Options, store: Store, device: str) -> list[Run]:
    """The finished runs of all guests, in their order."""
    from bench.guests import Place, invited, pairs, score_guest
    from bench.metrics import weights

    choose(options.instruments)  # raises UserError on an unknown one
    weights.inception(options.fid_weights)
    weights.dinov2(options.fid_weights)
    if options.originals is not None:
        data, guest = pairs(options.originals, options.reconstructions, options.bits_per_image, device)
        guests = [guest]
    else:
        check_name(options.data)
        place = Place(options.results, device)
        guests = [invited(name, place) for name in dict.fromkeys(options.tokenizer)]
        if options.resize_to:
            guests = [guest.resized(options.resize_to, options.image_size) for guest in guests]
        data = load(located(options.data), options.image_size)
    store.check_writable(50)
    for net in weights.TRUNKS:
        weights.trunk_state(net)
    how = options.split, options.fid_weights, options.instruments, options.train_images
    runs = []
    for guest in guests:
        runs.append(score_guest(guest, data, store, *how))
        say(f"scored: {escape(f'{guest.name}: {runs[-1].folder}')}")
    return runs


def table_of(runs: list[Run]) -> Table:
    """A row per run, ranked among those of equal bits, with k-means and image formats at these in grey."""
    from bench.analysis.finished import COLUMNS, references
    from bench.analysis.tables import Group, score_table

    rates: dict[float, list[Run]] = {}
    for run in runs:
        rates.setdefault(run.metrics().get("bits_per_image", math.inf), []).append(run)
    groups = []
    for bits, own in sorted(rates.items()):
        rows = [(run.config()["backbone"], run.metrics().get("params", 0), run.metrics()) for run in own]
        title = "no rate" if bits == math.inf else f"{bits:.0f} bits per image"
        groups.append(Group(rows, references(own[0].metrics()), title=title))
    return score_table("tokenizer", COLUMNS, groups)


class _Callable(ModuleType):
    """Once this command is imported, ``bench.score`` is its module, and is still to be called as the function."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        from bench.tokenizers.evaluate import score

        return score(*given, **named)


sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    sys.exit(main())
