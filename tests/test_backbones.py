"""Contracts that every backbone keeps, at every grid; and the bugs that public backbones shipped."""

import pytest
import torch

from backbones import BACKBONES
from backbones.layers import downsamplings, pyramid
from backbones.mamba import BidirectionalMambaBlock, MambaBlock
from backbones.vit import TransformerBlock
from bench.config import PRESETS, make_config
from bench.quantizers import QUANTIZERS
from bench.tokenizer import Tokenizer, parameter_count

every = pytest.mark.parametrize("name", BACKBONES)
GRIDS = (1, 4, 8, 16)
SIZE, D, WIDTH = 32, 6, 32


def build(name: str, grid: int, depth: int = 1):
    torch.manual_seed(0)
    backbone = BACKBONES[name]
    return backbone.Encoder(SIZE, grid, D, WIDTH, depth), backbone.Decoder(SIZE, grid, D, WIDTH, depth)


def awaken(module: torch.nn.Module) -> torch.nn.Module:
    """Residual branches start at zero, which would hide whatever they do wrong."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module


@every
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_tokenizer_contract(name, grid, quantizer):
    """Shapes, ranges, gradients everywhere, and decode(encode(x)) as the forward path (bugs 3 and 6)."""
    torch.manual_seed(0)
    config = make_config(
        name, "smoke", quantizer=quantizer, grid_size=grid, width=WIDTH, depth=1, code_dim=D, codebook_size=32
    )
    tokenizer = awaken(Tokenizer(config))
    x = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    x_hat, quantized = tokenizer(x)
    assert x_hat.shape == x.shape
    assert quantized.codes.shape == (2, grid, grid)
    (x_hat.square().mean() + quantized.loss).backward()
    for key, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key

    tokenizer.eval()
    codes = tokenizer.encode(x)
    assert codes.dtype == torch.int64
    decoded = tokenizer.decode(codes)
    assert decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, tokenizer(x)[0].clamp(-1, 1), atol=1e-5, rtol=1e-5)


@every
@pytest.mark.parametrize("grid", GRIDS)
def test_other_images_do_not_change_mine(name, grid):
    """Attention over the batch instead of the tokens (bug 4), or any norm over the batch."""
    encoder, decoder = map(awaken, build(name, grid))
    x = torch.randn(3, 3, SIZE, SIZE, requires_grad=True)
    gradient = torch.autograd.grad(encoder(x)[1].sum(), x)[0]
    assert not gradient[[0, 2]].any()
    z = torch.randn(3, D, grid, grid, requires_grad=True)
    gradient = torch.autograd.grad(decoder(z)[1].sum(), z)[0]
    assert not gradient[[0, 2]].any()
    assert gradient[1].any()


@pytest.mark.parametrize("block", [TransformerBlock, BidirectionalMambaBlock, MambaBlock])
def test_tokens_of_my_image_change_mine(block):
    """The other half of bug 4; the causal block sees what came before, the others everything (bug 8)."""
    torch.manual_seed(0)
    layer = awaken(block(WIDTH))
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    for token in range(9):
        gradient = torch.autograd.grad(layer(x)[0, token].sum(), x)[0]
        seen = gradient[0].abs().sum(-1) > 0
        assert seen[: token + 1].all()
        assert seen[token + 1 :].any() == (block is not MambaBlock and token < 8)
        assert not gradient[1].any()


def test_bidirectional_block_flips_back():
    """With equal mixers, reversing the input reverses the output: nothing comes out in the wrong order (bug 7)."""
    torch.manual_seed(0)
    layer = awaken(BidirectionalMambaBlock(WIDTH))
    layer.backward_mixer.load_state_dict(layer.forward_mixer.state_dict())
    x = torch.randn(2, 7, WIDTH)
    torch.testing.assert_close(layer(x.flip(1)), layer(x).flip(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("block", [TransformerBlock, BidirectionalMambaBlock, MambaBlock])
def test_residual_is_added_once(block):
    """Branches that start at zero leave x itself, not 2x (bug 7)."""
    x = torch.randn(2, 7, WIDTH)
    torch.testing.assert_close(block(WIDTH)(x), x)


@every
def test_last_layer_makes_the_pixels(name):
    _, decoder = build(name, 4)
    x = decoder(torch.randn(2, D, 4, 4))
    gradient = torch.autograd.grad(x.square().mean(), decoder.last_layer)[0]
    assert gradient.abs().sum() > 0
    last = [p for p in decoder.parameters() if p.ndim > 1][-1]
    assert decoder.last_layer is last


@every
def test_bfloat16_autocast_is_finite_and_close(name):
    encoder, _ = map(awaken, build(name, 4))
    x = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    exact = encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(x).float()
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_match_parameters(preset):
    """Within 5 % of one another, encoder and decoder together: otherwise the comparison is not one of backbones."""
    counts = {name: parameter_count(Tokenizer(make_config(name, preset))) for name in BACKBONES}
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts


@every
def test_depth_adds_blocks_and_width_widens(name):
    def count(width: int, depth: int) -> int:
        encoder = BACKBONES[name].Encoder(SIZE, 8, D, width, depth)
        return parameter_count(encoder)

    assert count(32, 1) < count(32, 2) < count(32, 3)
    assert count(32, 1) < count(48, 1) < count(64, 1)


def test_downsamplings():
    assert [downsamplings(64, grid) for grid in (64, 32, 1)] == [0, 1, 6]
    assert downsamplings(48, 6) == 3
    for size, grid in ((64, 7), (64, 0), (64, 128), (48, 16), (64, -8)):
        with pytest.raises(ValueError, match=str(grid)):
            downsamplings(size, grid)


def test_pyramid_never_grows_towards_the_image():
    assert pyramid(96, 0) == pyramid(96, 1) == [96]
    assert pyramid(96, 3) == [24, 48, 96]
    assert pyramid(96, 6) == [24, 24, 24, 24, 48, 96]
