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

ABOUT: dict[str, str] = {
    "photos": "4096 crops of photographs that come with scikit-image; no download",
    "cifar10": "50,000 small photographs of ten kinds of things, 32×32",
    "fashion_mnist": "60,000 grey pictures of clothes, 28×28",
    "stl10": "100,000 photographs without labels to train on, 96×96",
    "celeba": "162,770 faces of celebrities, 178×218",
    "flowers102": "1,020 photographs of flowers of 102 kinds",
    "folder:PATH": "any folder of images, with subfolders train, val and test or without",
}
"""What each is, in a line, for ``--list``."""
