"""The embedded default: crops of photographs that come with scikit-image, scikit-learn and matplotlib.

A part of every photograph is for training, one for validation and one for the test, so that no pixel is in two splits.
Crops are of any size from ``image_size`` up to the whole part, resized: details and whole faces. A crop's class is its
photograph.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from bench.core.errors import UserError

from .sources import SPLITS, Source, Split

TRIES, CONTRAST = 100, 4  # a crop in which no channel's standard deviation reaches 4 levels is redrawn
COUNTS = (4096, 512, 512)  # crops of train, val and test


class Box(NamedTuple):
    """A part of a photograph, in pixels; right and bottom are outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def side(self) -> int:
        """Of the largest square within it."""
        return min(self.right - self.left, self.bottom - self.top)


class Photograph(NamedTuple):
    """``pixels`` (H, W, 3) uint8, and the parts of it that are for training, validation and the test."""

    pixels: np.ndarray
    train: Box
    val: Box
    test: Box

    @property
    def largest(self) -> int:
        """The largest image_size of which every split has a crop."""
        return min(self.train.side, self.val.side, self.test.side)


def photographs() -> dict[str, Photograph]:
    """A face each of an astronaut and an admiral, a cat, a cup, a rocket, a motorcycle, a pagoda and a flower, by name.
    Nothing is downloaded."""
    import matplotlib.cbook
    import skimage.data
    import sklearn.datasets

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        portrait = np.asarray(image.convert("RGB"))
    china, flower = (sklearn.datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower"))
    motorcycle, _, _ = skimage.data.stereo_motorcycle()  # left view, right view, disparity
    parts = {
        "astronaut": (skimage.data.astronaut(), Box(0, 0, 310, 512), Box(310, 300, 512, 512), Box(310, 0, 512, 300)),
        "cat": (skimage.data.chelsea(), Box(0, 0, 225, 170), Box(0, 170, 225, 300), Box(225, 0, 451, 300)),
        "cup": (skimage.data.coffee(), Box(160, 190, 600, 400), Box(0, 190, 160, 400), Box(150, 0, 450, 190)),
        "rocket": (skimage.data.rocket(), Box(400, 0, 640, 427), Box(0, 220, 200, 427), Box(200, 100, 400, 427)),
        "motorcycle": (motorcycle, Box(0, 0, 370, 500), Box(370, 0, 741, 130), Box(370, 130, 741, 500)),
        "pagoda": (china, Box(0, 230, 400, 427), Box(400, 120, 640, 427), Box(50, 20, 370, 230)),
        "flower": (flower, Box(300, 270, 640, 427), Box(150, 270, 300, 427), Box(160, 70, 450, 270)),
        "portrait": (portrait, Box(0, 310, 512, 600), Box(0, 20, 130, 310), Box(130, 20, 390, 310)),
    }
    return {name: Photograph(*part) for name, part in parts.items()}


def _is_flat(pixels: np.ndarray) -> bool:
    """Whether no channel varies: sky. In integers, so that every machine rejects the same."""
    values = pixels.reshape(-1, 3).astype(np.int64)
    count = len(values)
    variance = count * (values**2).sum(axis=0) - values.sum(axis=0) ** 2  # times count²
    return bool(variance.max() < (CONTRAST * count) ** 2)


def _draw_crops(photos: dict[str, Photograph], image_size: int, count: int, split: str) -> list[tuple[str, Box]]:
    """Photograph and place of every crop of ``split``: the photographs in turn, all sizes and places equally likely."""
    draw = np.random.PCG64(SPLITS.index(split)).random_raw  # NumPy promises this stream for ever, not a Generator's
    crops, names = [], list(photos)
    for index in range(count):
        photo = photos[name := names[index % len(names)]]
        part: Box = getattr(photo, split)
        for _ in range(TRIES):
            side = image_size + draw() % (part.side - image_size + 1)
            left = part.left + draw() % (part.right - part.left - side + 1)
            top = part.top + draw() % (part.bottom - part.top - side + 1)
            every = side // image_size  # pixel tells whether the crop is flat
            if not _is_flat(photo.pixels[top : top + side : every, left : left + side : every]):
                break
        crops.append((name, Box(left, top, left + side, top + side)))
    return crops


def _open(
    photos: dict[str, Photograph], counts: tuple[int, int, int], image_size: int
) -> tuple[Split, Split, Split, str]:
    limits = {name: photo.largest for name, photo in photos.items()}
    photos = {name: photo for name, photo in photos.items() if limits[name] >= image_size}
    if not photos:
        raise UserError(
            f"image_size {image_size} is larger than photos allows: use at most {max(limits.values())}, "
            "or give larger images as folder:PATH"
        )

    def read(crop: tuple[str, Box]) -> np.ndarray:
        name, box = crop
        pixels = photos[name].pixels[box.top : box.bottom, box.left : box.right]  # a resizer would look around its box
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS))

    drawn = [_draw_crops(photos, image_size, count, split) for split, count in zip(SPLITS, counts, strict=True)]
    splits = [Split(crops, read, lambda crop: crop[0]) for crops in drawn]
    how = f"crops of {len(photos)} photographs, disjoint parts, resized to {image_size}×{image_size}"
    return *splits, how


def photo_source(
    image_size: int,
    photos: Callable[[], dict[str, Photograph]] = photographs,
    counts: tuple[int, int, int] = COUNTS,
) -> Source:
    """So many crops to train on, to validate and to test with, drawn from ``photos``."""
    return Source(counts, lambda: _open(photos(), counts, image_size))
