"""Orders of tokens: bijections whose neighbours are what they promise, and layers that read by them."""

import pytest
import torch
from torch import nn

from backbones.orders import ORDERS, TURNS, order, read
from bench.core.errors import UserError
from bench.tokenizers.config import make_config
from bench.tokenizers.tokenizer import Tokenizer

SCANNED = ("mamba", "bimamba", "hybrid")


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_an_order_is_a_bijection(name, side):
    assert sorted(order(name, side, side).tolist()) == list(range(side**2))


@pytest.mark.parametrize("name", ["snake", "hilbert"])
@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_neighbours_in_a_snake_and_on_hilbert_s_curve_are_neighbours_in_the_grid(name, side):
    places = order(name, side, side)
    rows, columns = places // side, places % side
    assert set(((rows.diff().abs()) + columns.diff().abs()).tolist()) == {1}


@pytest.mark.parametrize("side", [4, 8, 16])
def test_every_quarter_of_hilbert_s_curve_is_a_square(side):
    for quarter in order("hilbert", side, side).chunk(4):
        assert len((quarter // side).unique()) == len((quarter % side).unique()) == side // 2


def test_grids_that_are_no_squares_have_rows_columns_and_snakes():
    assert order("columns", 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert order("snake", 3, 2).tolist() == [0, 1, 3, 2, 4, 5]
    for sides in ((2, 4), (3, 3), (12, 12)):
        with pytest.raises(ValueError, match="whose side is a power of two, not {}×{}".format(*sides)):
            order("hilbert", *sides)


class Running(nn.Module):
    """Adds up what came before, as any layer does that reads in order."""

    sequential = True

    def forward(self, x):
        return x.cumsum(1)


@pytest.mark.parametrize("turns", TURNS)
def test_blocks_read_in_their_turn_and_tokens_stay_in_their_places(turns):
    tokens, blocks = torch.randn(2, 16, 3), [Running(), nn.Identity(), Running(), Running()]
    expected = tokens
    for index in range(3):
        places = order(TURNS[turns][index % len(TURNS[turns])], 4, 4)
        moved = torch.empty_like(expected)
        moved[:, places] = expected[:, places].cumsum(1)
        expected = moved
    torch.testing.assert_close(read(blocks, tokens, turns, 4, 4), expected)


@pytest.mark.parametrize("name", SCANNED)
@pytest.mark.parametrize("turns", [name for name in TURNS if name != "raster"])
def test_an_order_changes_what_a_scan_makes_of_the_same_weights(name, turns):
    """No parameter is added, so the same weights fit all orders; an order made while scoring serves training."""
    order.cache_clear()
    usual, other = (
        make_config(name, "smoke", device="cpu", width=32, depth=4, token_order=one) for one in ("raster", turns)
    )
    torch.manual_seed(0)
    tokenizer, reordered = Tokenizer(usual), Tokenizer(other)
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=0.1)
    reordered.load_state_dict(tokenizer.state_dict())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        assert not torch.allclose(reordered.encoder(x), tokenizer.encoder(x))
    reordered.encoder(x).sum().backward()
    z = torch.randn(2, usual.code_dim, 4, 4)
    assert not torch.allclose(reordered.decoder(z), tokenizer.decoder(z))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": "vit", "token_order": "snake"}, "token_order is snake, of which backbone 'vit' makes no use"),
        ({"backbone": "mamba", "token_order": "spiral"}, "unknown token_order 'spiral'; choose from raster, columns"),
        (
            {"backbone": "mamba", "token_order": "hilbert", "image_size": 48, "grid_size": 6},
            "power of two, not 6×6; take the order snake, or a grid that has it",
        ),
    ],
)
def test_an_order_that_does_not_fit_is_refused_in_one_sentence(changes, words):
    with pytest.raises(UserError, match=words):
        make_config(preset="smoke", device="cpu", width=32, depth=1, **changes).check()
