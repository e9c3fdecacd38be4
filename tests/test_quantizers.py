"""Properties that every quantizer shares, and the bugs that public quantizers shipped."""

import math

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import quantizers
from bench.quantizers import QUANTIZERS, EMAQuantizer, StandardQuantizer, nearest

K, D = 12, 5
every = pytest.mark.parametrize("name", QUANTIZERS)


def make(name: str, **options):
    torch.manual_seed(0)
    return QUANTIZERS[name](K, D, **options)


def grid(batch: int = 3, side: int = 4) -> torch.Tensor:
    return torch.randn(batch, D, side, side, generator=torch.Generator().manual_seed(1))


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 70), k=st.integers(1, 40), d=st.integers(1, 9), seed=st.integers(0, 99))
def test_nearest_is_brute_force(n, k, d, seed):
    generator = torch.Generator().manual_seed(seed)
    x, e = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    distances = torch.cdist(x.double(), e.double())
    chosen = distances.gather(1, nearest(x, e)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, atol=1e-5, rtol=1e-5)


def test_nearest_never_holds_all_distances(monkeypatch):
    x, e = torch.randn(1000, D), torch.randn(64, D)
    whole = nearest(x, e)
    sizes = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: sizes.append(addmm(*a, **k)) or sizes[-1])
    monkeypatch.setitem(quantizers.CHUNK_BYTES, "cpu", 4 * 64 * 10)
    assert torch.equal(nearest(x, e), whole)
    assert len(sizes) == 100
    assert max(block.numel() for block in sizes) <= 640


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
def test_lookup_of_the_codes_is_the_forward_path(name):
    """Decoding from indices must not differ from training's own path (bug 6)."""
    quantizer = make(name).eval()
    out = quantizer(grid())
    torch.testing.assert_close(quantizer.lookup(out.codes), out.z_q, atol=1e-6, rtol=1e-6)


@every
def test_output_depends_on_the_codes_alone(name):
    """Nudging z within its cell must not change what the decoder sees (bug 3)."""
    quantizer = make(name).eval()
    z = grid()
    first, second = quantizer(z), quantizer(z + 1e-4)
    assert torch.equal(first.codes, second.codes)
    torch.testing.assert_close(first.z_q, second.z_q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["standard", "ema"])
def test_gradient_passes_straight_through(name):
    z, weights = grid().requires_grad_(), torch.randn(3, D, 4, 4)
    (make(name)(z).z_q * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_l2_gradient_passes_straight_through_the_normalisation():
    z, weights = grid().requires_grad_(), torch.randn(3, D, 4, 4)
    (make("l2")(z).z_q * weights).sum().backward()
    expected = torch.autograd.grad((F.normalize(z, dim=1) * weights).sum(), z)[0]
    torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize("name", ["standard", "l2"])
def test_codebook_gradient_does_not_depend_on_beta(name):
    """β belongs to the commitment term, not to the codebook's (bug 1)."""
    gradients = []
    for beta in (0.0, 0.25, 4.0):
        quantizer = make(name, beta=beta)
        quantizer(grid()).loss.backward()
        gradients.append(quantizer.codebook.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@every
def test_commitment_gradient_is_proportional_to_beta(name):
    """β reaches the loss (bug 2), and pulls the encoder only as far as it says."""
    gradients = []
    for beta in (0.5, 2.0):
        z = grid().requires_grad_()
        make(name, beta=beta)(z).loss.backward()
        gradients.append(z.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], 4 * gradients[0])


def test_standard_loss_is_equation_3():
    quantizer, z = make("standard", beta=0.3), grid()
    out = quantizer(z)
    distance = (z.movedim(1, -1) - quantizer.codebook[out.codes]).square().mean()
    torch.testing.assert_close(out.loss, 1.3 * distance)
    torch.testing.assert_close(out.distortion, distance)


def test_l2_ignores_the_norms():
    quantizer = make("l2").eval()
    z = grid()
    scaled = quantizer(z * torch.rand(3, 1, 4, 4).add(0.1))
    assert torch.equal(scaled.codes, quantizer(z).codes)
    torch.testing.assert_close(scaled.z_q.norm(dim=1), torch.ones(3, 4, 4))


@every
def test_eval_mode_changes_nothing(name):
    """Statistics that move during evaluation leak the validation set into the codebook (bug 5)."""
    quantizer = make(name, revive_after=1).eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    for _ in range(3):
        quantizer(grid())
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), key


@every
def test_training_mode_revives_dead_codes_and_they_stay(name):
    """A revived code sits on a token, and is still there after steps that do not choose it (bug 5: running sums)."""
    quantizer = make(name, revive_after=8)  # 96 tokens: two steps of 48
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
    tokens = quantizer.normalise(z.movedim(1, -1).reshape(-1, D))
    revived = quantizer.normalise(quantizer.codebook.detach())[1:].clone()
    if name != "ema":  # the moving average has already taken its first step away from the token
        assert torch.cdist(revived, tokens).min(1).values.max() < 5e-3  # what cdist resolves
    assert quantizer(z).codes.unique().numel() > K // 2
    revived = quantizer.normalise(quantizer.codebook.detach())[1:].clone()
    quantizer.revive_after = 0
    elsewhere = quantizer.codebook.detach()[:1].T.reshape(1, D, 1, 1).clone()
    for _ in range(20):
        quantizer(elsewhere)
    torch.testing.assert_close(quantizer.normalise(quantizer.codebook.detach())[1:], revived, atol=2e-3, rtol=2e-2)


@every
def test_patience_is_counted_in_tokens(name):
    """With one code per image a step has fewer tokens than there are codes: unused in a step is not dead."""
    quantizer = make(name, revive_after=10)
    for step in range(1, 60):
        before = quantizer.codebook.detach().clone()
        quantizer(3 + torch.zeros(2, D, 1, 1))  # one code takes all: 2 of the 120 tokens that a dead code must miss
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


def test_ema_first_step_has_its_closed_form():
    quantizer, z = make("ema", decay=0.9), grid()
    before = quantizer.codebook.clone()
    codes = quantizer(z).codes.flatten()
    tokens = z.movedim(1, -1).reshape(-1, D)
    k = int(codes.mode().values)
    mine = tokens[codes == k]
    expected = (0.9 * before[k] + 0.1 * mine.sum(0)) / (0.9 + 0.1 * len(mine))
    torch.testing.assert_close(quantizer.codebook[k], expected, atol=1e-4, rtol=1e-4)


def test_ema_converges_to_the_mean_of_its_cell():
    quantizer = EMAQuantizer(1, D, decay=0.5)
    z = grid()
    for _ in range(40):
        quantizer(z)
    torch.testing.assert_close(quantizer.codebook[0], z.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)


@every
def test_codebook_starts_at_tokens(name):
    quantizer = make(name)
    z = grid(batch=4)
    quantizer.initialise(z)
    tokens = quantizer.normalise(z.movedim(1, -1).reshape(-1, D))
    codebook = quantizer.normalise(quantizer.codebook.detach())
    assert torch.cdist(codebook, tokens).min(1).values.max() < 5e-3
    assert codebook.unique(dim=0).shape[0] == K
    few = make(name)
    few.initialise(grid(batch=1, side=2))  # 4 tokens for 12 codes
    assert few.codebook.detach().unique(dim=0).shape[0] == K


@every
def test_float32_whatever_the_autocast(name):
    z = grid().bfloat16()
    plain = make(name)(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = make(name)(z)
    assert out.z_q.dtype == out.loss.dtype == torch.float32
    assert torch.equal(out.codes, plain.codes)
    torch.testing.assert_close(out.z_q, plain.z_q)


@every
def test_one_code_and_one_token(name):
    out = QUANTIZERS[name](1, D)(torch.randn(1, D, 1, 1))
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


def _two_processes(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizer = EMAQuantizer(K, D, revive_after=1)
    z = torch.randn(2, D, 4, 4, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(rank)  # what each would revive differs
    for _ in range(3):
        quantizer(z[rank : rank + 1])
    torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_their_statistics(tmp_path):
    """Each process sees its own half of the batch; their codebooks must stay one (bug 5: synchronisation)."""
    mp.spawn(_two_processes, args=(str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
