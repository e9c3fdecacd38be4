"""Two folders of images, originals and what something made of them: scored without the model that did."""

import os
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bench.core.errors import UserError
from bench.core.files import sha256_arrays
from bench.core.progress import Bar
from bench.data import Data, find_images, to_rgb
from bench.metrics import from_uint8

from .guest import Guest


class Recorded:
    """A codec that gives, in their order, what was made of images elsewhere: (N, H, W, 3) uint8, and of a rate of
    ``bits`` an image. The latent is what is shown."""

    def __init__(self, images: np.ndarray, bits: float | None):
        self.images, self.place = images, 0
        if bits is not None:
            self.encode_with_bits = lambda x: (self.encode(x), torch.full((len(x),), bits))

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], the originals that come next → their reconstructions, alike."""
        shown = self.images[self.place : self.place + len(x)]
        self.place = (self.place + len(x)) % len(self.images)
        return from_uint8(torch.from_numpy(shown).permute(0, 3, 1, 2)).to(x.device)

    def decode(self, codes: Tensor) -> Tensor:
        """What ``encode`` gives is decoded already."""
        return codes


def pairs(originals: Path, reconstructions: Path, bits: float | None, device: str) -> tuple[Data, Guest]:
    """The images below ``originals`` as a test split, and a guest that gives those below ``reconstructions``, whose
    rate is ``bits`` an image where that is known. Names are compared without their endings. Raises UserError where
    names, counts or sizes differ, or images are not square."""
    folders = originals, reconstructions
    found = [_named(folder) for folder in folders]
    if lone := sorted(found[0].keys() ^ found[1].keys()):
        where, other = folders if lone[0] in found[0] else folders[::-1]
        counts = f"{len(found[0])} originals, {len(found[1])} reconstructions"
        raise UserError(f"{lone[0]} is in {where} and not in {other} ({counts}); give both the same names")
    arrays = [_read(folder, names) for folder, names in zip(folders, found, strict=True)]
    if arrays[0].shape != arrays[1].shape:
        shapes = " and ".join(f"{array.shape[2]}×{array.shape[1]}" for array in arrays)
        raise UserError(f"originals and reconstructions are of {shapes} pixels; they have to be of one size")
    name = os.path.realpath(originals)
    split = f"{len(arrays[0])} images of {PurePath(name).name}, as they are"
    data = Data(name, arrays[0][:0], arrays[0][:0], arrays[0], sha256_arrays(arrays[0]), split, ())
    guest = Guest(
        name=f"folder:{os.path.realpath(reconstructions)}",
        codec=Recorded(arrays[1], bits),
        codebook_size=None,
        digest=sha256_arrays(arrays[1]),
        device=device,
        about={"class": "reconstructions that were made elsewhere"},
        pixels=True,
        made=arrays[1],
    )
    return data, guest


def _named(folder: Path) -> dict[str, str]:
    """Image files below ``folder`` by their names without endings, sorted. Raises UserError where two share one."""
    found: dict[str, str] = {}
    for name in find_images(str(folder)):
        stem = PurePath(name).with_suffix("").as_posix()
        if stem in found:
            raise UserError(f"{found[stem]} and {name} in {folder} have one name; keep one of them")
        found[stem] = name
    return dict(sorted(found.items()))


def _read(folder: Path, names: dict[str, str]) -> np.ndarray:
    """The images as (N, H, W, 3) uint8. Raises UserError where one cannot be read, is not square or of another size."""
    shown: list[np.ndarray] = []
    with Bar(f"reading {folder}", len(names)) as bar:
        for name in names.values():
            try:
                with Image.open(folder / name) as image:
                    pixels = np.asarray(to_rgb(image))
            except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                raise UserError(f"{folder / name} cannot be read ({error}); remove it from both folders") from error
            height, width = pixels.shape[:2]
            if height != width or (shown and pixels.shape != shown[0].shape):
                first = f", and others are of {shown[0].shape[1]}×{shown[0].shape[0]}" if shown else ""
                raise UserError(
                    f"{folder / name} is of {width}×{height} pixels{first}; images are square and of one size"
                )
            shown.append(pixels)
            bar.advance()
    return np.stack(shown)
