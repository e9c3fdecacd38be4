"""Latents without codes: nothing is lost on the way, and the rate is a divergence in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from bench.metrics import Batch, CodeScores, Setup
from bench.quantizers import QUANTIZERS
from bench.quantizers.continuous import KLQuantizer, NoQuantizer
from bench.tokenizers.tokenizer import Tokenizer

K, D = 16, 5
every = pytest.mark.parametrize("name", [name for name, kind in QUANTIZERS.items() if not kind.discrete])


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def grid() -> torch.Tensor:
    return torch.randn(3, D, 2, 4)


def posterior(quantizer: KLQuantizer, z: torch.Tensor) -> Normal:
    """Of every component of (B, D, h, w), written out cell by cell."""
    parameters = torch.einsum("bdhw,pd->bphw", z, quantizer.posterior.weight)
    parameters = parameters + quantizer.posterior.bias.view(1, -1, 1, 1)
    return Normal(parameters[:, :D], (parameters[:, D:] / 2).exp())


@every
def test_shapes_and_types(name):
    """Latents stand in the place of codes, from where no gradient comes; the look-up gives them back."""
    quantizer, z = QUANTIZERS[name](K, D), grid().bfloat16()
    for mode in (True, False):
        out = quantizer.train(mode)(z)
        assert out.z_q.shape == out.codes.shape == (3, D, 2, 4)
        assert out.z_q.dtype == out.codes.dtype == out.loss.dtype == torch.float32
        assert out.loss.ndim == out.distortion.ndim == 0
        assert torch.equal(quantizer.lookup(out.codes), out.z_q)
        assert not out.codes.requires_grad
        assert not out.distortion.requires_grad


@every
def test_starting_it_changes_nothing(name):
    quantizer = QUANTIZERS[name](K, D)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.initialise(grid())
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_none_is_the_identity_and_so_is_its_gradient():
    z, weights = grid().requires_grad_(), grid()
    out = NoQuantizer(K, D)(z)
    assert torch.equal(out.z_q, z)
    (out.z_q * weights).sum().backward()
    assert torch.equal(z.grad, weights)
    assert out.loss == out.distortion == 0
    assert out.rate is None


def test_none_decodes_what_it_encodes_as_encoder_and_decoder_alone(tiny):
    """Exactly; in both modes, and it has no parameters."""
    tokenizer = Tokenizer(replace(tiny, quantizer="none"))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    for mode in (True, False):
        tokenizer.train(mode)
        alone = tokenizer.decoder(tokenizer.encoder(x))
        assert torch.equal(tokenizer.decode(tokenizer.encode(x)), alone.clamp(-1, 1))
        assert torch.equal(tokenizer(x)[0], alone)
    assert not list(tokenizer.quantizer.parameters())


def test_kl_s_rate_is_the_divergence_from_the_unit_gaussian_in_bits():
    """Of each image, the sum over its components; the loss is their mean in nats."""
    quantizer, z = KLQuantizer(K, D, kl_weight=0.3), 2 * grid()
    expected = kl_divergence(posterior(quantizer, z), Normal(0.0, 1.0))
    for mode in (True, False):
        out = quantizer.train(mode)(z)
        torch.testing.assert_close(out.rate, expected.sum((1, 2, 3)) / math.log(2))
        torch.testing.assert_close(out.loss, 0.3 * expected.mean())
        assert not out.rate.requires_grad


def test_a_unit_gaussian_costs_nothing():
    quantizer = KLQuantizer(K, D)
    for parameter in quantizer.parameters():
        torch.nn.init.zeros_(parameter)
    out = quantizer(grid())
    assert torch.equal(out.rate, torch.zeros(3))
    assert out.loss == 0


def test_kl_draws_in_training_from_the_posterior_and_takes_its_mean_when_scored():
    quantizer, z = KLQuantizer(K, D), grid()
    expected = posterior(quantizer, z)
    draws = torch.stack([quantizer(z).z_q.detach() for _ in range(2000)])
    error = (draws.mean(0) - expected.mean) / expected.stddev * math.sqrt(2000)
    assert error.abs().max() < 5
    torch.testing.assert_close(draws.std(0), expected.stddev.detach(), rtol=0.1, atol=0.01)
    assert quantizer(z).distortion > 0
    quantizer.eval()
    torch.testing.assert_close(quantizer(z).z_q, expected.mean)
    assert quantizer(z).distortion == 0


def test_kl_s_gradient_is_that_of_the_draw_and_of_the_divergence():
    """At the noise that it drew: by autograd through torch.distributions, and that by finite differences."""
    quantizer, z, weights = KLQuantizer(K, D, kl_weight=0.7), grid().requires_grad_(), grid()

    out = quantizer(z)
    start = posterior(quantizer, z)
    noise = ((out.z_q - start.mean) / start.stddev).detach()

    def objective(z: torch.Tensor) -> torch.Tensor:
        at = posterior(quantizer, z)
        return ((at.mean + at.stddev * noise) * weights).sum() + 0.7 * kl_divergence(at, Normal(0.0, 1.0)).mean()

    expected = torch.autograd.grad(objective(z), z)[0]
    ((out.z_q * weights).sum() + out.loss).backward()
    torch.testing.assert_close(z.grad, expected, rtol=1e-4, atol=1e-5)
    step = 1e-2 * torch.randn_like(z)
    moved = (objective(z + step) - objective(z - step)) / 2
    assert float(moved.detach()) == pytest.approx(float((expected * step).sum()), rel=0.02)


def test_kl_weight_scales_the_divergence_alone():
    z, losses = grid(), []
    for weight in (0.0, 1.0, 4.0):
        torch.manual_seed(0)
        quantizer = KLQuantizer(K, D, kl_weight=weight)
        out = quantizer(z)
        losses.append((float(out.loss.detach()), out.z_q.detach(), out.rate))
    assert losses[0][0] == 0 < losses[1][0]
    assert losses[2][0] == pytest.approx(4 * losses[1][0])
    for other in losses[1:]:
        assert torch.equal(other[1], losses[0][1])
        assert torch.equal(other[2], losses[0][2])


def test_without_a_weight_the_mean_is_what_none_would_be(tiny):
    """With the identity as its map, kl in eval mode reconstructs as no quantizer at all, and loses nothing to it."""
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    seen = []
    for name, weight in (("none", {}), ("kl", {"kl_weight": 0.0})):
        torch.manual_seed(0)
        tokenizer = Tokenizer(replace(tiny, quantizer=name, **weight)).eval()
        if name == "kl":
            tokenizer.load_state_dict(seen[0][1], strict=False)
            torch.nn.init.zeros_(tokenizer.quantizer.posterior.bias)
            tokenizer.quantizer.posterior.weight.data[:4] = torch.eye(4)
        x_hat, quantized = tokenizer(x)
        assert quantized.loss == 0
        seen.append((x_hat, tokenizer.state_dict()))
    torch.testing.assert_close(seen[0][0], seen[1][0])


def test_extreme_log_variances_are_held():
    quantizer = KLQuantizer(K, D)
    torch.nn.init.constant_(quantizer.posterior.bias, 1e4)
    assert quantizer(grid()).z_q.isfinite().all()
    torch.nn.init.constant_(quantizer.posterior.bias, -1e4)
    assert quantizer(grid()).loss.isfinite()


def test_scores_without_codes_have_the_measured_bits_or_none():
    """On average over the set, and not over its batches; perplexity and usage are not invented."""
    x = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    latents = torch.zeros(3, D, 2, 2)
    for bits, expected in (((96.0, 160.0, 64.0), {"bits_per_image": 106.0, "bits_per_pixel": 106.0 / 64}), (None, {})):
        scores = CodeScores(Setup(None, torch.device("cpu")))
        for part in (slice(0, 2), slice(2, 3)):
            own = None if bits is None else torch.tensor(bits)[part]
            scores.update(Batch(x[part], x[part], latents[part], own))
        if bits is not None:
            expected = {"bits_per_image": sum(bits) / 3, "bits_per_pixel": sum(bits) / 3 / 64}
            assert scores.per_image["bits_per_image"].tolist() == list(bits)
        assert scores.result() == pytest.approx(expected)
