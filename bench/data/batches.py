"""Batches that are a pure function of (seed, step), and their augmentation."""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.torchvision_repair import repair

RUN, WINDOW = 64, 1 << 16  # of images that stay on disk: neighbours that move together, and how many are mixed


@lru_cache(maxsize=8)
def _permutation(count: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


def batch_indices(seed: int, step: int, batch_size: int, count: int, run: int = 0) -> np.ndarray:
    """Rows of batch number ``step``: (batch_size,) int64 in [0, count). A pure function of its arguments.

    Batches walk through one fresh permutation an epoch, so every image comes exactly once an epoch; a batch may end
    one epoch and begin the next. Where there are more than WINDOW images, and ``run`` of them are best read together,
    it is a permutation of such runs, and then of the images in each WINDOW of them.
    """
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    order = partial(_in_runs, run=run) if run and count > WINDOW else _anywhere
    return np.concatenate([order(seed, int(e), count, places[epochs == e]) for e in np.unique(epochs)])


def _anywhere(seed: int, epoch: int, count: int, places: np.ndarray) -> np.ndarray:
    return _permutation(count, seed, epoch)[places]


def _in_runs(seed: int, epoch: int, count: int, places: np.ndarray, run: int) -> np.ndarray:
    mixed = places.copy()
    for window in np.unique(places // WINDOW):
        begin, here = window * WINDOW, places // WINDOW == window
        order = _permutation(int(min(WINDOW, count - begin)), seed, epoch, 1 + int(window))  # 0 would be the runs'
        mixed[here] = begin + order[places[here] - begin]
    whole = mixed // run < count // run  # what is left of the last run stays last
    mixed[whole] = _permutation(count // run, seed, epoch)[mixed[whole] // run] * run + mixed[whole] % run
    return mixed


def from_uint8(x: Tensor) -> Tensor:
    """[0, 255] uint8 → [-1, 1] float32, the range of every model here; keeps shape and memory format."""
    return x.float().div(127.5).sub_(1)


def batch(
    images: np.ndarray,
    seed: int,
    step: int,
    batch_size: int,
    augment: str,
    device: torch.device | str,
    part: slice = slice(None),
) -> Tensor:
    """Training batch number ``step``, or ``part`` of it: (B, 3, H, W) float32 in [-1, 1] on ``device``, channels_last.

    A pure function of (images, seed, step): global random states play no part, and the random draws are those of the
    CPU on any device, and of the whole batch for any part. ``images`` is (N, H, W, 3) uint8, ``augment`` a name in
    AUGMENTATIONS. Of images that stay on disk the next batch is decoded meanwhile.
    """
    run = getattr(images, "run", 0)  # arrays have none: whatever the order, their rows are as near
    rows = batch_indices(seed, step, batch_size, len(images), run)[part]
    pixels = torch.from_numpy(images[rows]).to(device).permute(0, 3, 1, 2)
    if run:
        images.ahead(batch_indices(seed, step + 1, batch_size, len(images), run)[part])
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    draws = Draws(torch.Generator().manual_seed(int(state[0])), batch_size, part)
    return from_uint8(AUGMENTATIONS[augment](pixels, draws).contiguous(memory_format=torch.channels_last))


def eval_batches(images: np.ndarray, batch_size: int) -> Iterator[Tensor]:
    """All of (N, H, W, 3) ``images`` in order, as uint8 (B, 3, H, W) tensors on the CPU; the last may be shorter."""
    for start in range(0, len(images), batch_size):
        yield torch.from_numpy(np.array(images[start : start + batch_size])).permute(0, 3, 1, 2)


class Draws(NamedTuple):
    """Random numbers for ``part`` of a batch of so many images, drawn for all of them by a generator on the CPU."""

    rng: torch.Generator
    count: int
    part: slice = slice(None)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers in [low, high) of that shape for each image: (B, *shape) float32."""
        return (low + (high - low) * torch.rand((self.count, *shape), generator=self.rng))[self.part]


def _sometimes(x: Tensor, effect: Callable[[Tensor], Tensor], probability: float, draws: Draws) -> Tensor:
    rows = (draws.uniform() < probability).nonzero().squeeze(1).to(x.device)
    return x.index_copy(0, rows, effect(x[rows]))  # only the chosen are computed, and no device has to be waited for


def _random_resized_crop_and_flip(x: Tensor, draws: Draws, flip: float) -> Tensor:
    """Torchvision's RandomResizedCrop(scale (0.8, 1), ratio (3/4, 4/3)) and a flip, as one bilinear resampling. No
    window is larger than the image, so there is nothing to antialias."""
    batch_size, tries = len(x), 10
    area = draws.uniform(tries, low=0.8, high=1.0)
    ratio = draws.uniform(tries, low=math.log(3 / 4), high=math.log(4 / 3)).exp()
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()])  # (2, B, tries): width and height
    size[:, :, -1] = 1  # like torchvision: the first window that fits, else the whole image
    first = (size <= 1).all(dim=0).float().argmax(dim=1)
    width, height = size[:, torch.arange(batch_size), first]

    theta = torch.zeros(batch_size, 2, 3)  # output to input coordinates, both in [-1, 1]
    theta[:, 0, 0] = torch.where(draws.uniform() < flip, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * draws.uniform(low=-1.0)
    theta[:, 1, 2] = (1 - height) * draws.uniform(low=-1.0)
    grid = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False).round().to(torch.uint8)


def _blog(x: Tensor, draws: Draws) -> Tensor:
    repair()
    from torchvision.transforms.functional import adjust_sharpness, autocontrast

    x = _random_resized_crop_and_flip(x, draws, flip=0.3)
    x = _sometimes(x, partial(adjust_sharpness, sharpness_factor=2.0), 0.3, draws)
    return _sometimes(x, autocontrast, 0.3, draws)


AUGMENTATIONS: dict[str, Callable[[Tensor, Draws], Tensor]] = {
    "none": lambda x, draws: x,
    "flip": lambda x, draws: _sometimes(x, lambda images: images.flip(-1), 0.5, draws),
    "blog": _blog,
}
"""Augmentations by name: uint8 (B, 3, H, W) and random draws → the same, so resampled images stay images."""
