"""Data sets by name. To add one: write a function ``image_size -> Source`` and add a line."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from backbones.plugins import plugged

from .formats import check_hub, find_arrays, find_parquet, hub_source, npy_source, parquet_source
from .photos import photo_source
from .shards import find_shards, shard_source
from .sources import Source, check_folder, folder_source, torchvision_source

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
DATASETS |= plugged("data", DATASETS)
"""Data sets by name: image_size -> Source."""


class Format(NamedTuple):
    """How images of one's own may be given: FORMAT:PLACE."""

    place: str  # what stands behind the colon, as commands call it
    source: Callable[[str, int], Source]  # a place and image_size
    check: Callable[[str], object]  # raises UserError where nothing can be read at a place; quick


FORMATS: dict[str, Format] = {
    "folder": Format("PATH", folder_source, check_folder),
    "shards": Format("DIR|PATTERN", shard_source, find_shards),
    "parquet": Format("FILE|DIR", parquet_source, find_parquet),
    "npy": Format("FILE|DIR", npy_source, find_arrays),
    "hf": Format("NAME[:SPLIT]", hub_source, check_hub),
}
"""Formats of images of one's own, by the word before the colon."""

ABOUT: dict[str, str] = {
    "photos": "4096 crops of photographs that come with scikit-image; no download",
    "cifar10": "50,000 small photographs of ten kinds of things, 32×32",
    "fashion_mnist": "60,000 grey pictures of clothes, 28×28",
    "stl10": "100,000 photographs without labels to train on, 96×96",
    "celeba": "162,770 faces of celebrities, 178×218",
    "flowers102": "1,020 photographs of flowers of 102 kinds",
    "folder:PATH": "any folder of images, with subfolders train, val and test or without",
    "shards:DIR|PATTERN": "WebDataset's tar files, which images to train on stay in; python -m bench.shard writes them",
    "parquet:FILE|DIR": "tables with a column of image files, as on Hugging Face's hub",
    "npy:FILE|DIR": "one array (N, H, W, 3) uint8, or train.npy, test.npy and perhaps val.npy",
    "hf:NAME[:SPLIT]": "a data set of the datasets package: a folder that save_to_disk made, or a name on the hub",
}
"""What each is, in a line, for ``--list``."""
