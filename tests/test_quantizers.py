"""Properties that every quantizer shares, and the bugs that public quantizers shipped."""

import math
import sys
from dataclasses import fields, replace

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import codebook as parts
from bench.adapters import fsq_levels, residual_sizes
from bench.codebook import entropy_penalty, kmeans, nearest, rotate
from bench.config import Config, make_config
from bench.data import eval_batches, load
from bench.files import UserError
from bench.metrics import CodeHistogram, from_uint8
from bench.quantizers import QUANTIZERS, StandardQuantizer
from bench.tokenizer import Tokenizer
from bench.train import train

K, D = 16, 5
UNUSED = {  # settings that cannot apply to all, and why some have no use for them
    "beta": "fsq bounds its components, there is nothing to commit",
    "revive_after": "fsq and lfq have no codebook, simvq's is frozen, residual's two are short",
    "kmeans_init": "fsq and lfq have no codebook",
    "entropy_weight": "fsq and residual get by without",
    "gradient": "gumbel's is the soft choice's; fsq and lfq round, where the direction of a whole vector means nothing",
    "ema_decay": "for moving averages",
    "temperature": "for the soft choice",
}


def users(setting: str) -> list[str]:
    """Quantizers that heed a field of Config."""
    return [name for name, kind in QUANTIZERS.items() if setting in kind.settings]


def having(setting: str):
    """Runs a test for each of them."""
    return pytest.mark.parametrize("name", users(setting))


every = pytest.mark.parametrize("name", QUANTIZERS)
with_codebook = having("revive_after")
SPHERICAL = ("l2", "ema_l2")


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


@every
def test_shapes_ranges_and_types(name):
    out = make(name)(grid())
    assert out.z_q.shape == (3, D, 4, 4)
    assert out.z_q.dtype == torch.float32
    assert out.codes.shape == (3, 4, 4)
    assert out.codes.dtype == torch.int64
    assert 0 <= out.codes.min() <= out.codes.max() < K
    assert out.loss.ndim == out.distortion.ndim == 0


@every
@pytest.mark.parametrize("started", [False, True])
def test_lookup_of_the_codes_is_the_forward_path(name, started):
    """Decoding from indices must not differ from training's own path (bug 6)."""
    quantizer = make(name).eval()
    if started:
        quantizer.initialise(grid(batch=6))
    out = quantizer(grid())
    torch.testing.assert_close(quantizer.lookup(out.codes), out.z_q, atol=1e-6, rtol=1e-6)


@every
def test_in_training_the_decoder_sees_codes_too(name):
    """What it learns on must be what it is scored on: vectors of the codebook, as it was before this step."""
    quantizer, z = make(name), grid()
    quantizer.initialise(grid(batch=6))
    before = everything(quantizer)
    out = quantizer(z)
    torch.testing.assert_close(flat(out.z_q.detach()), before[out.codes.flatten()], atol=1e-6, rtol=1e-5)


@every
def test_there_are_exactly_k_codes(name):
    """Bits are counted as log2 K: K different vectors, and no index beyond (product codebooks included)."""
    quantizer = make(name).eval()
    quantizer.initialise(grid(batch=20))
    assert everything(quantizer).unique(dim=0).shape[0] == K
    codes = quantizer(4 * grid(batch=200)).codes
    assert set(codes.flatten().tolist()) == set(range(K))


@every
def test_output_depends_on_the_codes_alone(name):
    """Nudging z within its cell must not change what the decoder sees (bug 3)."""
    quantizer = make(name).eval()
    z = grid()
    first, second = quantizer(z), quantizer(z + 1e-4)
    assert torch.equal(first.codes, second.codes)
    torch.testing.assert_close(first.z_q, second.z_q, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------------- gradient


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


@pytest.mark.parametrize("name", ["standard", "simvq"])
def test_loss_is_equation_3(name):
    quantizer, z = make(name, beta=0.3), grid()
    out = quantizer(z)
    distance = (z - quantizer.lookup(out.codes)).square().mean()
    torch.testing.assert_close(out.loss, 1.3 * distance)
    torch.testing.assert_close(out.distortion, distance)


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
    quantizer(grid())
    torch.manual_seed(9)
    other = QUANTIZERS[name](K, D, **options)
    other.load_state_dict(quantizer.state_dict())
    for step in range(3):
        outs = []
        for one in (quantizer, other):
            torch.manual_seed(step)
            outs.append(one(grid() + step))
        for a, b in zip(*outs, strict=True):
            assert torch.equal(a, b)
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


@given(st.integers(2, 70000))
def test_products_are_exact(codebook_size):
    levels, sizes = fsq_levels(codebook_size), residual_sizes(codebook_size)
    assert not levels or math.prod(levels) == codebook_size
    assert math.prod(sizes) == codebook_size
    assert sizes[0] >= sizes[1] >= 1


@pytest.mark.parametrize(
    ("name", "size", "fix"),
    [
        ("fsq", 509, "507"),
        ("fsq", 2, "3"),
        ("lfq", 500, "512"),
        ("lfq", 1, "2"),
        ("residual", 509, "508"),
        ("residual", 2, "4"),
    ],
)
def test_a_codebook_that_cannot_be_is_refused_with_the_nearest_that_can(name, size, fix, tiny):
    for attempt in (
        lambda: replace(tiny, quantizer=name, codebook_size=size).check(),
        lambda: QUANTIZERS[name](size, D),
    ):
        with pytest.raises(UserError, match=f"codebook_size is {size}; .*{name}.* such as {fix}$"):
            attempt()
    replace(tiny, quantizer=name, codebook_size=int(fix)).check()


@pytest.mark.parametrize("name", ["fsq", "lfq", "simvq", "residual"])
def test_without_the_package_the_command_to_install_it_is_named(name, monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(UserError, match="pip install 'vector-quantize-pytorch"):
        replace(tiny, quantizer=name).check()
    with pytest.raises(UserError, match="pip install 'vector-quantize-pytorch"):
        QUANTIZERS[name](K, D)
    replace(tiny, quantizer="ema").check()


def test_lfq_leaves_no_soft_choices_to_the_package():
    """Whose entropy in training holds N×K of them, and takes their mean over one process."""
    assert not make("lfq").train().codec.training


def test_weight_decay_spares_simvq_s_matrix():
    assert make("simvq").codec.code_transform.weight._no_weight_decay


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("setting", UNUSED)
@every
def test_a_setting_without_effect_is_refused(name, setting, tiny):
    value = {"gradient": "rotation", "kmeans_init": True, "revive_after": 7}.get(setting, 0.5)
    config = replace(tiny, quantizer=name, **{setting: value})
    if name in users(setting):
        config.check()
        Tokenizer(config)
    else:
        with pytest.raises(UserError, match=f"{setting} is {value}, of which quantizer '{name}' makes no use"):
            config.check()


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
    z = grid().bfloat16()
    plain = make(name)(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        quantizer = make(name)
        out = quantizer(z)
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
    assert out.codes.shape == (1, 1, 1)
    assert out.z_q.isfinite().all()
    assert math.isfinite(float(out.loss.detach()))


@pytest.mark.parametrize("name", [*users("revive_after"), "simvq"])
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
    config = make_config("cnn", "smoke", quantizer=name, steps=600, lpips_weight=0.0, device="cpu").resolved()
    images = load(config.data, config.image_size).train
    tokenizer, _ = train(config, images, tmp_path)
    histogram = CodeHistogram(config.codebook_size)
    for x in eval_batches(images, 64):
        histogram.update(tokenizer.encode(from_uint8(x)))
    assert histogram.usage() > 0.9


# ------------------------------------------------------------------------------------------------------- many processes


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
