"""Data sets by name. To add one: write a function ``image_size -> Source`` and add a line."""

from collections.abc import Callable
from functools import partial

from .photos import photo_source
from .sources import Source, torchvision_source

_TRAIN_AND_TEST = {"train": {"train": True}, "test": {"train": False}}
_VALID = {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}}  # CelebA's word
_VAL = {**_VALID, "val": {"split": "val"}}
_UNLABELED = {"train": {"split": "unlabeled"}, "val": {"split": "train"}, "test": {"split": "test"}}  # 100,000 to train

DATASETS: dict[str, Callable[[int], Source]] = {
    "photos": photo_source,
    "cifar10": partial(torchvision_source, "CIFAR10", _TRAIN_AND_TEST),
    "fashion_mnist": partial(torchvision_source, "FashionMNIST", _TRAIN_AND_TEST),
    "stl10": partial(torchvision_source, "STL10", _UNLABELED),
    "celeba": partial(torchvision_source, "CelebA", _VALID),
    "flowers102": partial(torchvision_source, "Flowers102", _VAL),
}
"""Data sets by name: image_size -> Source. Besides them ``folder:PATH`` takes any folder of images."""
