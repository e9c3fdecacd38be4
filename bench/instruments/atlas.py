"""Every code by itself, beside the patches that chose it."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.metrics import Metric

from .instrument import Instrument, Reading, Subject, arrays

IMAGES = 256
CODES = 1024  # at most, the most used first
PATCHES = 3  # below each code
COLUMNS = 32
LARGEST = 4_000_000  # pixels of the picture, before it is enlarged


def cells(images: Tensor, grid_size: int) -> Tensor:
    """Images (N, 3, S, S) cut into the cells of a grid: (N, grid_size, grid_size, 3, S / grid_size, S / grid_size)."""
    cell = images.shape[-1] // grid_size
    return images.unflatten(3, (grid_size, cell)).unflatten(2, (grid_size, cell)).permute(0, 2, 4, 1, 3, 5)


def alone(subject: Subject, codes: Tensor, grid_size: int) -> Tensor:
    """What each of ``codes`` (n,) decodes to by itself, (n, 3, c, c) uint8: the middle cell of a grid filled with it,
    where no other code and no border is near. Amid another code, whichever that is, patches show what lies around them:
    they are 4 dB and more further from those that chose the code."""
    middle = grid_size // 2
    filled = codes.view(-1, 1, 1).expand(-1, grid_size, grid_size)
    return torch.cat([cells(subject.decode(part), grid_size)[:, middle, middle] for part in filled.split(256)])


def measure(subject: Subject) -> Reading:
    """``alone_psnr``: how near the codes by themselves are to the patches of IMAGES images that chose them, those of
    the CODES most used."""
    x = subject.few(IMAGES)
    codes = subject.encode(x)
    patches, chosen = cells(x, codes.shape[-1]).flatten(0, 2), codes.flatten()
    used, counts = chosen.unique(return_counts=True)
    used = used[counts.argsort(descending=True, stable=True)][:CODES]
    pictures, error, seen = alone(subject, used, codes.shape[-1]), 0.0, 0
    examples = []
    for code, picture in zip(used, pictures, strict=True):
        own = patches[chosen == code]
        error += (own.float() - picture.float()).square().mean((1, 2, 3)).double().sum().item()
        seen += len(own)
        examples.append(own[torch.linspace(0, len(own) - 1, min(PATCHES, len(own))).long().to(own.device)])
    metrics = {"alone_psnr": 10 * math.log10(255**2 / max(error / seen, 1e-10 * 255**2))}
    title = f"{len(used)} codes by themselves, the most used first; below each, patches that chose it"
    return Reading(metrics, lambda path: draw(path, pictures, examples, title))


def draw(path: Path, pictures: Tensor, examples: list[Tensor], title: str) -> None:
    """Saves ``pictures`` (n, 3, c, c) uint8 with at most PATCHES ``examples`` (m, 3, c, c) below each."""
    from bench.core import plots  # and seaborn: not before it is needed

    cell = pictures.shape[-1]
    strip = (1 + PATCHES) * cell + max(1, cell // 8)
    count = min(len(pictures), max(COLUMNS, LARGEST // (strip * cell)))
    sheet = np.full((-(-count // COLUMNS) * COLUMNS, strip, cell, 3), 255, dtype=np.uint8)
    for place in range(count):
        sheet[place, :cell] = arrays(pictures[place : place + 1])[0]
        below = arrays(examples[place]).reshape(-1, cell, 3)
        sheet[place, strip - PATCHES * cell :][: len(below)] = below
    plots.picture(path, np.split(sheet, len(sheet) // COLUMNS), [], title, width=14)


ATLAS = Instrument(
    about="every code decoded by itself beside patches that chose it (atlas.png), and how near it is to them",
    version=1,
    seconds=3,
    metrics={"alone_psnr": Metric("PSNR of codes alone, dB", ".2f", "higher")},
    shown=("alone_psnr",),
    measure=measure,
    fails=Subject.codeless,
)
