"""What the masked prior promises besides what test_priors.py asks of every prior: it has no order."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from bench.core.errors import UserError
from bench.priors import generate
from bench.priors.config import PriorConfig
from bench.priors.models import masked
from bench.priors.models.masked import MaskedPrior, hidden_after

K = 2
GRIDS = torch.tensor(list(itertools.product(range(K), repeat=4))).view(-1, 2, 2)  # all there are, of four codes


@pytest.fixture
def prior() -> MaskedPrior:
    """Of grids of four codes, far from uniform and from independent."""
    torch.manual_seed(0)
    made = MaskedPrior(K, (2, 2), 16, 2, 0.0, 2, unlabelled=True)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return made.eval()


def labels(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.int64)


def hide(codes: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return codes.masked_fill(hidden.view(2, 2), K)


def log_p(prior, codes: torch.Tensor, hidden: torch.Tensor, **mix) -> torch.Tensor:
    """ln p of each of four codes given those that are not ``hidden``, (B, 4)."""
    logits = prior.logits(hide(codes, hidden), labels(len(codes)))
    if guidance := mix.get("guidance"):
        free = prior.train().logits(hide(codes, hidden), labels(len(codes)) + 1)
        prior.eval()
        logits = free + guidance * (logits - free)
    return logits.log_softmax(-1).gather(3, codes[..., None]).view(-1, 4)


def orders(prior, **mix) -> torch.Tensor:
    """ln p of all grids in each of the 24 orders: (24, B)."""
    found = []
    for order in itertools.permutations(range(4)):
        hidden, total = torch.ones(4, dtype=torch.bool), 0.0
        for place in order:
            total = total + log_p(prior, GRIDS, hidden, **mix)[:, place]
            hidden[place] = False
        found.append(total)
    return torch.stack(found)


def source() -> torch.Tensor:
    """A distribution of all grids in which no code is independent of the others."""
    return torch.rand(len(GRIDS), generator=torch.Generator().manual_seed(3)).pow(2).softmax(0)


class Oracle(MaskedPrior):
    """Knows the true conditional distribution of each code of ``source``."""

    def __init__(self):
        super().__init__(K, (2, 2), 8, 1, 0.0)

    def logits(self, codes, labels=None):
        p = source()
        fits = ((codes[:, None] == GRIDS) | (codes[:, None] == K)).flatten(2).all(2)  # (B, all grids)
        ways = torch.stack([(fits * p) @ (GRIDS.flatten(1) == code).float() for code in range(K)], -1)
        return ways.log().unflatten(1, (2, 2))


def test_all_but_what_is_hidden_is_seen_by_all(prior):
    """Each code changes what is said of every other, whichever comes first; of itself too, as it is not hidden."""
    with torch.no_grad():
        before = prior.logits(GRIDS[:1], labels(1)).flatten(1, 2)
        for place in range(4):
            other = GRIDS[:1].clone().flatten()
            other[place] = 1 - other[place]
            changed = prior.logits(other.view(1, 2, 2), labels(1)).flatten(1, 2)
            assert (changed != before).any(-1).all()


def test_a_code_is_scored_without_being_seen(prior, monkeypatch):
    """What is scored is what the prior was told is hidden, and nothing else is; the rest is given as it is."""
    given, logits = [], prior.logits
    monkeypatch.setattr(prior, "logits", lambda codes, labels: given.append(codes) or logits(codes, labels))
    monkeypatch.setattr(masked, "HIDINGS", 1)
    for _ in range(9):
        scored = prior.nll(GRIDS, labels(16)) > 0
        assert (given[-1] == K).equal(scored)
        assert given[-1][~scored].equal(GRIDS[~scored])
        prior.train()  # where each hiding is another
    assert len(given) == 9


def test_a_grid_is_hidden_once_in_a_step_and_often_in_evaluation(prior, monkeypatch):
    given, logits = [], prior.logits
    monkeypatch.setattr(prior, "logits", lambda codes, labels: given.append(codes) or logits(codes, labels))
    prior.nll(GRIDS, labels(16))
    assert len(given) == masked.HIDINGS
    prior.train().nll(GRIDS, labels(16))
    assert len(given) == masked.HIDINGS + 1


@pytest.mark.parametrize("training", [False, True])
def test_nll_is_the_mean_cost_of_all_orders(prior, monkeypatch, training):
    """Σ over the grid: of many hidings the mean over the 24 orders of −Σ ln p(code | those before), without bias; of
    each of them m codes are hidden, where m is uniform."""
    with torch.no_grad():
        exact, times = -orders(prior).mean(0), 4000
        prior.train(training)
        if training:
            found = torch.stack([prior.nll(GRIDS, labels(16)).sum((1, 2)) for _ in range(times)])
            assert found.std(0).min() > 0.05  # another hiding each time
            found = found.mean(0)
        else:
            monkeypatch.setattr(masked, "HIDINGS", times)
            found = prior.nll(GRIDS, labels(16)).sum((1, 2))
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)


def test_in_evaluation_it_is_the_same_each_time_and_spread_evenly(prior):
    """Every number of hidden codes as often as any other, so that the estimate is steadier than by chance."""
    counts, logits = [], prior.logits
    prior.logits = lambda codes, labels: counts.append((codes == K).sum((1, 2))) or logits(codes, labels)
    first = prior.nll(GRIDS, labels(16))
    assert first.equal(prior.nll(GRIDS, labels(16)))
    each = torch.stack(counts[: masked.HIDINGS])
    assert all((each == m).sum(0).tolist() == [masked.HIDINGS // 4] * 16 for m in range(1, 5))


def test_the_bound_is_above_the_entropy_of_a_source_and_tight_for_who_knows_it(prior, monkeypatch):
    """Whose conditionals are the true ones pays −ln p of each grid, in any order; another pays more on average."""
    monkeypatch.setattr(masked, "HIDINGS", 4000)
    p = source()
    with torch.no_grad():
        known, other = Oracle().eval().nll(GRIDS), prior.nll(GRIDS, labels(16))
    torch.testing.assert_close(known.sum((1, 2)), -p.log(), rtol=0.05, atol=0)
    entropy = float(-(p * p.log()).sum())
    assert float((p * known.sum((1, 2))).sum()) == pytest.approx(entropy, rel=0.01)
    assert float((p * other.sum((1, 2))).sum()) > 1.05 * entropy


def compare(drawn: torch.Tensor, p: torch.Tensor) -> None:
    counts = torch.bincount(drawn.flatten(1) @ torch.tensor([8, 4, 2, 1]), minlength=16)
    assert p.sum() == pytest.approx(1, abs=1e-4)
    assert ((counts - len(drawn) * p) ** 2 / (len(drawn) * p)).sum() < stats.chi2.ppf(0.9999, 15)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_in_one_pass_codes_are_drawn_independently(prior, guidance):
    """Each from softmax(ℓ(none) + g · (ℓ(label) − ℓ(none))) with all codes hidden."""
    drawn = prior.sample(20_000, torch.Generator().manual_seed(0), 1.0, 0, labels(20_000), guidance, passes=1)
    with torch.no_grad():
        p = log_p(prior, GRIDS, torch.ones(4, dtype=torch.bool), guidance=guidance).sum(1).exp()
    compare(drawn, p)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_in_as_many_passes_as_codes_and_any_order_they_are_drawn_from_what_was_drawn_before(
    prior, monkeypatch, guidance
):
    """With so much noise that chance alone says which code is kept: the mean over all orders."""
    monkeypatch.setattr(masked, "CHOICE", 1e9)
    drawn = prior.sample(20_000, torch.Generator().manual_seed(0), 1.0, 0, labels(20_000), guidance, passes=4)
    with torch.no_grad():
        p = orders(prior, guidance=guidance).exp().mean(0)
    compare(drawn, p)


def test_without_noise_the_surest_codes_are_kept(prior, monkeypatch):
    """Of what a pass drew, those of the highest p, whether right or wrong; what is kept stays."""
    monkeypatch.setattr(masked, "CHOICE", 0.0)
    given, logits = [], prior.logits
    prior.logits = lambda codes, labels: given.append(codes) or logits(codes, labels)
    drawn = prior.sample(500, torch.Generator().manual_seed(0), labels=labels(500), passes=2)
    before, after = given
    assert (before == K).all()
    assert ((after == K).sum((1, 2)) == 2).all()
    kept = after != K
    assert drawn[kept].equal(after[kept])
    with torch.no_grad():
        p = logits(before[:1], labels(1)).softmax(-1)[0]
    surest = p.amax(-1).flatten().argmax()  # when it drew its likelier code, nothing else is surer
    likelier = (after.flatten(1)[:, surest] == p.flatten(0, 1)[surest].argmax()).float().mean()
    assert likelier == pytest.approx(float(p.max()), abs=0.06)


def test_what_was_kept_once_is_never_hidden_again(prior):
    given, logits = [torch.full((500, 2, 2), K)], prior.logits
    prior.logits = lambda codes, labels: given.append(codes) or logits(codes, labels)
    given.append(prior.sample(500, torch.Generator().manual_seed(0), labels=labels(500), passes=4))
    for before, after in itertools.pairwise(sorted(given, key=lambda codes: -(codes == K).sum())):
        assert before[before != K].equal(after[before != K])


@pytest.mark.parametrize(("passes", "tokens"), [(1, 1), (1, 64), (4, 64), (12, 64), (12, 16), (64, 64), (99, 5)])
def test_fewer_are_hidden_after_each_pass_and_none_in_the_end(passes, tokens):
    left = hidden_after(passes, tokens)
    assert len(left) == min(passes, tokens)
    assert left[-1] == 0
    assert all(after < before for before, after in itertools.pairwise([tokens, *left]))
    cosine = [int(tokens * math.cos(math.pi / 2 * (i + 1) / passes)) for i in range(len(left))]
    if passes * 4 < tokens:
        assert left == cosine


def test_sampling_is_deterministic_and_obeys_temperature_and_top_k(prior):
    def draw(seed, **options):
        return prior.sample(64, torch.Generator().manual_seed(seed), labels=labels(64), **options)

    assert draw(0).equal(draw(0))
    assert not draw(0).equal(draw(1))
    greedy = draw(0, top_k=1, passes=1)
    assert greedy.equal(draw(1, top_k=1, passes=1))
    assert greedy.equal(draw(1, temperature=1e-4, passes=1))
    with torch.no_grad():
        blind = prior.logits(torch.full((1, 2, 2), K), labels(1)).argmax(-1)
    assert (greedy == blind).all()
    assert draw(0, passes=4).equal(draw(0, passes=99))
    assert not draw(0, passes=4).equal(draw(0, passes=1))


def test_samples_are_drawn_in_the_passes_that_were_asked_for(monkeypatch):
    """And in batches whose logits fit; the labels are those of their own grids."""
    asked = []

    def sample(n, generator, temperature, top_k, given, guidance, progress, passes):
        asked.append((n, temperature, top_k, guidance, passes))
        return given.view(-1, 1, 1).expand(n, 2, 2)

    fake = SimpleNamespace(sample=sample, tokens=4, codebook_size=K)
    config = PriorConfig("t", "masked", samples=10, temperature=0.5, top_k=1, passes=3, guidance=2.0, device="cpu")
    monkeypatch.setattr(generate, "LOGITS", 4 * 4 * K * 2)  # of four grids, with a label and without
    drawn = generate.draw(fake, config, np.arange(5))
    assert asked == [(4, 0.5, 1, 2.0, 3), (4, 0.5, 1, 2.0, 3), (2, 0.5, 1, 2.0, 3)]
    expected = np.random.default_rng(0).integers(0, 5, 10)
    assert drawn[:, 0, 0].tolist() == expected.tolist()


def test_speed_is_that_of_the_passes_that_were_asked_for():
    asked = []
    prior = SimpleNamespace(classes=0, logits=lambda codes, labels: torch.zeros(1))
    prior.sample = lambda n, generator, labels, **own: asked.append(own) or torch.zeros(n, 2, 2)
    generate.speedup(prior, PriorConfig("t", "masked", passes=3, device="cpu"))
    generate.speedup(prior, PriorConfig("t", "rnn", device="cpu"))
    assert asked == [{"passes": 3}] * 2 + [{}] * 2


def test_passes_of_a_prior_that_has_none_are_refused():
    with pytest.raises(UserError, match="passes is 3, of which prior 'rnn' makes no use; leave it out"):
        PriorConfig("none", "rnn", passes=3).check()
    with pytest.raises(UserError, match="passes is 0; it must be at least 1"):
        PriorConfig("none", "masked", passes=0).check()
    PriorConfig("none", "masked", passes=3, device="cpu").check()
