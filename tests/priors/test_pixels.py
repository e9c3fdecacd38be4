"""Pixels in the place of codes: nothing is lost, their order is what is promised, bits are bits per dimension."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.core.errors import UserError
from bench.data import Data
from bench.metrics import to_uint8
from bench.priors import pixels as module
from bench.priors.config import PriorConfig
from bench.priors.generate import rate
from bench.priors.pixels import Pixels, is_grey
from bench.priors.train import train_prior

SIDE = 16


def noise(count: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Images of uniform noise; grey ones of one channel."""
    values = np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, channels), dtype=np.uint8)
    return np.ascontiguousarray(np.broadcast_to(values, (count, SIDE, SIDE, 3)))


@pytest.fixture
def made(monkeypatch):
    """``made(train, test)``: pixels of these images."""

    def make(train: np.ndarray, test: np.ndarray, **about) -> Pixels:
        data = Data("toy", train, noise(3), test, "0123456789abcdef" * 4, "toy", (), **about)
        monkeypatch.setattr(module, "load", lambda name, image_size: data)
        return Pixels("photos", SIDE)

    return make


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_as_they_were(made, channels):
    """All 256 values of them; grey ones are a third as many codes."""
    images = noise(20, channels)
    assert len(np.unique(images)) == 256
    pixels = made(images, images)
    assert pixels.config.channels == channels
    codes = pixels.encode(images)
    assert codes.shape == (20, SIDE, channels * SIDE)
    back = to_uint8(pixels.decode(torch.from_numpy(codes.astype(np.int64)))).permute(0, 2, 3, 1)
    assert np.array_equal(back.numpy(), images)


def test_codes_are_the_channels_of_a_pixel_and_then_those_of_the_next(made):
    images = noise(2)
    codes = made(images, images).encode(images)
    expected = [[images[1, r, c, channel] for c in range(SIDE) for channel in range(3)] for r in range(SIDE)]
    assert codes[1].tolist() == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_codes_are_the_decoded_arrays_and_no_copies(made, channels):
    """With the labels of their own split; of mirror images there are none, and those to validate are not looked at."""
    train, test = noise(7, channels), noise(5, channels, seed=1)
    labels = tuple(np.arange(count, dtype=np.int64) % 2 for count in (7, 3, 5))
    pixels = made(train, test, classes=("a", "b"), labels=labels)
    codes = pixels.codes()
    assert np.shares_memory(codes.train, train)
    assert np.shares_memory(codes.held_out, test)
    assert (codes.codebook_size, codes.grid, codes.classes) == (256, (SIDE, channels * SIDE), ("a", "b"))
    assert np.array_equal(codes.held_out, pixels.encode(test))
    assert len(codes.train) == 7
    assert (codes.train_labels is labels[0], codes.held_out_labels is labels[2]) == (True, True)
    assert codes.tokenizer == pixels.digest == "0123456789abcdef"
    assert pixels.config.bits_per_image == 8 * codes.train[0].size


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("channel", range(3))
def test_one_pixel_that_is_not_grey_makes_three_channels(made, monkeypatch, split, channel):
    """Of any image of either split that is used, however many are looked at together."""
    monkeypatch.setattr(module, "COMPARED", 4)
    for place in (0, 3, 4, -1):
        images = {"train": noise(9, 1), "test": noise(6, 1)}
        assert made(**images).config.channels == 1
        images[split][place, -1, -1, channel] ^= 1
        assert made(**images).config.channels == 3
        assert not is_grey(images[split])


def test_bits_per_token_are_bits_per_dimension(made, tmp_path):
    """Of images that are all alike next to none, of noise eight, of noise whose channels are equal or of two values as
    many as it has, under the histogram and, where channels have to know each other, a prior that is trained."""
    floor = PriorConfig("none", "independent", device="cpu").resolved()
    alike = np.broadcast_to(noise(1), (6000, SIDE, SIDE, 3))
    two = noise(6000) % 2 * 200
    for images, bits, near in ((alike, 0, 0.04), (noise(6000), 8, 0.05), (noise(6000, 1), 8, 0.05), (two, 1, 0.04)):
        codes = made(images, images[:64]).codes()
        prior, _ = train_prior(floor, codes, tmp_path)
        assert rate(prior, codes.held_out, None, None) == pytest.approx(bits, abs=near)


def test_a_channel_is_told_the_channels_before_it(made, tmp_path):
    """Red is one of two values, and green and blue follow from it: a third of a bit for each at best, and a whole one
    for whoever is not told."""
    images = noise(256)[..., :1] % 2 * 100 + np.arange(3, dtype=np.uint8)
    codes = made(images, images[:32]).codes()
    how = {"steps": 130, "batch_size": 4, "lr": 1e-2, "warmup": 10, "dropout": 0.0, "weight_ema": 0.9}
    config = PriorConfig("none", "pixelcnn", 1, 30_000, precision="fp32", device="cpu", **how)
    prior, _ = train_prior(config.resolved(), codes, tmp_path)
    assert 0.33 < rate(prior, codes.held_out, None, None) < 0.6


def test_a_name_tells_data_and_size_and_keeps_folders_apart(made):
    """It is part of a run's id, and so of a folder's name."""
    pixels = made(noise(2), noise(2))
    named = {}
    for data in ("photos", "cifar10", "folder:a/b", "folder:a-b", "folder:~/a b: c"):
        for size in (28, 32):
            pixels.config = replace(pixels.config, data=data, image_size=size)
            named[data, size] = pixels.name
            PriorConfig(pixels.name, "rnn", device="cpu").check()
    assert len({*named.values()}) == 10
    assert named["photos", 32] == "pixels-photos-32"
    assert named["cifar10", 28] == "pixels-cifar10-28"
    assert re.fullmatch("pixels-folder-[0-9a-f]{8}-32", named["folder:a/b", 32])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("photos", 15), "image_size is 15; it must be at least 16"),
        (("photos", 10**6), "image_size is 1000000; it must be at most 8192"),
        (("mnist", 32), "unknown data 'mnist': choose one of photos"),
        (("photos", 4096), "image_size 4096 is larger than photos allows"),
    ],
)
def test_images_that_cannot_be_are_refused(given, words, monkeypatch, tmp_path):
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(words)):
        Pixels(*given)
