"""Priors: causal, complete in what they see, equal step by step and at once, right about known distributions."""

import pytest
import torch
from torch.nn import functional as F

from bench.priors import LEARNED, PRIORS

K, SIDE = 7, 4


def build(name: str, grid_size: int = SIDE, classes: int = 0, width: int = 24, depth: int = 2):
    """A prior in eval mode whose every parameter matters: what starts as zero is random here."""
    torch.manual_seed(0)
    if name not in LEARNED:
        prior = PRIORS[name](K, grid_size, classes)
        prior.fit(torch.randint(K, (50, grid_size, grid_size)))
        return prior
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
