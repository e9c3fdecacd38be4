"""Instruments find what is known of codecs that are made for it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.core.errors import UserError
from bench.instruments import INSTRUMENTS, Subject, atlas, equivariance, probes, robustness, sizes
from bench.instruments.instrument import spread
from bench.tokenizers.config import make_config
from bench.tokenizers.evaluate import PatchKMeans, score
from bench.tokenizers.tokenizer import Tokenizer

SIDE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)


class Grey:
    """A code per cell of 4×4 pixels: its mean brightness, one of 256."""

    def encode(self, x):
        return x.mean(1, keepdim=True).unfold(2, 4, 4).unfold(3, 4, 4).mean((1, 4, 5)).add(1).mul(127.5).round().long()

    def decode(self, codes):
        grey = codes.float().div(127.5).sub(1).repeat_interleave(4, 1).repeat_interleave(4, 2)
        return grey[:, None].expand(-1, 3, -1, -1)

    def lookup(self, codes):
        return codes.float()[:, None]


class Blank(Grey):
    """The same codes, and a decoder that heeds none of them."""

    def decode(self, codes):
        return torch.zeros(len(codes), 3, SIDE, SIDE)


class Latent:
    """No codes: all pixels of a cell of 4×4 lie between encoder and decoder."""

    def encode(self, x):
        return F.pixel_unshuffle(x, 4)

    def decode(self, latents):
        return F.pixel_shuffle(latents, 4)


class Stained(Latent):
    """The image with stains that stay in their places, whatever it shows."""

    def decode(self, latents):
        return super().decode(latents) + 0.2 * torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


class Upright(Grey):
    """Codes that also say where in the image they are."""

    def encode(self, x):
        place = torch.arange(SIDE // 4)
        return (super().encode(x) + 37 * place + 91 * place[:, None]) % 256


def subject(codec=None, images=IMAGES, train=IMAGES, labels=None, codebook_size=256, at=None):
    codec = codec or Grey()
    return Subject(
        codec, getattr(codec, "lookup", None), codebook_size, images, train, labels, at or (lambda size: images)
    )


def flat(levels):
    """Images of one grey level each, (N, SIDE, SIDE, 3) uint8."""
    return np.broadcast_to(np.asarray(levels, dtype=np.uint8)[:, None, None, None], (len(levels), SIDE, SIDE, 3)).copy()


def smooth():
    """Images whose cells differ from their neighbours by little."""
    ramp = np.add.outer(np.arange(SIDE), np.arange(SIDE))
    return np.stack([flat([0])[0] + (ramp * 2 + 5 * i)[..., None].astype(np.uint8) for i in range(16)])


def test_a_share_is_replaced_and_the_places_of_a_smaller_one_are_among_them():
    codes, other = torch.zeros(50, 20, 20, dtype=torch.int64), torch.ones(50, 20, 20, dtype=torch.int64)
    replaced = {share: robustness.damaged(codes, other, share) for share in (0, 0.05, 0.2, 1)}
    assert not replaced[0].any()
    assert replaced[1].all()
    assert replaced[0.05].float().mean() == pytest.approx(0.05, abs=0.01)
    assert replaced[0.2].float().mean() == pytest.approx(0.2, abs=0.01)
    assert (replaced[0.05] <= replaced[0.2]).all()
    assert robustness.damaged(codes, other, 0.2).equal(replaced[0.2])


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan])
def test_a_share_outside_0_and_1_is_refused(share):
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(UserError, match=r"give one from 0 to 1$"):
        robustness.damaged(codes, codes, share)


def test_random_codes_are_any_but_the_right_one():
    codes = torch.arange(8).repeat(4000)
    others = robustness.random_others(codes, 8)
    assert (others != codes).all()
    counts = torch.bincount((others - codes) % 8, minlength=8)[1:]
    assert (counts / len(codes) - 1 / 7).abs().max() < 0.01
    assert robustness.random_others(torch.zeros(3, dtype=torch.int64), 1).tolist() == [0, 0, 0]


def test_near_codes_are_the_nearest_others_in_use():
    near = robustness.nearest_others(torch.tensor([[[10, 12], [40, 43]], [[10, 44], [12, 40]]]), subject())
    assert near.tolist() == [[[12, 10], [43, 44]], [[12, 43], [10, 43]]]
    alone = torch.full((2, 2, 2), 7)
    assert robustness.nearest_others(alone, subject()).equal(alone)


def test_near_codes_are_the_nearest_others_in_use_of_a_large_codebook():
    """More of them than are compared with all others at once."""
    codes = 3 * torch.arange(1500).view(1, 30, 50)
    near = robustness.nearest_others(codes, subject())
    assert ((near - codes).abs() == 3).all()


def test_a_few_images_are_spread_over_all():
    assert spread(10, 4).tolist() == [0, 3, 6, 9]
    assert spread(3, 9).tolist() == [0, 1, 2]
    assert subject().few(2).permute(0, 2, 3, 1).numpy().tolist() == IMAGES[[0, -1]].tolist()


def test_damage_costs_nothing_where_the_decoder_heeds_no_codes():
    found = robustness.measure(subject(Blank())).metrics
    assert found["loss_random"] == found["loss_near"] == 0
    assert len({value for name, value in found.items() if name.startswith("psnr_")}) == 1
    assert len({value for name, value in found.items() if name.startswith("lpips_")}) == 1


def test_near_codes_cost_less_than_random_ones_and_more_codes_cost_more():
    found = robustness.measure(subject(images=smooth())).metrics
    assert 0 < found["loss_near"] < found["loss_random"]
    for kind in robustness.KINDS:
        curve = [found[f"psnr_{kind}_{100 * share:.0f}"] for share in robustness.SHARES]
        assert curve == sorted(curve, reverse=True)
        assert found[f"loss_{kind}"] == curve[0] - curve[2]
        assert found[f"lpips_{kind}_20"] > found[f"lpips_{kind}_0"]
    assert found["psnr_near_0"] == found["psnr_random_0"]


@pytest.mark.parametrize("codec", [Grey(), Latent()])
def test_what_moves_along_has_0_db(codec):
    """Cells that know nothing of each other move with any image by whole cells, and mirrored; the identity always."""
    blocks = np.repeat(np.repeat(IMAGES[:, ::4, ::4], 4, 1), 4, 2)  # which Grey loses but the colour of
    found = equivariance.measure(subject(codec, images=blocks)).metrics
    assert found["equivariance_cell"] == found["equivariance_flip"] == 0
    if isinstance(codec, Latent):
        assert {found[f"equivariance_{name}"] for name in ("half", "zoom")} == {0}
        assert not [name for name in found if name.startswith("codes")]
    else:
        assert found["equivariance_half"] > 0.5
        assert found["equivariance_zoom"] > 0
        assert found["codes_kept_cell"] == found["codes_kept_flip"] == 1


def test_errors_that_stay_where_they_were_have_3_db():
    found = equivariance.measure(subject(Stained(), images=IMAGES // 4 + 96)).metrics
    for name in ("cell", "half", "flip"):
        assert found[f"equivariance_{name}"] == pytest.approx(10 * math.log10(2), abs=0.15), name


def test_codes_that_know_their_place_do_not_stay():
    found = equivariance.measure(subject(Upright())).metrics
    assert max(found["codes_kept_cell"], found["codes_kept_flip"]) < 0.1


def test_excess_is_the_difference_beside_the_errors_in_closed_form():
    truth = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    assert equivariance.excess(truth + 6, truth + 6, truth) == 0
    expected = 10 * math.log10(1 + 36 / (36 + 1 / 12))
    assert equivariance.excess(truth, truth + 6, truth) == pytest.approx(expected)
    assert equivariance.excess(truth + 6, truth, truth) == pytest.approx(expected)


def test_windows_show_nothing_that_came_in():
    x = torch.arange(SIDE * SIDE).remainder(251).view(1, 1, SIDE, SIDE).expand(1, 3, -1, -1).to(torch.uint8)
    for name, pixels in (("cell", 4), ("half", 2)):
        move, window = equivariance.moves(SIDE, 8)[name]
        was = slice(window.start - pixels, window.stop - pixels)
        assert move(x)[..., window, window].equal(x[..., was, was])
        assert window.start >= pixels + 4
        assert window.stop <= SIDE - 4
    assert equivariance.moves(SIDE, 8)["flip"].apply(x)[..., 0].equal(x[..., -1])


def test_a_grid_of_few_cells_cannot_be_shifted():
    assert {*equivariance.moves(SIDE, 2)} == {"flip", "zoom"}
    assert {*equivariance.moves(SIDE, SIDE)} == {"flip", "zoom", "cell"}


LEVELS = np.arange(0, 250, 25)


def labelled(codec=None, noise=False, count=200):
    """Flat images of ten grey levels, which are their labels; with ``noise`` the labels are random."""
    draw = np.random.default_rng(1)
    labels = [draw.integers(0, len(LEVELS), count) for _ in range(2)]
    images = [flat(LEVELS[own]) for own in labels]
    if noise:
        labels = [draw.integers(0, len(LEVELS), count) for _ in range(2)]
    return subject(codec, images[1], images[0], tuple(labels)), labels[1]


def test_codes_that_are_the_label_tell_all_of_it():
    looked_at, labels = labelled()
    found = probes.measure(looked_at).metrics
    shares = np.bincount(labels) / len(labels)
    assert found["code_label_bits"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert found["purity"] == 1
    for name in ("linear_codes", "knn_codes", "knn_vectors"):
        assert found[f"probe_{name}"] == 1, name
    assert found["probe_linear_vectors"] > 2 * found["probe_chance"]


def test_codes_that_have_nothing_to_do_with_labels_tell_nothing():
    looked_at, _ = labelled(noise=True, count=1000)
    found = probes.measure(looked_at).metrics
    for name in ("linear_codes", "knn_codes", "linear_vectors", "knn_vectors", "chance"):
        assert found[f"probe_{name}"] == pytest.approx(0.1, abs=0.04), name
    assert found["purity"] < 0.2
    assert found["code_label_bits"] < 0.1


def test_purity_and_information_in_closed_form():
    codes, labels = np.array([5, 5, 5, 5, 9, 9, 9, 9]), np.array([3, 3, 3, 1, 1, 1, 1, 1])
    found = probes.information(codes, labels)
    assert found["purity"] == 7 / 8
    joint = {(5, 3): 3 / 8, (5, 1): 1 / 8, (9, 1): 4 / 8}
    label = {3: 3 / 8, 1: 5 / 8}
    expected = sum(p * math.log2(p / (0.5 * label[c])) for (_, c), p in joint.items())
    assert found["code_label_bits"] == pytest.approx(expected)


def test_histograms_know_only_codes_of_training_images():
    train, scored = torch.tensor([[[3, 3], [3, 7]]]), torch.tensor([[[7, 9], [2, 7]]])
    first, second = probes.histograms(train, scored)
    np.testing.assert_allclose(first, [[math.sqrt(0.75), 0.5]], rtol=1e-15)  # roots differ in their last bit
    np.testing.assert_allclose(second, [[0, math.sqrt(0.5)]], rtol=1e-15)


def test_probes_need_labels():
    assert "have no labels" in INSTRUMENTS["probes"].unfit(subject())
    assert not INSTRUMENTS["probes"].unfit(labelled()[0])


def test_cells_are_those_of_the_grid():
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert atlas.cells(x, 4)[1, 2, 3].equal(x[1, :, 4:6, 6:8])


def test_codes_alone_are_as_near_as_the_codec_where_cells_stand_alone(tmp_path):
    codec = PatchKMeans(IMAGES, 8, 16, "cpu")
    looked_at = subject(codec, codebook_size=16)
    reading = atlas.measure(looked_at)
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    x_hat = looked_at.decode(looked_at.encode(x))
    error = (x_hat.double() - x.double()).square().mean().item()
    assert reading.metrics["alone_psnr"] == pytest.approx(10 * math.log10(255**2 / error))
    reading.draw(tmp_path / "atlas.png")
    assert (tmp_path / "atlas.png").stat().st_size > 1000


def test_the_same_size_has_the_scores_of_the_run():
    config = make_config("vit", "smoke", device="cpu", image_size=SIDE, grid_size=8, width=32, depth=1)
    tokenizer = Tokenizer(config).eval()
    looked_at = subject(tokenizer, at=lambda size: np.repeat(np.repeat(IMAGES, 2, 1), 2, 2)[:, :size, :size])
    found = sizes.measure(looked_at).metrics
    scored, _ = score(tokenizer, config.codebook_size, IMAGES)
    assert found["psnr_size_100"] == scored["psnr"]
    assert found["lpips_size_100"] == scored["lpips_alex"]
    assert {*found} == {*INSTRUMENTS["sizes"].metrics}


def test_of_many_images_the_same_few_are_scored_at_every_size(monkeypatch):
    """Evenly spaced over all: image number i is grey of shade i."""
    seen = []
    monkeypatch.setattr(sizes, "IMAGES", 3)
    monkeypatch.setattr(sizes, "scores", lambda subject, images: seen.append(images[:, 0, 0, 0].tolist()) or {})
    shades = flat(range(9))
    sizes.measure(subject(images=shades, at=lambda size: np.repeat(shades, 2, 1)))
    assert seen == [[0, 4, 8]] * len(sizes.FACTORS)
