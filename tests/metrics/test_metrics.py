"""Metrics agree with their papers, with published values and with the packages that everybody compares against."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from bench import metrics
from bench.core.errors import UserError
from bench.core.files import sha256_file
from bench.metrics import (
    EVALUATORS,
    EXTRACTORS,
    Artefacts,
    Batch,
    CodeHistogram,
    FrechetStatistics,
    ImageSet,
    Setup,
    digests,
    distances,
    from_uint8,
    full_precision,
    kernel_distance,
    psnr,
    sets,
    ssim,
    to_uint8,
    weights,
)
from bench.metrics.sets import Extractor

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=weights.TRUNKS)
def perceptual(request):
    return trunk(request.param)


def trunk(net):
    try:
        return metrics.perceptual(net, CPU)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def no_dinov2(monkeypatch):
    """Minutes of computing where this machine happens to have its weights."""
    monkeypatch.setattr(weights, "dinov2", lambda path: None)
    monkeypatch.setattr(weights, "dinov2_missing", lambda: "no file")


@pytest.fixture
def no_inception(monkeypatch):
    trunk("alex"), trunk("vgg")
    monkeypatch.setattr(weights, "inception", lambda path: None)


def crop(image, y, x):
    """(1, 3, 64, 64) uint8"""
    return torch.from_numpy(image[y : y + 64, x : x + 64].copy()).permute(2, 0, 1)[None]


def photographs(n, seed):
    """(n, 3, 64, 64) uint8 crops, and the same with grey noise"""
    rng = np.random.default_rng(seed)
    sources = [data.astronaut(), data.chelsea(), data.coffee()]
    x = torch.cat([crop(sources[k % 3], *rng.integers(0, 230, 2)) for k in range(n)])
    noise = torch.from_numpy(rng.normal(0, 20, (n, 1, 64, 64)))
    return x, (x + noise).round().clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------------------- images


def test_uint8_survives_the_round_trip_exactly():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert from_uint8(every).aminmax() == (-1, 1)


def test_to_uint8_clamps_and_rounds():
    x = torch.tensor([-7.0, -1.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1, 1.0, 1.001, math.inf])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([math.nan]))
    for half in (torch.bfloat16, torch.float16):  # what a decoder may give: rounded once, to pixels
        x = torch.linspace(-1, 1, 999).to(half)
        assert torch.equal(to_uint8(x), to_uint8(x.double()))


def test_psnr_and_ssim_agree_with_skimage():
    """(bug 11)"""
    x, x_hat = photographs(6, 0)
    pairs = [(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()) for a, b in zip(x, x_hat, strict=True)]
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]
    torch.testing.assert_close(psnr(x_hat, x).double(), torch.tensor(expected), atol=1e-4, rtol=0)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    expected = [structural_similarity(a, b, data_range=255, **options) for a, b in pairs]
    torch.testing.assert_close(ssim(x_hat, x).double(), torch.tensor(expected), atol=1e-4, rtol=0)
    # The bug to stay clear of: range 2 for images in [0, 1] makes the stabilising constants four times too large.
    wrong = [structural_similarity(a / 255, b / 255, data_range=2, **options) for a, b in pairs]
    assert (ssim(x_hat, x).numpy() - wrong < -1e-3).all()


def test_identical_images_score_the_cap_and_one():
    x, _ = photographs(2, 1)
    assert psnr(x, x).tolist() == [100.0, 100.0]
    torch.testing.assert_close(ssim(x, x), torch.ones(2))


@given(error=st.integers(1, 255), share=st.integers(1, 64))
@settings(max_examples=25, deadline=None)
def test_psnr_is_that_of_each_image_in_closed_form(error, share):
    """An error in so many of 64 pixels; the other image of the batch is perfect and has no part in it."""
    x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    x_hat = x.clone()
    x_hat[0].view(3, 64)[:, :share] = error
    expected = 20 * math.log10(255 / error) + 10 * math.log10(64 / share)
    assert psnr(x_hat, x).tolist() == pytest.approx([expected, 100.0], abs=1e-4)
    assert psnr(x, x_hat).tolist() == psnr(x_hat, x).tolist()


def test_ssim_looks_at_whole_windows_only():
    """In an image of one window it is Wang's eq. 13, written out; flips and a transposition change nothing."""
    x, x_hat = (images[:1, :, 20:31, 30:41] for images in photographs(1, 9))
    places = torch.arange(11, dtype=torch.float64) - 5
    bell = torch.exp(-places.square() / (2 * 1.5**2))
    window = torch.outer(bell, bell) / bell.sum() ** 2

    def mean(values):
        return (values * window).sum((1, 2))

    a, b = x_hat[0].double(), x[0].double()
    variances, covariance = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2, mean(a * b) - mean(a) * mean(b)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    by_hand = (2 * mean(a) * mean(b) + c1) * (2 * covariance + c2)
    by_hand /= (mean(a) ** 2 + mean(b) ** 2 + c1) * (variances + c2)
    assert ssim(x_hat, x).item() == pytest.approx(by_hand.mean().item(), abs=1e-4)
    x, x_hat = photographs(2, 9)
    for change in (lambda y: y.flip(2), lambda y: y.flip(3), lambda y: y.mT):
        torch.testing.assert_close(ssim(change(x_hat), change(x)), ssim(x_hat, x), atol=1e-5, rtol=0)


def test_full_precision_has_no_autocast_and_no_tensorfloat32_and_ends():
    convolution, x = torch.nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4)
    flags = torch.backends.cudnn
    before = flags.enabled, flags.deterministic, flags.allow_tf32
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision(CPU):
            assert convolution(x).dtype == torch.float32
            assert (flags.enabled, flags.deterministic, flags.allow_tf32) == (True, True, False)
        assert convolution(x).dtype == torch.bfloat16
    assert (flags.enabled, flags.deterministic, flags.allow_tf32) == before


def test_scores_of_images_take_uint8_of_equal_shape():
    x, _ = photographs(2, 1)
    for score in (psnr, ssim):
        bad = [x.float(), x[:, :1], x[..., 0], x[0]]
        for pair in (*((y, x) for y in [*bad, x[:1]]), *((x, y) for y in [*bad, x[:1]]), *((y, y) for y in bad)):
            with pytest.raises(ValueError, match="must be uint8 of equal shape"):
                score(*pair)
        with pytest.raises(ValueError, match=r"not torch\.float32 \(1, 3, 64, 64\) and torch\.uint8 \(2, 3, 64, 64\)$"):
            score(x[:1].float(), x)
    for small, size in ((x[..., :10], r"\(64, 10\)"), (x[..., :10, :], r"\(10, 64\)")):
        with pytest.raises(ValueError, match=f"at least 11 pixels a side, not {size}"):
            ssim(small, small)


# ----------------------------------------------------------------------------------------------------------- perceptual

GOLDEN = {"alex": (0.43375, 0.00796), "vgg": (0.65198, 0.00993)}


def test_lpips_golden_values(perceptual):
    astronaut, cat = crop(data.astronaut(), 0, 192), crop(data.chelsea(), 64, 128)
    brighter = (from_uint8(astronaut) + 20 / 127.5).clamp(-1, 1)
    pairs = torch.cat([from_uint8(cat), brighter]), from_uint8(astronaut).expand(2, -1, -1, -1)
    np.testing.assert_allclose(perceptual(*pairs).detach().numpy(), GOLDEN[perceptual.net], atol=6e-6)


def test_lpips_values_and_gradients_equal_the_package(perceptual):
    reference = weights.lpips_network(perceptual.net)
    x_hat, x = torch.rand(2, 3, 3, 48, 64, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
    x_hat.requires_grad_()
    ours, theirs = perceptual(x_hat, x), reference(x_hat, x).flatten()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    gradient, expected = (torch.autograd.grad(value.sum(), x_hat)[0] for value in (ours, theirs))
    assert (gradient - expected).norm() < 1e-2 * expected.norm()  # rounding may tip a max-pooling the other way


def test_lpips_is_a_distance_between_the_directions_of_features(perceptual):
    """Written out: squared differences of unit vectors, weighted by channel, averaged over places, summed over layers.
    Of each image by itself; the order of a pair plays no part."""
    x_hat, x = torch.rand(2, 2, 3, 32, 40, generator=torch.Generator().manual_seed(1)).mul(2).sub(1)
    with torch.no_grad():
        expected = torch.zeros(2)
        for a, b, head in zip(perceptual.features(x_hat), perceptual.features(x), perceptual.heads, strict=True):
            a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
            expected += ((a - b) ** 2 * head.view(1, -1, 1, 1)).sum(1).flatten(1).mean(1)
        for pair in ((x_hat, x), (x, x_hat)):
            torch.testing.assert_close(perceptual(*pair), expected, atol=1e-5, rtol=0)
        assert perceptual(x, x).tolist() == [0, 0]


def test_lpips_gradient_is_finite_where_the_package_gives_nan(perceptual):
    """No square root without an eps (bug 12)."""
    x = torch.zeros(1, 3, 32, 32)
    for x_hat in (x.clone(), x + 0.5):
        x_hat.requires_grad_()
        perceptual(x_hat, x).sum().backward()
        assert x_hat.grad.isfinite().all()
    silent, reference = copy.deepcopy(perceptual), weights.lpips_network(perceptual.net)
    for pretrained in (silent.trunk, reference.net):
        last = [module for module in pretrained.slice5 if isinstance(module, torch.nn.Conv2d)][-1]
        last.weight.zero_()
        last.bias.fill_(1e-25)  # every unit fires, and the square is zero in float32
    x_hat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    assert torch.autograd.grad(reference(x_hat, x).sum(), x_hat)[0].isnan().any()
    assert torch.autograd.grad(silent(x_hat, x + 0.5).sum(), x_hat)[0].isfinite().all()


def test_lpips_trains_the_reconstruction_only(perceptual):
    x_hat, x = torch.zeros(2, 1, 3, 32, 32, requires_grad=True).unbind()
    x = x.detach().requires_grad_()
    perceptual(x_hat, x).sum().backward()
    assert x.grad is None
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


def test_lpips_refuses_what_is_not_an_image(perceptual):
    x = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="floats"):
        perceptual(x.to(torch.uint8), x)
    size = metrics.MINIMUM_SIZE[perceptual.net]
    for small, found in ((x[..., :size], rf"\(64, {size - 1}\)"), (x[..., :size].mT, rf"\({size - 1}, 64\)")):
        perceptual(small, small)
        smaller = small[..., 1:] if small.shape[3] == size else small[..., 1:, :]
        with pytest.raises(ValueError, match=f"LPIPS-{perceptual.net} needs {size} pixels a side, not {found}"):
            perceptual(smaller, smaller)
        with pytest.raises(RuntimeError, match="too small"):  # no smaller than the trunk itself needs
            perceptual.trunk(smaller)
    for beyond, found in ((x + torch.linspace(0, 1.5, 64), r"0, 1\.5"), (x - torch.linspace(0, 1.5, 64), r"-1\.5, 0")):
        for pair in ((beyond, x), (x, beyond)):
            with torch.no_grad(), pytest.raises(ValueError, match=rf"not \[{found}\]"):
                perceptual(*pair)
            with pytest.raises(ValueError, match=rf"not \[{found}\]"):
                perceptual.distance_and_features(*pair)
            perceptual(*pair)  # where gradients are recorded, nothing waits for a check


def test_lpips_first_made_during_evaluation_can_train():
    trunk("alex")
    metrics.perceptual.cache_clear()
    with torch.inference_mode():
        metrics.perceptual("alex", CPU)
    x_hat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    metrics.perceptual("alex", CPU)(x_hat, x_hat.detach() + 0.5).sum().backward()
    assert x_hat.grad.abs().sum() > 0


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_a_trunk_in_half_precision_is_the_same_to_the_bit_under_autocast(net):
    """In value and gradient; the one that scores stays as it is."""
    trunk(net)
    x = torch.rand(2, 3, 64, 64).mul(2).sub(1)
    found = []
    for half in (False, True):
        network = metrics.perceptual(net, CPU, *([torch.bfloat16] if half else []))
        assert {p.dtype for p in network.trunk.parameters()} == {torch.bfloat16 if half else torch.float32}
        x_hat = (0.9 * x).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            distance = network(x_hat, x)
        distance.sum().backward()
        found.append((distance.detach(), x_hat.grad))
    for full, half in zip(*found, strict=True):
        assert torch.equal(full, half)


def test_lpips_forgives_rounding_and_evaluates_without_gradients(perceptual):
    x = torch.full((1, 3, 32, 32), 1.0005, requires_grad=True)
    distance, *pooled = perceptual.distance_and_features(x, -x)
    assert distance.item() > 0
    assert not any(found.requires_grad for found in (distance, *pooled))
    with torch.no_grad(), pytest.raises(ValueError, match="not"):
        perceptual(x + 1e-3, x)


def test_lpips_is_one_network_for_each_net_and_device():
    trunk("alex"), trunk("vgg")
    assert metrics.perceptual("alex", CPU) is metrics.perceptual("alex", torch.device("cpu"))
    assert metrics.perceptual("alex", CPU) is not metrics.perceptual("vgg", CPU)
    elsewhere = metrics.perceptual.__wrapped__("alex", torch.device("meta"))
    assert {parameter.device.type for parameter in elsewhere.parameters()} == {"meta"}


def test_features_are_the_pooled_last_layer(perceptual):
    x_hat, x = torch.rand(2, 2, 3, 64, 64).mul(2).sub(1)
    distance, pooled_hat, pooled = perceptual.distance_and_features(x_hat, x)
    torch.testing.assert_close(distance, perceptual(x_hat, x))
    reference = weights.lpips_network(perceptual.net)
    for images, features in ((x_hat, pooled_hat), (x, pooled)):
        expected = reference.net(reference.scaling_layer(images))[-1].mean((2, 3))
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- image sets


def statistics(features, batch=7):
    result = FrechetStatistics(features.shape[1])
    for part in torch.as_tensor(features).split(batch):
        result.update(part)
    return result


def gaussian(n, mean, variance, rng):
    """(n, D) vectors whose sample moments are exactly these: a mean and a diagonal covariance."""
    white = rng.normal(size=(n, len(mean)))
    white -= white.mean(0)
    white = np.linalg.qr(white)[0] * math.sqrt(n - 1)
    return white * np.sqrt(variance) + mean


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(6, 40), batch=st.integers(1, 50))
@settings(max_examples=25, deadline=None)
def test_frechet_distance_of_gaussians_in_closed_form(seed, n, batch):
    rng = np.random.default_rng(seed)
    (mean, other_mean), (variance, other_variance) = rng.normal(size=(2, 5)), rng.uniform(0.1, 4, (2, 5))
    first, second = gaussian(n, mean, variance, rng), gaussian(50, other_mean, other_variance, rng)
    expected = ((mean - other_mean) ** 2).sum() + ((variance**0.5 - other_variance**0.5) ** 2).sum()
    assert statistics(first, batch).distance(statistics(second, batch)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_frechet_statistics_stream_and_ignore_order():
    features = torch.rand(40, 6) + 100  # a mean far above the deviation
    mean, covariance = statistics(features, 40).moments()
    np.testing.assert_allclose(mean, features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-6, atol=1e-9)
    traced = features.clone().requires_grad_()
    for other in (statistics(features, 3), statistics(features.flip(0)), FrechetStatistics.of(traced)):
        for found, expected in zip(other.moments(), (mean, covariance), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_frechet_distance_is_symmetric_and_moves_with_neither_set_alone(seed):
    """Also where the covariances do not commute: shifted together nothing changes, shifted apart by v adds |v|²."""
    first, second = np.random.default_rng(seed).normal(size=(2, 30, 4))
    second = second @ np.random.default_rng(seed + 1).normal(size=(4, 4))
    first -= first.mean(0) - second.mean(0)  # equal means, so that a shift adds exactly its square
    distance = statistics(first).distance(statistics(second))
    shift = np.array([3.0, -1, 0, 2])
    assert statistics(second).distance(statistics(first)) == pytest.approx(distance, abs=1e-6)
    assert statistics(first + shift).distance(statistics(second + shift)) == pytest.approx(distance, abs=1e-6)
    assert statistics(first + shift).distance(statistics(second)) == pytest.approx(distance + 14, abs=1e-6)
    assert statistics(first).distance(statistics(first)) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_of_equal_sizes_is_the_unbiased_mmd_of_all_vectors():
    """Summed pair by pair (Bińkowski et al. 2018, eq. 4), no vector with itself."""
    x, y = np.random.default_rng(0).normal(size=(2, 7, 3))
    y += 0.5

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (7 * 6)
    between = sum(k(x[i], y[j]) for i, j in pairs) / 49
    x, y = torch.tensor(x), torch.tensor(y)
    assert kernel_distance(x, y) == pytest.approx(within - 2 * between, rel=1e-5)
    assert kernel_distance(x, x.flip(0)) == pytest.approx(kernel_distance(x, x), rel=1e-4)


def test_kernel_distance_of_unequal_sizes_is_the_mean_over_the_packages_subsets():
    """100 draws as large as the smaller set, of both: no set is cut to its first vectors."""
    x, y = torch.randn(14, 3, generator=torch.Generator().manual_seed(0)).split([9, 5])
    for a, b in ((x, y), (y, x)):
        options = {"kid_subset_size": 5, "verbose": False}  # and torch-fidelity's own number of subsets and seed
        expected = kid_features_to_metric(a, b, **options)[KEY_METRIC_KID_MEAN]
        assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_draws_as_torch_fidelity_does_by_default():
    names = ("kid_subsets", "kid_subset_size", "rng_seed")
    assert tuple(DEFAULTS[n] for n in names) == (distances.KID_SUBSETS, distances.KID_SUBSET_SIZE, distances.KID_SEED)


def image_set(vgg, inception=None):
    inception = torch.zeros(0, 4) if inception is None else torch.as_tensor(inception)
    return ImageSet({"vgg16": torch.as_tensor(vgg).float(), "inception": inception, "dinov2": torch.zeros(0, 4)})


def test_precision_asks_of_the_made_and_recall_of_the_real():
    """Two real clusters, of which one is made: all that is made is real, half of what is real is made."""
    cluster = np.random.default_rng(0).uniform(size=(12, 2))
    both = np.concatenate([cluster, cluster + 100])
    one = image_set(cluster + np.random.default_rng(1).uniform(-1e-3, 1e-3, (12, 2)))
    found = one.distances(image_set(both))
    assert (found["precision_vgg16"], found["recall_vgg16"]) == (1, 0.5)
    found = image_set(both).distances(one)
    assert (found["precision_vgg16"], found["recall_vgg16"]) == (0.5, 1)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_precision_and_recall_are_the_definition(seed):
    """Kynkäänniemi et al. 2019, eq. 2: within the distance of some vector to its third nearest in the same set."""
    made, real = np.random.default_rng(seed).normal(size=(2, 15, 2)).astype(np.float32)
    real = real[:11] * 2

    def covered(points, by):
        radii = np.sort(np.linalg.norm(by[:, None] - by[None], axis=-1), axis=1)[:, 3]  # its own distance comes first
        return (np.linalg.norm(points[:, None] - by[None], axis=-1) <= radii).any(1).mean()

    found = image_set(made).distances(image_set(real))
    assert found["precision_vgg16"] == pytest.approx(covered(made, real))
    assert found["recall_vgg16"] == pytest.approx(covered(real, made))


def test_sets_of_images_are_compared_on_both_networks_where_both_have_features():
    rng = np.random.default_rng(3)
    vgg, other = rng.normal(size=(2, 8, 3))
    deep, deeper = gaussian(8, [0.0, 0, 0, 0], [1, 2, 3, 4], rng), gaussian(8, [3.0, 0, 0, 4], [1, 2, 3, 4], rng)
    found = image_set(vgg, deep).distances(image_set(other, deeper))
    assert found["gfid"] == pytest.approx(25, rel=1e-5)
    assert found["gfid_vgg16"] == pytest.approx(
        statistics(torch.tensor(vgg)).distance(statistics(torch.tensor(other))), rel=1e-4
    )
    assert found["gkid_vgg16"] == pytest.approx(kernel_distance(torch.tensor(vgg), torch.tensor(other)), rel=1e-4)
    names = {"gfid_vgg16", "gkid_vgg16", "precision_vgg16", "recall_vgg16"}
    for pair in ((image_set(vgg, deep), image_set(other)), (image_set(vgg), image_set(other, deeper))):
        assert pair[0].distances(pair[1]).keys() == names  # no FID against nothing
    assert image_set(vgg[:4]).distances(image_set(other[:4])).keys() == names
    for few, many, told in ((vgg[:3], other, "3 and 8"), (vgg, other[:3], "8 and 3")):
        with pytest.raises(ValueError, match=f"sets of {told} images are too small"):
            image_set(few).distances(image_set(many))


class Linear(torch.nn.Module):
    """Three features of every image, by a product that autocast would round."""

    def __init__(self):
        super().__init__()
        self.weight = torch.linspace(0, 1, 3 * 48).view(3, 48)

    def forward(self, images):
        return (torch.nn.functional.linear(images[:, :, :4, :4].flatten(1).float(), self.weight),)


def test_features_of_sets_are_float32_whatever_the_autocast(monkeypatch):
    monkeypatch.setattr(weights, "inception", lambda path: Linear())
    monkeypatch.setattr(sets, "EXTRACTORS", {"inception": EXTRACTORS["inception"]._replace(dimension=3)})
    x, x_hat = photographs(5, 13)
    plain = ImageSet.of(x.split(2)).features["inception"]
    scores = sets.InceptionScores(Setup(4, CPU))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ImageSet.of(x.split(2)).features["inception"], plain)
        scores.update(Batch(x, x_hat, None))
    torch.testing.assert_close(scores.statistics[1].total, plain.double().sum(0), rtol=1e-6, atol=0)
    assert not plain.requires_grad


def test_a_lone_feature_network_is_told_its_device_and_file(monkeypatch):
    asked = []
    network = EXTRACTORS["inception"]._replace(load=lambda *told: asked.append(told) or (lambda x: x[:, :1, 0, 0]))
    monkeypatch.setattr(sets, "EXTRACTORS", {"inception": network._replace(dimension=1)})
    found = ImageSet.of([torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)], "cpu", "file").features["inception"]
    sets.InceptionScores(Setup(4, torch.device("meta"), "other"))
    assert asked == [(CPU, "file"), (torch.device("meta"), "other")]
    assert found.dtype == torch.float32
    assert found.tolist() == [[7], [7]]


def test_an_extractor_is_one_entry(monkeypatch):
    """From which sets of images, the names of cached files and what identifies it follow."""
    trunk("vgg")
    monkeypatch.setattr(weights, "inception", lambda path: None)
    monkeypatch.setattr(weights, "inception_missing", lambda: "no network")
    corner = Extractor("fid_corner", "corner", "top left, ", 3, lambda *_: lambda x: x[:, :, 0, 0].float(), str)
    monkeypatch.setitem(EXTRACTORS, "corner", corner)
    x, x_hat = photographs(5, 12)
    made, real = (ImageSet.of(images.split(2)) for images in (x_hat, x))
    assert torch.equal(made.features["corner"], x_hat[:, :, 0, 0].float())
    assert made.features["inception"].shape == (0, 2048)
    expected = statistics(made.features["corner"]).distance(statistics(real.features["corner"]))
    assert made.distances(real)["gfid_corner"] == pytest.approx(expected)
    file = Path("file")
    assert digests(file) == f"{weights.weights_digest('vgg')}-{weights.weights_digest('inception')}-none-file"
    assert digests(None) == f"{weights.weights_digest('vgg')}-none-none-None"
    assert corner.identity(file) == "top left, file"


class Scores:
    """All evaluators at once, on codes that do not matter."""

    def __init__(self, fid_weights=None):
        self.evaluators = [evaluator(Setup(4, CPU, fid_weights)) for evaluator in EVALUATORS]

    def update(self, x, x_hat):
        for evaluator in self.evaluators:
            evaluator.update(Batch(x, x_hat, torch.zeros(len(x), 8, 8, dtype=torch.int64)))

    def result(self):
        return {name: value for evaluator in self.evaluators for name, value in evaluator.result().items()}

    @property
    def per_image(self):
        return {name: values for evaluator in self.evaluators for name, values in evaluator.per_image.items()}


class ToyInception(torch.nn.Module):
    """Like torch-fidelity's it takes uint8 and nothing else: the first ``size`` numbers of every image."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, images):
        assert images.dtype == torch.uint8
        return (images.flatten(1)[:, : self.size].float(),)


def test_inception_sees_the_pixels_of_samples(monkeypatch):
    """Integers, as it takes them: floats in [-1, 1] are for VGG16."""
    trunk("vgg")
    asked = []
    monkeypatch.setattr(weights, "inception", lambda path: asked.append(path) or ToyInception(2048))
    x, _ = photographs(5, 10)
    x = x[..., :32, :32]
    found = ImageSet.of(x.split(2), "cpu", "path")
    assert asked == ["path"]
    assert torch.equal(found.features["inception"], x.flatten(1)[:, :2048].float())
    with torch.no_grad():
        expected = trunk("vgg").features(from_uint8(x))[-1].mean((2, 3))
    torch.testing.assert_close(found.features["vgg16"], expected, rtol=1e-4, atol=1e-5)


def test_fid_is_of_inception_and_fid_vgg16_of_vgg16(monkeypatch):
    trunk("vgg")
    asked = []
    monkeypatch.setattr(weights, "inception", lambda path: asked.append(path) or ToyInception(3))
    x, x_hat = photographs(6, 11)
    x, x_hat = x[..., :32, :32], x_hat[..., :32, :32]
    scores = Scores("path")
    inception, lpips = scores.evaluators[:2]
    inception.statistics = FrechetStatistics(3), FrechetStatistics(3)
    scores.update(x[:4], x_hat[:4])
    scores.update(x[4:], x_hat[4:])
    first, second = (statistics(images[:, 0, 0, :3].double()) for images in (x_hat, x))
    assert scores.result()["fid"] == pytest.approx(first.distance(second), rel=1e-6)
    for found, expected in zip(inception.statistics, (first, second), strict=True):
        assert torch.equal(found.total, expected.total)  # reconstructions, originals
    features = [trunk("vgg").features(from_uint8(images))[-1].mean((2, 3)) for images in (x_hat, x)]
    first, second = map(statistics, features)
    assert scores.result()["fid_vgg16"] == pytest.approx(first.distance(second), rel=1e-3)
    for found, expected in zip(lpips.statistics, (first, second), strict=True):
        torch.testing.assert_close(found.total, expected.total, rtol=1e-4, atol=1e-4)
    assert asked == ["path"]


def test_set_distances_need_two_samples():
    one, many = torch.zeros(1, 4), torch.rand(5, 4)
    two = torch.tensor([[1.0, 0, 0, 0], [3.0, 0, 0, 0]])
    assert statistics(two).distance(statistics(two + 1)) == pytest.approx(4, abs=1e-6)
    assert kernel_distance(two, two + 1) == pytest.approx(kernel_distance(two + 1, two))
    with pytest.raises(ValueError, match="at least 2 samples"):
        statistics(many).distance(statistics(one))
    with pytest.raises(ValueError, match="at least 2 samples of each, not 1"):
        kernel_distance(many, one)


class VGG16Features(FeatureExtractorBase):
    """Our features, as torch-fidelity wants them."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    def forward(self, images):
        return (metrics.perceptual("vgg", CPU).features(from_uint8(images))[-1].mean((2, 3)),)

    @staticmethod
    def get_provided_features_list():
        return ("512",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "512"


torch_fidelity.register_feature_extractor("vgg16-relu5_3", VGG16Features)


class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def fidelity(x_hat, x, **options):
    """torch-fidelity's own numbers on the same images."""
    common = {"cuda": False, "save_cpu_ram": True, "cache": False, "verbose": False, "batch_size": 8}
    return torch_fidelity.calculate_metrics(input1=Images(x_hat), input2=Images(x), **common, **options)


@pytest.mark.parametrize("subset", [1000, 16])  # the whole of both sets once, and many subsets
def test_vgg16_distances_equal_torch_fidelity(no_inception, monkeypatch, subset):
    x, x_hat = photographs(24, 2)
    scores = Scores()
    scores.update(x[:10], x_hat[:10])
    scores.update(x[10:], x_hat[10:])
    monkeypatch.setattr(distances, "KID_SUBSET_SIZE", subset)
    found = scores.result()
    expected = fidelity(
        x_hat, x, fid=True, kid=True, kid_subset_size=min(24, subset), feature_extractor="vgg16-relu5_3"
    )
    assert found["fid_vgg16"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert found["kid_vgg16"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3, abs=1e-6)


@pytest.fixture
def random_inception(tmp_path, monkeypatch):
    """A file of Inception weights, randomly initialised and accepted as the real ones."""
    with monkeypatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("random", ["2048"])
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    monkeypatch.setitem(weights.DIGESTS, "inception", sha256_file(path)[:8])
    return path


@pytest.mark.slow
def test_fid_equals_torch_fidelity(random_inception):
    trunk("vgg")
    x, x_hat = photographs(6, 3)
    random_state = torch.get_rng_state()
    scores = Scores(random_inception)
    assert torch.equal(torch.get_rng_state(), random_state)
    scores.update(x, x_hat)
    expected = fidelity(x_hat, x, fid=True, feature_extractor_weights_path=str(random_inception))
    assert scores.result()["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- all at once


def test_scores_are_means_over_images_whatever_the_batches(no_inception):
    x, x_hat = photographs(7, 4)
    whole, parts = Scores(), Scores()
    whole.update(x, x_hat)
    for part, part_hat in zip(x.split(3), x_hat.split(3), strict=True):
        parts.update(part, part_hat)
    images = {"fid_vgg16", "kid_vgg16", "lpips_alex", "lpips_vgg", "psnr", "ssim"}
    assert images < set(whole.result()) < {name for evaluator in EVALUATORS for name in evaluator.METRICS}
    assert whole.result() == pytest.approx(parts.result(), rel=1e-3, abs=1e-5)
    for name, values in parts.per_image.items():
        assert values.shape == (7,)
        assert values.mean() == pytest.approx(whole.result()[name], rel=1e-5)
    for net in weights.TRUNKS:
        right, wrong = (trunk(net)(scale(x_hat), scale(x)) for scale in (from_uint8, lambda images: images / 255))
        np.testing.assert_allclose(parts.per_image[f"lpips_{net}"], right, atol=1e-5)
        assert (right - wrong).abs().max() > 0.01  # the bug to stay clear of: LPIPS on [0, 1]


def test_metrics_are_shown_under_their_names_with_the_digits_that_tell_runs_apart():
    shown = {name: metric[:2] for evaluator in EVALUATORS for name, metric in evaluator.METRICS.items()}
    known = {
        "fid": ("FID", ".1f"),
        "fid_vgg16": ("FID vgg16", ".1f"),
        "fd_dinov2": ("FD DINOv2", ".1f"),
        "kid_vgg16": ("KID vgg16", ".4f"),
        "lpips_alex": ("LPIPS alex", ".3f"),
        "lpips_vgg": ("LPIPS vgg", ".3f"),
        "psnr": ("PSNR dB", ".2f"),
        "ssim": ("SSIM", ".3f"),
        "sharpness": ("sharpness", ".2f"),
        "grid_energy": ("grid energy dB", ".1f"),
        "grid_edges": ("grid edges dB", ".1f"),
        "grid_energy_init": ("grid energy dB, untrained", ".1f"),
        "grid_edges_init": ("grid edges dB, untrained", ".1f"),
        "perplexity": ("perplexity", ".0f"),
        "usage": ("usage", ".2f"),
        "dead_codes": ("dead codes", ".0f"),
        "tokens": ("tokens", ".0f"),
        "bits_per_image": ("bits per image", ".0f"),
        "bits_per_pixel": ("bits per pixel", ".3f"),
    }
    assert {name: shown[name] for name in known} == known


def test_no_metric_is_given_by_two_evaluators():
    names = [name for evaluator in EVALUATORS for name in evaluator.METRICS]
    assert len(names) == len(set(names))


def test_scores_run_each_network_once_per_image_in_float32(no_inception):
    x, x_hat = photographs(4, 5)
    plain, cast = Scores(), Scores()
    plain.update(x, x_hat)
    images, hooks = [], []
    for network in (cast.evaluators[1].alex, cast.evaluators[1].vgg):
        hooks.append(network.trunk.register_forward_hook(lambda module, inputs, output: images.append(len(inputs[0]))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.update(x, x_hat)
    for hook in hooks:
        hook.remove()
    assert images == [4] * 4  # originals and reconstructions, two networks
    assert cast.result() == plain.result()


# ---------------------------------------------------------------------------------------------------------------- codes


def histogram(codebook_size, *batches):
    result = CodeHistogram(codebook_size)
    for batch in batches:
        result.update(torch.as_tensor(batch))
    return result


def test_perplexity_is_that_of_the_set_and_not_a_mean_over_batches():
    """(bug 9)"""
    batches = [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert histogram(8, *batches).perplexity() == pytest.approx(4)
    assert np.mean([histogram(8, batch).perplexity() for batch in batches]) == pytest.approx(1)


@pytest.mark.parametrize("size", [1, 2, 512])
def test_uniform_codes_have_perplexity_k(size):
    uniform = histogram(size, torch.arange(size).reshape(1, -1, 1).repeat(3, 1, 2))
    assert uniform.perplexity() == pytest.approx(size)
    assert (uniform.usage(), uniform.dead_codes()) == (1, 0)


def test_usage_counts_no_code_that_did_not_occur():
    """Nothing starts full of zeros, which would count as code 0 (bug 10)."""
    codes = histogram(8, [[5, 5], [7, 5]], torch.empty(0, 2, 2, dtype=torch.int64))
    assert codes.counts.tolist() == [0, 0, 0, 0, 0, 3, 0, 1]
    assert (codes.usage(), codes.dead_codes()) == (0.25, 6)
    assert codes.perplexity() == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


@given(codes=st.lists(st.integers(0, 11), min_size=1, max_size=60), batch=st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_what_codes_say_is_a_matter_of_how_often_each_occurs(codes, batch):
    """Perplexity, usage and dead codes by counting, whatever the batches and the order (bugs 9, 10)."""
    counts = np.array([codes.count(code) for code in range(12)])
    found = histogram(12, *torch.tensor(codes).split(batch))
    entropy = -sum(n / len(codes) * math.log(n / len(codes)) for n in counts if n)
    assert found.counts.tolist() == counts.tolist()
    assert found.perplexity() == pytest.approx(math.exp(entropy))
    assert found.dead_codes() == (counts == 0).sum()
    assert found.usage() == pytest.approx((counts > 0).mean())
    assert histogram(12, codes[::-1]).perplexity() == pytest.approx(found.perplexity())


def test_perplexity_of_nothing_is_no_number():
    assert math.isnan(CodeHistogram(4).perplexity())
    assert (CodeHistogram(4).usage(), CodeHistogram(4).dead_codes()) == (0, 4)


@pytest.mark.parametrize("codes", [[-1, 0], [0, 8], [0.0, 1.0]])
def test_codes_outside_the_codebook_are_refused(codes):
    with pytest.raises(ValueError, match=r"integers in \[0, 8\)"):
        histogram(8, codes)


# ------------------------------------------------------------------------------------------------------ grids and blur


def artefacts(x, x_hat, batch=1000):
    result = Artefacts()
    for part, part_hat in zip(x.split(batch), x_hat.split(batch), strict=True):
        result.update(part, part_hat)
    return result


def with_residual(residual):
    """24 grey originals, and reconstructions that differ from them by ``residual`` grey levels, up to rounding."""
    x = torch.full((24, 3, 64, 64), 128, dtype=torch.uint8)
    return x, (x + residual).round().clamp(0, 255).to(torch.uint8)


def noise(scale=12.0):
    return scale * torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def tiles(grid):
    """One random patch of unit variance, repeated: what a decoder paints that knows its bias only."""
    patch = torch.randn(3, 64 // grid, 64 // grid, generator=torch.Generator().manual_seed(1))
    return patch.repeat(1, grid, grid)


def steps(grid):
    """Patches of one random grey each: what a codebook of flat patches gets wrong."""
    grey = torch.randn(24, 3, grid, grid, generator=torch.Generator().manual_seed(2))
    return grey.repeat_interleave(64 // grid, 2).repeat_interleave(64 // grid, 3)


GRID_SIZES = (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("grid", GRID_SIZES)
def test_white_noise_shows_no_grid(grid):
    found = artefacts(*with_residual(noise())).result(grid)
    assert abs(found["grid_energy"]) < 0.2
    assert abs(found["grid_edges"]) < 0.1


@pytest.mark.parametrize("grid", GRID_SIZES)
def test_nothing_and_a_constant_shift_show_exactly_no_grid(grid):
    for shift in (0, 9, -30):
        found = artefacts(*with_residual(shift)).result(grid)
        assert found["grid_energy"] == pytest.approx(0, abs=1e-6)
        assert found["grid_edges"] == pytest.approx(0, abs=1e-6)


def test_a_constant_shift_changes_no_score():
    x, x_hat = with_residual(noise() + 8 * tiles(8))
    shifted = x_hat.clamp(20, 235) + 15
    assert artefacts(x, shifted).result(8) == pytest.approx(artefacts(x, x_hat.clamp(20, 235)).result(8), abs=1e-4)


@pytest.mark.parametrize("grid", [2, 4, 8, 16, 32])
def test_energy_grows_with_a_repeated_patch(grid):
    scores = [
        artefacts(*with_residual(noise() + amplitude * tiles(grid))).grid_energy(grid)
        for amplitude in (0, 3, 6, 12, 24)
    ]
    assert scores == sorted(scores)
    assert scores[-1] > 5
    assert scores[-1] > scores[0] + 5


@pytest.mark.parametrize("grid", [2, 4, 8, 16])
def test_edges_grow_with_steps_between_patches(grid):
    scores = [
        artefacts(*with_residual(noise(2) + amplitude * steps(grid))).grid_edges(grid) for amplitude in (0, 1, 4, 16)
    ]
    assert scores == sorted(scores)
    assert scores[-1] > 6


def test_the_two_views_complement_each_other():
    """A repeated patch has no edges of its own; flat patches of random grey have no energy at the grid's frequency."""
    repeated = artefacts(*with_residual(noise() + 12 * tiles(8))).result(8)
    flat = artefacts(*with_residual(noise(2) + 12 * steps(8))).result(8)
    assert repeated["grid_energy"] > 8
    assert abs(repeated["grid_edges"]) < 2
    assert flat["grid_edges"] > 8
    assert flat["grid_energy"] < 0.5


def test_amplitude_counts_only_beside_the_noise():
    """Everything twice as large, images included, is the same picture: a ratio, but for what rounding adds."""
    once, twice = (artefacts(*with_residual(k * (noise(8) + 8 * tiles(8)))).result(8) for k in (1, 2))
    assert once["grid_energy"] == pytest.approx(twice["grid_energy"], abs=0.2)
    assert once["grid_edges"] == pytest.approx(twice["grid_edges"], abs=0.1)


def test_rounding_is_no_grid():
    """A pattern below half a grey level is at most dithered; no score reports noise as structure."""
    found = artefacts(*with_residual(0.4 * tiles(8).sign())).result(8)
    assert found["grid_energy"] == pytest.approx(0, abs=1e-6)
    one_level = artefacts(*with_residual(torch.where(tiles(8) > 0, 1.0, 0.0))).result(8)
    assert 5 < one_level["grid_energy"] < 20  # large, and finite without any noise to divide by


@given(seed=st.integers(0, 2**32 - 1), grid=st.sampled_from([2, 4, 8, 16]))
@settings(max_examples=15, deadline=None)
def test_flips_and_a_transposition_change_no_score(seed, grid):
    x, x_hat = photographs(4, seed)
    expected = artefacts(x, x_hat).result(grid)
    for change in (lambda y: y.flip(2), lambda y: y.flip(3), lambda y: y.mT):
        assert artefacts(change(x), change(x_hat)).result(grid) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_image_content_is_no_grid():
    """Blur leaves the images' own edges in the residual, and they lie anywhere."""
    x, _ = photographs(128, 0)
    blurred = torch.nn.functional.avg_pool2d(x.float(), 3, stride=1, padding=1, count_include_pad=False).round()
    for grid in (4, 8, 16):
        found = artefacts(x, blurred.to(torch.uint8)).result(grid)
        assert abs(found["grid_energy"]) < 0.5
        assert abs(found["grid_edges"]) < 0.5


def test_a_grid_shows_at_its_own_size_only():
    x, x_hat = with_residual(noise() + 12 * tiles(8) + 6 * steps(8))
    right, shifted = (artefacts(x, images).result(8) for images in (x_hat, x_hat.roll((3, 3), (2, 3))))
    assert shifted["grid_energy"] == pytest.approx(
        right["grid_energy"], abs=0.5
    )  # a shifted pattern is one all the same
    assert shifted["grid_edges"] < 0.2 < right["grid_edges"]  # borders are where the tokenizer has them
    finer = artefacts(*with_residual(noise() + 12 * tiles(16)))
    assert finer.grid_energy(8) < 0.7 * finer.grid_energy(16)  # every other one of these frequencies is empty


def test_grid_energy_is_the_formula():
    """Written out for every frequency, from numpy's transform."""
    x, x_hat = photographs(3, 5)
    residual = x_hat.double().numpy() - x.double().numpy()
    power = sum(
        (np.abs(np.fft.fft(lines, norm="ortho")) ** 2).mean((0, 1, 2)) / 2
        for lines in (residual, residual.swapaxes(2, 3))
    )
    level = 10 * np.log10(power + 1 / 12)
    for grid, reach in ((2, 1), (4, 2), (8, 4), (16, 4), (32, 4)):
        excess = [
            level[k] - np.mean([level[(k + j) % 64] for j in range(-reach, reach + 1) if j])
            for k in range(grid, 64, grid)
        ]
        assert artefacts(x, x_hat).grid_energy(grid) == pytest.approx(np.mean(excess), abs=1e-4)


def test_grid_edges_is_the_formula():
    x, x_hat = photographs(3, 6)
    residual = x_hat.double() - x.double()
    border, inside = [], []
    for k in range(63):
        step = [(residual[..., k + 1] - residual[..., k]).abs(), (residual[..., k + 1, :] - residual[..., k, :]).abs()]
        (border if (k + 1) % 8 == 0 else inside).extend(step)
    ratio = (torch.stack(border).mean() + 1 / 3) / (torch.stack(inside).mean() + 1 / 3)
    assert artefacts(x, x_hat).grid_edges(8) == pytest.approx(20 * math.log10(ratio), abs=1e-4)


def test_sharpness_is_the_ratio_of_the_sets():
    x, _ = photographs(8, 7)
    assert artefacts(x, x).sharpness() == 1
    grey = x.float().mean((2, 3), keepdim=True).expand(x.shape).to(torch.uint8)
    assert artefacts(x, grey).sharpness() == pytest.approx(0, abs=1e-4)
    half = (x // 2).float()
    assert artefacts(x, half.to(torch.uint8)).sharpness() == pytest.approx(0.5, abs=0.02)
    assert artefacts(grey, grey).sharpness() == 1  # flat against flat: nothing is divided by zero
    dot = grey.clone()
    dot[0, 0, 5, 5] ^= 1
    assert artefacts(grey, dot).sharpness() == 4  # grey levels, to its neighbours, against none, which counts as one
    blurred = torch.nn.functional.avg_pool2d(x.float(), 3, stride=1, padding=1).to(torch.uint8)
    assert artefacts(x, blurred).sharpness() < 0.8
    steep = [y.double().diff(dim=2).abs().sum() + y.double().diff(dim=3).abs().sum() for y in (blurred, x)]
    assert artefacts(x, blurred).sharpness() == pytest.approx(float(steep[0] / steep[1]), rel=1e-5)


def test_artefacts_are_those_of_the_set_whatever_the_batches():
    x, x_hat = photographs(7, 8)
    whole = artefacts(x, x_hat)
    for batch in (1, 3):
        assert artefacts(x, x_hat, batch).result(8) == pytest.approx(whole.result(8), rel=1e-5, abs=1e-5)
    assert whole.result(8).keys() == {"grid_energy", "grid_edges", "sharpness"}
    with pytest.raises(ValueError, match="must be uint8"):
        Artefacts().update(x.float(), x_hat.float())
