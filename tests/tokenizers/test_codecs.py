"""Image formats as references: true file sizes, the best quality that the bits allow, and scores like any codec's."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, features

from bench.core.files import cache_dir
from bench.data import Data
from bench.metrics import from_uint8, psnr, to_uint8
from bench.tokenizers import codecs
from bench.tokenizers.codecs import FORMATS, FormatCodec, available, compress, format_references, write
from bench.tokenizers.config import Config, make_config

SCORED = make_config("cnn", "smoke", device="cpu")
every = pytest.mark.parametrize("name", [name for name in FORMATS if name in available()])


def pixels(images: Data, count: int = 3) -> np.ndarray:
    """Of 64×64, which compress better than 32×32: (count, 64, 64, 3) uint8."""
    rows = images.train[:32].reshape(2, 2, 4, 2, 32, 32, 3)  # any four crops beside each other
    return np.ascontiguousarray(rows.transpose(0, 2, 1, 4, 3, 5, 6).reshape(8, 64, 64, 3)[:count])


def shown(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@every
def test_the_quality_is_the_highest_that_fits(images, name):
    """By brute force over all qualities, at budgets from too small for any to enough for all."""
    for image in pixels(images, 2):
        qualities = range(0 if name != "jpeg" else 1, 101)
        files = {quality: write(image, name, quality) for quality in qualities}
        sizes = sorted(map(len, files.values()))
        for limit in (10, *sizes[::9], sizes[-1]):
            fitting = [quality for quality in qualities if len(files[quality]) <= limit]
            found = compress(image, name, 8 * limit)
            if fitting:
                assert found == files[max(fitting)]
            else:
                assert len(found) == sizes[0] > limit


@every
def test_sizes_that_step_back_are_looked_past(monkeypatch, name):
    """Files of 10, 30, 20, 40, ... bytes: the highest quality that fits may lie behind one that does not."""
    sizes = [30, 20, 50, 40, 70, 60, 90, 80]
    monkeypatch.setitem(FORMATS, name, FORMATS[name]._replace(qualities=range(len(sizes)), lowest=2))
    monkeypatch.setattr(codecs, "write", lambda image, name, quality: bytes([quality]) + bytes(sizes[quality] - 1))
    for limit in (5, 20, 25, 30, 40, 45, 50, 69, 75, 100):
        fitting = [quality for quality, size in enumerate(sizes) if size <= limit]
        assert compress(None, name, 8 * limit)[0] == (max(fitting) if fitting else 1)


def test_a_bit_less_than_the_file_does_not_fit(images):
    image = pixels(images, 1)[0]
    size = 8 * len(write(image, "webp", 30))
    assert len(compress(image, "webp", size)) * 8 <= size
    assert len(compress(image, "webp", size - 0.5)) * 8 < size


@every
def test_bits_are_the_sizes_of_files_that_decode_to_what_is_scored(images, name):
    """Headers included; of each image its own."""
    batch = pixels(images)
    latents, bits = FormatCodec(name, 8000).encode_with_bits(from_uint8(tensor(batch)))
    files = [compress(image, name, 8000) for image in batch]
    assert bits.tolist() == [8 * len(file) for file in files]
    assert bits.max() <= 8000
    assert torch.equal(to_uint8(FormatCodec(name, 8000).decode(latents)), tensor(np.stack(list(map(shown, files)))))
    assert torch.equal(FormatCodec(name, 8000).encode(from_uint8(tensor(batch))), latents)


@every
def test_more_bits_are_less_distortion(images, name):
    x = tensor(pixels(images, 4))
    scores, rates = [], []
    for bits in (100, 5000, 8000, 12000, 24000):
        latents, used = FormatCodec(name, bits).encode_with_bits(from_uint8(x))
        rates.append(float(used.mean()))
        scores.append(float(psnr(to_uint8(latents), x).mean()))
    assert rates == sorted(rates)
    assert scores == sorted(scores)
    assert rates[0] > 100  # no format goes that low
    assert scores[-1] > scores[0] + 3


def test_references_are_scores_by_score_of_the_images_that_runs_are_scored_on(trial_data, monkeypatch):
    found = format_references(SCORED, trial_data, 4000.0, None)
    assert {name.rpartition("_")[2] for name in found} == {*available()}
    for name in available():
        files = [compress(image, name, 4000) for image in trial_data.test]
        bits = np.mean([8 * len(file) for file in files])
        assert found[f"bits_per_image_{name}"] == pytest.approx(bits)
        assert found[f"bits_per_pixel_{name}"] == pytest.approx(bits / 32**2)
        expected = psnr(tensor(np.stack(list(map(shown, files)))), tensor(trial_data.test)).mean()
        assert found[f"psnr_{name}"] == pytest.approx(float(expected), abs=1e-4)
        own = {key for key in found if key.endswith(f"_{name}")}
        assert own <= {f"{metric}_{name}" for metric in codecs.KEPT}
        assert {f"{metric}_{name}" for metric in codecs.KEPT[1:]} <= own


def test_references_are_computed_once_for_images_bits_and_library(trial_data, monkeypatch):
    calls = []
    answer = dict.fromkeys(codecs.KEPT, 1.0)
    monkeypatch.setattr(codecs, "score", lambda *given: calls.append(given) or ({**answer, "psnr": len(calls)}, {}))
    monkeypatch.setattr(codecs, "available", lambda: ["webp"])

    def ask(data: Data = trial_data, bits: float = 4000.0, config: Config = SCORED) -> float:
        return format_references(config, data, bits, None)["psnr_webp"]

    assert ask() == ask() == ask(bits=4007.9) == 1  # a file has whole bytes
    assert ask(bits=4008.0) == 2
    assert ask(replace(trial_data, fingerprint="1" * 64)) == 3
    monkeypatch.setattr(codecs.PIL, "__version__", "0.1")
    assert ask() == 4
    monkeypatch.setattr(features, "version", lambda library: "0.2")
    assert ask() == 5
    assert ask(config=replace(SCORED, split="val")) == 6
    assert len(list((cache_dir() / "references").iterdir())) == 6
    assert [given[1] for given in calls] == [None] * 6  # there are no codes
    assert all(given[2] is trial_data.test for given in calls[:5])
    assert calls[5][2] is trial_data.val


def test_a_format_that_pillow_cannot_write_is_left_out(trial_data, monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    assert available() == ["webp", "jpeg"]
    monkeypatch.setattr(codecs, "score", lambda *given: (dict.fromkeys(codecs.KEPT, 1.0), {}))
    assert not any(name.endswith("_avif") for name in format_references(SCORED, trial_data, 4000.0, None))
