"""What is measured of priors: rates in bits, samples, copies, references and speed, on toys whose numbers are known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench.core.files import unseal
from bench.data import Data
from bench.metrics import psnr, weights
from bench.priors import generate
from bench.priors.codes import Codes
from bench.priors.config import PriorConfig
from bench.priors.generate import decode, draw, nearest, rate, real_features, references, score_prior, speedup
from bench.priors.models import PRIORS, Prior

K, SIDE, SIZE = 6, 2, 8


class Painter(torch.nn.Module):
    """A tokenizer whose code is the grey level of its cell: 0, 51, 102, …"""

    def __init__(self, split: str = "test"):
        super().__init__()
        self.config = SimpleNamespace(image_size=SIZE, split=split)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        levels = codes.float() / (K - 1) * 2 - 1
        return (
            levels.repeat_interleave(SIZE // SIDE, 1).repeat_interleave(SIZE // SIDE, 2)[:, None].expand(-1, 3, -1, -1)
        )


class Recorder(Prior):
    """Draws given grids in turn, and remembers what it was asked for; its p of code k is proportional to k + 1."""

    def __init__(self, drawn: np.ndarray, classes: int = 0):
        super().__init__(K, (SIDE, SIDE), classes)
        self.drawn, self.asked, self.at = torch.from_numpy(drawn.astype(np.int64)), [], 0
        self.register_buffer("log_p", (torch.arange(1, K + 1) / (K * (K + 1) / 2)).log())

    def logits(self, codes, labels=None):
        return self.log_p.expand(*codes.shape, K)

    def sample(self, n, generator, temperature=1.0, top_k=0, labels=None, guidance=1.0, progress=None):
        told = {"temperature": temperature, "top_k": top_k, "labels": labels, "guidance": guidance}
        self.asked.append(SimpleNamespace(n=n, **told))
        self.asked[-1].random = torch.rand((), generator=generator).item()
        if progress:
            progress(n * self.tokens)
        rows = torch.arange(self.at, self.at + n) % len(self.drawn)
        self.at += n
        return self.drawn[rows]


def images_of(codes: np.ndarray) -> np.ndarray:
    return decode(Painter(), torch.from_numpy(codes.astype(np.int64)), "cpu").permute(0, 2, 3, 1).numpy()


def random_codes(count: int, seed: int, low: int = 0, high: int = K) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, SIDE, SIDE), dtype=np.uint8)


def toy(
    train: np.ndarray, held_out: np.ndarray, labels=(None, None), classes: tuple[str, ...] = ()
) -> tuple[Codes, Data]:
    """Codes and images of which ``held_out`` are the test; those to validate are all black."""
    val = np.zeros_like(images_of(held_out[:5]))
    data = Data("toy", images_of(train), val, images_of(held_out), f"{train.sum():064}", "toy", ())
    return Codes(train, held_out, K, "tokenizer", classes, *labels), data


def config(**settings) -> PriorConfig:
    return PriorConfig("toy", "rnn", **{"samples": 40, "precision": "fp32", "device": "cpu", **settings})


class Features:
    """Stands in for ImageSet: instead of features the images themselves; remembers the sets that were made."""

    made: list[np.ndarray]

    def __init__(self, features):
        self.features = features

    @classmethod
    def of(cls, batches, device="cpu", fid_weights=None):
        images = torch.cat([x.float().flatten(1) for x in batches])
        cls.made.append(images.numpy())
        return cls({"vgg16": images, "inception": torch.zeros(0, 2048), "dinov2": torch.zeros(0, 1024)})

    def distances(self, real):
        """Both sets show, and which is which."""
        made, real = (float(side.features["vgg16"].mean()) for side in (self, real))
        return {"gfid_vgg16": made, "recall_vgg16": real}


@pytest.fixture(autouse=True)
def features(monkeypatch, tmp_path) -> type[Features]:
    """Quick features, and a cache of this test's own."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(generate, "ImageSet", Features)
    monkeypatch.setattr(weights, "inception_digest", lambda path: None if path is None else str(path))
    Features.made = []
    return Features


# -- rate -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_the_rate_is_the_mean_bits_of_a_token_whatever_the_batches(monkeypatch, count):
    """Brute force over every token; the last batch is shorter and must not count for more."""
    monkeypatch.setattr(generate, "BATCH", 4)
    codes = random_codes(count, 1)
    bits = [-math.log2((code + 1) / 21) for code in codes.ravel().tolist()]
    assert rate(Recorder(codes).eval(), codes, None, None) == pytest.approx(np.mean(bits), rel=1e-6)


def test_memory_bounds_the_batches_of_a_rate(monkeypatch):
    codes, seen = random_codes(10, 1), []
    prior = Recorder(codes).eval()
    logits = prior.logits
    monkeypatch.setattr(prior, "logits", lambda x, labels=None: seen.append(x.numel() * K) or logits(x, labels))
    monkeypatch.setattr(generate, "LOGITS", 3 * SIDE**2 * K)
    whole = rate(prior, codes, None, None)
    assert max(seen) <= 3 * SIDE**2 * K
    monkeypatch.setattr(generate, "LOGITS", 1)
    assert rate(prior, codes, None, None) == pytest.approx(whole)
    assert sum(seen) == 2 * codes.size * K


def test_labels_are_coded_with_the_frequencies_of_the_training_set():
    """(n + ½) / (N + C/2), so a class that training lacks has finite bits; each label costs its own, once a grid."""
    codes, labels = random_codes(5, 1), np.array([0, 2, 2, 1, 0])
    train_labels = np.array([0] * 12 + [1] * 3)
    prior = Recorder(codes, classes=3).eval()
    free = rate(Recorder(codes).eval(), codes, None, None)
    p = np.array([12.5, 3.5, 0.5]) / 16.5
    assert rate(prior, codes, labels, train_labels) == pytest.approx(free - np.log2(p[labels]).mean() / SIDE**2)


def test_a_prior_is_told_the_label_of_each_grid(monkeypatch):
    monkeypatch.setattr(generate, "BATCH", 4)
    codes, labels = random_codes(9, 1), np.arange(9) % 3
    prior, seen = Recorder(codes, classes=3).eval(), []
    logits = prior.logits
    prior.logits = lambda x, given=None: seen.append((x.numpy(), given.numpy())) or logits(x, given)
    rate(prior, codes, labels, labels)
    assert np.array_equal(np.concatenate([x for x, _ in seen]), codes)
    assert np.array_equal(np.concatenate([given for _, given in seen]), labels)


# -- samples ----------------------------------------------------------------------------------------------------------


def test_as_many_grids_are_drawn_as_told_and_as_told(monkeypatch):
    """Each batch goes on where the one before left the generator."""
    monkeypatch.setattr(generate, "SAMPLE_BATCH", 16)
    prior = Recorder(random_codes(40, 1))
    drawn = draw(prior, config(temperature=0.7, top_k=3, guidance=2.5), None)
    assert np.array_equal(drawn.numpy(), prior.drawn.numpy())
    assert [asked.n for asked in prior.asked] == [16, 16, 8]
    told = {(asked.temperature, asked.top_k, asked.labels, asked.guidance) for asked in prior.asked}
    assert told == {(0.7, 3, None, 2.5)}
    random = [asked.random for asked in prior.asked]
    assert len(set(random)) == 3
    for seed in (0, 1):
        again = Recorder(random_codes(40, 1))
        draw(again, config(seed=seed), None)
        assert ([asked.random for asked in again.asked] == random) == (seed == 0)


@pytest.mark.parametrize("positions", [1, SIDE**2, 7 * SIDE**2 + 1])
def test_positions_bound_the_grids_that_are_drawn_at_a_time(monkeypatch, positions):
    """One at least; of grids as large as any tokenizer's the bound is none."""
    assert generate.POSITIONS // 64**2 == generate.SAMPLE_BATCH
    monkeypatch.setattr(generate, "POSITIONS", positions)
    prior = Recorder(random_codes(40, 1))
    assert np.array_equal(draw(prior, config(), None).numpy(), prior.drawn.numpy())
    assert {asked.n for asked in prior.asked[:-1]} == {max(1, positions // SIDE**2)}


def test_the_bar_of_samples_counts_their_codes(monkeypatch):
    """It moves while grids are drawn, and ends where it should."""
    bars = []

    class Bar(generate.Bar):
        def __init__(self, label, total):
            super().__init__(label, total)
            self.seen = []
            bars.append(self)

        def advance(self, count=1, figures=""):
            self.seen.append(count)

    monkeypatch.setattr(generate, "Bar", Bar)
    monkeypatch.setattr(generate, "SAMPLE_BATCH", 30)
    prior = PRIORS["independent"](K, (3, 6))
    draw(prior.eval(), config(), None)
    (bar,) = bars
    assert bar.total == sum(bar.seen) == 40 * 18
    assert len(bar.seen) == 2 * 18


def test_labels_are_drawn_as_often_as_the_training_set_has_them(monkeypatch):
    """Three of four are of class 4, one of class 1, none of any other; over all batches, and anew with another seed."""
    monkeypatch.setattr(generate, "SAMPLE_BATCH", 1000)
    train_labels = np.array([4, 1, 4, 4] * 50)
    found = []
    for seed in (0, 1):
        prior = Recorder(random_codes(40, 1), classes=6)
        draw(prior, config(samples=4000, seed=seed), train_labels)
        labels = torch.cat([asked.labels for asked in prior.asked])
        assert (len(labels), labels.dtype) == (4000, torch.int64)
        share = torch.bincount(labels, minlength=6) / 4000
        assert share.tolist() == pytest.approx([0, 0.25, 0, 0, 0.75, 0], abs=0.03)
        assert not prior.asked[0].labels.equal(prior.asked[1].labels)
        found.append(labels)
    assert not found[0].equal(found[1])


def test_labels_of_the_first_and_the_last_image_are_drawn_too():
    prior = Recorder(random_codes(40, 1), classes=6)
    draw(prior, config(), np.array([5, 3]))
    assert set(prior.asked[0].labels.tolist()) == {3, 5}


def test_a_prior_without_classes_is_told_no_labels_where_there_are_some():
    train, val = random_codes(20, 1), random_codes(10, 2)
    codes, data = toy(train, val, (np.arange(20) % 2, np.arange(10) % 2), ("a", "b"))
    prior = Recorder(train)
    scored(prior, codes, data)
    assert [asked.labels for asked in prior.asked] == [None] * 3


@pytest.mark.parametrize("classes", [0, 2])
def test_the_speed_of_sampling_is_that_of_16_grids_drawn_as_the_seed_says(classes):
    first, again, other = (Recorder(random_codes(40, 1), classes) for _ in range(3))
    for prior, seed in ((first, 3), (again, 3), (other, 4)):
        speedup(prior.eval(), config(seed=seed))
        assert [asked.n for asked in prior.asked] == [16, 16]
        for asked in prior.asked:
            assert asked.labels is None if classes == 0 else asked.labels.tolist() == [0] * 16
    drawn = [[asked.random for asked in prior.asked] for prior in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_all_is_computed_in_float32_whatever_autocast_says(tmp_path):
    """Rates, samples and images, those of references as well; so that the device decides nothing."""
    cast = {"logits": set(), "sample": set(), "decode": set()}

    class Watched(Recorder):
        def logits(self, *arguments):
            cast["logits"].add(torch.is_autocast_enabled("cpu"))
            return super().logits(*arguments)

        def sample(self, *arguments, **options):
            cast["sample"].add(torch.is_autocast_enabled("cpu"))
            return super().sample(*arguments, **options)

    class WatchedPainter(Painter):
        def decode(self, codes):
            cast["decode"].add(torch.is_autocast_enabled("cpu"))
            return super().decode(codes)

    train = random_codes(20, 1)
    codes, data = toy(train, train)
    with torch.autocast("cpu", torch.bfloat16):
        references(WatchedPainter(), codes, data, config(), tmp_path, None)
        score_prior(Watched(train).eval(), WatchedPainter(), codes, data, config(), {"nearest_val_psnr_95": 1.0}, None)
    assert cast == {"logits": {False}, "sample": {False}, "decode": {False}}


def test_decoded_samples_are_clamped_and_rounded():
    """As reconstructions are (bug 11): 0.6 of a level is one level, what lies beyond white is white."""

    class Levels:
        def decode(self, codes):
            return ((codes.float() - 1) * 0.6 / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)

    codes = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 1000]]])
    assert decode(Levels(), codes, "cpu")[:, 1].tolist() == [[[0, 0], [1, 1]], [[2, 2], [3, 255]]]
    many = torch.randint(0, 400, (2 * generate.BATCH + 3, 2, 2), generator=torch.Generator().manual_seed(0))
    expected = ((many - 1).clamp_min(0) * 0.6).round().to(torch.uint8)
    assert decode(Levels(), many, "cpu")[:, 0].equal(expected)


# -- neighbours -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 32, 64])
def test_nearest_is_what_brute_force_finds(size):
    """PSNR to the nearest of all training images and of their mirror images, at 32×32 pixels where they are larger."""
    generator = np.random.default_rng(0)
    train, images = (generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8) for count in (30, 7))
    found, rows = nearest(torch.from_numpy(images).permute(0, 3, 1, 2), train, "cpu")

    def small(x: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(x.copy()).permute(2, 0, 1).double()
        return F.avg_pool2d(x, size // 32) if size > 32 else x

    for image, decibels, row in zip(images, found, rows, strict=True):
        errors = [
            min((small(image) - small(other)).square().mean().item() for other in (one, one[:, ::-1])) for one in train
        ]
        assert row == np.argmin(errors)
        assert decibels.item() == pytest.approx(10 * math.log10(255**2 / min(errors)), abs=1e-3)
    if size <= 32:
        one = torch.from_numpy(train[rows.numpy()]).permute(0, 3, 1, 2)
        both = [psnr(torch.from_numpy(images).permute(0, 3, 1, 2), x.contiguous()) for x in (one, one.flip(-1))]
        torch.testing.assert_close(found, torch.maximum(*both))


def test_a_copy_has_78_decibels_and_not_infinitely_many():
    """As of a mean squared error of 0.001, which is far below that of one grey level in any image."""
    images = images_of(random_codes(3, 1))
    decibels, _ = nearest(torch.from_numpy(images).permute(0, 3, 1, 2), images, "cpu")
    assert decibels.tolist() == pytest.approx([10 * math.log10(255**2 / 0.001)] * 3)


def test_neighbours_come_from_an_even_choice_of_all_training_images(monkeypatch):
    """Of more than a block, and where a part of them has to do; rows are those of the training set."""
    train = np.random.default_rng(0).integers(0, 256, (2500, 4, 4, 3), dtype=np.uint8)
    asked = np.array([0, 1, 1023, 1024, 1700, 2499])
    images = torch.from_numpy(train[asked]).permute(0, 3, 1, 2)
    decibels, rows = nearest(images, train, "cpu")
    assert rows.tolist() == asked.tolist()
    assert (decibels > 60).all()
    monkeypatch.setattr(generate, "NEAREST_IMAGES", 50)
    decibels, rows = nearest(images, train, "cpu")
    assert set(rows.tolist()) <= set(np.linspace(0, 2499, 50, dtype=int).tolist())
    assert (decibels > 60).tolist() == [True, False, False, False, False, True]


# -- scores -----------------------------------------------------------------------------------------------------------


def scored(prior: Prior, codes: Codes, data: Data, **settings) -> generate.Generated:
    known = {"nearest_val_psnr": -9.0, "nearest_val_psnr_95": 30.0}  # as references give both
    return score_prior(prior.eval(), Painter(), codes, data, config(**settings), known, None)


def test_rates_are_of_held_out_codes_and_of_as_many_training_codes():
    """Training codes are taken evenly, to the last mirror image."""
    train, val = np.sort(random_codes(90, 1), axis=0), random_codes(30, 2, 3)
    codes, data = toy(train, val)
    metrics = scored(Recorder(train), codes, data).metrics

    def bits(grids: np.ndarray) -> float:
        return float(-np.log2((grids + 1.0) / 21).mean())

    per_token = bits(val)
    assert metrics["coded_bits_per_token"] == pytest.approx(per_token)
    assert metrics["coded_bits_per_image"] == pytest.approx(4 * per_token)
    assert metrics["coded_bits_per_pixel"] == pytest.approx(4 * per_token / 64)
    evenly = [math.floor(89 * place / 29) for place in range(30)]
    assert metrics["coded_bits_per_token_train"] == pytest.approx(bits(train[evenly]))
    assert metrics["params_prior"] == 0


def test_rates_of_a_conditional_prior_count_the_classes_of_each_set():
    train, val = random_codes(20, 1), random_codes(10, 2)
    labels = np.array([0] * 15 + [1] * 5), np.ones(10, dtype=np.int64)
    codes, data = toy(train, val, labels, ("a", "b"))
    prior = Recorder(train, classes=2)
    generated = scored(prior, codes, data, conditional=True)
    asked = [asked.labels for asked in prior.asked if len(asked.labels) == 40]
    assert generated.classes == ["ab"[place] for place in torch.cat(asked).tolist()]
    metrics = generated.metrics
    assert {len(asked.labels) for asked in prior.asked} == {40, generate.TRIED}
    evenly = np.linspace(0, 19, 10, dtype=int)
    bits = np.log2(21 / 15.5), np.log2(21 / 5.5)
    for name, grids, classes in (("", val, labels[1]), ("_train", train[evenly], labels[0][evenly])):
        free = float(-np.log2((grids + 1.0) / 21).mean())
        coded = np.mean([bits[label] for label in classes]) / SIDE**2
        assert metrics[f"coded_bits_per_token{name}"] == pytest.approx(free + coded)


def test_memorised_samples_are_copies_and_others_are_not():
    train, val = random_codes(30, 1, 0, 3), random_codes(30, 2)
    codes, data = toy(train, val)
    memorised = scored(Recorder(train), codes, data)
    assert memorised.metrics["copy_rate"] == 1
    assert memorised.metrics["nearest_train_psnr"] > 60
    assert (memorised.neighbours == memorised.images).all()
    bright = np.full((30, SIDE, SIDE), K - 1)  # nothing in the training set is brighter than 102
    assert scored(Recorder(bright), codes, data).metrics["copy_rate"] == 0
    mixed = scored(Recorder(np.concatenate([train[:10], bright])), codes, data, samples=40)
    assert mixed.metrics["copy_rate"] == 0.25
    assert mixed.metrics["nearest_train_psnr"] < 30  # the median, not the best


def test_the_samples_themselves_come_back_with_their_neighbours():
    train, val = random_codes(30, 1), random_codes(9, 2)
    codes, data = toy(train, val)
    drawn = random_codes(100, 3)
    generated = scored(Recorder(drawn), codes, data, samples=100)
    expected = np.roll(drawn, -2 * generate.TRIED, axis=0)  # the speed is measured with grids of its own, twice
    assert np.array_equal(generated.codes, expected)
    assert np.array_equal(generated.images, images_of(expected[: generate.SHOWN]))
    assert generated.neighbours.shape == generated.images.shape
    _, rows = nearest(torch.from_numpy(generated.images).permute(0, 3, 1, 2), data.train, "cpu")
    assert np.array_equal(generated.neighbours, data.train[rows.numpy()])


def test_samples_are_compared_with_held_out_images_in_that_order(features):
    """Precision is of the samples and recall of real images: which is which matters."""
    train, val = random_codes(30, 1, 0, 1), random_codes(9, 2, 1, 2)
    codes, data = toy(train, val)
    metrics = scored(Recorder(np.full((5, SIDE, SIDE), 5)), codes, data).metrics
    assert (metrics["gfid_vgg16"], metrics["recall_vgg16"]) == (255, 51)
    assert [len(made) for made in features.made] == [9, 40]


def test_samples_and_references_are_compared_with_the_split_that_the_tokenizer_was_scored_on(tmp_path):
    """That to validate is black here."""
    train = random_codes(30, 1)
    codes, data = toy(train, random_codes(9, 2, 1, 2))
    for split, level in (("val", 0), ("test", 51)):
        known = {"nearest_val_psnr": -9.0, "nearest_val_psnr_95": 30.0}
        found = score_prior(Recorder(train).eval(), Painter(split), codes, data, config(), known, None)
        assert found.metrics["recall_vgg16"] == level
        (tmp_path / split).mkdir()
        assert references(Painter(split), codes, data, config(), tmp_path / split, None)["recall_vgg16_real"] == level


def test_speed_is_counted_from_the_first_code_to_the_last_image(monkeypatch):
    """On a clock that only the work moves: 3 s to sample a batch of 256 and 1 s for each of 64 to decode."""
    now = [0.0]
    monkeypatch.setattr(generate, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(Recorder):
        def sample(self, *arguments, **options):
            now[0] += 3
            return super().sample(*arguments, **options)

        def logits(self, *arguments):
            now[0] += 6
            return super().logits(*arguments)

    class SlowPainter(Painter):
        def decode(self, codes):
            now[0] += 1
            return super().decode(codes)

    train = random_codes(30, 1)
    codes, data = toy(train, train)
    known = {"nearest_val_psnr_95": 30.0}
    metrics = score_prior(Slow(train).eval(), SlowPainter(), codes, data, config(samples=512), known, None).metrics
    assert metrics["images_per_second_sample"] == 512 / (2 * 3 + 8)
    assert metrics["sampling_speedup"] == SIDE**2 * 6 / 3
    assert speedup(Slow(train, classes=2).eval(), config()) == 8


def test_sampling_ends_when_the_device_has_sampled(monkeypatch):
    """A device that works on after a call returns: 3 s for the samples, 6 s for their logits, waited for by ``cpu``."""
    now, pending = [0.0], [0.0]
    monkeypatch.setattr(generate, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Late(torch.Tensor):
        def cpu(self):
            now[0], pending[0] = now[0] + pending[0], 0.0
            return super().cpu()

    class Queue:
        classes = 0

        def sample(self, n, generator, labels=None):
            pending[0] += 3
            return torch.zeros(n, SIDE, SIDE, dtype=torch.int64).as_subclass(Late)

        def logits(self, codes, labels=None):
            pending[0] += 6
            return torch.zeros(*codes.shape, K).as_subclass(Late)

    assert speedup(Queue(), config()) == SIDE**2 * 6 / 3


# -- references -------------------------------------------------------------------------------------------------------


def found_references(codes: Codes, data: Data, folder: Path, fid_weights: Path | None = None, **settings) -> dict:
    folder.mkdir(exist_ok=True)
    return references(Painter(), codes, data, config(**settings), folder, fid_weights)


def test_references_are_real_and_shuffled_codes_and_the_floor(tmp_path, features):
    """Left cells are dark and right ones bright in training, so that an order is there to be lost."""
    left, right = np.random.default_rng(0).integers(0, 3, (2, 50, SIDE, 1), dtype=np.uint8)
    train = np.concatenate([left, right + 3], axis=2)
    mirrored = np.concatenate([train, train[:, :, ::-1]])
    val = random_codes(20, 2)
    codes, data = toy(train, val)
    codes = codes._replace(train=mirrored)
    found = found_references(codes, data, tmp_path / "codes", samples=30)

    real, shuffled = features.made[-2:]
    evenly = np.linspace(0, 49, 30, dtype=int)
    images = images_of(train[evenly])
    assert np.array_equal(real, images.transpose(0, 3, 1, 2).reshape(30, -1))
    assert not np.array_equal(real, shuffled)
    assert np.array_equal(np.sort(real, axis=1), np.sort(shuffled, axis=1))  # each grid keeps its codes
    assert len({tuple(np.argsort(grid, kind="stable")) for grid in shuffled}) > 10  # in an order of its own
    assert found["nearest_train_psnr_real"] > 60 > found["nearest_train_psnr_shuffled"]
    assert found["recall_vgg16_real"] == found["recall_vgg16_shuffled"] == pytest.approx(data.test.mean())

    floor = PRIORS["independent"](K, (SIDE, SIDE))
    floor.fit(torch.from_numpy(mirrored.astype(np.int64)))
    bits = floor.nll(torch.from_numpy(val.astype(np.int64))).double().mean().item() / math.log(2)
    assert found["coded_bits_per_token_independent"] == pytest.approx(bits)

    decibels = nearest(torch.from_numpy(images_of(val)).permute(0, 3, 1, 2), data.train, "cpu")[0].numpy()
    assert found["nearest_val_psnr"] == pytest.approx(np.sort(decibels)[9], rel=1e-5)  # torch's median of 20
    assert found["nearest_val_psnr_95"] == pytest.approx(np.quantile(decibels, 0.95), rel=1e-5)


def test_no_real_code_is_counted_twice(tmp_path, features):
    """Also where more samples are asked for than there are images."""
    train = random_codes(7, 1)
    codes, data = toy(train, random_codes(6, 2))
    found_references(codes._replace(train=np.concatenate([train, train])), data, tmp_path / "codes", samples=1000)
    assert [len(made) for made in features.made] == [6, 7, 7]
    assert len(np.unique(features.made[1], axis=0)) == len(np.unique(train, axis=0))


def test_references_are_computed_once_for_what_they_depend_on(tmp_path, features, monkeypatch):
    """And anew for another number of samples, other weights, another kind of device or another version of scoring."""
    codes, data = toy(random_codes(20, 1), random_codes(8, 2))

    def computed(**settings) -> bool:
        before = len(features.made)
        found = found_references(codes, data, tmp_path / "codes", **settings)
        assert found == found_references(codes, data, tmp_path / "codes", **settings)
        return len(features.made) > before

    assert computed()
    assert not computed(temperature=0.5, seed=3)
    assert computed(samples=10)
    assert computed(fid_weights=Path("inception"))
    monkeypatch.setattr(generate, "PRIOR_VERSION", generate.PRIOR_VERSION + 1)
    assert computed()
    monkeypatch.setattr(weights, "weights_digest", lambda name: f"other {name}")
    assert computed()
    known = {path.name for path in (tmp_path / "codes").iterdir()}
    assert all("cpu" in name for name in known)


def test_features_of_held_out_images_are_computed_once_for_a_data_set(features, monkeypatch):
    _, data = toy(random_codes(20, 1), random_codes(8, 2))
    first = real_features(data, "test", "cpu", None).features["vgg16"]
    assert np.array_equal(features.made[0], data.test.transpose(0, 3, 1, 2).reshape(8, -1))
    assert real_features(data, "test", "cpu", None).features["vgg16"].equal(first)
    assert len(features.made) == 1
    assert not real_features(data, "val", "cpu", None).features["vgg16"].any()
    other = replace(data, test=images_of(random_codes(8, 3)), fingerprint="1" * 64)
    assert not real_features(other, "test", "cpu", None).features["vgg16"].equal(first)
    real_features(data, "test", "cpu", Path("inception"))
    monkeypatch.setattr(weights, "weights_digest", lambda name: f"other {name}")
    real_features(data, "test", "cpu", None)
    assert len(features.made) == 5


def test_cached_features_keep_every_network(features, monkeypatch, tmp_path):
    _, data = toy(random_codes(5, 1), random_codes(5, 2))
    made = features({"vgg16": torch.ones(1, 2), "inception": torch.zeros(3, 4), "dinov2": torch.zeros(0, 5)})
    monkeypatch.setattr(features, "of", lambda *arguments: made)
    for _ in range(2):
        found = real_features(data, "test", "cpu", None).features
        assert (found["vgg16"].tolist(), found["inception"].shape) == ([[1, 1]], (3, 4))
    (path,) = (tmp_path / "cache" / "references").iterdir()
    assert set(np.load(path)) == {"vgg", "inception", "dinov2"}


def test_references_are_written_as_they_are_returned(tmp_path):
    codes, data = toy(random_codes(20, 1), random_codes(8, 2))
    found = found_references(codes, data, tmp_path / "codes")
    (path,) = (tmp_path / "codes").iterdir()
    assert unseal(path) == found
    assert all(math.isfinite(value) for value in found.values())


def test_cached_features_lie_in_the_cache_whole_or_not_at_all(features, monkeypatch, tmp_path):
    """One file for all devices of a kind, since all give the same."""
    _, data = toy(random_codes(5, 1), random_codes(5, 2))
    save = np.savez

    def full(path, **arrays):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(generate.np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        real_features(data, "test", "cpu", None)
    folder = tmp_path / "cache" / "references"
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(generate.np, "savez", save)
    for device in ("cpu", "cpu:0"):
        real_features(data, "test", device, None)
    (path,) = folder.iterdir()
    assert path.name.startswith(f"features-{data.fingerprint[:16]}-test-")
    assert path.name.endswith("-none-cpu.npz")
    assert len(features.made) == 2  # the first time was in vain


def test_references_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Beside the codes, under a name that says for how many samples; one file for all devices of a kind."""
    codes, data = toy(random_codes(20, 1), random_codes(8, 2))
    folder = tmp_path / "codes"

    def full(path, text):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "write_text", full)
        with pytest.raises(OSError, match="disk full"):
            found_references(codes, data, folder)
    assert list(folder.iterdir()) == []
    for device in ("cpu", "cpu:0"):
        found_references(codes, data, folder, device=device)
    (path,) = folder.iterdir()
    assert path.name.startswith(f"references-v{generate.PRIOR_VERSION}-40-")
    assert path.name.endswith("-cpu.json")


def test_bars_say_what_takes_its_time_and_count_all_of_it(monkeypatch, tmp_path):
    bars = []

    class Noted(generate.Bar):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            bars.append(self)

    monkeypatch.setattr(generate, "Bar", Noted)
    monkeypatch.setattr(generate, "SAMPLE_BATCH", 16)
    monkeypatch.setattr(generate, "BATCH", 16)
    codes, data = toy(random_codes(30, 1), random_codes(20, 2))
    found_references(codes, data, tmp_path / "codes")
    scored(Recorder(codes.train), codes, data)
    assert [(bar.label, bar.done) for bar in bars] == [
        *(("features of test images", 20), ("scoring real codes", 30), ("scoring shuffled codes", 30)),
        *(("rating grids", 20), ("rating grids", 20), ("rating grids", 20)),  # the floor's, held-out ones, of training
        *(("sampling codes", 40 * SIDE**2), ("scoring samples", 40)),
    ]
    assert all(bar.done == bar.total for bar in bars)


@pytest.mark.parametrize("classes", [0, 3])
def test_flops_of_a_prior_are_those_of_one_whole_grid(classes):
    """Of all positions at once: a linear head of 5 numbers for each of 6 codes, a multiplication and an addition."""

    class Linear(Prior):
        def __init__(self):
            super().__init__(K, (SIDE, SIDE), classes)
            self.head = torch.nn.Linear(5, K, bias=False)

        def logits(self, codes, labels=None):
            assert (labels is None) == (classes == 0)
            return self.head(torch.zeros(*codes.shape, 5))

    assert generate.whole_grid_flops(Linear()) == 2 * SIDE**2 * 5 * K


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"content": {"nearest_val_psnr": 1.0}, "sha256": ""}',
        '{"nearest_val_psnr": 1.0}',
        '{"nearest_val_psnr": 1.0, "nearest_val_psnr_95": "30"}',
    ],
)
def test_damaged_references_are_computed_again(tmp_path, features, capsys, content):
    """Also those that were written without a digest and lack a number, or have a text in its place."""
    codes, data = toy(random_codes(20, 1), random_codes(8, 2))
    found = found_references(codes, data, tmp_path / "codes")
    (path,) = (tmp_path / "codes").iterdir()
    path.write_text(content)
    assert found_references(codes, data, tmp_path / "codes") == found
    assert f"{path} is damaged: " in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["empty", "cut", "flip"])
def test_damaged_features_are_computed_again(features, tmp_path, capsys, damage):
    _, data = toy(random_codes(20, 1), random_codes(8, 2))
    first = real_features(data, "test", "cpu", None).features["vgg16"]
    (path,) = (tmp_path / "cache" / "references").iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(bytes(8), 200)] ^= 1
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "flip": content}[damage])
    assert real_features(data, "test", "cpu", None).features["vgg16"].equal(first)
    assert len(features.made) == 2
    assert f"{path} is damaged: " in capsys.readouterr().err
