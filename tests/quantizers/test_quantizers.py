"""Properties that every quantizer shares, and the bugs that public quantizers shipped."""

import copy
import itertools
import math
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.core.errors import UserError
from bench.data import eval_batches, load
from bench.metrics import CodeHistogram, from_uint8
from bench.quantizers import QUANTIZERS
from bench.quantizers import codebook as parts
from bench.quantizers.codebook import (
    chunk_rows,
    digits,
    entropy_penalty,
    factors,
    first_codes,
    kmeans,
    nearest,
    number,
    rotate,
    straight_through,
)
from bench.quantizers.learned import StandardQuantizer, _from_uniform
from bench.quantizers.rounded import LEVELS, bit_entropy, fsq_levels
from bench.tokenizers.config import Config, make_config
from bench.tokenizers.tokenizer import Tokenizer
from bench.tokenizers.train import train

K, D = 16, 5
UNUSED = {  # settings that cannot apply to all, and why some have no use for them
    "beta": "fsq bounds its components, there is nothing to commit, nor is there without codes",
    "revive_after": "fsq, lfq and bsq have no codebook, simvq's is frozen, residual's are short",
    "kmeans_init": "fsq, lfq and bsq have no codebook",
    "entropy_weight": "fsq, residual and product get by without",
    "gradient": "gumbel's and ibq's is the soft choice's; fsq, lfq, bsq round: the direction of a vector means nothing",
    "ema_decay": "for moving averages",
    "codebooks": "for several",
    "temperature": "for the soft choice",
    "temperature_end": "for the soft choice",
    "uniform_weight": "for the soft choice",
    "kl_weight": "for the Gaussian latent",
}


NO_CODES = {"none", "kl"}
NEEDLESS = {  # by whom, where all others have to heed them
    "beta": {"fsq", *NO_CODES},
    "revive_after": {"fsq", "lfq", "bsq", "simvq", "residual", *NO_CODES},
    "kmeans_init": {"fsq", "lfq", "bsq", *NO_CODES},
    "entropy_weight": {"fsq", "residual", "product", *NO_CODES},
    "gradient": {"gumbel", "ibq", "fsq", "lfq", "bsq", *NO_CODES},
}


def users(setting: str) -> list[str]:
    """Quantizers that heed a field of Config."""
    return [name for name, kind in QUANTIZERS.items() if setting in kind.settings]


def having(setting: str):
    """Runs a test for each of them."""
    return pytest.mark.parametrize("name", users(setting))


every = pytest.mark.parametrize("name", QUANTIZERS)
# What is said of codes says nothing of latents that have none: those are in test_continuous.py.
every_with_codes = pytest.mark.parametrize("name", [name for name, kind in QUANTIZERS.items() if kind.discrete])
with_codebook = pytest.mark.parametrize("name", [name for name in users("revive_after") if name != "product"])
SPHERICAL = ("l2", "ema_l2")


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def make(name: str, **options):
    torch.manual_seed(0)
    return QUANTIZERS[name](K, D, **options)


def grid(batch: int = 3, side: int = 4) -> torch.Tensor:
    return torch.randn(batch, D, side, side, generator=torch.Generator().manual_seed(1))


def everything(quantizer) -> torch.Tensor:
    """The vectors of all K codes, (K, D)."""
    return quantizer.lookup(torch.arange(K).view(1, 1, K))[0, :, 0].T.detach().clone()


def flat(z: torch.Tensor) -> torch.Tensor:
    return z.movedim(1, -1).reshape(-1, z.shape[1])


# -------------------------------------------------------------------------------------------------------------- look-up


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 70), k=st.integers(1, 40), d=st.integers(1, 9), seed=st.integers(0, 99))
def test_nearest_is_brute_force(n, k, d, seed):
    generator = torch.Generator().manual_seed(seed)
    x, e = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    distances = torch.cdist(x.double(), e.double())
    chosen = distances.gather(1, nearest(x, e)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [1, 64, 128, 129, 256, 1024, 1280])
def test_the_least_of_strips_is_the_least(columns):
    """Whether there are strips or not, and of equal ones the first."""
    distances = torch.randn(50, columns)
    assert torch.equal(parts.least(distances), distances.argmin(1))
    ties = torch.randint(0, 3, (50, columns)).float()
    first = (ties == ties.amin(1, keepdim=True)).float().argmax(1)
    assert torch.equal(parts.least(ties), first)


@pytest.fixture
def blocks(monkeypatch) -> list[torch.Tensor]:
    """Every product of tokens with codes from here on, in chunks of ten rows of 64."""
    found = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: found.append(addmm(*a, **k)) or found[-1])
    monkeypatch.setitem(parts.CHUNK_BYTES, "cpu", 4 * 64 * 10)
    return found


def test_nearest_never_holds_all_distances(blocks):
    x, e = torch.randn(1000, D), torch.randn(64, D)
    assert torch.equal(nearest(x, e), torch.cdist(x, e).argmin(1))
    assert len(blocks) == 100
    assert max(block.numel() for block in blocks) <= 640


@every_with_codes
def test_every_cell_keeps_its_place(name):
    """In grids of any shape: the image, row and column of a code are those of its token, which it depends on alone."""
    quantizer, z = make(name).eval(), torch.randn(2, D, 3, 5)
    quantizer.initialise(grid(batch=6))
    out = quantizer(z)
    assert out.codes.shape == (2, 3, 5)
    assert out.codes.unique().numel() > 3
    torch.testing.assert_close(quantizer.lookup(out.codes), out.z_q, atol=1e-6, rtol=1e-6)
    for image, row, column in ((0, 0, 4), (0, 2, 1), (1, 1, 3), (1, 2, 0)):
        alone = quantizer(z[image, :, row, column].view(1, D, 1, 1))
        assert int(alone.codes) == int(out.codes[image, row, column])
        torch.testing.assert_close(out.z_q[image, :, row, column], alone.z_q.flatten(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["standard", "ema", "l2", "ema_l2", "gumbel", "simvq"])
def test_the_code_is_the_nearest_one(name):
    quantizer = make(name).eval()
    quantizer.initialise(grid(batch=6))
    tokens = flat(grid())
    tokens = F.normalize(tokens, dim=1) if name in SPHERICAL else tokens
    distances = torch.cdist(tokens.double(), everything(quantizer).double())
    assert torch.equal(quantizer(grid()).codes.flatten(), distances.argmin(1))


def test_lfq_s_code_is_the_signs():
    quantizer = make("lfq").eval()
    expected = quantizer.project_out(quantizer.project_in(flat(grid())).sign())
    torch.testing.assert_close(flat(quantizer(grid()).z_q), expected)


def test_fsq_s_code_is_the_nearest_level_of_every_component():
    quantizer = make("fsq").eval()
    half = torch.tensor([(level - 1) * 1.001 / 2 for level in fsq_levels(K)])  # all even at this K
    bounded = (quantizer.project_in(flat(grid())) + (0.5 / half).atanh()).tanh() * half - 0.5
    expected = quantizer.project_out(bounded.round() / (torch.tensor(fsq_levels(K)) // 2))
    torch.testing.assert_close(flat(quantizer(grid()).z_q), expected)


def test_residual_s_code_is_a_pair_whatever_the_two_sizes():
    quantizer = QUANTIZERS["residual"](12, D).eval()
    quantizer.initialise(grid(batch=6))
    first, second = (stage.codebook for stage in quantizer.codec.layers)
    assert (len(first), len(second)) == (4, 3)
    pairs = quantizer.lookup(torch.arange(12).view(1, 1, 12))[0, :, 0].T
    torch.testing.assert_close(pairs, (first[:, None] + second).flatten(0, 1))
    out = quantizer(grid())
    torch.testing.assert_close(quantizer.lookup(out.codes), out.z_q, atol=1e-6, rtol=1e-6)


@every_with_codes
def test_shapes_ranges_and_types(name):
    out = make(name)(grid())
    assert out.z_q.shape == (3, D, 4, 4)
    assert out.z_q.dtype == torch.float32
    assert out.codes.shape == (3, 4, 4)
    assert out.codes.dtype == torch.int64
    assert 0 <= out.codes.min() <= out.codes.max() < K
    assert out.loss.ndim == out.distortion.ndim == 0
    assert not out.distortion.requires_grad  # it is for the log


@every
@pytest.mark.parametrize("started", [False, True])
def test_lookup_of_the_codes_is_the_forward_path(name, started):
    """Decoding from indices must not differ from training's own path (bug 6)."""
    quantizer = make(name).eval()
    if started:
        quantizer.initialise(grid(batch=6))
    out = quantizer(grid())
    torch.testing.assert_close(quantizer.lookup(out.codes), out.z_q, atol=1e-6, rtol=1e-6)


@every_with_codes
def test_in_training_the_decoder_sees_codes_too(name):
    """What it learns on must be what it is scored on: vectors of the codebook, as it was before this step."""
    quantizer, z = make(name), grid()
    quantizer.initialise(grid(batch=6))
    before = everything(quantizer)
    out = quantizer(z)
    torch.testing.assert_close(flat(out.z_q.detach()), before[out.codes.flatten()], atol=1e-6, rtol=1e-5)


@every_with_codes
def test_there_are_exactly_k_codes(name):
    """Bits are counted as log2 K: K different vectors, and no index beyond (product codebooks included)."""
    quantizer = make(name).eval()
    quantizer.initialise(grid(batch=20))
    assert everything(quantizer).unique(dim=0).shape[0] == K
    codes = quantizer(4 * grid(batch=200)).codes
    assert set(codes.flatten().tolist()) == set(range(K))


@every_with_codes
def test_output_depends_on_the_codes_alone(name):
    """Nudging z within its cell must not change what the decoder sees (bug 3)."""
    quantizer = make(name).eval()
    z = grid()
    first, second = quantizer(z), quantizer(z + 1e-4)
    assert torch.equal(first.codes, second.codes)
    torch.testing.assert_close(first.z_q, second.z_q, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------------- gradient


def test_straight_through_is_the_code_with_the_token_s_gradient():
    tokens, chosen, weights = torch.randn(3, 20, D).unbind()
    tokens.requires_grad_()
    chosen.requires_grad_()
    out = straight_through(tokens, chosen)
    torch.testing.assert_close(out, chosen)
    (out * weights).sum().backward()
    assert torch.equal(tokens.grad, weights)
    assert chosen.grad is None


@pytest.mark.parametrize("name", ["standard", "ema", "simvq", "residual"])
def test_gradient_passes_straight_through(name):
    """Once: a sum over residual stages would pass it twice."""
    z, weights = grid().requires_grad_(), torch.randn(3, D, 4, 4)
    (make(name)(z).z_q * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


@pytest.mark.parametrize("name", SPHERICAL)
def test_gradient_passes_straight_through_the_normalisation(name):
    z, weights = grid().requires_grad_(), torch.randn(3, D, 4, 4)
    (make(name)(z).z_q * weights).sum().backward()
    expected = torch.autograd.grad((F.normalize(z, dim=1) * weights).sum(), z)[0]
    torch.testing.assert_close(z.grad, expected)


def test_lfq_gradient_passes_straight_through_the_signs():
    quantizer, z, weights = make("lfq"), grid().requires_grad_(), torch.randn(3, D, 4, 4)
    (quantizer(z).z_q * weights).sum().backward()
    expected = flat(weights) @ quantizer.project_out.weight @ quantizer.project_in.weight
    torch.testing.assert_close(flat(z.grad), expected)


def test_fsq_gradient_passes_straight_through_the_rounding():
    """That of the bounded component, (L−1)/2 · tanh, in units of half the levels."""
    quantizer, z, weights = make("fsq"), grid().requires_grad_(), torch.randn(3, D, 4, 4)
    (quantizer(z).z_q * weights).sum().backward()
    scalars = quantizer.project_in(flat(z)).detach().double().requires_grad_()
    half = torch.tensor([(level - 1) * 1.001 / 2 for level in fsq_levels(K)])  # all even at this K
    bounded = (scalars + (0.5 / half).atanh()).tanh() * half / (torch.tensor(fsq_levels(K)) // 2)
    (bounded * (flat(weights) @ quantizer.project_out.weight).double()).sum().backward()
    torch.testing.assert_close(flat(z.grad), scalars.grad.float() @ quantizer.project_in.weight)


@having("gradient")
def test_rotation_changes_the_gradient_alone(name):
    outs, gradients = [], []
    for gradient in ("straight_through", "rotation"):
        z = grid().requires_grad_()
        outs.append(make(name, gradient=gradient)(z))
        (outs[-1].z_q * torch.arange(D).view(1, D, 1, 1)).sum().backward()
        gradients.append(z.grad)
    for before, after in zip(*outs, strict=True):
        torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-6)
    assert (gradients[0] - gradients[1]).abs().max() > 0.01


@settings(deadline=None, max_examples=30)
@given(d=st.integers(2, 9), seed=st.integers(0, 99), scale=st.floats(0.01, 100))
def test_rotation_is_a_rotation_and_a_rescaling(d, seed, scale):
    """Its Jacobian J takes e to q, leaves what is perpendicular to both but for the scale, and keeps angles."""
    generator = torch.Generator().manual_seed(seed)
    e, q = torch.randn(d, generator=generator).double(), scale * torch.randn(d, generator=generator).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: rotate(x[None], q[None])[0], e)
    ratio = q.norm() / e.norm()
    torch.testing.assert_close(rotate(e[None], q[None])[0], q)
    torch.testing.assert_close(jacobian @ e, q)
    torch.testing.assert_close(jacobian.T @ jacobian, ratio**2 * torch.eye(d).double())
    assert torch.linalg.det(jacobian) > 0
    plane = torch.linalg.qr(torch.stack([e, q]).T)[0]
    beside = torch.eye(d).double() - plane @ plane.T
    torch.testing.assert_close(jacobian @ beside, ratio * beside, atol=1e-6 * float(ratio), rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), small=st.sampled_from([1e-5, 1e-4, 1e-3]))
def test_rotation_turns_short_vectors_like_long_ones(seed, small):
    """Only shorter ones than a millionth have no direction. No gradient reaches the code."""
    generator = torch.Generator().manual_seed(seed)
    e, q, weights = (F.normalize(torch.randn(D, generator=generator).double(), dim=0) for _ in range(3))
    gradients = []
    for scale in (1.0, small):
        tokens, chosen = (scale * e)[None].requires_grad_(), (scale * q)[None].requires_grad_()
        (rotate(tokens, chosen) * weights).sum().backward()
        gradients.append(tokens.grad)
        assert chosen.grad is None
    torch.testing.assert_close(*gradients)


def test_rotation_is_the_package_s():
    functions = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    tokens, chosen, weights = torch.randn(3, 50, D).unbind()
    gradients = []
    for function in (rotate, functions.rotate_to):
        x = tokens.clone().requires_grad_()
        (function(x, chosen) * weights).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_rotation_is_safe_where_there_is_no_direction():
    """A zero token, a zero code, both, and opposite ones; the first three pass straight through."""
    e = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    q = torch.tensor([[3.0, 1.0], [0.0, 0.0], [0.0, 0.0], [-1.0, -2.0]])
    out = rotate(e, q)
    assert torch.equal(out, q)
    weights = torch.randn(4, 2)
    (out * weights).sum().backward()
    assert torch.equal(e.grad[:3], weights[:3])
    torch.testing.assert_close(e.grad[3].norm(), weights[3].norm())


# ----------------------------------------------------------------------------------------------------------------- loss


def codebook_parameter(quantizer) -> torch.Tensor:
    return quantizer.codec.code_transform.weight if hasattr(quantizer, "codec") else quantizer.codebook


@pytest.mark.parametrize("name", ["standard", "l2", "simvq"])
def test_codebook_gradient_does_not_depend_on_beta(name):
    """β belongs to the commitment term, not to the codebook's (bug 1)."""
    gradients = []
    for beta in (0.0, 0.25, 4.0):
        quantizer = make(name, beta=beta)
        quantizer(grid()).loss.backward()
        gradients.append(codebook_parameter(quantizer).grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@having("beta")
def test_commitment_gradient_is_proportional_to_beta(name):
    """β reaches the loss (bug 2), and pulls the encoder only as far as it says."""
    gradients = []
    for beta in (0.5, 2.0):
        z = grid().requires_grad_()
        make(name, beta=beta)(z).loss.backward()
        gradients.append(z.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], 4 * gradients[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "terms"),
    [("standard", 1.3), ("l2", 1.3), ("simvq", 1.3), ("ema", 0.3), ("ema_l2", 0.3), ("gumbel", 0.3)],
)
def test_loss_is_equation_3_or_its_commitment_alone(name, terms, training):
    """The codebook's term where it learns by that gradient, and β times the commitment (bugs 1 and 2)."""
    quantizer, z = make(name, beta=0.3).train(training), grid()
    before = everything(quantizer)
    out = quantizer(z)
    tokens = F.normalize(flat(z), dim=1) if name in SPHERICAL else flat(z)
    distance = (tokens - before[out.codes.flatten()]).square().mean()
    torch.testing.assert_close(out.loss, terms * distance)
    torch.testing.assert_close(out.distortion, distance)


@pytest.mark.parametrize("name", ["standard", "simvq"])
def test_either_term_pulls_its_own_side_alone(name):
    """The codebook's moves no token, the commitment no code: each has its closed form."""
    quantizer, z = make(name, beta=0.3), grid().requires_grad_()
    before = everything(quantizer).requires_grad_()
    out = quantizer(z)
    out.loss.backward()
    tokens, chosen = flat(z.detach()), before[out.codes.flatten()]
    torch.testing.assert_close(flat(z.grad), 0.3 * 2 * (tokens - chosen.detach()) / tokens.numel())
    (chosen - tokens).square().mean().backward()
    pull = before.grad  # on each code
    expected = pull if name == "standard" else pull.T @ quantizer.codec.frozen_codebook
    torch.testing.assert_close(codebook_parameter(quantizer).grad, expected)


def test_gumbel_has_no_codebook_loss():
    quantizer = make("gumbel")
    assert not torch.autograd.grad(quantizer(grid().requires_grad_()).loss, quantizer.codebook, allow_unused=True)[0]


def test_lfq_commits_the_components_to_their_signs():
    quantizer, z = make("lfq", beta=0.3), grid().requires_grad_()
    out = quantizer(z)
    scalars = quantizer.project_in(flat(z))
    expected = 0.3 * (scalars - scalars.detach().sign()).square().mean()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (out.loss, expected)))


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_distortion_is_measured_between_tokens(name):
    """Not between the components, which the log could not compare with other quantizers."""
    out = make(name)(grid())
    torch.testing.assert_close(out.distortion, (grid() - out.z_q.detach()).square().mean())


def test_residual_commits_either_stage():
    quantizer, z = make("residual", beta=0.3), grid()
    quantizer.initialise(z)
    before = [stage.codebook.clone() for stage in quantizer.codec.layers]
    out = quantizer(z)
    first, second = out.codes.flatten() // 4, out.codes.flatten() % 4
    left = flat(z) - before[0][first]
    assert torch.equal(first, nearest(flat(z), before[0]))
    assert torch.equal(second, nearest(left, before[1]))
    expected = left.square().mean() + (left - before[1][second]).square().mean()
    torch.testing.assert_close(out.loss, 0.3 * expected)
    torch.testing.assert_close(out.distortion, (left - before[1][second]).square().mean())


def test_fsq_has_no_loss():
    assert make("fsq")(grid()).loss == 0


@pytest.mark.parametrize("name", SPHERICAL)
def test_the_sphere_ignores_the_norms(name):
    quantizer = make(name).eval()
    z = grid()
    scaled = quantizer(z * torch.rand(3, 1, 4, 4).add(0.1))
    assert torch.equal(scaled.codes, quantizer(z).codes)
    torch.testing.assert_close(scaled.z_q.norm(dim=1), torch.ones(3, 4, 4))


# -------------------------------------------------------------------------------------------------------------- entropy


def dense_penalty(x: torch.Tensor, e: torch.Tensor, variance: float) -> torch.Tensor:
    """Equations 5 and 6, with the whole matrix of soft choices."""
    p = (-torch.cdist(x, e).square() / (2 * variance)).softmax(1)
    return (-p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()


def test_entropy_penalty_is_the_formula_and_its_gradient(blocks):
    x, e = torch.randn(200, D), torch.randn(64, D)
    found, expected = [
        (a.requires_grad_(), b.requires_grad_()) for a, b in ((x.clone(), e.clone()), (x.double(), e.double()))
    ]
    penalty = entropy_penalty(*found, torch.tensor(0.4))
    reference = dense_penalty(*expected, 0.4)
    torch.testing.assert_close(penalty.double(), reference)
    penalty.backward()
    reference.backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-6, rtol=1e-4)


def test_entropy_penalty_never_holds_all_soft_choices(blocks):
    """Neither at once nor kept for the backward pass."""
    kept = []
    x, e = torch.randn(1000, D, requires_grad=True), torch.randn(64, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        penalty = entropy_penalty(x, e, torch.tensor(1.0))
    penalty.backward()
    assert max(block.numel() for block in blocks) <= 640
    assert sum(kept) < 64 * 1000


def test_entropy_penalty_has_its_bounds():
    codes = 10 * torch.eye(K)
    sure_and_even, lone = codes.repeat(3, 1), codes[:1].repeat(30, 1)
    halfway = torch.zeros(30, K)
    assert float(entropy_penalty(sure_and_even, codes, torch.tensor(1.0))) == pytest.approx(-math.log(K), abs=1e-5)
    assert float(entropy_penalty(lone, codes, torch.tensor(1.0))) == pytest.approx(0, abs=1e-5)
    assert float(entropy_penalty(halfway, codes, torch.tensor(1.0))) == pytest.approx(0, abs=1e-5)
    assert entropy_penalty(codes, codes, torch.tensor(0.0)).isfinite()  # every token on a code
    assert entropy_penalty(lone, 100 * codes, torch.tensor(1.0)).isfinite()  # codes beyond all reach


def test_entropy_penalty_does_not_see_the_scale():
    x, e = torch.randn(200, D), torch.randn(64, D)
    small, large = (entropy_penalty(s * x, s * e, torch.tensor(0.4 * s**2)) for s in (1.0, 100.0))
    torch.testing.assert_close(small, large)


@having("entropy_weight")
def test_entropy_weight_scales_what_training_adds(name, monkeypatch):
    losses = [make(name, entropy_weight=weight)(grid()).loss for weight in (0.0, 0.5, 1.0)]
    assert losses[1] < losses[0]
    torch.testing.assert_close(losses[2] - losses[0], 2 * (losses[1] - losses[0]))
    monkeypatch.setattr(parts, "checkpoint", None)  # a call would fail
    make(name, entropy_weight=0.0)(grid())
    make(name, entropy_weight=1.0).eval()(grid())


def test_entropy_penalty_holds_the_variance():
    variance = torch.tensor(0.5, requires_grad=True)
    entropy_penalty(torch.randn(20, D, requires_grad=True), torch.randn(8, D), variance).backward()
    assert variance.grad is None


@pytest.mark.parametrize(
    "name", [name for name in users("entropy_weight") if name != "bsq"]
)  # whose bits have their own
def test_entropy_penalty_is_of_the_tokens_that_compete_for_the_codes(name):
    """With the variance that they have about their codes; its gradient reaches the encoder. Codes as they were before
    this step."""
    outs, gradients = [], []
    for weight in (0.0, 0.7):
        quantizer, z = make(name, entropy_weight=weight), grid().requires_grad_()
        before = everything(quantizer)
        torch.manual_seed(3)  # gumbel's noise
        outs.append(quantizer(z))
        gradients.append(torch.autograd.grad(outs[-1].loss, z)[0])
    x = grid().requires_grad_()
    tokens = F.normalize(flat(x), dim=1) if name in SPHERICAL else flat(x)
    codes = before
    if name == "lfq":
        tokens, codes = quantizer.project_in(tokens), torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    chosen = tokens.sign() if name == "lfq" else before[outs[0].codes.flatten()]
    variance = float((tokens - chosen).detach().square().mean())
    penalty = dense_penalty(tokens.double(), codes.detach().double(), variance).float()
    torch.testing.assert_close(outs[1].loss - outs[0].loss, 0.7 * penalty, atol=1e-5, rtol=1e-4)
    expected = torch.autograd.grad(0.7 * penalty, x)[0]
    torch.testing.assert_close(gradients[1] - gradients[0], expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(outs[1].distortion, outs[0].distortion)


@every
def test_entropy_weight_left_open_is_the_quantizer_s_own(name, tiny):
    config = replace(tiny, quantizer=name)
    assert config.resolved().entropy_weight == {"bsq": 0.1, "lfq": 0.1, "simvq": 0.02}.get(name, 0)
    if name in users("entropy_weight"):
        assert Tokenizer(config).quantizer.entropy_weight == config.resolved().entropy_weight


@having("entropy_weight")
def test_entropy_penalty_spreads_the_codes(name):
    """Tokens that have nothing else to do but lower it come to use more codes, more evenly."""
    slow = {"ema_decay": 0.9999} if name in users("ema_decay") else {}  # codes that do not run after the tokens
    quantizer = make(name, entropy_weight=1.0, beta=0.0, **slow)
    z = (0.05 * grid() + 1).requires_grad_()
    quantizer.initialise(grid())
    before = quantizer(z).codes.flatten().bincount(minlength=K)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        quantizer(z).loss.backward()
        optimizer.step()
    after = quantizer.eval()(z).codes.flatten().bincount(minlength=K)
    assert (after > 0).sum() > (before > 0).sum()
    assert after.max() < before.max()


# --------------------------------------------------------------------------------------------------------------- gumbel


def test_gumbel_is_torch_s_gumbel_softmax(monkeypatch):
    """Straight-through sample and both of its gradients, given the same noise."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x: torch.rand_like(x).log().neg())
    weights = torch.randn(3, D, 4, 4)
    quantizer, z = make("gumbel", temperature=0.7), grid().requires_grad_()
    torch.manual_seed(5)
    out = quantizer(z)
    (out.z_q * weights).sum().backward()

    x, e = flat(z.detach()).requires_grad_(), quantizer.codebook.detach().clone().requires_grad_()
    squares = (x[:, None] - e).square().sum(2)
    logits = -squares / (2 * squares.detach().amin(1).mean() / D)
    torch.manual_seed(5)
    hard = F.gumbel_softmax(logits, tau=0.7, hard=True)
    assert torch.equal(out.codes.flatten(), hard.argmax(1))
    (hard @ e * flat(weights)).sum().backward()
    torch.testing.assert_close(flat(z.grad), x.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(quantizer.codebook.grad, e.grad, atol=1e-4, rtol=1e-4)


def test_gumbel_is_finite_where_every_token_sits_on_a_code():
    quantizer = make("gumbel")
    quantizer.replace(torch.ones(K, dtype=torch.bool), torch.arange(K)[:, None].expand(K, D).float())  # exact squares
    z = quantizer.codebook.detach()[:4].T.reshape(1, D, 2, 2).clone().requires_grad_()
    out = quantizer(z)
    (out.z_q.sum() + out.loss).backward()
    assert out.codes.flatten().tolist() == [0, 1, 2, 3]
    assert z.grad.isfinite().all()
    assert quantizer.codebook.grad.isfinite().all()


def test_gumbel_samples_its_posterior_and_argmax_is_nearest():
    quantizer = make("gumbel")
    token = torch.randn(D)
    z = token.view(1, D, 1, 1).expand(1, D, 100, 200)
    squares = (token - quantizer.codebook.detach()).square().sum(1)
    expected = (-squares / (2 * squares.min() / D)).softmax(0)
    frequency = quantizer(z).codes.flatten().bincount(minlength=K) / 20000
    torch.testing.assert_close(frequency, expected, atol=0.015, rtol=0)
    assert set(quantizer.eval()(z).codes.flatten().tolist()) == {int(squares.argmin())}


# ------------------------------------------------------------------------------------------------------------ the state


@every
def test_eval_mode_changes_nothing(name):
    """Statistics that move during evaluation leak the validation set into the codebook (bug 5)."""
    quantizer = make(name, **({"revive_after": 1} if name in users("revive_after") else {})).eval()
    for part in quantizer.modules():
        if hasattr(part, "idle"):
            part.idle.fill_(10**6)  # in training all codes would be replaced
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    for _ in range(3):
        quantizer(grid())
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), key


@every
def test_the_state_is_all_there_is(name):
    """A checkpoint and a seed are enough to go on: no flag, statistic or generator beside them (bug 14)."""
    options = {"revive_after": 1} if name in users("revive_after") else {}
    quantizer = make(name, **options)
    quantizer.initialise(grid())
    for _ in range(K):
        quantizer(grid(batch=1, side=1))  # which leaves most codes idle, for the next step to revive
    torch.manual_seed(9)
    other = QUANTIZERS[name](K, D, **options)
    other.load_state_dict(quantizer.state_dict())
    for step in range(3):
        outs = []
        for one in (quantizer, other):
            torch.manual_seed(step)
            outs.append(one(grid() + step))
        for a, b in zip(*outs, strict=True):
            assert (a is b is None) or torch.equal(a, b)
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@with_codebook
def test_training_mode_revives_dead_codes_and_they_stay(name):
    """A revived code sits on a token, and is still there after steps that do not choose it (bug 5: running sums)."""
    quantizer = make(name, revive_after=6)  # 96 tokens: two steps of 48
    z = grid() + 3  # all on one side of the origin
    far = -50 * torch.ones(D)
    quantizer.replace(torch.arange(K) == 0, torch.full((K, D), 3.0))  # one live code
    quantizer.replace(torch.arange(K) > 0, far.expand(K, D))  # the rest far away, never chosen
    for _ in range(2):
        quantizer(z)
    assert quantizer.idle[1:].min() >= 96
    quantizer.eval()
    assert quantizer(z).codes.unique().numel() < K
    quantizer.train()
    quantizer(z)  # revives, then looks up
    tokens = quantizer.normalise(flat(z))
    revived = quantizer.normalise(quantizer.codebook.detach())[1:].clone()
    if name not in ("ema", "ema_l2"):  # the moving average has already taken its first step away from the token
        assert torch.cdist(revived, tokens).min(1).values.max() < 5e-3  # what cdist resolves
    assert quantizer(z).codes.unique().numel() > K // 2
    revived = quantizer.normalise(quantizer.codebook.detach())[1:].clone()
    quantizer.revive_after = 0
    elsewhere = quantizer.codebook.detach()[:1].T.reshape(1, D, 1, 1).clone()
    for _ in range(20):
        quantizer(elsewhere)
    torch.testing.assert_close(quantizer.normalise(quantizer.codebook.detach())[1:], revived, atol=2e-3, rtol=2e-2)


@with_codebook
def test_idle_counts_the_tokens_since_a_code_was_chosen(name):
    """From nothing, not from a buffer that says that all are in use, or none (bug 10)."""
    quantizer, idle = make(name), [0] * K
    for step in range(6):
        codes = quantizer(grid(batch=1, side=2) + step).codes.flatten().tolist()
        idle = [0 if code in codes else tokens + len(codes) for code, tokens in enumerate(idle)]
        assert quantizer.idle.tolist() == idle
    assert len(set(idle)) > 2


@with_codebook
@pytest.mark.parametrize("revive_after", [0, 3])
def test_a_code_is_revived_once_its_patience_is_over(name, revive_after):
    """At revive_after·K missed tokens, not one sooner; then it sits on a token, with all of its patience before it."""
    quantizer, z = make(name, revive_after=revive_after), grid() + 3
    far = torch.full((K, D), -50.0) + torch.eye(K, D)  # no token chooses one of these
    quantizer.replace(torch.arange(K) > 0, far)
    quantizer.idle.copy_(torch.tensor([0, 3 * K, 3 * K - 1] + [0] * (K - 3)))
    out = quantizer(z)
    homes = torch.cdist(quantizer.normalise(quantizer.codebook.detach()), quantizer.normalise(flat(z))).min(1).values
    moved = homes[1:] < 1  # a moving average has taken one step more
    assert moved.tolist() == [revive_after > 0] + [False] * (K - 2)
    assert quantizer.idle[2] == 3 * K - 1 + 48
    assert quantizer.idle[1] == (0 if 1 in out.codes else 48 if revive_after else 3 * K + 48)
    if revive_after and name != "gumbel":  # which samples
        assert 1 in out.codes  # revived before the look-up


@pytest.mark.parametrize("name", ["ema", "ema_l2"])
def test_a_code_revived_after_a_long_time_stays_among_the_tokens(name):
    """By then its running size has faded far below one; kept, it would blow the average up (bug 5)."""
    quantizer, z = make(name, revive_after=30, ema_decay=0.5), grid() + 3
    quantizer.replace(torch.arange(K) > 0, torch.full((K, D), -50.0))
    for _ in range(10):
        assert float(quantizer(z).codes.max()) == 0
    assert float(quantizer.cluster_size[1:].max()) == pytest.approx(0.5**10)
    tokens = quantizer.normalise(flat(z))
    for _ in range(3):
        quantizer(z)
        assert (quantizer.codebook[1:] > tokens.amin(0) - 1e-3).all()
        assert (quantizer.codebook[1:] < tokens.amax(0) + 1e-3).all()


@with_codebook
def test_revived_codes_sit_on_tokens_of_their_own(name):
    """Drawn at random, not one for all."""
    quantizer, z = make(name, revive_after=1), grid() + 3
    quantizer.idle.fill_(K)
    quantizer._revive(quantizer.normalise(flat(z)))
    revived = quantizer.normalise(quantizer.codebook.detach())
    assert torch.cdist(revived, quantizer.normalise(flat(z))).min(1).values.max() < 5e-3
    assert revived.unique(dim=0).shape[0] > K / 2
    assert not quantizer.idle.any()


@with_codebook
def test_patience_is_counted_in_tokens(name):
    """With one code per image a step has fewer tokens than there are codes: unused in a step is not dead."""
    quantizer = make(name, revive_after=10)
    for step in range(1, 60):
        before = quantizer.codebook.detach().clone()
        quantizer(3 + torch.zeros(2, D, 1, 1))  # one code takes all: 2 of the 160 tokens that a dead code must miss
        changed = (quantizer.codebook.detach() - before).abs().sum(1) > 1e-2
        assert changed.sum() <= 1, step


def test_ema_revival_resets_the_running_sums():
    quantizer = make("ema", revive_after=1)
    which = torch.arange(K) == 3
    quantizer.replace(which, torch.full((K, D), 7.0))
    assert quantizer.cluster_size[3] == 1
    assert torch.equal(quantizer.cluster_sum[3], torch.full((D,), 7.0))
    tokens = torch.zeros(4, D)
    quantizer.learn(tokens, torch.zeros(4, dtype=torch.int64), torch.eye(K)[0] * 4)  # nothing chose code 3
    torch.testing.assert_close(quantizer.codebook[3], torch.full((D,), 7.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("ema_decay", [0.1, 0.99])
@pytest.mark.parametrize("name", ["ema", "ema_l2"])
def test_ema_follows_its_formula_step_by_step(name, ema_decay):
    """In float64: N ← γN + (1−γ)n, S ← γS + (1−γ)s, e = S / N, smoothed; codes that nothing chooses among them."""
    quantizer = make(name, ema_decay=ema_decay)
    size, total = torch.ones(K).double(), quantizer.codebook.double()
    for step in range(5):
        z = grid() + step / 2
        codes = quantizer(z).codes.flatten()
        one_hot = F.one_hot(codes, K).double()
        size = ema_decay * size + (1 - ema_decay) * one_hot.sum(0)
        total = ema_decay * total + (1 - ema_decay) * one_hot.T @ quantizer.normalise(flat(z)).double()
        torch.testing.assert_close(quantizer.cluster_size.double(), size, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(quantizer.cluster_sum.double(), total, atol=1e-6, rtol=1e-4)
        smoothed = (size + 1e-5) / (size.sum() + K * 1e-5) * size.sum()
        torch.testing.assert_close(quantizer.codebook.double(), total / smoothed[:, None], atol=1e-5, rtol=1e-3)
    assert size.min() < 0.96


def test_ema_smoothing_lifts_small_sizes_and_keeps_the_total():
    """In float64, and with one token among K codes: otherwise it would be lost in rounding."""
    quantizer = make("ema", ema_decay=0.1).double()
    before = quantizer.codebook.clone()
    token = torch.ones(1, D).double()
    quantizer.learn(token, torch.tensor([3]), torch.eye(K)[3].double())
    sizes = torch.full((K,), 0.1).double() + 0.9 * torch.eye(K)[3]
    smoothed = (sizes + 1e-5) / (sizes.sum() + K * 1e-5) * sizes.sum()
    torch.testing.assert_close(smoothed.sum(), sizes.sum())
    sums = 0.1 * before + 0.9 * torch.eye(K)[3][:, None] * token
    torch.testing.assert_close(quantizer.codebook, sums / smoothed[:, None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["ema", "ema_l2"])
def test_ema_first_step_has_its_closed_form(name):
    quantizer, z = make(name, ema_decay=0.9), grid()
    before = quantizer.codebook.clone()
    codes = quantizer(z).codes.flatten()
    tokens = quantizer.normalise(flat(z))
    k = int(codes.mode().values)
    mine = tokens[codes == k]
    expected = quantizer.normalise((0.9 * before[k] + 0.1 * mine.sum(0)) / (0.9 + 0.1 * len(mine)))
    torch.testing.assert_close(quantizer.lookup(torch.tensor([[[k]]])).flatten(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ema", "ema_l2"])
def test_ema_converges_to_the_mean_of_its_cell(name):
    """On the sphere the mean of unit tokens, brought back to it; the tokens' norms have no weight."""
    quantizer = QUANTIZERS[name](1, D, ema_decay=0.5)
    z = grid() + 1
    for _ in range(40):
        quantizer(z)
    mean = quantizer.normalise(quantizer.normalise(flat(z)).mean(0))
    torch.testing.assert_close(
        quantizer.lookup(torch.zeros(1, 1, 1, dtype=torch.int64)).flatten(), mean, atol=1e-4, rtol=1e-3
    )


@having("ema_decay")
def test_ema_decay_sets_the_pace(name):
    """And the first step goes on from the first codes: whatever else averages remember was reset with them."""
    moves = []
    for ema_decay in (0.5, 0.9999):
        quantizer = make(name, ema_decay=ema_decay)
        quantizer.initialise(grid(batch=6))
        before = everything(quantizer)
        quantizer(grid() + 1)
        moves.append(float((everything(quantizer) - before).norm(dim=1).max()))
    assert moves[0] > 0.3
    assert moves[1] < 0.01


# ------------------------------------------------------------------------------------------------------ the first codes


@with_codebook
def test_codebook_starts_at_tokens(name):
    quantizer = make(name)
    z = grid(batch=4)
    quantizer.initialise(z)
    tokens = quantizer.normalise(flat(z))
    codebook = quantizer.normalise(quantizer.codebook.detach())
    assert torch.cdist(codebook, tokens).min(1).values.max() < 5e-3
    assert codebook.unique(dim=0).shape[0] == K


@with_codebook
def test_starting_forgets_what_came_before(name):
    """Idle times, and a moving average's sums, which stand for one token each."""
    quantizer = make(name)
    quantizer(grid())
    assert quantizer.idle.any()
    quantizer.initialise(grid(batch=4))
    assert not quantizer.idle.any()
    if name in users("ema_decay"):
        assert torch.equal(quantizer.cluster_size, torch.ones(K))
        assert torch.equal(quantizer.cluster_sum, quantizer.codebook)


def test_first_codes_are_different_tokens_or_repeat_them_with_jitter():
    tokens = 10 + 3 * torch.randn(40, D)
    found = first_codes(tokens, 40, by_kmeans=False)
    assert torch.equal(found.sort(0).values, tokens.sort(0).values)  # each once
    assert not torch.equal(found, tokens)  # in random order
    found = first_codes(tokens[:8], 20, by_kmeans=True)
    assert found.unique(dim=0).shape[0] == 20
    assert torch.equal(found[:8].sort(0).values, tokens[:8].sort(0).values)
    away = torch.cdist(found[8:].double(), tokens[:8].double()).min(1).values
    per_component = float(away.square().mean().div(D).sqrt())
    assert per_component == pytest.approx(0.01 * float(tokens[:8].std()), rel=0.4)


def test_first_codes_by_kmeans_are_ten_rounds_from_random_tokens():
    tokens = torch.randn(200, D)
    torch.manual_seed(0)
    found = first_codes(tokens, K, by_kmeans=True)
    torch.manual_seed(0)
    expected = first_codes(tokens, K, by_kmeans=False)
    for _ in range(10):
        expected = kmeans(tokens, expected, rounds=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("by_kmeans", [False, True])
@pytest.mark.parametrize("count", [8, 200])
def test_first_codes_on_the_sphere_lie_there(count, by_kmeans):
    normalise = QUANTIZERS["l2"](1, 1).normalise
    found = first_codes(normalise(torch.randn(count, D)), K, by_kmeans, normalise)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(K))


def test_kmeans_round_is_the_means_of_the_cells():
    tokens, start = torch.randn(100, D), 0.3 * torch.randn(6, D)
    codes = torch.cdist(tokens, start).argmin(1)
    assert len(codes.unique()) == 6
    expected = torch.stack([tokens[codes == k].mean(0) for k in range(6)])
    torch.testing.assert_close(kmeans(tokens, start, rounds=1), expected)
    lone = torch.full((1, D), 30.0)  # a cell of its own
    torch.testing.assert_close(kmeans(torch.cat([tokens, lone]), torch.cat([start, lone - 1]), rounds=1)[6:], lone)


def test_kmeans_restarts_an_empty_cluster_at_a_token():
    tokens = torch.randn(50, D)
    found = kmeans(tokens, torch.cat([tokens[:2], torch.full((5, D), 900.0)]), rounds=1)
    restarted = torch.cdist(found[2:], tokens)
    assert restarted.min(1).values.max() < 5e-3
    assert len(restarted.argmin(1).unique()) > 2


def test_an_empty_cluster_may_restart_at_any_token():
    """Not only at one of the first K: 19 of 20 clusters are empty, and there are 100 tokens in order."""
    torch.manual_seed(0)
    tokens = torch.arange(100.0)[:, None].repeat(1, D)
    found = kmeans(tokens, torch.cat([tokens[:1], torch.full((19, D), 900.0)]), rounds=1)[1:]
    places = torch.cdist(found, tokens).argmin(1)
    assert places.min() < 50 <= places.max()


@pytest.mark.parametrize("name", ["standard", "l2", "ema", "ema_l2", "gumbel", "simvq"])
def test_kmeans_start_ends_at_the_means_of_its_cells(name):
    """On the sphere at their directions."""
    quantizer, z = make(name, kmeans_init=True), 0.05 * grid(batch=20)
    z += 3 * torch.randn(20, D, 1, 1)  # twenty clusters, soon found
    quantizer.initialise(z)
    found = everything(quantizer)
    tokens = flat(z)
    tokens = F.normalize(tokens, dim=1) if name in SPHERICAL else tokens
    codes = torch.cdist(tokens, found).argmin(1)
    means = torch.stack([tokens[codes == k].mean(0) for k in range(K)])
    means = F.normalize(means, dim=1) if name in SPHERICAL else means
    torch.testing.assert_close(found, means, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [name for name in users("kmeans_init") if name != "residual"]
)  # whose second stage has nothing left
@pytest.mark.parametrize("kmeans_init", [False, True])
def test_fewer_tokens_than_codes_start_it_too(name, kmeans_init):
    few = make(name, kmeans_init=kmeans_init)
    few.initialise(grid(batch=1, side=2))  # 4 tokens for 16 codes
    assert everything(few).unique(dim=0).shape[0] == K


@having("kmeans_init")
def test_kmeans_start_is_nearer_and_repeatable(name):
    distortions = []
    for kmeans_init in (False, True):
        quantizer = make(name, kmeans_init=kmeans_init).eval()
        torch.manual_seed(3)
        quantizer.initialise(grid(batch=20))
        distortions.append(float(quantizer(grid(batch=20)).distortion))
    assert distortions[1] < 0.95 * distortions[0]
    again = make(name, kmeans_init=True)
    torch.manual_seed(3)
    again.initialise(grid(batch=20))
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_kmeans_never_gets_worse_and_ends_at_means():
    tokens = torch.randn(500, D)
    centroids, last = tokens[:20], math.inf
    for _ in range(30):
        distortion = float((tokens - centroids[nearest(tokens, centroids)]).square().sum())
        assert distortion <= last + 1e-3
        last, centroids = distortion, kmeans(tokens, centroids, rounds=1)
    settled = kmeans(tokens, centroids, rounds=50)
    codes = nearest(tokens, settled)
    means = torch.stack([tokens[codes == k].mean(0) for k in range(20)])
    torch.testing.assert_close(settled, means, atol=1e-4, rtol=1e-4)


def test_kmeans_restarts_empty_clusters():
    tokens = torch.cat([torch.randn(50, 2) + 20, torch.randn(50, 2) - 20])
    torch.manual_seed(0)
    found = kmeans(tokens, torch.tensor([[20.0, 20.0], [500.0, 0.0], [600.0, 0.0], [700.0, 0.0]]))
    assert len(nearest(tokens, found).unique()) == 4


def test_spherical_kmeans_stays_on_the_sphere():
    normalise = QUANTIZERS["l2"](1, 1).normalise
    tokens = normalise(torch.randn(300, D))
    found = kmeans(tokens, tokens[:8], normalise, rounds=60)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(8))
    codes = nearest(tokens, found)
    sums = torch.zeros(8, D).index_add_(0, codes, tokens)
    torch.testing.assert_close(found, normalise(sums), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "deviation"), [("fsq", 0.3), ("lfq", 1.0)])
def test_scalars_start_centred_whatever_the_encoder_s_scale(name, deviation):
    quantizer = make(name)
    z = 50 * grid(batch=20) + 7
    quantizer.initialise(z)
    scalars = quantizer.project_in(flat(z))
    torch.testing.assert_close(scalars.mean(0), torch.zeros_like(scalars[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(scalars.std(0, correction=0), torch.full_like(scalars[0], deviation))


def test_simvq_starts_as_a_look_up_and_moves_every_code_at_once():
    quantizer = make("simvq")
    quantizer.initialise(grid(batch=4))
    before = everything(quantizer)
    torch.testing.assert_close(before, quantizer.codec.frozen_codebook)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    quantizer(grid(batch=1, side=1)).loss.backward()  # a single token
    optimizer.step()
    assert (everything(quantizer) - before).norm(dim=1).min() > 0


def test_residual_stages_start_at_their_own_inputs():
    quantizer, tokens = make("residual"), flat(grid(batch=6))
    quantizer.initialise(grid(batch=6))
    for stage in quantizer.codec.layers:
        assert torch.cdist(stage.codebook, tokens).min(1).values.max() < 5e-3
        tokens = tokens - stage.codebook[nearest(tokens, stage.codebook)]


def test_residual_stages_ask_for_as_many_first_codes_as_they_have(monkeypatch):
    """Of unequal stages too: centroids of a larger codebook, cut to the smaller one, would leave inputs without any."""
    asked = []

    def first(tokens, codebook_size, by_kmeans):
        asked.append((codebook_size, by_kmeans))
        return tokens[:codebook_size]

    monkeypatch.setattr("bench.quantizers.packaged.first_codes", first)
    quantizer = QUANTIZERS["residual"](12, D, kmeans_init=True)
    quantizer.initialise(grid())
    assert asked == [(4, True), (3, True)]


# ---------------------------------------------------------------------------------------------------------- the package


@pytest.mark.parametrize(
    ("codebook_size", "levels"),
    [
        (240, (8, 6, 5)),
        (1000, (8, 5, 5, 5)),
        (4375, (7, 5, 5, 5, 5)),
        (15360, (8, 8, 8, 6, 5)),
        (64000, (8, 8, 8, 5, 5, 5)),
        (512, (8, 8, 8)),
        (128, (8, 4, 4)),
    ],
)
def test_fsq_levels_are_the_paper_s(codebook_size, levels):
    assert fsq_levels(codebook_size) == levels


@pytest.mark.parametrize(("codebook_size", "levels"), [(90, (10, 9)), (540, (10, 9, 6)), (648, (9, 9, 8))])
def test_fsq_levels_are_the_nearest_to_six_by_squares_not_by_absolute_values(codebook_size, levels):
    """The sum of the logarithms themselves would favour several sixes and a 3."""
    assert fsq_levels(codebook_size) == levels


@given(st.integers(2, 70000))
def test_products_are_exact(codebook_size):
    levels = fsq_levels(codebook_size)
    assert not levels or math.prod(levels) == codebook_size


@given(st.integers(1, 70000), st.integers(1, 6))
def test_factors_have_k_as_their_product_and_fall(codebook_size, count):
    sizes = factors(codebook_size, count)
    assert math.prod(sizes) == codebook_size
    assert len(sizes) == count
    assert sorted(sizes, reverse=True) == list(sizes)
    assert min(sizes) >= 1


@pytest.mark.parametrize(
    ("codebook_size", "found"),
    [(512, (32, 16)), (512, (8, 8, 8)), (12, (4, 3)), (1000, (10, 10, 10)), (7, (7, 1)), (2**24, (64,) * 4)],
)
def test_factors_are_as_equal_as_they_can_be(codebook_size, found):
    assert factors(codebook_size, len(found)) == found


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_digits_are_all_combinations_in_their_order_and_number_is_their_inverse(sizes):
    codes = torch.arange(math.prod(sizes))
    found = digits(codes, sizes)
    assert found.tolist() == [list(indices) for indices in itertools.product(*map(range, sizes))]
    assert torch.equal(number(found, sizes), codes)


@pytest.mark.parametrize(
    ("name", "size", "fix"),
    [
        ("fsq", 509, "507"),
        ("fsq", 2, "3"),
        ("lfq", 500, "512"),
        ("residual", 509, "508"),
        ("residual", 2, "4"),
        ("product", 509, "508"),
        ("bsq", 500, "512"),
    ],
)
def test_a_codebook_that_cannot_be_is_refused_with_the_nearest_that_can(name, size, fix, tiny):
    levels = f"a product of {min(LEVELS)} to {max(LEVELS)} levels a component"
    rule = {"fsq": levels, "lfq": "a power of two", "bsq": "a power of two"}.get(name, "a product of 2 numbers above 1")
    for attempt in (
        lambda: replace(tiny, quantizer=name, codebook_size=size).check(),
        lambda: QUANTIZERS[name](size, D),
    ):
        with pytest.raises(UserError, match=f"^codebook_size is {size}; .*{name}.* needs {rule}, such as {fix}$"):
            attempt()
    replace(tiny, quantizer=name, codebook_size=int(fix)).check()


@pytest.mark.parametrize("name", ["fsq", "lfq", "simvq", "residual"])
def test_without_the_package_the_command_to_install_it_is_named(name, monkeypatch, tiny):
    """In the version that this project asks for."""
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    project = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    (requirement,) = set(re.findall(r'"(vector-quantize-pytorch[^"]*)"', project))
    with pytest.raises(UserError, match=f"pip install '{requirement}'$"):
        replace(tiny, quantizer=name).check()
    with pytest.raises(UserError, match=f"quantizers .*{name}.* need a package; pip install '{requirement}'$"):
        QUANTIZERS[name](K, D)
    replace(tiny, quantizer="ema").check()


class Gpu:
    """Stands in for a codebook of 1024 vectors on the second GPU."""

    device = torch.device("cuda:1")

    def __len__(self) -> int:
        return 1024


def test_distances_are_held_for_one_token_at_least_and_4_mb_on_unknown_devices():
    """256 MB on a GPU; a codebook that fills all of that is looked up token by token."""
    for device, rows in (("cpu", 1024), ("meta", 1024)):
        assert chunk_rows(torch.empty(1024, D, device=device)) == rows
        assert chunk_rows(torch.empty(1 << 21, 1, device=device)) == 1
    assert chunk_rows(Gpu()) == 65_536


def test_lfq_leaves_no_soft_choices_to_the_package():
    """Whose entropy in training holds N×K of them, and takes their mean over one process."""
    quantizer = make("lfq").train()
    quantizer(grid())
    assert not quantizer.codec.training


def test_weight_decay_spares_simvq_s_matrix():
    assert make("simvq").codec.code_transform.weight._no_weight_decay


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("setting", UNUSED)
@every
def test_a_setting_without_effect_is_refused(name, setting, tiny):
    value = {"gradient": "rotation", "kmeans_init": True, "revive_after": 7, "codebooks": 3}.get(setting, 0.5)
    config = replace(tiny, quantizer=name, **{setting: value})
    if name in users(setting):
        config.check()
        Tokenizer(config)
    else:
        with pytest.raises(UserError, match=f"{setting} is {value}, of which quantizer '{name}' makes no use"):
            config.check()


@pytest.mark.parametrize(("setting", "without"), NEEDLESS.items())
def test_a_setting_is_heeded_by_all_but_those_that_have_no_use_for_it(setting, without):
    assert {*QUANTIZERS} - {*users(setting)} == without


@every
def test_a_quantizer_by_itself_has_the_defaults_of_config(name):
    """But revives no codes, which belongs to a training run, and spreads none."""
    quantizer, config = make(name), {field.name: field.default for field in fields(Config)}
    for setting in {*QUANTIZERS[name].settings} & {"beta", "kmeans_init", "temperature", "kl_weight"}:
        assert getattr(quantizer, setting) == config[setting], setting
    assert quantizer.pass_gradient is parts.GRADIENTS[config["gradient"]]
    assert quantizer.entropy_weight == getattr(quantizer, "revive_after", 0) == 0
    if name in users("ema_decay"):
        parted = {
            "residual": lambda: quantizer.codec.layers[0]._codebook.decay,
            "product": lambda: quantizer.parts[1].ema_decay,
        }
        decay = parted[name]() if name in parted else quantizer.ema_decay
        assert decay == config["ema_decay"]


def test_every_field_of_a_quantizer_is_one_of_config():
    assert {setting for kind in QUANTIZERS.values() for setting in kind.settings} == set(UNUSED)
    assert set(UNUSED) <= {field.name for field in fields(Config)}


def test_factorised_codes_are_a_small_code_dim(tiny):
    """ViT-VQGAN's projection to few dimensions and back is the backbones' own: K·d numbers, gradients either side."""
    tokenizer = Tokenizer(replace(tiny, quantizer="l2", code_dim=2))
    assert tokenizer.quantizer.codebook.shape == (tiny.codebook_size, 2)
    x = torch.rand(2, 3, 32, 32)
    x_hat, quantized = tokenizer(x)
    assert quantized.z_q.shape == (2, 2, 4, 4)
    (x_hat.square().mean() + quantized.loss).backward()
    for parameter in (*tokenizer.encoder.parameters(), *tokenizer.decoder.parameters(), tokenizer.quantizer.codebook):
        assert parameter.grad is not None


@every
def test_float32_whatever_the_autocast(name):
    """Of tokens and codes so near one another that bfloat16 would confuse them."""
    z = (1 + 0.1 * grid()).bfloat16()
    outs = []
    for enabled in (False, True):
        quantizer = make(name)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.manual_seed(2)
            quantizer.initialise(z if enabled else z.float())
            outs.append(quantizer(z if enabled else z.float()))
    plain, out = outs
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer.lookup(out.codes).dtype == torch.float32
        quantizer.initialise(z)
    assert out.z_q.dtype == out.loss.dtype == torch.float32
    assert torch.equal(out.codes, plain.codes)
    torch.testing.assert_close(out.z_q, plain.z_q)


@every
def test_one_token(name):
    quantizer = make(name)
    quantizer.initialise(torch.randn(1, D, 1, 1))
    out = quantizer(torch.randn(1, D, 1, 1))
    assert out.codes.shape == ((1, 1, 1) if quantizer.discrete else (1, D, 1, 1))
    assert out.z_q.isfinite().all()
    assert math.isfinite(float(out.loss.detach()))


@pytest.mark.parametrize("kmeans_init", [False, True])
@pytest.mark.parametrize("name", [name for name in users("kmeans_init") if name != "product"])
def test_one_number_starts_a_codebook(name, kmeans_init):
    """One token of one component has no spread to jitter by."""
    quantizer = QUANTIZERS[name](K, 1, kmeans_init=kmeans_init)
    quantizer.initialise(torch.randn(1, 1, 1, 1))
    assert quantizer.lookup(torch.arange(K).view(1, 1, K)).isfinite().all()


@pytest.mark.parametrize("name", [*(name for name in users("revive_after") if name != "product"), "simvq"])
def test_one_code(name):
    quantizer = QUANTIZERS[name](1, D)
    out = quantizer(torch.randn(1, D, 1, 1))
    assert out.codes.tolist() == [[[0]]]
    assert math.isfinite(float(out.loss.detach()))


def test_standard_codebook_learns_without_commitment():
    quantizer = StandardQuantizer(1, D, beta=0.0)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    z = grid()
    for _ in range(40):
        optimizer.zero_grad()
        quantizer(z).loss.backward()
        optimizer.step()
    torch.testing.assert_close(quantizer.codebook[0].detach(), z.mean((0, 2, 3)), atol=1e-3, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsq", "lfq", "simvq"])
def test_codes_stay_in_use_without_revival(name, tmp_path):
    """What the three promise. On the photographs that it was trained on; 600 steps of seeds 0 and 1 gave 0.96 to 1.00,
    150 steps as little as 0.5. Elsewhere usage is lower for every quantizer: fewer images, other content."""
    settings = {"steps": 600, "lpips_weight": 0.0, "device": "cpu", "precision": "fp32"}
    config = make_config("cnn", "smoke", quantizer=name, **settings).resolved()
    images = load(config.data, config.image_size).train
    tokenizer, _ = train(config, images, tmp_path)
    histogram = CodeHistogram(config.codebook_size)
    for x in eval_batches(images, 64):
        histogram.update(tokenizer.encode(from_uint8(x)))
    assert histogram.usage() > 0.9


# ------------------------------------------------------------------------------------------------------- many processes


class Processes:
    """Two processes as two threads, whose collective calls meet at a barrier."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.barrier, self.rank, self.shared = threading.Barrier(2, timeout=20), threading.local(), [None, None]
        self.calls = [0, 0]
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_rank", lambda: self.rank.value)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.copy_(self.gathered(tensor)[src]))

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.calls[self.rank.value] += 1
        self.shared[self.rank.value] = tensor.clone()
        self.barrier.wait()
        found = list(self.shared)
        self.barrier.wait()
        return found

    def all_reduce(self, tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> None:
        assert op == dist.ReduceOp.SUM
        tensor.copy_(sum(self.gathered(tensor)))

    def run(self, work: Callable) -> list:
        """``work(rank)`` of both."""

        def process(rank: int):
            self.rank.value = rank
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()  # the other would wait for this one
                raise

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(process, range(2)))


@pytest.fixture
def processes(monkeypatch) -> Processes:
    return Processes(monkeypatch)


def trained(name: str, z: torch.Tensor, **options):
    """A quantizer after a few steps on ``z`` and its neighbourhood."""
    quantizer = QUANTIZERS[name](K, D, **options)
    start = torch.linspace(-2, 2, K)[:, None] * torch.arange(1, D + 1).roll(1)
    with torch.no_grad():
        if name == "residual":
            for number, stage in enumerate(quantizer.codec.layers):
                for codes in (stage._codebook.embed, stage._codebook.embed_avg):
                    codes.copy_(start[number::4])
        else:
            quantizer.replace(torch.ones(K, dtype=torch.bool), start)
    for step in range(4):
        quantizer(z + step / 4)
    return quantizer


@pytest.mark.parametrize("name", ["standard", "l2", "ema", "ema_l2", "residual"])
def test_two_processes_are_one_with_the_whole_batch(name, monkeypatch):
    """Running sums, idle times and the codebook's moves, of half a batch each (bug 5: synchronisation)."""
    z = grid(batch=6)
    options = {"ema_decay": 0.8} if name in users("ema_decay") else {}
    whole = trained(name, z, **options).state_dict()
    with monkeypatch.context() as patch:
        states = Processes(patch).run(lambda rank: trained(name, z[3 * rank :][:3], **options).state_dict())
    assert whole.keys() == states[0].keys()
    for state in states:
        for key, value in whole.items():
            torch.testing.assert_close(state[key], value, msg=key, atol=1e-5, rtol=1e-4)


@with_codebook
def test_two_processes_revive_the_same_codes_at_the_same_places(name, processes):
    """Each could only offer its own tokens (bug 5: synchronisation)."""
    z = grid(batch=6) + 3
    z[3:] += 5  # the second's are elsewhere

    def work(rank: int) -> dict:
        quantizer = trained(name, z[3 * rank :][:3], revive_after=1)
        quantizer.idle.fill_(K)
        quantizer(z[3 * rank :][:3])
        return quantizer.state_dict()

    first, second = processes.run(work)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_mean_of_two_processes_entropy_penalties_and_of_their_gradients_is_that_of_the_whole_batch(monkeypatch):
    x, e = torch.randn(60, D), torch.randn(K, D)

    def of(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = tokens.clone().requires_grad_()
        penalty = entropy_penalty(tokens, e, torch.tensor(0.5))
        return penalty.detach(), torch.autograd.grad(penalty, tokens)[0]

    value, gradient = of(x)
    with monkeypatch.context() as patch:
        values, gradients = zip(*Processes(patch).run(lambda rank: of(x[30 * rank :][:30])), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), value)
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient)


def _two_processes(rank: int, folder: str, name: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    options = {"revive_after": 1} if name in users("revive_after") else {}
    quantizer = QUANTIZERS[name](K, D, **options)
    z = torch.randn(2, D, 4, 4, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(rank)  # what each would revive differs
    for _ in range(3):
        quantizer(z[rank : rank + 1])
    x, e = torch.randn(2, 30, D, generator=torch.Generator().manual_seed(6)), z[0].flatten(1).T
    mine = x[rank].requires_grad_()
    entropy_penalty(mine, e, torch.tensor(0.5)).backward()
    torch.save((quantizer.state_dict(), mine.grad), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ema", "ema_l2", "residual"])
def test_processes_share_their_statistics(tmp_path, name):
    """Each process sees its own half of the batch; their codebooks must stay one (bug 5: synchronisation), and the mean
    gradient of the entropy penalty must be that of the whole batch."""
    mp.spawn(_two_processes, args=(str(tmp_path), name), nprocs=2)
    states, gradients = zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)), strict=True)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    z = torch.randn(2, D, 4, 4, generator=torch.Generator().manual_seed(5))
    x = torch.randn(2, 30, D, generator=torch.Generator().manual_seed(6)).flatten(0, 1).requires_grad_()
    entropy_penalty(x, z[0].flatten(1).T, torch.tensor(0.5)).backward()
    torch.testing.assert_close(torch.cat(gradients) / 2, x.grad)


# ------------------------------------------------------------------------------------------------- choices, bits, parts


def test_ibq_sees_the_nearest_code_and_its_gradient_is_that_of_all_of_them_by_nearness():
    """Value: the code. Gradient: of Σ p_k e_k for the tokens, with the codes' own vectors held, and for the chosen code
    its own on top; losses as in standard."""
    quantizer, z, weights = make("ibq", beta=0.3), grid().requires_grad_(), torch.randn(48, D)
    out = quantizer(z)
    e, x = quantizer.codebook.detach().double(), flat(z).detach().double().requires_grad_()
    squares = torch.cdist(x, e).square()
    assert torch.equal(out.codes.flatten(), squares.argmin(1))
    variance = squares.amin(1).mean().detach() / D
    p = (-squares / (2 * variance)).softmax(1)
    nearest_ones = e[out.codes.flatten()]
    ((p @ e) * weights.double()).sum().backward()
    by_choice = torch.autograd.grad((flat(out.z_q) * weights).sum(), z, retain_graph=True)[0]
    torch.testing.assert_close(flat(by_choice), x.grad.float(), atol=1e-4, rtol=1e-3)
    loss = (1 + 0.3) * (x.detach() - nearest_ones).square().mean()
    torch.testing.assert_close(out.loss.double(), loss, check_dtype=False)


def test_ibq_s_gradient_reaches_every_code_and_standard_s_does_not():
    reached = {}
    for name in ("ibq", "standard"):
        quantizer = make(name)
        quantizer.initialise(3 * grid(batch=6))
        out = quantizer(grid(batch=1, side=2).requires_grad_())  # four tokens
        out.z_q.square().sum().backward()
        grads = quantizer.codebook.grad
        reached[name] = 0 if grads is None else int((grads.abs().sum(1) > 0).sum())
    assert reached == {"ibq": K, "standard": 0}


def test_bsq_s_codes_are_the_sign_patterns_on_the_unit_sphere():
    quantizer = make("bsq").eval()
    out = quantizer(grid())
    signs = quantizer.project_in(flat(grid())).sign()
    torch.testing.assert_close(flat(out.z_q), quantizer.project_out(signs / 2))  # 1/√4: of length 1
    bits = (signs > 0).long()
    assert torch.equal(out.codes.flatten(), (bits * torch.tensor([1, 2, 4, 8])).sum(1))


def test_bsq_passes_the_gradient_straight_through_to_the_sphere():
    quantizer, z, weights = make("bsq"), grid().requires_grad_(), torch.randn(48, D)
    (flat(quantizer(z).z_q) * weights).sum().backward()
    x = flat(grid()).requires_grad_()
    (F.normalize(quantizer.project_in(x), dim=1) * (weights @ quantizer.project_out.weight)).sum().backward()
    torch.testing.assert_close(flat(z.grad), x.grad)


def test_the_entropy_of_bits_is_that_of_all_codes_when_bits_are_independent():
    """E[H] is exact: the bits of a code, given its token, are independent. Value and gradient in float64; at its least
    when sure and even, 0 when all tokens are alike."""
    torch.manual_seed(0)
    x, level, variance = torch.randn(30, 3, dtype=torch.float64, requires_grad=True), 0.6, torch.tensor(0.4)
    patterns = torch.cartesian_prod(*[torch.tensor([-level, level], dtype=torch.float64)] * 3)
    p = (-torch.cdist(x, patterns).square() / (2 * variance.double())).softmax(1)
    one = (p[:, :, None] * (patterns > 0)).sum(1).mean(0)
    expected = -(p * p.log()).sum(1).mean() + (one * one.log() + (1 - one) * (1 - one).log()).sum()
    found = bit_entropy(x, level, variance.double())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (found, expected)))
    even = 100 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert bit_entropy(even, 0.5, variance).item() == pytest.approx(-2 * math.log(2), abs=1e-4)
    assert bit_entropy(torch.ones(4, 2), 0.5, variance).item() == pytest.approx(0, abs=1e-5)


def test_product_codes_decode_by_parts():
    """Each half of z by a quantizer of its own, as ema has it; the code writes both indices."""
    quantizer = make("product", beta=0.3)
    quantizer.initialise(grid(batch=6))
    halves = [copy.deepcopy(part) for part in quantizer.parts]
    out = quantizer(grid())
    assert [part.code_dim for part in halves] == [3, 2]
    first, second = halves[0](grid()[:, :3]), halves[1](grid()[:, 3:])
    assert torch.equal(out.z_q, torch.cat([first.z_q, second.z_q], 1))
    assert torch.equal(out.codes, 4 * first.codes + second.codes)
    torch.testing.assert_close(out.loss, 0.6 * first.loss + 0.4 * second.loss)
    torch.testing.assert_close(out.distortion, (flat(grid()) - flat(out.z_q)).square().mean())
    assert all(
        torch.equal(value, other.state_dict()[key])
        for part, other in zip(quantizer.parts, halves, strict=True)
        for key, value in part.state_dict().items()
    )


@pytest.mark.parametrize("name", ["residual", "product"])
def test_three_codebooks_write_one_code(name):
    quantizer = QUANTIZERS[name](8, 6, codebooks=3).eval()
    assert quantizer.sizes == (2, 2, 2)
    z = torch.randn(2, 6, 4, 4)
    quantizer.initialise(z)
    out = quantizer(z)
    torch.testing.assert_close(quantizer.lookup(out.codes), out.z_q, atol=1e-6, rtol=1e-6)
    assert set(out.codes.flatten().tolist()) <= set(range(8))
    every_code = quantizer.lookup(torch.arange(8).view(1, 1, 8))[0, :, 0].T
    assert len(every_code.unique(dim=0)) == 8


def test_more_codebooks_than_components_are_refused(tiny):
    with pytest.raises(UserError, match="code_dim is 2; quantizer 'product' needs 3, a component per codebook"):
        replace(tiny, quantizer="product", code_dim=2, codebooks=3, codebook_size=8).check()


def test_gumbel_s_divergence_from_the_uniform_is_in_nats_per_token():
    outs = []
    for weight in (0.0, 0.5):
        quantizer = make("gumbel", uniform_weight=weight)
        torch.manual_seed(3)
        outs.append(quantizer(grid()))
    squares = torch.cdist(flat(grid()).double(), quantizer.codebook.detach().double()).square()
    p = (-squares / (2 * squares.amin(1).mean() / D)).softmax(1)
    expected = (p * (p * K).log()).sum(1).mean()
    torch.testing.assert_close((outs[1].loss - outs[0].loss).double(), 0.5 * expected, atol=1e-4, rtol=1e-4)
    assert _from_uniform(torch.zeros(3, 7)).item() == pytest.approx(0, abs=1e-6)


def test_gumbel_s_temperature_falls_geometrically_to_its_end(tiny):
    quantizer = make("gumbel", temperature=2.0, temperature_end=0.5)
    found = []
    for done in (0.0, 0.5, 1.0):
        quantizer.anneal(done)
        found.append(quantizer.temperature)
    assert found == pytest.approx([2.0, 1.0, 0.5])
    steady = make("gumbel", temperature=2.0)
    steady.anneal(0.7)
    assert steady.temperature == 2.0
