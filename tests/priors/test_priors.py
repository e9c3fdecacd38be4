"""Priors: causal, complete in what they see, equal step by step and at once, right about known distributions."""

import contextlib
import itertools
import json
import math
import re
import threading
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from backbones.orders import ORDERS
from backbones.orders import order as token_order
from bench.core.errors import Diverged, Interrupted, UserError
from bench.data import batch_indices
from bench.priors import train as training
from bench.priors.codes import Codes
from bench.priors.config import SAMPLING, PriorConfig
from bench.priors.generate import rate
from bench.priors.models import CAUSAL, LEARNED, PRIORS, SEQUENCES, Prior
from bench.priors.models.pixelcnn import GatedLayer, gate
from bench.priors.models.sequence import CausalMambaLayer, CausalTransformerLayer, RecurrentLayer
from bench.priors.train import build as build_prior
from bench.priors.train import train_prior
from bench.tokenizers.sizes import parameter_count
from bench.training import loop
from bench.training.loop import parameter_groups, unheard

K, SIDE = 7, 4
GRID, LONG = (SIDE, SIDE), (3, 6)  # rows and columns: of codes, and of two pixels of three channels in each row
ORDERED = ("independent", *CAUSAL)  # what is left of PRIORS has tests of its own, in test_masked.py
NO_LABELS = ("0", (), None, None)  # tokenizer, classes, labels


def build(name: str, grid: tuple[int, int] = GRID, classes: int = 0, width: int = 24, depth: int = 2):
    """A prior in eval mode whose every parameter matters: what starts as zero is random here."""
    torch.manual_seed(0)
    if name not in LEARNED:
        prior = PRIORS[name](K, grid, classes)
        prior.fit(torch.randint(K, (50, *grid)))
        return prior.eval()
    prior = LEARNED[name](K, grid, width, depth, 0.1, classes)
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return prior.eval()


def grids(count: int, grid: tuple[int, int] = GRID) -> torch.Tensor:
    return torch.randint(K, (count, *grid), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", [GRID, LONG])
@pytest.mark.parametrize("name", CAUSAL)
def test_each_position_sees_all_before_it_and_nothing_else(name, grid):
    """Gradients of every position's logits on every code: none from itself and later ones (bug 8), and one from every
    earlier one, so there is no blind spot. Of a pixel's channels green sees red, and blue both."""
    prior, tokens = build(name, grid, depth=4), math.prod(grid)
    table = torch.randn(tokens, prior.embedding.embedding_dim, requires_grad=True)  # every position its own code
    prior.embedding = torch.nn.Module()
    prior.embedding.forward = lambda codes: F.embedding(codes, table)
    logits = prior.logits(torch.arange(tokens).view(1, *grid)).flatten(1, 2)
    for position in range(tokens):
        weights = torch.randn(K, generator=torch.Generator().manual_seed(position))
        (gradient,) = torch.autograd.grad(logits[0, position] @ weights, table, retain_graph=True)
        reach = gradient.abs().sum(-1)
        assert (reach[:position] > 0).all(), f"{name} is blind at {position}"
        assert not reach[position:].any(), f"{name} sees the future at {position}"


@pytest.mark.parametrize("order", [name for name in ORDERS if name != "raster"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_in_another_order_a_code_sees_what_its_order_has_before_it(name, order):
    """Step by step the same, and samples lie where they were drawn; the distribution is a whole one."""
    torch.manual_seed(0)
    prior = SEQUENCES[name](3, (2, 2), 16, 1, 0.0, 0, token_order=order).eval()
    torch.nn.init.normal_(prior.head.weight, std=0.4)
    sequence = token_order(order, 2, 2).tolist()
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    with torch.no_grad():
        whole = prior.logits(grids).flatten(1, 2)
        state, before = prior.start(None, len(grids)), None
        for position, cell in enumerate(sequence):
            logits, state = prior.step(position, before, state)
            torch.testing.assert_close(logits, whole[:, cell], rtol=1e-5, atol=1e-5)
            before = grids.flatten(1)[:, cell]
            later = sequence[position + 1 :]
            changed = grids.flatten(1).index_fill(1, torch.tensor(later, dtype=torch.int64), 0).view(-1, 2, 2)
            torch.testing.assert_close(prior.logits(changed).flatten(1, 2)[:, cell], whole[:, cell])
        p = prior.nll(grids).sum((1, 2)).neg().exp()
    assert p.sum() == pytest.approx(1, abs=1e-5)
    drawn = prior.sample(20_000, torch.Generator().manual_seed(0)).flatten(1)
    counts = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81)
    chi_squared = ((counts - 20_000 * p) ** 2 / (20_000 * p)).sum()
    assert chi_squared < stats.chi2.ppf(0.9999, 80)


def test_an_order_that_a_prior_has_no_use_for_or_a_grid_has_not_is_refused():
    with pytest.raises(UserError, match="token_order is snake, of which prior 'pixelcnn' makes no use; leave it"):
        PriorConfig("none", "pixelcnn", token_order="snake").check()
    with pytest.raises(UserError, match="power of two, not 6×6; take the order snake, or a grid that has it"):
        build_prior(PriorConfig("none", "rnn", token_order="hilbert"), K, (6, 6), 0)


@pytest.mark.parametrize("grid_size", [8, 16])
def test_pixelcnn_is_as_deep_as_the_grid_needs(grid_size):
    """The last position sees every other, at the depth that it has unless told otherwise."""
    prior = build_prior(PriorConfig("none", "pixelcnn", parameters=100_000), K, (grid_size, grid_size), 0).eval()
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, grid_size, grid_size, prior.position.shape[0], requires_grad=True)
    prior.embedding = torch.nn.Module()
    prior.embedding.forward = lambda codes: x
    logits = prior.logits(torch.zeros(1, grid_size, grid_size, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(logits[0, -1, -1].sum(), x)
    assert (gradient.abs().sum(-1).flatten() > 0).tolist() == [True] * (grid_size**2 - 1) + [False]


@pytest.mark.parametrize("grid", [GRID, LONG])
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", ORDERED)
def test_step_by_step_equals_at_once(name, classes, grid):
    prior, codes = build(name, grid, classes=classes), grids(5, grid)
    labels = torch.tensor([0, 1, 2, 2, 1]) if classes else None
    with torch.no_grad():
        whole = prior.logits(codes, labels).flatten(1, 2)
        state, before = prior.start(labels, len(codes)), None
        for position in range(prior.tokens):
            logits, state = prior.step(position, before, state)
            torch.testing.assert_close(logits, whole[:, position], rtol=1e-5, atol=1e-5)
            before = codes.flatten(1)[:, position]


def test_attention_remembers_more_than_it_has_room_for_at_first():
    layer, x = CausalTransformerLayer(24), torch.randn(3, 150, 24)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        state, found = layer.start(3), []
        for position in range(150):
            y, state = layer.step(x[:, position : position + 1], state)
            found.append(y)
        torch.testing.assert_close(torch.cat(found, 1), layer(x), rtol=1e-4, atol=1e-4)
    assert state[0].shape[2] == 256


@pytest.mark.parametrize("order", ["columns", "snake"])
def test_in_another_order_a_long_grid_is_read_step_by_step_as_at_once(order):
    """And what is drawn there lies where it was drawn: its logits are those that it was drawn from."""
    torch.manual_seed(0)
    prior = SEQUENCES["rnn"](K, LONG, 16, 1, 0.0, 0, token_order=order).eval()
    torch.nn.init.normal_(prior.head.weight, std=0.4)
    codes, sequence = prior.sample(5, torch.Generator().manual_seed(0), top_k=1), token_order(order, *LONG).tolist()
    assert codes.shape == (5, *LONG)
    with torch.no_grad():
        whole = prior.logits(codes)
        assert codes.equal(whole.argmax(-1))
        state, before = prior.start(None, len(codes)), None
        for position, cell in enumerate(sequence):
            logits, state = prior.step(position, before, state)
            torch.testing.assert_close(logits, whole.flatten(1, 2)[:, cell], rtol=1e-5, atol=1e-5)
            before = codes.flatten(1)[:, cell]


@pytest.mark.parametrize("name", PRIORS)
def test_whoever_waits_for_samples_is_told_of_every_code(name):
    """Of a long grid more than once."""
    told, prior = [], build(name, LONG)
    drawn = prior.sample(5, torch.Generator().manual_seed(0), progress=told.append)
    assert drawn.equal(prior.sample(5, torch.Generator().manual_seed(0)))
    assert sum(told) == drawn.numel() == 5 * 18
    assert len(told) > 5
    assert min(told) > 0


@pytest.mark.parametrize("name", ORDERED)
def test_nll_is_a_distribution_and_sampling_follows_it(name):
    """On a grid of two codes: probabilities of all K² × … grids sum to one, and samples come as often as they say."""
    torch.manual_seed(0)
    k, prior = 3, None
    if name in LEARNED:
        prior = LEARNED[name](k, (2, 2), 16, 1, 0.0, 0)
        torch.nn.init.normal_(prior.head.weight, std=0.4)
    else:
        prior = PRIORS[name](k, (2, 2))
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


@pytest.mark.parametrize("name", ORDERED)
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
    prior = build(name, grid=(1, 1))
    assert prior.nll(grids(5, (1, 1))).shape == (5, 1, 1)
    assert prior.sample(3, torch.Generator()).shape == (3, 1, 1)
    lone = PRIORS[name](1, (2, 2), *((8, 1, 0.0) if name in LEARNED else ())).eval()
    assert not lone.nll(torch.zeros(2, 2, 2, dtype=torch.int64)).any()


@pytest.mark.parametrize("name", LEARNED)
def test_labels_matter(name):
    prior, codes = build(name, classes=2), grids(4)
    with torch.no_grad():
        one, other = (prior.nll(codes, torch.full((4,), label)) for label in (0, 1))
    assert (one[:, 0, 0] != other[:, 0, 0]).all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", CAUSAL)
def test_guidance_draws_away_from_what_is_said_without_a_label(name, guidance):
    """From softmax(ℓ(none) + g · (ℓ(label) − ℓ(none))), code by code; 1 is the labelled distribution itself."""
    torch.manual_seed(0)
    prior = LEARNED[name](3, (2, 2), 16, 1, 0.0, 2, unlabelled=True).eval()
    for part in (prior.head.weight, *(table.weight for table in prior.modules() if isinstance(table, nn.Embedding))):
        nn.init.normal_(part, std=0.4)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    label = torch.ones(len(grids), dtype=torch.int64)
    with torch.no_grad():
        labelled, free = prior.logits(grids, label), prior.train().logits(grids, label + 1)
        prior.eval()
        log_p = (free + guidance * (labelled - free)).log_softmax(-1)
        p = log_p.gather(3, grids[..., None]).sum((1, 2, 3)).exp()
    ones = torch.ones(20_000, dtype=torch.int64)
    drawn = prior.sample(20_000, torch.Generator().manual_seed(0), labels=ones, guidance=guidance).flatten(1)
    counts = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81)
    assert ((counts - 20_000 * p) ** 2 / (20_000 * p)).sum() < stats.chi2.ppf(0.9999, 80)
    if guidance == 1:
        assert drawn.equal(prior.sample(20_000, torch.Generator().manual_seed(0), labels=ones).flatten(1))


def test_so_many_labels_are_missing_in_training():
    """Another draw in each step; a missing label is one more than there are classes."""
    labels = np.tile(np.arange(4, dtype=np.int64), 250)
    codes = Codes(
        np.zeros((1000, 2, 2), np.int64),
        np.zeros((4, 2, 2), np.int64),
        K,
        "t",
        ("a", "b", "c", "d"),
        labels,
        labels[:4],
    )
    config = PriorConfig("none", "rnn", batch_size=1000, conditional=True, label_dropout=0.2, device="cpu")
    found = [training.batch(codes, config, step)[1] for step in range(2)]
    missing = [(given == 4).float().mean().item() for given in found]
    assert missing == pytest.approx([0.2, 0.2], abs=0.05)
    assert set(found[0].tolist()) == {0, 1, 2, 3, 4}
    assert not (training.batch(codes, replace(config, label_dropout=0.0), 0)[1] == 4).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_dropout": 0.1}, "label_dropout is 0.1, and without --conditional there are no labels"),
        ({"guidance": 2.0}, "guidance is 2, and the prior knows nothing without a label; train with --label-dropout"),
        ({"guidance": 0.0}, "guidance is 0.0; it must be above 0"),
        ({"guidance": 1e9}, "guidance is 1000000000.0; it must be at most 1000"),
    ],
)
def test_guidance_without_labels_is_refused(changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        PriorConfig("none", "rnn", device="cpu", **changes).check()
    with pytest.raises(UserError, match="guidance is 2, and this prior knows nothing without a label"):
        build("rnn", classes=2).sample(1, torch.Generator(), labels=torch.zeros(1, dtype=torch.int64), guidance=2.0)


@pytest.mark.parametrize("name", PRIORS)
def test_what_does_not_fit_is_refused_in_one_sentence(name):
    prior = build(name)
    with pytest.raises(UserError, match="grids of 8×8 and this prior is for 4×4"):
        prior.nll(grids(2, (8, 8)))
    with pytest.raises(UserError, match=f"this prior knows {K}; they are of another tokenizer"):
        prior.nll(grids(2) + 1)
    with pytest.raises(UserError, match="they are of another tokenizer"):
        prior.nll(grids(2) - K)
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


def test_a_long_grid_has_no_order_of_hilbert_and_is_not_one_of_as_many_codes():
    with pytest.raises(UserError, match="power of two, not 32×96; take the order snake, or a grid that has it"):
        build_prior(PriorConfig("none", "rnn", token_order="hilbert"), K, (32, 96), 0)
    with pytest.raises(UserError, match="grids of 6×3 and this prior is for 3×6"):
        build("rnn", LONG).nll(grids(2, (6, 3)))


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", PRIORS)
def test_other_grids_of_a_batch_change_nothing(name, classes):
    """Attention or recurrence over the batch would let them (bug 4); a label is that of its own grid."""
    prior, codes = build(name, classes=classes), grids(4)
    labels = torch.tensor([0, 1, 2, 1]) if classes else None
    with torch.no_grad():
        together = prior.logits(codes, labels)
        for row in range(4):
            alone = prior.logits(codes[row : row + 1], None if labels is None else labels[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LEARNED)
def test_an_untrained_prior_is_the_uniform_distribution(name):
    prior = LEARNED[name](K, GRID, 24, 2, 0.0).eval()
    assert prior.nll(grids(3)).mean((1, 2)).detach().numpy() == pytest.approx(math.log(K))
    assert not prior.logits(grids(3)).any()


@pytest.mark.parametrize("layer", [RecurrentLayer, CausalTransformerLayer, CausalMambaLayer])
def test_an_untrained_layer_is_the_identity(layer):
    x = torch.randn(2, 5, 24)
    assert layer(24)(x).equal(x)


def test_an_untrained_gated_layer_is_the_identity_of_both_stacks():
    v, h = torch.randn(2, 2, 8, 3, 3)
    assert all(after.equal(before) for after, before in zip(GatedLayer(8, 0.0)(v, h), (v, h), strict=True))


@pytest.mark.parametrize("name", CAUSAL)
def test_every_position_is_told_its_own_place(name):
    """The logits at a position depend on its own row of the position table, and on none of what lies behind: of later
    positions or, in PixelCNN, whose stacks look to either side, of later rows of the grid."""
    prior = build(name, depth=4)
    logits = prior.logits(grids(1)).flatten(1, 2)
    for place in range(SIDE**2):
        weights = torch.randn(K, generator=torch.Generator().manual_seed(place))
        (gradient,) = torch.autograd.grad(logits[0, place] @ weights, prior.position, retain_graph=True)
        table = gradient if gradient.ndim == 2 else gradient.flatten(1).T  # of PixelCNN (width, h, w)
        felt = (table.abs().sum(1) > 0).tolist()
        assert felt[place], f"{name} does not know where {place} is"
        behind = place + 1 if name != "pixelcnn" else (place // SIDE + 1) * SIDE
        assert not any(felt[behind:])


@pytest.mark.parametrize("name", LEARNED)
def test_tables_start_small_and_never_decay(name):
    """Codes, labels and positions are tables, not weights: decay would pull rare rows to zero."""
    torch.manual_seed(0)
    prior = LEARNED[name](512, (8, 8), 32, 2, 0.1, 100)
    decayed, free = parameter_groups(prior, 0.05)
    names = {id(parameter): name for name, parameter in prior.named_parameters()}
    tables = {"embedding.weight", "position", "first.weight" if name in SEQUENCES else "label.weight"}
    assert tables <= {names[id(parameter)] for parameter in free["params"]}
    for table in tables:
        assert prior.get_parameter(table).std().item() == pytest.approx(0.02, rel=0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    matrices = {
        name
        for name, parameter in prior.named_parameters()
        if parameter.ndim > 1 and name not in tables and not getattr(parameter, "_no_weight_decay", False)
    }
    assert {names[id(parameter)] for parameter in decayed["params"]} == matrices
    assert any(name.startswith("layers") for name in matrices)
    assert "head.weight" in matrices


def zeros(x: torch.Tensor) -> float:
    return float((x == 0).double().mean())


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "pixelcnn"])
def test_dropout_is_of_embeddings_and_of_what_each_layer_adds(name):
    prior, seen = build(name, width=64).train(), []
    prior.dropout.p = 0.5
    for layer in prior.layers:
        layer.register_forward_hook(lambda _, given, made: seen.append((given[0], made - given[0])))
    prior.norm.register_forward_hook(lambda _, given, made: seen.append((given[0], None)))
    prior.logits(grids(64))
    (first, _), *_ = seen
    assert zeros(first) == pytest.approx(0.5, abs=0.01)
    for (x, _), (after, _) in itertools.pairwise(seen):
        assert zeros(after - x) == pytest.approx(0.5, abs=0.02)
    seen.clear()
    prior.eval().logits(grids(4))
    assert not zeros(seen[0][0])
    for (x, adds), (after, _) in itertools.pairwise(seen):
        torch.testing.assert_close(after, x + adds)


def test_dropout_of_pixelcnn_is_of_embeddings_and_of_gated_features():
    prior, seen = build("pixelcnn", width=64), []
    prior.dropout.register_forward_hook(lambda _, given, made: seen.append(made))
    for layer in prior.layers:
        layer.dropout.p = prior.dropout.p = 0.5
        for out in (layer.vertical_out, layer.horizontal_out):
            out.register_forward_hook(lambda _, given, made: seen.append(given[0]))
    for training_mode, share in ((True, 0.5), (False, 0.0)):
        prior.train(training_mode).logits(grids(32))
        assert len(seen) == 1 + 2 * len(prior.layers)
        assert [zeros(x) for x in seen] == pytest.approx([share] * len(seen), abs=0.01)
        seen.clear()


@pytest.mark.parametrize("width", [24, 64, 72])
def test_transformer_layers_attend_as_torchs_own_do(width):
    """Parity with nn.MultiheadAttention under a causal mask, where the heads divide the width."""
    torch.manual_seed(0)
    layer = CausalTransformerLayer(width)
    torch.nn.init.normal_(layer.out.weight, std=0.3)
    reference = torch.nn.MultiheadAttention(width, layer.heads, bias=False, batch_first=True)
    reference.in_proj_weight = layer.qkv.weight
    reference.out_proj.weight = layer.out.weight
    x = torch.randn(3, 6, width)
    normed = F.layer_norm(x, (width,))
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = x + reference(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)  # the MLP starts as zero


def test_the_gate_is_equation_two():
    a, b = torch.randn(2, 3, 5, 4, 4)
    torch.testing.assert_close(gate(torch.cat([a, b], 1)), a.tanh() * b.sigmoid())


@pytest.mark.parametrize("depth", [1, 2])
def test_a_layer_of_pixelcnn_sees_two_rows_and_columns_further(depth):
    """From a position in the middle of a large grid: 2 · depth + 1 rows above, that many pixels to the left."""
    side, r, c = 15, 8, 7
    prior = build("pixelcnn", grid=(side, side), depth=depth)
    x = torch.randn(1, side, side, 24, requires_grad=True)
    prior.embedding = torch.nn.Module()
    prior.embedding.forward = lambda codes: x
    weights = torch.randn(K)
    (gradient,) = torch.autograd.grad(prior.logits(grids(1, (side, side)))[0, r, c] @ weights, x)
    seen = gradient[0].abs().sum(-1) > 0
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[r, c - 2 * depth - 1 : c] = True
    for layer in range(depth):  # after so many layers of its stack, the vertical one is passed on
        for more in range(depth - layer):
            up, left = 2 * (layer + 1) + 1, 2 * (layer + 1)
            reach = slice(max(0, c - left - 2 * more), c + left + 1)
            expected[r - up : r, reach] = True
    assert seen.equal(expected)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", ORDERED)
def test_codes_are_drawn_from_what_whole_grids_would_say(name, classes, monkeypatch):
    """At every position, from softmax(logits / temperature) of the top_k likeliest codes, given what was drawn before
    and the label: read from the probabilities that were drawn with."""
    prior, given = build(name, classes=classes), []
    labels = torch.tensor([2, 0, 1, 2, 1]) if classes else None
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *rest, **more: given.append(p) or multinomial(p, *rest, **more))
    for temperature, top_k in ((1.0, 0), (0.5, 0), (2.0, 3), (0.7, 1), (1.0, K - 1), (1.3, K + 5)):
        given.clear()
        drawn = prior.sample(5, torch.Generator().manual_seed(0), temperature, top_k, labels)
        with torch.no_grad():
            logits = prior.logits(drawn, labels) / temperature
        p = torch.stack(given, 1).view_as(logits)
        if 0 < top_k < K:
            assert ((p > 0).sum(-1) == top_k).all()
            assert (torch.where(p > 0, logits, torch.inf).amin(-1) >= logits.sort(-1).values[..., -top_k] - 1e-5).all()
            logits = logits.masked_fill(p == 0, -torch.inf)
        torch.testing.assert_close(p, logits.softmax(-1), rtol=1e-4, atol=1e-5)


def test_a_histogram_gives_every_code_half_a_count_more():
    """p = (n + ½) / (N + K/2) at every position of its own, whatever was counted before."""
    codes = grids(9, (2, 2))
    prior = PRIORS["independent"](K, (2, 2))
    for _ in range(2):  # in place of the former counts
        prior.fit(codes)
    expected = [
        [(sum(int(grid[r, c]) == code for grid in codes) + 0.5) / (9 + K / 2) for code in range(K)]
        for r, c in itertools.product(range(2), repeat=2)
    ]
    found = prior.logits(codes[:1]).exp().view(4, K)
    assert found.tolist() == [pytest.approx(row) for row in expected]
    assert prior.nll(codes[:1])[0, 1, 0].item() == pytest.approx(-math.log(expected[2][int(codes[0, 1, 0])]))


def test_a_histogram_that_is_fitted_again_has_forgotten_what_it_had():
    again, once = PRIORS["independent"](K, GRID, 0), PRIORS["independent"](K, GRID, 0)
    for codes in (grids(9), grids(20)):
        again.fit(codes)
    once.fit(grids(20))
    assert again.counts.equal(once.counts)


@pytest.mark.parametrize("name", PRIORS)
def test_no_grids_have_no_codes_to_be_surprised_at(name):
    assert build(name).nll(torch.zeros(0, SIDE, SIDE, dtype=torch.int64)).shape == (0, SIDE, SIDE)


@pytest.mark.parametrize("classes", [0, 2])
def test_training_looks_at_no_code_and_no_label(classes):
    """A GPU would have to be waited for; here on a device that has no numbers to look at."""
    prior = build("rnn", classes=classes).to("meta").train()
    labels = torch.zeros(3, dtype=torch.int64, device="meta") if classes else None
    assert prior.nll(grids(3).to("meta"), labels).shape == (3, SIDE, SIDE)


def test_independent_is_the_closed_form_entropy():
    """With every code seen often, the smoothed histogram's rate is the entropy of the codes' own histogram."""
    codes = torch.multinomial(torch.tensor([0.5, 0.25, 0.125, 0.125]), 40_000, replacement=True).view(-1, 2, 2)
    prior = PRIORS["independent"](4, (2, 2))
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
    """Within 3 % of the source's entropy on unseen grids, well below what positions on their own give. One without an
    order, which has to predict any code from any others, is further above it after as many steps."""
    generator = np.random.default_rng(0)
    train, _ = markov(20_000, 6, generator)
    val, entropy = markov(2_000, 6, generator)
    codes = Codes(train.astype(np.uint8), val.astype(np.uint8), STATES, "0", (), None, None)
    config = PriorConfig(
        *("none", name, 2, 100_000), dropout=0.0, steps=STEPS.get(name, 500), precision="fp32", device="cpu"
    )
    prior, _ = train_prior(config.resolved(), codes, tmp_path)
    reached = rate(prior, codes.held_out, None, None)
    assert entropy * 0.995 < reached < entropy * (1.03 if name in CAUSAL else 1.6)
    floor = PRIORS["independent"](STATES, (6, 6))
    floor.fit(torch.from_numpy(train))
    assert rate(floor, codes.held_out, None, None) > 1.3 * reached


def toy_codes(count: int = 64, side: int = 4, classes: int = 0) -> Codes:
    generator = np.random.default_rng(0)
    train, val = (generator.integers(0, K, (count, side, side), dtype=np.uint8) for _ in range(2))
    names = tuple(f"class {number}" for number in range(classes))
    labels = [generator.integers(0, classes, count) for _ in range(2)] if classes else [None, None]
    return Codes(train, val, K, "0", names, *labels)


@pytest.fixture
def steps_taken(monkeypatch) -> list[int]:
    """Grows by one number for every training step that is really taken."""
    taken, batch = [], training.batch
    monkeypatch.setattr(training, "batch", lambda *arguments: taken.append(arguments[-1]) or batch(*arguments))
    return taken


class Stop(threading.Event):
    """A user who stops a run when ``history`` has so many lines."""

    def __init__(self, history, lines: int):
        super().__init__()
        self.history, self.lines = history, lines

    def is_set(self) -> bool:
        return self.history.read_text().count("\n") == self.lines


def stopped(config: PriorConfig, codes: Codes, folder, at: int) -> None:
    """Trains until after step ``at``, where it leaves a checkpoint."""
    folder.mkdir(exist_ok=True)
    stop = Stop(folder / "history.jsonl", at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "interruptible", lambda: contextlib.nullcontext(stop))
        with pytest.raises(Interrupted, match=f"stopped at step {at} of {config.steps}"):
            train_prior(config, codes, folder)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["at"][0] == at


def timeless(history) -> list[dict]:
    rows = [json.loads(row) for row in history.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("name", LEARNED)
def test_resumed_at_any_step_it_ends_bit_equal(name, tmp_path, steps_taken):
    """Weights, their average, the optimiser and the history go on from the very step (bug 14), also twice."""
    codes, conditional = toy_codes(classes=2), name == "rnn"
    config = PriorConfig(
        *("none", name), depth=1, parameters=20_000, steps=8, batch_size=8, warmup=3, conditional=conditional,
        precision="fp32", device="cpu",
    )  # fmt: skip
    whole, _ = train_prior(config, codes, tmp_path)
    history = timeless(tmp_path / "history.jsonl")
    assert [row["step"] for row in history] == [*range(1, 9)]
    for stops in ((1,), (3, 7)):
        folder = tmp_path / str(stops)
        steps_taken.clear()
        for at in stops:
            stopped(config, codes, folder, at)
        again, _ = train_prior(config, codes, folder)
        assert steps_taken == [*range(8)]  # every step once: nothing was trained again
        for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
            assert one.equal(other)
        assert timeless(folder / "history.jsonl") == history


def test_without_resuming_training_begins_anew(tmp_path, steps_taken):
    config = PriorConfig("none", "rnn", 1, 20_000, steps=4, batch_size=8, precision="fp32", device="cpu")
    stopped(config, toy_codes(), tmp_path, 3)
    steps_taken.clear()
    train_prior(config, toy_codes(), tmp_path, resume=False)
    assert steps_taken == [0, 1, 2, 3]
    assert [row["step"] for row in timeless(tmp_path / "history.jsonl")] == [1, 2, 3, 4]


# -- the training loop, on a toy whose every number is known ----------------------------------------------------------


class Toy(Prior):
    """One probability per code and nothing else; remembers what it was given, in which state it was, and its losses."""

    slope, offset = 1.0, 0.0

    def __init__(self, *shape: int):
        super().__init__(*shape)
        self.table = torch.nn.Parameter(torch.linspace(-1, 1, self.codebook_size))
        self.calls, self.losses, self.weights = [], [], []

    def nll(self, codes, labels=None):
        random = torch.rand(()).item()
        call = SimpleNamespace(codes=codes.clone(), labels=labels, random=random, training=self.training)
        call.autocast = torch.is_autocast_enabled("cpu")
        self.calls.append(call)
        loss = self.offset - self.slope * self.table.log_softmax(0)[codes]
        self.losses.append(loss.mean().item())
        self.clock()
        return loss

    clock = staticmethod(lambda: None)


@pytest.fixture
def toy(monkeypatch):
    """``toy(codes, folder, **settings)`` trains a Toy: what was averaged, the Toy itself, the optimiser's notes of each
    step (rate, gradient's norm, betas, weights after it) and the seconds."""
    notes, built = [], []

    class Spy(torch.optim.AdamW):
        def step(self, *arguments):
            (parameter,) = (parameter for group in self.param_groups for parameter in group["params"])
            rates = {group["lr"] for group in self.param_groups}
            betas = {group["betas"] for group in self.param_groups}
            norm = parameter.grad.norm().item()
            super().step(*arguments)
            notes.append(SimpleNamespace(rates=rates, betas=betas, norm=norm, after=parameter.detach().clone()))

    monkeypatch.setattr(torch.optim, "AdamW", Spy)

    def make(config, codebook_size, grid, classes):
        torch.rand(7)  # as initialisation would
        built.append(Toy(codebook_size, grid, classes))
        return built[-1]

    monkeypatch.setattr(training, "build", make)

    def train(codes, folder, **settings):
        notes.clear()
        usual = {"steps": 10, "batch_size": 6, "warmup": 4, "precision": "fp32", "device": "cpu"}
        config = PriorConfig("none", "rnn", **{**usual, **settings})
        averaged, seconds = train_prior(config, codes, folder)
        return SimpleNamespace(averaged=averaged, model=built[-1], notes=list(notes), seconds=seconds, config=config)

    return train


def test_the_applied_rate_is_the_schedule(toy, tmp_path):
    """Linear to lr over the warm-up, times a cosine that ends at zero; the history tells what was applied."""
    run = toy(toy_codes(), tmp_path, lr=0.01, steps=10, warmup=4)
    expected = [0.01 * min(1, (t + 1) / 4) * (1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)]
    assert [rate for note in run.notes for rate in note.rates] == pytest.approx(expected)
    assert [row["lr"] for row in timeless(tmp_path / "history.jsonl")] == pytest.approx(expected)
    assert {betas for note in run.notes for betas in note.betas} == {(0.9, 0.95)}


def test_batches_walk_through_every_grid_with_its_label_once_an_epoch(toy, tmp_path):
    codes = toy_codes(20, classes=3)
    rows = {grid.tobytes(): row for row, grid in enumerate(codes.train)}
    assert len(rows) == 20
    walks = []
    for seed in (0, 1):
        run = toy(codes, tmp_path, conditional=True, seed=seed, steps=20)
        walk = [rows[grid.astype(np.uint8).tobytes()] for call in run.model.calls for grid in call.codes.numpy()]
        labels = torch.cat([call.labels for call in run.model.calls]).tolist()
        assert labels == codes.train_labels[walk].tolist()
        assert run.model.calls[0].codes.dtype == run.model.calls[0].labels.dtype == torch.int64
        assert (np.sort(np.reshape(walk, (6, 20))) == np.arange(20)).all()
        assert walk == np.concatenate([batch_indices(seed, step, 6, 20) for step in range(20)]).tolist()
        walks.append(walk)
    assert walks[0] != walks[1]
    assert walks[0][:20] != walks[0][20:40]
    assert all(call.labels is None for call in toy(codes, tmp_path, conditional=False).model.calls)


def test_every_step_draws_its_own_randomness_whatever_was_drawn_before(toy, tmp_path):
    drawn = []
    for before in (99, 100):
        torch.manual_seed(before)
        drawn.append([call.random for call in toy(toy_codes(), tmp_path).model.calls])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 10


@pytest.mark.parametrize("clip", [0.0, 0.02, 1e6])
def test_the_gradient_is_clipped_to_its_bound(toy, tmp_path, monkeypatch, clip):
    """The history tells the norm before, the optimiser gets at most the bound; 0 does not clip."""
    monkeypatch.setattr(Toy, "slope", 50.0)
    run = toy(toy_codes(), tmp_path, grad_clip=clip)
    before = [row["grad_norm"] for row in timeless(tmp_path / "history.jsonl")]
    assert min(before) > 1
    assert [note.norm for note in run.notes] == pytest.approx([0.02] * 10 if clip == 0.02 else before, rel=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_what_is_scored_is_the_average_of_the_weights_after_each_step(toy, tmp_path, decay):
    run = toy(toy_codes(), tmp_path, weight_ema=decay, lr=0.1, weight_decay=0.0)
    mean = run.notes[0].after
    for n, note in enumerate(run.notes[1:], 1):
        share = min(decay, (1 + n) / (10 + n))
        mean = share * mean + (1 - share) * note.after
    torch.testing.assert_close(run.averaged.table.detach(), mean)
    assert decay or run.averaged.table.equal(run.model.table)
    assert all(call.training for call in run.model.calls)
    assert not run.averaged.training
    assert not run.averaged.table.requires_grad


def test_the_history_tells_mean_bits_since_its_last_line(toy, tmp_path):
    run = toy(toy_codes(), tmp_path, steps=601)
    rows = timeless(tmp_path / "history.jsonl")
    assert [row["step"] for row in rows] == [*range(3, 601, 3), 601]
    bits = np.array(run.model.losses) / math.log(2)
    expected = [bits[start : start + 3].mean() for start in range(0, 601, 3)]
    assert [row["bits_per_token"] for row in rows] == pytest.approx(expected)


def test_seconds_are_those_of_all_steps_also_of_earlier_parts(toy, tmp_path, monkeypatch):
    """On a clock that only training moves: 2 s a step."""
    now = [1000.0]
    monkeypatch.setattr(Toy, "clock", lambda self: now.__setitem__(0, now[0] + 2))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    folder = tmp_path / "stopped"
    assert toy(toy_codes(), tmp_path / ".").seconds == 20
    config = PriorConfig("none", "rnn", steps=10, batch_size=6, warmup=4, precision="fp32", device="cpu")
    stopped(config, toy_codes(), folder, 3)
    now[0] += 500  # between the two parts
    assert toy(toy_codes(), folder).seconds == 20
    rows = [json.loads(row) for row in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["seconds"] for row in rows] == [2.0 * step for step in range(1, 11)]


def test_a_checkpoint_is_written_as_often_as_told_and_no_step_is_trained_twice_after_a_crash(
    toy, tmp_path, monkeypatch, steps_taken
):
    """Where writing takes no time; the process ends without a word in step 7."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def tick(self) -> None:
        now[0] += 1
        if now[0] == 7:
            raise MemoryError

    monkeypatch.setattr(Toy, "clock", tick)
    with pytest.raises(MemoryError):
        toy(toy_codes(), tmp_path)
    at, seconds = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["at"]
    assert (at, seconds) == (6, 6)  # every 2 s is after steps 3 and 6
    steps_taken.clear()
    crashed = toy(toy_codes(), tmp_path)
    assert steps_taken == [6, 7, 8, 9]
    (tmp_path / "whole").mkdir()
    assert crashed.averaged.table.equal(toy(toy_codes(), tmp_path / "whole").averaged.table)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_that_of_autocast(toy, tmp_path, precision):
    run = toy(toy_codes(), tmp_path, precision=precision)
    assert {call.autocast for call in run.model.calls} == {precision == "bf16"}


@pytest.mark.parametrize(("part", "wrong"), [("slope", math.nan), ("slope", 1e38), ("offset", math.inf)])
def test_what_is_not_finite_ends_the_run(toy, tmp_path, monkeypatch, part, wrong):
    """Neither a loss without a finite gradient nor a gradient without a finite loss passes."""
    monkeypatch.setattr(Toy, part, wrong)
    with pytest.raises(Diverged, match=r"by step 1; try --lr below 0\.003"):
        toy(toy_codes(), tmp_path)
    assert not (tmp_path / "history.jsonl").read_text()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_floor_counts_training_codes(tmp_path):
    codes = toy_codes()
    config = PriorConfig("none", "independent", device="cpu").resolved()
    prior, _ = train_prior(config, codes, tmp_path)
    expected = [np.bincount(column, minlength=K).tolist() for column in codes.train.reshape(64, -1).T]
    assert prior.counts.tolist() == expected


def test_the_floor_counts_alike_whatever_is_counted_at_a_time(monkeypatch):
    """Neither grid nor batch is counted twice or left out, of any kind of whole number."""
    codes, found = toy_codes().train, []
    for count in (1, 7, 64, 1000):
        monkeypatch.setattr("bench.priors.models.independent.COUNTED", count)
        for given in (codes, codes.astype(np.uint16), torch.from_numpy(codes.astype(np.int64))):
            prior = PRIORS["independent"](K, codes.shape[1:])
            prior.fit(given)
            found.append(prior.counts)
    assert all(counts.equal(found[0]) for counts in found)
    assert found[0].sum() == codes.size


def test_the_floor_takes_as_long_as_it_counts(tmp_path, monkeypatch):
    """It comes in eval mode, and neither history nor checkpoint is left of it."""
    now = [100.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))
    independent = PRIORS["independent"]
    fit = independent.fit
    monkeypatch.setattr(independent, "fit", lambda self, codes: now.__setitem__(0, now[0] + 2.5) or fit(self, codes))
    config = PriorConfig("none", "independent", device="cpu").resolved()
    prior, seconds = train_prior(config, toy_codes(), tmp_path)
    assert seconds == 2.5
    assert not prior.training
    assert list(tmp_path.iterdir()) == []


def test_a_prior_is_trained_under_its_name_in_its_unit(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "fit", lambda learner, *given: asked.append((learner, given)) or ("prior", 5.0))
    config = PriorConfig("none", "rnn", 1, 20_000, seed=3, precision="fp32", device="cpu")
    assert train_prior(config, toy_codes(), tmp_path, resume=False, checkpoint_seconds=9.0) == ("prior", 5.0)
    ((learner, given),) = asked
    assert given == ("rnn seed 3", tmp_path, False, 9.0, unheard)
    assert learner.unit == "grids"
    assert learner.row({"grad_norm": 0.5, "nll": 2 * math.log(2)}) == {"grad_norm": 0.5, "bits_per_token": 2}
    assert learner.figures({"bits_per_token": 1.23456}) == "1.235 bits per token"


CHANGES = {
    **{
        "prior": "transformer",
        "token_order": "snake",
        "depth": 2,
        "parameters": 40_000,
        "dropout": 0.5,
        "conditional": True,
        "label_dropout": 0.5,
        "steps": 7,
    },
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
@pytest.mark.parametrize(("parameters", "classes"), [(300_000, 0), (1_000_000, 0), (300_000, 100)])
def test_parameters_are_matched(name, parameters, classes):
    """Those of labels included; of 8 to 512 codes, so that tables do not decide."""
    for codebook_size in (8, 512):
        prior = build_prior(PriorConfig("none", name, parameters=parameters), codebook_size, (8, 8), classes)
        count = sum(parameter.numel() for parameter in prior.parameters())
        assert count == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("name", LEARNED)
def test_labels_of_each_class_reach_the_model(name):
    prior = build_prior(PriorConfig("none", name, parameters=60_000, depth=1), K, GRID, 5)
    assert prior.classes == 5
    assert len(prior.first.weight if name in SEQUENCES else prior.label.weight) == 5


@pytest.mark.parametrize("name", LEARNED)
def test_depth_and_dropout_are_as_told(name):
    """At a budget that a width meets; unless told 4 layers, 3 of the LSTM, half the side of PixelCNN but at least 5."""
    usual = {"rnn": {4: 3, 16: 3}, "pixelcnn": {4: 5, 16: 8}}.get(name, {4: 4, 16: 4})
    for side, depth, told in ((SIDE, 1, 1), (SIDE, 6, 6), *((side, depth, None) for side, depth in usual.items())):
        budget = sum(parameter.numel() for parameter in LEARNED[name](K, (side, side), 33, depth, 0.0, 0).parameters())
        config = PriorConfig("none", name, depth=told, parameters=budget, dropout=0.37)
        prior = build_prior(config, K, (side, side), 0)
        assert len(prior.layers) == depth
        assert sum(parameter.numel() for parameter in prior.parameters()) == budget
    rates = {module.p for module in prior.modules() if isinstance(module, torch.nn.Dropout) and module.p}
    assert rates == {0.37}


def test_pixelcnn_of_a_long_grid_is_as_deep_as_its_rows_need():
    """Not as its columns: 32×32 pixels of three channels would take 48 layers."""
    config = PriorConfig("none", "pixelcnn", parameters=200_000)
    with torch.device("meta"):
        depths = [len(build_prior(config, K, grid, 0).layers) for grid in ((32, 96), (28, 28), (4, 96))]
    assert depths == pytest.approx([16, 14, 5], abs=1)  # one more or less where that meets the budget


def test_every_auto_is_replaced_and_the_floor_ignores_training(monkeypatch):
    """The floor's identity does not know of settings that it makes no use of; of its sampling it does."""
    assert {PriorConfig("t", "rnn").resolved().precision} <= {"bf16", "fp32"}
    assert PriorConfig("t", "rnn").resolved().device in ("cpu", "cuda")
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("bench.core.device.has_fast_bf16", lambda device, fast=fast: fast)
        assert PriorConfig("t", "rnn", device="cpu").resolved().precision == precision
        assert PriorConfig("t", "rnn", precision="fp32", device="cpu").resolved().precision == "fp32"
        assert PriorConfig("t", "independent", device="cpu").resolved().precision == "fp32"
    floor = PriorConfig("t", "independent", device="cpu")
    unused = {"depth": 9, "parameters": 7, "dropout": 0.7, "conditional": True, "steps": 3, "batch_size": 5, "lr": 1.0}
    unused |= {"warmup": 1, "weight_decay": 1.0, "grad_clip": 9.0, "weight_ema": 0.5, "precision": "bf16"}
    unused |= {"token_order": "snake", "label_dropout": 0.1}
    assert {*unused, "tokenizer", "prior", *SAMPLING, "device", "seed"} == {field.name for field in fields(PriorConfig)}
    assert replace(floor, **unused).resolved() == floor.resolved()
    for name, value in {"samples": 9, "temperature": 0.5, "top_k": 3, "seed": 1, "tokenizer": "other"}.items():
        assert replace(floor, **{name: value}).run_id() != floor.run_id()


def test_an_identity_is_that_of_the_canonical_config(monkeypatch):
    """Stable between processes, readable, and another one when scoring changes."""
    config = PriorConfig("cnn-1", "rnn")  # what auto stands for, not the word
    assert config.run_id() == replace(config, parameters=1_000_000).run_id() == config.resolved().run_id()
    before = config.run_id()
    assert before.startswith("rnn-cnn-1-")
    monkeypatch.setattr("bench.priors.config.PRIOR_VERSION", 99)
    assert config.run_id() != before


@pytest.mark.parametrize("field", ["samples", "temperature", "top_k", "passes"])
def test_how_a_prior_is_sampled_from_does_not_change_its_weights(field):
    config = PriorConfig("t", "rnn", precision="fp32", device="cpu")
    for seed in (0, 1):  # both ways round
        other = replace(config, **{field: 5}, seed=seed)
        assert config.trains_as(other) == other.trains_as(config) == (seed == 0)


@pytest.mark.parametrize(
    ("field", "allowed", "refused"),
    [
        *(("samples", 4, 3), ("steps", 1, 0), ("batch_size", 1, 0), ("parameters", 1, 0), ("depth", 1, 0)),
        *(("warmup", 0, -1), ("weight_decay", 0.0, -0.1), ("grad_clip", 0.0, -0.1), ("top_k", 0, -1)),
        *(("seed", 2**31 - 1, 2**31), ("seed", 0, -1), ("lr", 1e-9, 0.0), ("temperature", 1e-3, 1e-4)),
        *(("dropout", 0.0, 1.0), ("weight_ema", 0.0, 1.0), ("dropout", 0.99, -0.1), ("weight_ema", 0.99, -0.1)),
        *(("lr", 1.0, math.nan), ("temperature", 1.0, math.inf), ("precision", "bf16", "fp16")),
    ],
)
def test_settings_are_checked_at_their_very_bounds(field, allowed, refused):
    config = PriorConfig("t", "rnn", device="cpu")
    replace(config, **{field: allowed}).check()
    with pytest.raises(UserError, match=field):
        replace(config, **{field: refused}).check()


def test_too_few_parameters_are_refused():
    with pytest.raises(UserError, match="cannot have 1,000 parameters within 2%; the nearest is"):
        build_prior(PriorConfig("none", "rnn", parameters=1000), 512, (8, 8), 0)


def test_a_budget_that_cannot_be_met_is_answered_with_the_nearest():
    """Of all the depths that were tried: here the shallowest of the narrowest."""
    config = PriorConfig("run", prior="rnn", depth=3, parameters=1, device="cpu")
    counts = [parameter_count(LEARNED["rnn"](7, (2, 2), 1, depth, 0.1, 0)) for depth in (2, 3, 4, 5)]
    for parameters in (1, round(0.9 * min(counts))):  # nor will one do that is 10 % off
        with pytest.raises(UserError, match=f"the nearest is {min(counts):,}$"):
            build_prior(replace(config, parameters=parameters), 7, (2, 2), 0)


@pytest.mark.parametrize("name", LEARNED)
def test_a_deep_prior_is_sized_without_being_made(monkeypatch, name):
    """A thousand layers take seconds to make, and a search for the width asks many times: two tell what all take."""
    made, learned = [], LEARNED[name]

    def note(codebook_size, grid, width, depth, *others, **options):
        made.append(depth)
        return learned(codebook_size, grid, width, depth, *others, **options)

    monkeypatch.setitem(LEARNED, name, note)
    prior = build_prior(PriorConfig("none", name, depth=40, parameters=500_000, device="cpu"), 32, (4, 4), 0)
    assert made.pop() >= 39
    assert {*made} == {1, 2}
    assert parameter_count(prior) == pytest.approx(500_000, rel=0.02)
    with pytest.raises(UserError, match="cannot have 1,000 parameters within 2%"):
        build_prior(PriorConfig("none", name, depth=1000, parameters=1000, device="cpu"), 32, (4, 4), 0)
    assert {*made} == {1, 2}


def test_a_prior_that_no_machine_holds_is_not_made(monkeypatch):
    monkeypatch.setattr("bench.core.device.os.sysconf", lambda name: 1 << 10)
    with pytest.raises(UserError, match=r"a model of these settings takes .* GB and cpu has 0 GB"):
        build_prior(PriorConfig("none", "rnn", parameters=500_000, device="cpu"), 32, (4, 4), 0)
