"""One's own images through several trained tokenizers, side by side in one picture.

    python -m bench.reconstruct photo.jpg scan.png --run results/runs/RUN
    python -m bench.reconstruct holidays/ --run RUN_A RUN_B RUN_C --out holidays.png

An image per row: the original, then what each tokenizer makes of it, with its PSNR. IMAGE is a file of any size or a
folder of them; each is cut to its central square and resized as images of a folder are for training. A tokenizer of
another image size than the first gets the same square at its own size, which its label says.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from rich.markup import escape

from bench.core.cli import command, command_line
from bench.core.device import check_device, resolve_device
from bench.core.errors import UserError
from bench.core.plots import save
from bench.core.progress import Bar, say, stdout
from bench.core.store import find_tokenizer
from bench.data import eval_batches, find_images, from_uint8, to_pixels
from bench.metrics import full_precision, psnr, to_uint8
from bench.tokenizers.tokenizer import Tokenizer

MOST = 24  # images in one picture
BATCH = 8  # of them at a time
INCHES = 1.7  # side of a tile


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE [IMAGE ...]")] = ()
    """files, or folders whose images at any depth are meant, at most 24 of all"""
    run: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """folders or ids of finished tokenizer runs"""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.png")] = Path("reconstructions.png")
    """the picture"""
    results: Path = Path("results")
    """where ids are looked up, in runs/"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""


class Column(NamedTuple):
    """What a tokenizer makes of all images."""

    label: str  # backbone, quantizer and bits
    run_id: str
    images: np.ndarray  # (N, H, W, 3) uint8, at the tokenizer's own size
    psnr: list[float]  # dB, against the originals at that size


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what the user can fix."""
    return command(work, arguments)


def work(arguments: list[str]) -> int:
    """Parses the command line, reconstructs, and says where the picture is. Returns the exit code."""
    options = command_line(Options, arguments, "python -m bench.reconstruct", __doc__)
    if not options.images or not options.run:
        raise UserError("name images and runs: python -m bench.reconstruct IMAGE... --run RUN")
    if options.out.suffix.lower() != ".png" or options.out.is_dir():
        raise UserError(f"{options.out} is no name of a picture; let --out end in .png")
    device = resolve_device(options.device)
    check_device(device)
    folders = [find_tokenizer(name, options.results).folder for name in dict.fromkeys(options.run)]
    paths = find(options.images)
    columns, originals = [], {}  # by image size
    with Bar("reconstructing", len(folders) * len(paths)) as bar:
        for folder in dict.fromkeys(folders):
            tokenizer = Tokenizer.from_run(folder, device)
            size = tokenizer.config.image_size
            if size not in originals:
                originals[size] = np.stack([read(path, size) for path in paths])
            columns.append(reconstruct(tokenizer, folder.name, originals[size], device, bar))
    before = options.out.read_bytes() if options.out.is_file() else None
    draw(options.out, [path.name for path in paths], originals, columns)
    replaced = " (another file of that name was overwritten)" * (before not in (None, options.out.read_bytes()))
    stdout.print(f"Picture: {escape(str(options.out))}{replaced}", soft_wrap=True)
    return 0


def find(names: tuple[str, ...]) -> list[Path]:
    """The image files that ``names`` mean, in that order, at most MOST. Raises UserError where there is none."""
    found: list[Path] = []
    for path in (Path(name).expanduser() for name in names):
        if path.is_dir():
            found += [path / name for name in find_images(str(path))]
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"there is no image {path}; name files, or folders of them")
    found = list(dict.fromkeys(found))
    if len(found) > MOST:
        say(f"[yellow]left out:[/] all but the first {MOST} of {len(found)} images")
    return found[:MOST]


def read(path: Path, image_size: int) -> np.ndarray:
    """The image as tokenizers of that size are trained on it, (H, W, 3) uint8. Raises UserError where it is none."""
    try:
        with Image.open(path) as image:
            return to_pixels(image, image_size)
    except Exception as error:  # Pillow's decoders raise nearly every kind for broken files
        raise UserError(f"{path} cannot be read as an image ({error}); repair it or leave it out") from error


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, name: str, images: np.ndarray, device: str, bar: Bar) -> Column:
    """``images`` (N, H, W, 3) uint8 through ``tokenizer``, in float32 and rounded to uint8 as runs are scored; ``name``
    is that of its run."""
    shown, scores, measured = [], [], []
    for x in eval_batches(images, BATCH):
        x = x.to(device)
        with full_precision(x.device):
            codes, bits = tokenizer.encode_with_bits(from_uint8(x))
            x_hat = to_uint8(tokenizer.decode(codes))
        shown.append(x_hat.permute(0, 2, 3, 1).cpu().numpy())
        scores += psnr(x_hat, x).tolist()
        measured += [] if bits is None else bits.tolist()
        bar.advance(len(x))
    config, spent = tokenizer.config, "no codes"
    if config.discrete:
        spent = f"{config.tokens * np.log2(config.codebook_size):,.0f} bits per image"
    elif measured:
        spent = f"{np.mean(measured):,.0f} bits, the mean"
    return Column(f"{config.backbone}, {config.quantizer}\n{spent}", name, np.concatenate(shown), scores)


def draw(path: Path, names: list[str], originals: dict[int, np.ndarray], columns: list[Column]) -> None:
    """Saves the picture: a row for each of ``names``, a column for the ``originals`` of the first tokenizer's size,
    which come first, and one for each tokenizer."""
    first, *others = originals
    alike = Counter(column.label for column in columns)
    size = INCHES * (1 + len(columns)), (INCHES + 0.15) * len(names) + 0.7
    figure = Figure(figsize=size, layout="compressed")
    figure.suptitle(f"central squares, resized to {first}×{first}", x=0.01, ha="left", fontsize="medium")
    grid = figure.subplots(len(names), 1 + len(columns), squeeze=False)
    for row, name in enumerate(names):
        shown = [("original", originals[first][row], name)]
        for column in columns:
            side, own = column.images.shape[1], column.run_id.rpartition("-")[2]
            label = column.label + f"\nat {side}×{side}" * bool(others) + f"\n{own}" * (alike[column.label] > 1)
            shown.append((label, column.images[row], f"{column.psnr[row]:.2f} dB"))
        for axes, (label, image, below) in zip(grid[row], shown, strict=True):
            axes.imshow(image, interpolation="none")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(below if len(below) <= 24 else f"…{below[-23:]}", fontsize="small")
            if row == 0:
                axes.set_title(label, fontsize="small")
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
