"""Priors: causal, complete in what they see, equal step by step and at once, right about known distributions."""

import contextlib
import itertools
import json
import math
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from bench.codes import Codes
from bench.files import UserError
from bench.generate import rate
from bench.prior_config import SAMPLING, PriorConfig
from bench.priors import LEARNED, PRIORS
from bench.train import Interrupted
from bench.train_prior import build as build_prior
from bench.train_prior import train_prior

K, SIDE = 7, 4
NO_LABELS = ("0", (), None, None)  # tokenizer, classes, labels


def build(name: str, grid_size: int = SIDE, classes: int = 0, width: int = 24, depth: int = 2):
    """A prior in eval mode whose every parameter matters: what starts as zero is random here."""
    torch.manual_seed(0)
    if name not in LEARNED:
        prior = PRIORS[name](K, grid_size, classes)
        prior.fit(torch.randint(K, (50, grid_size, grid_size)))
        return prior.eval()
    prior = LEARNED[name](K, grid_size, width, depth, 0.1, classes)
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return prior.eval()


def grids(count: int, grid_size: int = SIDE) -> torch.Tensor:
    return torch.randint(K, (count, grid_size, grid_size), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LEARNED)
def test_each_position_sees_all_before_it_and_nothing_else(name):
    """Gradients of every position's logits on every input: none from itself and later ones (bug 8), and one from every
    earlier one, so there is no blind spot."""
    prior = build(name, depth=4)
    table = prior.embedding
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, codes):
            embedded = F.embedding(codes, table.weight).detach().requires_grad_()
            seen["x"] = embedded
            return embedded

    prior.embedding = Spy()
    logits = prior.logits(grids(1)).flatten(1, 2)
    x = seen["x"]
    for position in range(SIDE**2):
        weights = torch.randn(K, generator=torch.Generator().manual_seed(position))
        (gradient,) = torch.autograd.grad(logits[0, position] @ weights, x, retain_graph=True)
        reach = gradient.abs().sum(-1).flatten()
        reach = F.pad(reach, (0, SIDE**2 - len(reach)))  # sequences do not embed the last code
        assert (reach[:position] > 0).all(), f"{name} is blind at {position}"
        assert not reach[position:].any(), f"{name} sees the future at {position}"


@pytest.mark.parametrize("grid_size", [8, 16])
def test_pixelcnn_is_as_deep_as_the_grid_needs(grid_size):
    """The last position sees every other, at the depth that it has unless told otherwise."""
    prior = build_prior(PriorConfig("none", "pixelcnn", parameters=100_000), K, grid_size, 0).eval()
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, grid_size, grid_size, prior.position.shape[0], requires_grad=True)
    prior.embedding = torch.nn.Module()
    prior.embedding.forward = lambda codes: x
    logits = prior.logits(torch.zeros(1, grid_size, grid_size, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(logits[0, -1, -1].sum(), x)
    assert (gradient.abs().sum(-1).flatten() > 0).tolist() == [True] * (grid_size**2 - 1) + [False]


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", PRIORS)
def test_step_by_step_equals_at_once(name, classes):
    prior, codes = build(name, classes=classes), grids(5)
    labels = torch.tensor([0, 1, 2, 2, 1]) if classes else None
    with torch.no_grad():
        whole = prior.logits(codes, labels).flatten(1, 2)
        state, before = prior.start(labels, len(codes)), None
        for position in range(SIDE**2):
            logits, state = prior.step(position, before, state)
            torch.testing.assert_close(logits, whole[:, position], rtol=1e-5, atol=1e-5)
            before = codes.flatten(1)[:, position]


@pytest.mark.parametrize("name", PRIORS)
def test_nll_is_a_distribution_and_sampling_follows_it(name):
    """On a grid of two codes: probabilities of all K² × … grids sum to one, and samples come as often as they say."""
    torch.manual_seed(0)
    k, prior = 3, None
    if name in LEARNED:
        prior = LEARNED[name](k, 2, 16, 1, 0.0, 0)
        torch.nn.init.normal_(prior.head.weight, std=0.4)
    else:
        prior = PRIORS[name](k, 2)
        prior.fit(torch.randint(k, (20, 2, 2)))
    prior.eval()
    grids = torch.tensor(list(itertools.product(range(k), repeat=4))).view(-1, 2, 2)
    with torch.no_grad():
        p = prior.nll(grids).sum((1, 2)).neg().exp()
    assert p.sum() == pytest.approx(1, abs=1e-5)
    drawn = prior.sample(20_000, torch.Generator().manual_seed(0)).flatten(1)
    counts = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81)
    chi_squared = ((counts - 20_000 * p) ** 2 / (20_000 * p)).sum()
    assert chi_squared < stats.chi2.ppf(0.9999, 80)


@pytest.mark.parametrize("name", PRIORS)
def test_sampling_is_deterministic_and_obeys_temperature_and_top_k(name):
    prior = build(name)

    def draw(seed, **options):
        return prior.sample(8, torch.Generator().manual_seed(seed), **options)

    assert draw(0).equal(draw(0))
    assert not draw(0).equal(draw(1))
    assert draw(0, top_k=1).equal(draw(1, top_k=1))
    if name in LEARNED:  # counts may be tied
        assert draw(0, temperature=1e-4).equal(draw(1, top_k=1))
    assert draw(0, top_k=K).equal(draw(0, top_k=100))
    assert draw(0, top_k=K).equal(draw(0))
    greedy = draw(0, top_k=1)
    logits = prior.logits(greedy)
    torch.testing.assert_close(logits.gather(-1, greedy[..., None])[..., 0], logits.amax(-1))


@pytest.mark.parametrize("name", PRIORS)
def test_one_code_per_image_and_one_code_in_all(name):
    prior = build(name, grid_size=1)
    assert prior.nll(grids(5, 1)).shape == (5, 1, 1)
    assert prior.sample(3, torch.Generator()).shape == (3, 1, 1)
    lone = PRIORS[name](1, 2, *((8, 1, 0.0) if name in LEARNED else ())).eval()
    assert not lone.nll(torch.zeros(2, 2, 2, dtype=torch.int64)).any()


@pytest.mark.parametrize("name", LEARNED)
def test_labels_matter(name):
    prior, codes = build(name, classes=2), grids(4)
    with torch.no_grad():
        one, other = (prior.nll(codes, torch.full((4,), label)) for label in (0, 1))
    assert (one[:, 0, 0] != other[:, 0, 0]).all()


@pytest.mark.parametrize("name", PRIORS)
def test_what_does_not_fit_is_refused_in_one_sentence(name):
    prior = build(name)
    with pytest.raises(UserError, match="grids of 8×8 and this prior is for 4×4"):
        prior.nll(grids(2, 8))
    with pytest.raises(UserError, match=f"this prior knows {K}; they are of another tokenizer"):
        prior.nll(grids(2) + 1)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="temperature is"):
            prior.sample(1, torch.Generator(), temperature)
    with pytest.raises(UserError, match="top_k is -1"):
        prior.sample(1, torch.Generator(), top_k=-1)
    with pytest.raises(UserError, match="0 classes; labels were given"):
        prior.nll(grids(2), torch.zeros(2, dtype=torch.int64))
    conditional = build(name, classes=2)
    with pytest.raises(UserError, match="2 classes; labels were not given"):
        conditional.sample(2, torch.Generator())
    with pytest.raises(UserError, match="2 labels from 0 to 1"):
        conditional.nll(grids(2), torch.tensor([0, 2]))


def test_independent_is_the_closed_form_entropy():
    """With every code seen often, the smoothed histogram's rate is the entropy of the codes' own histogram."""
    codes = torch.multinomial(torch.tensor([0.5, 0.25, 0.125, 0.125]), 40_000, replacement=True).view(-1, 2, 2)
    prior = PRIORS["independent"](4, 2)
    prior.fit(codes)
    p = torch.stack([torch.bincount(column, minlength=4) for column in codes.flatten(1).T]).double()
    p /= p.sum(1, keepdim=True)
    entropy = torch.special.entr(p).sum(1).mean()
    assert prior.nll(codes).double().mean().item() == pytest.approx(entropy.item(), rel=1e-5)
    assert entropy / math.log(2) == pytest.approx(1.75, abs=0.01)


# -- learning ---------------------------------------------------------------------------------------------------------

STATES = 8
STEPS = {"rnn": 1200}  # what lies above is a row of steps back


def markov(count: int, side: int, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """Grids whose code is, each with probability ½, the one to the left plus one or the one above plus three (mod K),
    with noise; and the exact entropy rate in bits per token."""
    noise = np.array([0.9, 0.1])
    codes = np.zeros((count, side, side), dtype=np.int64)
    bits = 0.0
    for r, c in itertools.product(range(side), repeat=2):
        p = np.full((count, STATES), 0.0)
        parents = [(codes[:, r, c - 1] + 1) % STATES] if c else []
        parents += [(codes[:, r - 1, c] + 3) % STATES] if r else []
        for parent in parents:
            p[np.arange(count), parent] += noise[0] / len(parents)
        p += noise[1] / STATES if parents else 1 / STATES
        codes[:, r, c] = (p.cumsum(1) < generator.random((count, 1))).sum(1).clip(max=STATES - 1)
        bits += -(p * np.log2(p)).sum(1).mean()
    return codes, bits / side**2


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_a_known_entropy_is_reached(name, tmp_path):
    """Within 3 % of the source's entropy on unseen grids, well below what positions on their own give."""
    generator = np.random.default_rng(0)
    train, _ = markov(20_000, 6, generator)
    val, entropy = markov(2_000, 6, generator)
    codes = Codes(train.astype(np.uint8), val.astype(np.uint8), STATES, "0", (), None, None)
    config = PriorConfig(
        "none", name, depth=2, parameters=100_000, dropout=0.0, steps=STEPS.get(name, 500), device="cpu"
    )
    prior, _ = train_prior(config.resolved(), codes, tmp_path)
    reached = rate(prior, codes.val, None, None)
    assert entropy * 0.995 < reached < entropy * 1.03
    floor = PRIORS["independent"](STATES, 6)
    floor.fit(torch.from_numpy(train))
    assert rate(floor, codes.val, None, None) > 1.3 * reached


@pytest.mark.parametrize("name", LEARNED)
def test_resumed_it_ends_bit_equal(name, tmp_path, monkeypatch):
    """Interrupted in the middle and continued (bug 14)."""
    codes = Codes(*(np.random.default_rng(i).integers(0, K, (64, 4, 4), dtype=np.uint8) for i in (0, 1)), K, *NO_LABELS)
    config = PriorConfig("none", name, depth=1, parameters=20_000, steps=8, batch_size=8, device="cpu").resolved()
    whole, _ = train_prior(config, codes, tmp_path)
    halved = tmp_path / "halved"
    halved.mkdir()

    class Stop(threading.Event):
        def is_set(self):
            rows = (halved / "history.jsonl").read_text().count("\n")
            return rows == 4

    with monkeypatch.context() as patch:
        patch.setattr("bench.train_prior.interruptible", lambda: contextlib.nullcontext(Stop()))
        with pytest.raises(Interrupted, match="stopped at step 4 of 8"):
            train_prior(config, codes, halved)
    again, _ = train_prior(config, codes, halved)
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert one.equal(other)
    assert [json.loads(row)["step"] for row in (halved / "history.jsonl").read_text().splitlines()] == [*range(1, 9)]


CHANGES = {
    **{"prior": "transformer", "depth": 2, "parameters": 40_000, "dropout": 0.5, "conditional": True, "steps": 7},
    **{"batch_size": 4, "lr": 1e-2, "warmup": 1, "weight_decay": 5.0, "grad_clip": 0.01, "weight_ema": 0.0},
    **{"precision": "bf16", "seed": 1},
}


@pytest.mark.parametrize("field", [field.name for field in fields(PriorConfig) if field.name != "device"])
def test_every_setting_changes_something(field, tmp_path):
    """Flags that are parsed and never used (bug 16): the identity always, the weights where training heeds it."""
    config = PriorConfig(
        "none", "rnn", depth=1, parameters=20_000, steps=6, batch_size=8, warmup=3, precision="fp32", device="cpu"
    )
    if field in (*SAMPLING, "tokenizer"):
        changed = replace(config, **{field: "other" if field == "tokenizer" else 9})
        assert changed.run_id() != config.run_id()
        assert changed.trains_as(config) == (field in SAMPLING)
        return
    changed = replace(config, **{field: CHANGES[field]})
    assert changed.run_id() != config.run_id()
    assert not changed.trains_as(config)
    generator = np.random.default_rng(0)
    grids = [generator.integers(0, K, (64, 4, 4), dtype=np.uint8) for _ in range(2)]
    codes = Codes(*grids, K, "0", ("a", "b"), *(generator.integers(0, 2, 64) for _ in range(2)))
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one, _ = train_prior(config.resolved(), codes, tmp_path / "one")
    other, _ = train_prior(changed.resolved(), codes, tmp_path / "other")
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() != other.keys() or any(
        value.shape != other[name].shape or not value.equal(other[name]) for name, value in one.items()
    )


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("parameters", [300_000, 1_000_000])
def test_parameters_are_matched(name, parameters):
    config = PriorConfig("none", name, parameters=parameters)
    count = sum(parameter.numel() for parameter in build_prior(config, 512, 8, 0).parameters())
    assert count == pytest.approx(parameters, rel=0.02)


def test_too_few_parameters_are_refused():
    with pytest.raises(UserError, match="cannot have 1,000 parameters within 2%; the nearest is"):
        build_prior(PriorConfig("none", "rnn", parameters=1000), 512, 8, 0)
