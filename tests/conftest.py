"""What several test modules share."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # test processes run side by side: threads of one would wait for the other

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from backbones.torchvision_repair import repair
from bench.core.files import cache_dir
from bench.data import Data
from bench.tokenizers import train
from bench.tokenizers.config import Config, make_config
from tests.watched import Toy, Watch

repair()  # before test modules import torchvision, timm, lpips or torch-fidelity themselves


@pytest.fixture
def tiny() -> Config:
    """A run of a few seconds: 32×32 images, 4×4 codes of 16."""
    size = {"width": 16, "depth": 1, "codebook_size": 16, "code_dim": 4, "steps": 12, "batch_size": 8, "warmup": 2}
    return make_config("cnn", "smoke", **size, lpips_weight=0.0, device="cpu")


@pytest.fixture(autouse=True, scope="session")
def heeded() -> Iterator[None]:
    """Signals mean here what they mean at a terminal, also where whoever started the tests ignores them (nohup, &)."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in usual}
    for number in usual:
        if before[number] == signal.SIG_IGN:
            signal.signal(number, usual[number])
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def impatient() -> Iterator[None]:
    """A test that waits for what never comes fails after a while."""

    def fail(*_) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def images() -> Data:
    """48 crops of 32×32 pixels of one photograph to train on, 24 others to validate and 24 to test with."""
    photo = skimage.data.astronaut()
    crops = np.stack([photo[y : y + 32, x : x + 32] for y in range(0, 384, 32) for x in range(0, 256, 32)])
    how = "48 train / 24 val / 24 test crops of 32×32"
    return Data("photos", crops[:48], crops[72:], crops[48:72], "0" * 64, how, ())


@pytest.fixture(scope="session")
def image_folder(images, tmp_path_factory) -> Path:
    """The same crops as PNG files in train/, val/ and test/, for commands that run in processes of their own."""
    folder = tmp_path_factory.mktemp("images")
    for name, crops in (("train", images.train), ("val", images.val), ("test", images.test)):
        (folder / name).mkdir()
        for number, crop in enumerate(crops):
            Image.fromarray(crop).save(folder / name / f"{number:03}.png")
    return folder


@pytest.fixture
def trial_data(images, monkeypatch, tmp_path) -> Data:
    """Trials load ``images``, and cache their k-means reference in a folder of their own; weights stay shared."""
    weights = cache_dir() / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "weights").symlink_to(weights)
    monkeypatch.setenv("VQBENCH_CACHE", str(folder))
    monkeypatch.setattr("bench.tokenizers.trial.load", lambda data, image_size: images)
    return images


@pytest.fixture
def watch(images, tmp_path, monkeypatch) -> Watch:
    """Trains on ``images`` and tells every step of every optimiser."""
    return Watch(images.train, tmp_path, monkeypatch)


@pytest.fixture
def toys(monkeypatch) -> list[Toy]:
    """Runs train Toys; every one of them is in this list."""
    made = []
    monkeypatch.setattr(train, "Tokenizer", lambda config: made.append(Toy(config)) or made[-1])
    return made
