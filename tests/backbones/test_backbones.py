"""Contracts that every backbone keeps, at every grid; and the bugs that public backbones shipped."""

import importlib
import json
import runpy
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import nn

from backbones import BACKBONES, backbone, timm_encoder, torchvision_repair, users
from backbones.attention import Attention, SwiGLU, Turns
from backbones.cnn import ResidualBlock
from backbones.convnext import EPSILON, Depthwise, LayerNorm2d, NeXtformerBlock, RMSNorm2d, _Depthwise
from backbones.hybrid import VisionBlock
from backbones.layers import (
    GridTransformer,
    PyramidDecoder,
    RotaryBlock,
    TransformerBlock,
    blocks,
    downsamplings,
    mlp,
    orthogonal,
    patches,
    positions,
    pyramid,
    token_head,
)
from backbones.mamba import BidirectionalMambaBlock, MambaBlock, TwoStreamsBlock
from backbones.ssd import Mamba2
from bench.core.errors import UserError
from bench.quantizers import QUANTIZERS
from bench.tokenizers import train
from bench.tokenizers.budgets import match
from bench.tokenizers.config import make_config
from bench.tokenizers.presets import PRESETS
from bench.tokenizers.sizes import parameter_count, parameters
from bench.tokenizers.tokenizer import Tokenizer, to_device
from bench.training import loop
from bench.training.loop import parameter_groups

TIMM = ("timm:test_resnet", "timm:test_convnext", "timm:test_vit")  # feature maps at 2 to 32, 4 to 32, and 16 pixels
TOKENS = ("vit", "mamba", "bimamba", "hybrid")
every = pytest.mark.parametrize("name", [*BACKBONES, *TIMM])
GRIDS = (1, 4, 8, 16)
SIZE, D, WIDTH = 32, 6, 32


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def build(name: str, grid: int, depth: int = 1, size: int = SIZE, **options):
    torch.manual_seed(0)
    chosen = backbone(name)
    sides = (chosen.Encoder, chosen.encoder_options), (chosen.Decoder, chosen.decoder_options)
    return tuple(
        Side(size, grid, D, WIDTH, depth, **{option: value for option, value in options.items() if option in taken})
        for Side, taken in sides
    )


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
    assert quantized.codes.shape == ((2, grid, grid) if config.discrete else (2, D, grid, grid))
    (x_hat.square().mean() + quantized.loss).backward()
    for key, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key

    tokenizer.eval()
    codes = tokenizer.encode(x)
    assert codes.dtype == (torch.int64 if config.discrete else torch.float32)
    decoded = tokenizer.decode(codes)
    assert decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, tokenizer(x)[0].clamp(-1, 1), atol=1e-5, rtol=1e-5)


@every
@pytest.mark.parametrize("grid", GRIDS)
def test_other_images_do_not_change_mine(name, grid):
    """Attention over the batch instead of the tokens (bug 4), or any norm over the batch."""
    encoder, decoder = map(awaken, build(name, grid, attention=1, patch_overlap=True, final_conv=True))
    encoder.train(name not in TIMM)  # BatchNorm couples the images of a training batch; nothing else may
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


def test_the_two_directions_of_a_bidirectional_block_share_nothing():
    block = BidirectionalMambaBlock(WIDTH)
    forward, backward = ({id(p) for p in mixer.parameters()} for mixer in (block.forward_mixer, block.backward_mixer))
    assert forward
    assert len(forward) == len(backward)
    assert not forward & backward


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


# --------------------------------------------------------------------------------------------------------------- blocks


def swiglu(layer, x: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ layer.fc1_g.weight.T) * (x @ layer.fc1_x.weight.T)) @ layer.fc2.weight.T


def normed(norm, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def residual_block(block, x: torch.Tensor) -> torch.Tensor:
    first, second = block.branch[1], block.branch[3]
    y = F.conv2d(x.clamp(min=0), first.weight, first.bias, padding=1)
    return x + F.conv2d(y.clamp(min=0), second.weight, second.bias, padding=1)


def nextformer_block(block, x: torch.Tensor) -> torch.Tensor:
    padded = F.pad(normed(block.norm1, x.movedim(1, -1)).movedim(-1, 1), (3, 3, 3, 3))
    windows = padded.unfold(2, 7, 1).unfold(3, 7, 1)  # every channel on its own
    weight, bias = block.depthwise.weight[:, 0, None, None], block.depthwise.bias[:, None, None]
    x = x + (windows * weight).sum((-1, -2)) + bias
    return x + swiglu(block.mlp, normed(block.norm2, x.movedim(1, -1))).movedim(-1, 1)


def transformer_block(block, x: torch.Tensor) -> torch.Tensor:
    tokens = normed(block.norm1, x)
    q, k, v = (block.attention.qkv(tokens)).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (-1, 32)).transpose(1, 2) for t in (q, k, v))  # heads of 32
    mixed = ((q @ k.mT) / 32**0.5).softmax(-1) @ v
    x = x + block.attention.proj(mixed.transpose(1, 2).flatten(2))
    return x + swiglu(block.mlp, normed(block.norm2, x))


def mamba_block(block, x: torch.Tensor) -> torch.Tensor:
    x = x + block.mixer(normed(block.norm1, x))
    return x + swiglu(block.mlp, normed(block.norm2, x))


def bidirectional_block(block, x: torch.Tensor) -> torch.Tensor:
    tokens, last_to_first = normed(block.norm1, x), list(reversed(range(x.shape[1])))
    forward, backward = block.forward_mixer(tokens), block.backward_mixer(tokens[:, last_to_first])[:, last_to_first]
    x = x + forward + backward
    return x + swiglu(block.mlp, normed(block.norm2, x))


BLOCKS = {
    ResidualBlock: (residual_block, (2, 48, 5, 6)),
    NeXtformerBlock: (nextformer_block, (2, 48, 8, 9)),
    TransformerBlock: (transformer_block, (2, 7, 48)),  # two heads
    MambaBlock: (mamba_block, (2, 7, 48)),
    BidirectionalMambaBlock: (bidirectional_block, (2, 7, 48)),
}
every_block = pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)


@every_block
def test_block_is_its_definition_and_so_are_its_gradients(kind):
    """Written out in plain operations, in float64; the residuals are added once (bug 7)."""
    definition, shape = BLOCKS[kind]
    torch.manual_seed(0)
    block = awaken(kind(48)).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms, too, do something
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = (x, *block.parameters())
    weights = torch.randn(shape, dtype=torch.float64)
    found, expected = block(x), definition(block, x)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad((out * weights).sum(), leaves) for out in (found, expected))
    torch.testing.assert_close(*gradients)


@every_block
def test_every_block_starts_as_the_identity(kind):
    _, shape = BLOCKS[kind]
    x = torch.randn(shape)
    torch.testing.assert_close(kind(48)(x), x)


@pytest.mark.parametrize(("width", "hidden"), [(32, 88), (48, 128), (96, 256), (100, 264)])
def test_swiglu_has_as_many_parameters_as_the_usual_two_layers(width, hidden):
    """8 width², but for rounding to eights."""
    layer = mlp(width)
    assert layer.fc1_g.weight.shape == layer.fc1_x.weight.shape == layer.fc2.weight.T.shape == (hidden, width)
    assert parameter_count(layer) == pytest.approx(8 * width**2, rel=0.05)


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (32, 1), (48, 2), (96, 3), (100, 4)])
def test_attention_has_heads_of_32(width, heads):
    attention = TransformerBlock(width).attention
    assert (attention.heads, attention.proj.in_features) == (heads, heads * 32)


def test_blocks_share_the_depth_and_earlier_kinds_get_more():
    kinds = [lambda width: ("a", width), lambda width: ("b", width), lambda width: ("c", width)]
    shares = ["".join(kind for kind, _ in blocks(kinds, 8, depth)) for depth in range(7)]
    assert shares == ["", "a", "ab", "abc", "aabc", "aabbc", "aabbcc"]


def test_token_head_widens_four_times():
    head = token_head(8, 5)
    x = torch.randn(3, 8)
    hidden = (normed(head[0], x) @ head[1].weight.T + head[1].bias).tanh()
    assert hidden.shape == (3, 32)
    torch.testing.assert_close(head(x), hidden @ head[3].weight.T + head[3].bias)


# ------------------------------------------------------------------------------------------------------------- skeleton


@pytest.mark.parametrize(("channels", "out"), [(3, 8), (16, 8), (8, 8)])
def test_orthogonal_layers_keep_what_they_can_of_the_signal(channels, out):
    """As many orthonormal rows or columns as there can be; nothing is added."""
    layer = orthogonal(torch.nn.Sequential(torch.nn.Conv2d(channels, out, 2, stride=2)))[0]
    matrix = layer.weight.flatten(1)
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
    assert not layer.bias.any()


def layout(side: torch.nn.Module) -> list[str]:
    """Kinds of a pyramid's layers, and the channels that they lead to."""
    found = []
    for layer in side.layers:
        convolution = next((part for part in layer.modules() if isinstance(part, torch.nn.Conv2d)), None)
        channels = convolution.out_channels if convolution is not None else ""
        found.append(f"{type(layer).__name__} {channels}".strip())
    return found


@pytest.mark.parametrize("name", ["cnn", "convnext"])
def test_pyramid_has_its_blocks_at_every_level_and_attention_next_to_the_codes(name):
    block, norm = {"cnn": ("ResidualBlock", "ReLU"), "convnext": ("NeXtformerBlock", "LayerNorm2d")}[name]
    chosen, sizes = backbone(name), (32, 8, D, 48, 2, 3)
    assert layout(chosen.Encoder(*sizes)) == [
        *("Downsample 24", f"{block} 24", f"{block} 24"),
        *("Downsample 48", f"{block} 48", f"{block} 48"),
        *("GridTransformer", norm, f"Conv2d {D}"),
    ]
    assert layout(chosen.Decoder(*sizes)) == [
        *("Conv2d 48", "GridTransformer", f"{block} 48", f"{block} 48"),
        *("Upsample 96", f"{block} 24", f"{block} 24"),  # four cells of 24
        *(norm, "Upsample 12"),
    ]
    assert layout(chosen.Encoder(8, 8, D, 48, 1)) == ["Conv2d 48", f"{block} 48", norm, f"Conv2d {D}"]
    assert layout(chosen.Decoder(8, 8, D, 48, 1)) == ["Conv2d 48", f"{block} 48", norm, "Sequential 3"]


@pytest.mark.parametrize("name", ["cnn", "convnext"])
@pytest.mark.parametrize("grid", [32, 8])
def test_pyramid_s_skeleton_is_orthogonal(name, grid):
    """All convolutions between the blocks, but for the one that makes pixels."""
    encoder, decoder = build(name, grid)
    skeleton = [layer for side in (encoder.layers, decoder.layers[:-1]) for layer in side]
    convolutions = [
        part
        for layer in skeleton
        if type(layer) not in BLOCKS
        for part in layer.modules()
        if isinstance(part, torch.nn.Conv2d)
    ]
    assert len(convolutions) == 2 * downsamplings(SIZE, grid) + 1 + 2 * (grid == SIZE)
    for convolution in convolutions:
        matrix = convolution.weight.flatten(1)
        gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
        assert not convolution.bias.any()
    last = decoder.layers[-1][0].weight.flatten(1)
    assert not torch.allclose(last @ last.T, torch.eye(len(last)), atol=0.1)


@pytest.mark.parametrize("name", TOKENS)
def test_token_side_starts_as_patches_positions_and_head(name):
    """In that order, whatever the depth: all blocks start as the identity."""
    encoder, decoder = build(name, 4, depth=3, attention=1)
    x, z = torch.randn(2, 3, SIZE, SIZE), torch.randn(2, D, 4, 4)
    tokens = encoder.patchify(x).flatten(2).mT + encoder.position
    torch.testing.assert_close(encoder(x), encoder.head(tokens).mT.reshape(2, D, 4, 4), **CLOSE)
    tokens = z.flatten(2).mT @ decoder.embed.weight.T + decoder.embed.bias + decoder.position
    painted = decoder.unpatchify(decoder.head(tokens).mT.reshape(2, WIDTH, 4, 4))
    torch.testing.assert_close(decoder(z), painted, **CLOSE)


@pytest.mark.parametrize("name", TOKENS)
def test_token_side_is_its_parts_in_order(name):
    """Positions go in before the blocks, which follow one another; then the head."""
    encoder, decoder = map(awaken, build(name, 4, depth=2, attention=1))
    x, z = torch.randn(2, 3, SIZE, SIZE), torch.randn(2, D, 4, 4)
    tokens = encoder.patchify(x).flatten(2).mT + encoder.position
    for block in encoder.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(encoder(x), encoder.head(tokens).mT.reshape(2, D, 4, 4), **CLOSE)
    tokens = decoder.embed(z.flatten(2).mT) + decoder.position
    for block in decoder.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(decoder(z), decoder.unpatchify(decoder.head(tokens).mT.reshape(2, WIDTH, 4, 4)), **CLOSE)


KINDS = {
    **{"cnn": {ResidualBlock}, "convnext": {NeXtformerBlock}, "vit": {TransformerBlock}, "mamba": {MambaBlock}},
    **{"bimamba": {BidirectionalMambaBlock}, "hybrid": {BidirectionalMambaBlock, TransformerBlock}},
}


@pytest.mark.parametrize("name", [*KINDS, *TIMM])
def test_a_backbone_is_made_of_its_own_blocks(name):
    """Of one kind on either side, but for the hybrid's two."""
    encoder, decoder = build(name, 4, depth=2)
    for side in (decoder,) if name in TIMM else (encoder, decoder):
        layers = side.blocks if name in TOKENS else [layer for layer in side.layers if type(layer) in BLOCKS]
        assert {type(layer) for layer in layers} == KINDS.get(name, {ResidualBlock})


@pytest.mark.parametrize("name", ["mamba", "bimamba", "hybrid"])
def test_mamba_layers_have_states_and_heads_of_32(name):
    for side in build(name, 4):
        layers = [part for part in side.modules() if isinstance(part, Mamba2)]
        assert layers
        assert {(layer.d_state, layer.headdim, layer.d_inner) for layer in layers} == {(32, 32, 2 * WIDTH)}


@pytest.mark.parametrize("name", ["cnn", "convnext"])
def test_where_nothing_is_halved_a_cell_sees_its_neighbours(name):
    encoder, decoder = build(name, SIZE)
    x, z = torch.randn(1, 3, SIZE, SIZE, requires_grad=True), torch.randn(1, D, SIZE, SIZE, requires_grad=True)
    assert support(torch.autograd.grad(encoder(x)[0, :, 9, 5].sum(), x)[0]) == (3, 3)
    assert support(torch.autograd.grad(decoder(z)[0, :, 9, 5].sum(), z)[0]) == (3, 3)


@pytest.mark.parametrize("name", TOKENS)
def test_attention_of_tokens_stands_next_to_the_codes(name):
    plain, more = build(name, 4, depth=2), build(name, 4, depth=2, attention=2)
    (encoder, decoder), (longer_encoder, longer_decoder) = (
        [[type(block) for block in side.blocks] for side in sides] for sides in (plain, more)
    )
    assert len(encoder) == len(decoder) == 2
    assert longer_encoder == encoder + 2 * [TransformerBlock]
    assert longer_decoder == 2 * [TransformerBlock] + decoder


def test_a_fresh_grid_transformer_adds_positions_alone():
    """Row by row: a pixel's position is that of its token."""
    layer = GridTransformer(WIDTH, 4, 2)
    x = torch.randn(2, WIDTH, 4, 4)
    torch.testing.assert_close(layer(x), x + layer.position.T.view(1, WIDTH, 4, 4), **CLOSE)
    wide = torch.randn(1, WIDTH, 2, 8)  # another shape of as many
    torch.testing.assert_close(layer(wide), wide + layer.position.T.view(1, WIDTH, 2, 8), **CLOSE)


def test_a_grid_transformer_is_one_block_after_another_on_its_pixels():
    layer = awaken(GridTransformer(WIDTH, 4, 2))
    x = torch.randn(2, WIDTH, 4, 4)
    tokens = torch.stack([x[:, :, i // 4, i % 4] + layer.position[i] for i in range(16)], 1)
    expected = transformer_block(layer.blocks[1], transformer_block(layer.blocks[0], tokens))
    torch.testing.assert_close(layer(x).flatten(2).mT, expected, **CLOSE)


def test_positions_of_another_grid_are_interpolated_row_by_row():
    """What grows evenly along the rows, the columns or not at all does so at any size, away from the border."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    learned = torch.stack([rows, columns, torch.ones(8, 8)]).flatten(1).T
    assert positions(learned, 8, 8) is learned
    found = positions(learned, 16, 24).T.unflatten(1, (16, 24))[:, 4:-4, 6:-6]
    even = (torch.arange(16) + 0.5) / 2 - 0.5, (torch.arange(24) + 0.5) / 3 - 0.5
    torch.testing.assert_close(found[0], even[0][4:-4, None].expand(8, 12), atol=0.06, rtol=0)  # bicubic ripples
    torch.testing.assert_close(found[1], even[1][None, 6:-6].expand(8, 12), atol=0.06, rtol=0)
    torch.testing.assert_close(found[2], torch.ones(8, 12), **CLOSE)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_takes_images_of_one_and_a_half_and_twice_its_size(name):
    """Also with attention, whose positions are those of a grid."""
    encoder, decoder = build(name, 8, attention=1)
    for size in (SIZE * 3 // 2, 2 * SIZE):
        z = encoder(torch.zeros(1, 3, size, size))
        assert z.shape == (1, D, 8 * size // SIZE, 8 * size // SIZE)
        assert decoder(z).shape == (1, 3, size, size)


@pytest.mark.parametrize("name", [*TOKENS, "cnn"])
def test_positions_start_small_and_differ(name):
    """Deviating by 0.02, as in ViT."""
    for side in build(name, 32, attention=1):
        position = next(value.detach() for key, value in side.named_parameters() if "position" in key)
        assert position.shape == (1024, WIDTH)
        assert float(position.std()) == pytest.approx(0.02, rel=0.05)  # of 32,768 numbers
        assert abs(float(position.mean())) < 1e-3


@pytest.mark.parametrize("name", BACKBONES)
def test_a_cell_is_made_of_its_patch_and_paints_it(name):
    """Blocks start as the identity, so that nothing else reaches it: rows stay rows, columns columns."""
    encoder, decoder = build(name, 4)
    x, z = torch.randn(1, 3, SIZE, SIZE, requires_grad=True), torch.randn(1, D, 4, 4, requires_grad=True)
    blur = 2 if isinstance(decoder, PyramidDecoder) else 0  # pixels that the last convolution adds on each side
    for row, column in ((1, 2), (2, 1)):
        seen = torch.autograd.grad(encoder(x)[0, :, row, column].sum(), x)[0]
        mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
        assert torch.equal(seen[0].abs().sum(0) > 0, mask)
        mask[8 * row - blur : 8 * row + 8 + blur, 8 * column - blur : 8 * column + 8 + blur] = True
        for pixel in ((8 * row, 8 * column), (8 * row + 7, 8 * column + 7)):
            source = torch.autograd.grad(decoder(z)[0, :, pixel[0], pixel[1]].abs().sum(), z)[0]
            assert source[0, :, row, column].any()
        painted = (decoder(z + F.one_hot(torch.tensor(4 * row + column), 16).view(4, 4)) - decoder(z))[0].abs().sum(0)
        assert not (painted > 1e-6)[~mask].any()
        assert (painted > 1e-6)[mask].float().mean() > 0.95


@pytest.mark.parametrize("name", TOKENS)
def test_mamba_reads_in_raster_order_and_the_others_both_ways(name):
    """A cell of mamba sees the patches above it and those to its left, on either side of the codes (bugs 7 and 8)."""
    encoder, decoder = map(awaken, build(name, 4))
    x, z = torch.randn(1, 3, SIZE, SIZE, requires_grad=True), torch.randn(1, D, 4, 4, requires_grad=True)
    for cell in (0, 6, 9):
        row, column = divmod(cell, 4)
        expected = torch.arange(16) <= cell if name == "mamba" else torch.ones(16, dtype=torch.bool)
        seen = torch.autograd.grad(encoder(x)[0, :, row, column].sum(), x)[0].abs().sum((0, 1))
        assert torch.equal(seen.unflatten(0, (4, 8)).unflatten(2, (4, 8)).sum((1, 3)).flatten() > 0, expected)
        pixel = decoder(z)[0, :, 8 * row + 3, 8 * column + 5].sum()
        seen = torch.autograd.grad(pixel, z)[0].abs().sum((0, 1)).flatten()
        assert torch.equal(seen > 0, expected)


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
    encoder, _ = map(awaken, build(name, 4, attention=1, patch_overlap=True))
    x = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    exact = encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(x).float()
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def sizes(preset):
    """Parameters of both sides of every backbone, counted without allocating them."""
    with torch.device("meta"):
        tokenizers = {name: Tokenizer(make_config(name, preset)) for name in BACKBONES}
    return {name: parameter_count(t.encoder) + parameter_count(t.decoder) for name, t in tokenizers.items()}


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"blog256", "blog64"}))
def test_presets_match_parameters(preset):
    """Within 5 % of one another, encoder and decoder together: otherwise the comparison is not one of backbones."""
    counts = sizes(preset)
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts


def test_presets_make_the_tokens_that_their_sources_say():
    tokens = {"vqgan64": (64, 8, 1024), "vqvae32": (32, 4, 256), "celeba64": (64, 16, 512)}
    tokens |= {"vitvqgan-s": (256, 32, 8192), "blog256-fair": (256, 32, 8192), "blog64-fair": (64, 8, 1024)}
    for preset, expected in tokens.items():
        for name in BACKBONES:
            config = make_config(name, preset)
            config.check() if config.data == "photos" else None
            assert (config.image_size, config.grid_size, config.codebook_size) == expected
    assert make_config("cnn", "vqvae32").code_dim == make_config("cnn", "celeba64").code_dim == 64
    vit = make_config("vit", "vitvqgan-s")
    assert (vit.width, vit.depth, vit.quantizer) == (512, 8, "l2")


@pytest.mark.parametrize(("preset", "tokens"), [("blog256", 1024), ("blog64", 64)])
def test_the_blogs_mismatch_is_reproduced_under_its_own_name(preset, tokens):
    """Four times as many codes of the CNN as of the others, and a tenth of their parameters."""
    published = {name: make_config(name, preset) for name in ("convnext", "vit", "mamba", "bimamba")}
    assert {name: config.tokens for name, config in published.items()} == {
        **dict.fromkeys(("vit", "mamba", "bimamba"), tokens),
        "convnext": 4 * tokens,
    }
    convnext = published["convnext"]
    assert (convnext.attention, convnext.rms_norm, convnext.full_resolution) == (1, True, True)
    assert {make_config(name, f"{preset}-fair").attention for name in BACKBONES} == {1}
    counts = sizes(preset)
    assert min(counts["vit"], counts["mamba"], counts["bimamba"]) > 10 * counts["convnext"]
    assert make_config("convnext", preset, grid_size=4).grid_size == 4  # an explicit setting goes first


@every
def test_depth_adds_blocks_and_width_widens(name):
    def count(width: int, depth: int) -> int:
        side = backbone(name).Decoder if name in TIMM else backbone(name).Encoder
        return parameter_count(side(SIZE, 8, D, width, depth))

    assert count(32, 1) < count(32, 2) < count(32, 3)
    assert count(32, 1) < count(48, 1) < count(64, 1)


def test_downsamplings():
    assert [downsamplings(64, grid) for grid in (64, 32, 1)] == [0, 1, 6]
    assert downsamplings(48, 6) == 3
    for size, grid in ((64, 7), (64, 0), (64, 128), (48, 16), (64, -8), (64, 24), (33, 8), (32, 12)):
        with pytest.raises(ValueError, match=str(grid)):
            downsamplings(size, grid)


def test_pyramid_never_grows_towards_the_image():
    assert pyramid(96, 0) == pyramid(96, 1) == [96]
    assert pyramid(96, 3) == [24, 48, 96]
    assert pyramid(96, 6) == [24, 24, 24, 24, 48, 96]
    assert pyramid(100, 4) == [32, 32, 56, 100]  # rounded up, but for the grid's own


# -------------------------------------------------------------------------------------------------------------- options

CHOICES = {"attention": 2, "patch_overlap": True, "final_conv": True}
CHOICES |= {"rotary": True, "rms_norm": True, "full_resolution": True}
every_option = pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, {option: CHOICES[option] for option in chosen})
        for name in [*BACKBONES, *TIMM]
        for taken in [sorted(backbone(name).options & CHOICES.keys())]
        for chosen in [[], *([option] for option in taken), taken]
        if chosen or name == "vit"
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)


@every_option
@pytest.mark.parametrize(("size", "grid"), [(32, 32), (32, 16), (64, 8), (48, 3), (32, 1)])
def test_options_keep_shapes_and_train_everything(name, options, size, grid):
    """Patches of 1, 2, 8, 16 and 32 pixels; the pixels come out of ``last_layer``."""
    encoder, decoder = map(awaken, build(name, grid, size=size, **options))
    z = encoder(torch.rand(2, 3, size, size) * 2 - 1)
    assert z.shape == (2, D, grid, grid)
    x_hat = decoder(z)
    assert x_hat.shape == (2, 3, size, size)
    x_hat.square().mean().backward()
    for side in (encoder, decoder):
        for key, parameter in side.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
    assert decoder.last_layer is [p for p in decoder.parameters() if p.ndim > 1][-1]
    assert decoder.last_layer.grad.any()


@every_option
def test_channels_last_changes_nothing(name, options):
    config = make_config(name, "smoke", **options)
    torch.manual_seed(0)
    tokenizer = awaken(Tokenizer(config)).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    z = tokenizer.encoder(x)
    x_hat = tokenizer.decoder(z)
    to_device(tokenizer, "cpu")
    torch.testing.assert_close(tokenizer.encoder(x.contiguous(memory_format=torch.channels_last)), z, **CLOSE)
    torch.testing.assert_close(tokenizer.decoder(z.contiguous(memory_format=torch.channels_last)), x_hat, **CLOSE)


CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def support(response: torch.Tensor) -> tuple[int, int]:
    """Height and width of the box outside of which ``response`` (…, H, W) is zero."""
    seen = response.flatten(0, -3).abs().sum(0) > 0
    return int(seen.any(1).sum()), int(seen.any(0).sum())


@pytest.mark.parametrize("grid", [32, 16, 8, 4])
def test_overlap_mixes_neighbouring_patches(grid):
    """A token sees, and paints, its patch and half a patch around it, or without the option its patch alone."""
    patch = SIZE // grid
    for overlap in (False, True):
        side = (max(2 * patch, 3) if overlap else patch,) * 2
        encoder, decoder = build("vit", grid, patch_overlap=overlap)
        x = torch.zeros(1, 3, SIZE, SIZE, requires_grad=True)
        middle = encoder.patchify(x)[0, :, grid // 2, grid // 2].sum()
        assert support(torch.autograd.grad(middle, x)[0]) == side
        tokens = torch.zeros(1, WIDTH, grid, grid)
        blank = decoder.unpatchify(tokens)
        tokens[:, :, grid // 2, grid // 2] = 1
        assert support(decoder.unpatchify(tokens) - blank) == side
        _, decoder = build("vit", grid, patch_overlap=overlap, final_conv=True)
        painted = decoder.final_conv(decoder.unpatchify(tokens)) - decoder.final_conv(decoder.unpatchify(0 * tokens))
        assert support(painted) == (side[0] + 2, side[1] + 2)  # one pixel further


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("grid", [32, 16, 4])
def test_unpatchify_mirrors_patchify(grid, overlap):
    """With equal weights one is the transpose of the other: ⟨Px, t⟩ = ⟨x, Pᵀt⟩, at the borders too."""
    encoder, decoder = build("vit", grid, patch_overlap=overlap)
    assert decoder.unpatchify.weight.shape == encoder.patchify.weight.shape
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.randn(2, WIDTH, grid, grid)
    with torch.no_grad():
        decoder.unpatchify.weight.copy_(encoder.patchify.weight)
        for side in (encoder.patchify, decoder.unpatchify):
            side.bias.zero_()
        torch.testing.assert_close((encoder.patchify(x) * t).sum(), (x * decoder.unpatchify(t)).sum(), **CLOSE)


def test_patches_cover_the_image_at_every_stride():
    assert patches(64, 8, False) == {"kernel_size": 8, "stride": 8, "padding": 0}
    assert patches(64, 8, True) == {"kernel_size": 16, "stride": 8, "padding": 4}
    assert patches(64, 32, True) == {"kernel_size": 4, "stride": 2, "padding": 1}
    assert patches(64, 64, True) == {"kernel_size": 3, "stride": 1, "padding": 1}
    with pytest.raises(ValueError, match="grid_size 7"):
        patches(64, 7, True)


@pytest.mark.parametrize("name", TOKENS)
def test_cures_cost_what_they_should(name):
    def count(**options) -> list[int]:
        return [parameter_count(side) for side in build(name, 4, **options)]

    encoder, decoder = count()
    kernels = 3 * (16**2 - 8**2) * WIDTH  # twice the side of 8×8 patches
    assert count(patch_overlap=True) == [encoder + kernels, decoder + kernels]
    assert count(final_conv=True) == [encoder, decoder + 3 * 3 * 9 + 3]


@pytest.mark.parametrize("name", [*BACKBONES, "timm:test_convnext"])
def test_attention_costs_its_blocks(name):
    def count(layers: int) -> list[int]:
        return [parameter_count(side) for side in build(name, 4, attention=layers)]

    none, one, two = map(count, range(3))
    block = parameter_count(TransformerBlock(WIDTH))  # test_convnext has as many channels where its stride is 8
    position = 0 if name in TOKENS else 4**2 * WIDTH
    assert one == [side + position + block for side in none]
    assert two == [side + block for side in one]


@pytest.mark.parametrize("name", ["cnn", "convnext", "mamba", "timm:test_convnext"])
def test_attention_lets_every_cell_see_the_whole_image(name):
    """On the code side of either half, which convolutions and a causal scan cannot."""
    for layers in (0, 1):
        encoder, decoder = map(awaken, build(name, 16, size=64, attention=layers))
        x = torch.randn(2, 3, 64, 64, requires_grad=True)
        gradient = torch.autograd.grad(encoder.eval()(x)[0, :, 0, 0].sum(), x)[0]
        assert gradient[0, :, -4:, -4:].any() == bool(layers)
        assert not gradient[1].any()
        z = torch.randn(2, D, 16, 16, requires_grad=True)
        gradient = torch.autograd.grad(decoder(z)[0, :, 0, 0].sum(), z)[0]
        assert gradient[0, :, -1, -1].any() == bool(layers)
        assert not gradient[1].any()


@every
def test_options_left_alone_leave_no_trace(name):
    """The same weights, in the same order, under the same names: runs from before an option existed are continued."""
    plain = build(name, 4)
    for side, same in zip(plain, build(name, 4, attention=0, patch_overlap=False, final_conv=False), strict=True):
        assert [key for key, _ in side.named_parameters()] == [key for key, _ in same.named_parameters()]
        for key, value in side.state_dict().items():
            assert value.equal(same.state_dict()[key]), key
    if name in TOKENS:
        parts = [{key.split(".")[0] for key in side.state_dict()} for side in plain]
        assert parts[0] == {"patchify", "position", "blocks", "head"}
        assert parts[1] == {"embed", "position", "blocks", "head", "unpatchify"}
    elif name not in TIMM:
        assert {key.split(".")[0] for side in plain for key in side.state_dict()} == {"layers"}
        assert not any("position" in key for side in plain for key in side.state_dict())


def test_final_conv_is_drawn_last():
    """So it is compared on the start that the run without it has."""
    plain, cured = (build("vit", 4, final_conv=option) for option in (False, True))
    for side, other in zip(plain, cured, strict=True):
        for key, value in side.state_dict().items():
            assert value.equal(other.state_dict()[key]), key


@every
def test_options_of_other_backbones_are_refused(name):
    config = make_config(name, "smoke", device="cpu")
    config.check()
    for option, value in {**CHOICES, "pretrained": True}.items():
        chosen = replace(config, **{option: value})
        if option in backbone(name).options:
            chosen.check()
            continue
        with pytest.raises(UserError, match=f"^{option} is True, of which backbone '{name}' makes no use") as error:
            chosen.check()
        for other in users(option):
            assert other in str(error.value)
    with pytest.raises(UserError, match="attention is -1"):
        replace(config, attention=-1).check()


def test_users_of_options():
    assert users("attention") == [*BACKBONES, "timm:MODEL"]
    assert users("final_conv") == users("patch_overlap") == [*TOKENS]
    assert users("pretrained") == ["timm:MODEL"]
    assert users("rotary") == ["vit", "hybrid"]
    assert (users("rms_norm"), users("full_resolution")) == (["convnext"], ["cnn", "convnext"])


# --------------------------------------------------------------------------------------------------------------- hybrid


@pytest.mark.parametrize(
    ("depth", "kinds"), [(1, "M"), (2, "MA"), (3, "MMA"), (4, "MMAA"), (5, "MMMAA"), (8, "MMMMAAAA")]
)
def test_hybrid_scans_first_and_attends_last(depth, kinds):
    names = {BidirectionalMambaBlock: "M", TransformerBlock: "A"}
    for side in build("hybrid", 4, depth):
        assert "".join(names[type(block)] for block in side.blocks) == kinds


def test_hybrid_reads_both_ways_and_flips_back():
    """With equal mixers and no positions, reversed tokens come out as the reversed result (bug 7)."""
    for side in build("hybrid", 4, depth=4):
        blocks = awaken(side.blocks)
        for block in blocks[:2]:
            block.backward_mixer.load_state_dict(block.forward_mixer.state_dict())
        x = torch.randn(2, 16, WIDTH)
        torch.testing.assert_close(blocks(x.flip(1)), blocks(x).flip(1), **CLOSE)
        fresh = build("hybrid", 4, depth=4)[0].blocks
        torch.testing.assert_close(fresh(x), x)  # every residual once


# ----------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize(
    ("name", "size", "grid", "stride", "resize"),
    [
        ("test_resnet", 64, 8, 8, []),
        ("test_resnet", 64, 64, 2, ["Upsample"]),
        ("test_resnet", 64, 1, 32, ["Downsample"]),
        ("test_convnext", 32, 16, 4, ["Upsample"]),
        ("test_vit", 64, 8, 16, ["Upsample"]),
        ("test_vit", 96, 6, 16, []),
        ("test_vit", 64, 1, 16, ["Downsample", "Downsample"]),
        ("mobilenetv3_small_050", 64, 8, 8, []),
        ("test_mambaout", 64, 8, 8, []),  # a model whose maps are (B, h, w, C)
    ],
)
def test_timm_map_of_the_grid_s_stride_or_the_nearest(name, size, grid, stride, resize):
    encoder, _ = build(f"timm:{name}", grid, size=size)
    assert encoder.features.feature_info.reduction() == [stride]
    assert [type(step).__name__ for step in encoder.head][: len(resize)] == resize
    assert len(encoder.head) == len(resize) + 2
    z = encoder(torch.zeros(2, 3, size, size))
    assert z.shape == (2, D, grid, grid)
    z.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())  # nothing behind the map is kept


@pytest.mark.parametrize(
    ("strides", "stride", "level"),
    [
        ([2, 4, 8, 16], 8, 2),
        ([4, 8, 8, 16], 8, 2),  # of equal ones the deepest
        ([4, 16], 8, 0),  # of two equally near the finer
        ([2, 16], 8, 1),
        ([16, 32], 2, 0),
        ([3, 12, 16], 4, 2),  # only powers of two
    ],
)
def test_timm_s_nearest_map(strides, stride, level, monkeypatch):
    """Its index is timm's own, which need not start at 0."""
    info = SimpleNamespace(out_indices=[10 + i for i in range(len(strides))], reduction=lambda: strides)
    maps = [torch.zeros(1, 3, 48 // stride, 48 // stride) for stride in strides]
    monkeypatch.setattr(timm_encoder, "feature_maps", lambda *_: (SimpleNamespace(feature_info=info), maps))
    assert timm_encoder.nearest_level("any", 48, stride) == 10 + level


def test_timm_s_maps_must_cover_the_image(monkeypatch):
    info = SimpleNamespace(out_indices=[0, 1, 2], reduction=lambda: [4, 8, 8])
    maps = [torch.zeros(1, 3, 7, 8), torch.zeros(1, 3, 3, 3), torch.zeros(1, 3, 4, 5)]
    monkeypatch.setattr(timm_encoder, "feature_maps", lambda *_: (SimpleNamespace(feature_info=info), maps))
    with pytest.raises(ValueError, match="divides 32×32 images into no such grid"):
        timm_encoder.nearest_level("any", 32, 8)


def test_a_fresh_timm_encoder_has_seen_nothing():
    """The blank image that asks for its shapes leaves BatchNorm's statistics alone, and it trains."""
    encoder, _ = build("timm:test_resnet", 4)
    norms = [part for part in encoder.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms
    assert all(part.training and not part.num_batches_tracked and not part.running_mean.any() for part in norms)
    assert not {"scale", "shift"} & encoder.state_dict().keys()  # they follow from the model's name


def test_timm_encoder_couples_no_images_once_it_is_scored():
    encoder, _ = build("timm:test_resnet", 4)
    encoder(torch.randn(4, 3, SIZE, SIZE))
    encoder.eval()
    x = torch.randn(3, 3, SIZE, SIZE)
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]), **CLOSE)


@pytest.mark.parametrize("name", TIMM)
def test_timm_s_features_are_normed_and_projected(name):
    """Pixel by pixel over the channels, and orthogonally."""
    encoder, _ = build(name, 4, size=64)
    encoder.eval()
    x = torch.randn(2, 3, 64, 64)
    features = encoder.features(x * encoder.scale + encoder.shift)[0]
    norm, projection = encoder.head[-2:]
    weight = projection.weight[:, :, 0, 0]
    expected = normed(norm, features.movedim(1, -1)) @ weight.T
    torch.testing.assert_close(encoder(x), expected.movedim(-1, 1), **CLOSE)
    torch.testing.assert_close(weight @ weight.T, torch.eye(D), atol=1e-5, rtol=0)


@pytest.mark.parametrize("failing", ["operator torchvision::nms does not exist", "out of disk", ""])
def test_torchvision_is_repaired_after_that_very_error_alone(failing, monkeypatch):
    """Its operators are declared, what the failed import left is forgotten, and it is imported again."""
    log = []

    def import_module(name: str) -> None:
        log.append(f"import {name}")
        if failing and len(log) == 1:
            sys.modules["torchvision.half"] = None
            raise RuntimeError(failing)
        assert "torchvision.half" not in sys.modules

    library = SimpleNamespace(define=lambda schema: log.append(schema.partition("(")[0]))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(torch.library, "Library", lambda name, kind: log.append(f"{kind} {name}") or library)
    fresh = runpy.run_path(torchvision_repair.__file__)
    repair = fresh["repair"]
    assert not log  # nothing before it is called
    if failing == "out of disk":
        with pytest.raises(RuntimeError, match="out of disk"):
            repair()
        assert len(log) == 1
        return
    assert repair() == repair() == bool(failing)
    assert log == ["import torchvision", *(["DEF torchvision", "nms", "qnms", "import torchvision"] if failing else [])]
    assert fresh["_LIBRARIES"] == [library] * bool(failing)  # kept alive


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "vit_tiny_patch16_224"])
def test_timm_features_are_the_model_s_own(name):
    """Of images normalised as timm's transforms do it: (pixel in [0, 1] − mean) / std."""
    encoder, _ = build(f"timm:{name}", 4, size=64)
    fixed = {"img_size": 64} if "vit" in name else {}
    model = timm.create_model(name, num_classes=0, **fixed).eval()
    model.load_state_dict(encoder.features.model.state_dict(), strict=False)
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    maps = model.forward_intermediates((x - mean) / std, intermediates_only=True)
    expected = [features for features in maps if features.shape[-1] == 4][-1]
    encoder.eval()
    found = encoder.features((x * 2 - 1) * encoder.scale + encoder.shift)[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(encoder(x * 2 - 1), encoder.head(expected), **CLOSE)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("timm:resnet81", "unknown timm model 'resnet81'; did you mean resnet18"),
        ("timm:test_vit.r160", "unknown timm model 'test_vit.r160'; did you mean test_vit.r160_in1k"),
        ("timm:hf-hub:someone/something", "unknown timm model"),
        ("timm:", "unknown timm model ''"),
        ("convnet", "unknown backbone 'convnet'; choose from .*; perhaps convnext"),
        ("cnn,vit", "unknown backbone 'cnn,vit'; choose from .*; separate several by spaces"),
        ("resnet18", "unknown backbone 'resnet18'; choose from cnn, convnext, .* or timm:MODEL"),
        ("cnn:", "unknown backbone 'cnn:'"),
    ],
)
def test_unknown_names_are_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        backbone(name)
    with pytest.raises(UserError, match=sentence):
        make_config(name, "smoke")
    with pytest.raises(UserError, match=sentence):
        replace(make_config("cnn", "smoke"), backbone=name).check()


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("vit_tiny_patch16_224", 40, "gives no features of 40×40 images|divides 40×40 images into no such grid"),
        ("vit_small_patch14_reg4_dinov2", 64, "divides 64×64 images into no such grid"),
        ("inception_v3", 32, "inception_v3 gives no features of 32×32 images"),
    ],
)
def test_timm_models_that_do_not_fit_are_refused(name, size, sentence):
    config = make_config(f"timm:{name}", "smoke", image_size=size, grid_size=size // 8)
    with pytest.raises(UserError, match=sentence) as error:
        Tokenizer(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_pretrained_starts_from_timm_s_weights(name, monkeypatch):
    torch.manual_seed(7)
    published = timm.create_model(name).state_dict()  # for the size that it was trained at
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(published))
    config = make_config(f"timm:{name}", "smoke", pretrained=True)
    config.check()
    start, scratch = (Tokenizer(replace(config, pretrained=option)).encoder.features.model for option in (True, False))
    kept = [key for key, value in start.state_dict().items() if value.shape == published[key].shape and value.ndim > 1]
    assert len(kept) > 5
    for key in kept:
        assert published[key].equal(start.state_dict()[key]), key
        assert not published[key].equal(scratch.state_dict()[key]) or not published[key].any(), key


def test_weights_that_cannot_be_fetched_are_one_sentence(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no network,\nand nothing in the cache")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    config = make_config("timm:test_resnet", "smoke", pretrained=True)
    config.check()
    with pytest.raises(UserError, match=r"weights of test_resnet could not be loaded.*leave out --pretrained") as error:
        Tokenizer(config)
    assert "\n" not in str(error.value)

    # A finished run brings its own.
    tokenizer = Tokenizer(replace(config, pretrained=False))
    (tmp_path / "metrics.json").write_text('{"metrics": {}, "protocol": {}}')
    (tmp_path / "config.json").write_text(json.dumps({"config": asdict(config), "environment": {}}))
    safetensors.torch.save_model(tokenizer, str(tmp_path / "tokenizer.safetensors"))
    loaded = Tokenizer.from_run(tmp_path)
    assert loaded.config == config
    for key, value in tokenizer.state_dict().items():
        assert value.equal(loaded.state_dict()[key]), key


def test_what_timm_says_is_passed_on_in_one_short_line(monkeypatch):
    """An error without words goes by its name, a long one is cut; a name that resembles none gets no guess."""

    for said, reason in ((AssertionError(), "AssertionError"), (KeyError("a " * 200), r"'a a .* a \[\.\.\.\]")):

        def fail(*given, said=said, **options):
            raise said

        monkeypatch.setattr(timm_encoder.timm, "create_model", fail)
        sentence = rf"^timm's test_vit gives no features of 32×32 images \({reason}\)$"
        with pytest.raises(ValueError, match=sentence) as error:
            timm_encoder.feature_maps("test_vit", 32)
        assert len(str(error.value)) < 220
    with pytest.raises(ValueError, match=r"^unknown timm model 'qqqqqq'; timm.list_models\(\) gives them all$"):
        timm_encoder.check_name("qqqqqq")


def test_timm_position_embeddings_do_not_decay():
    tokenizer = Tokenizer(make_config("timm:test_vit", "smoke", attention=1))
    decayed, free = (set(map(id, group["params"])) for group in parameter_groups(tokenizer, 0.1))
    for name, parameter in tokenizer.named_parameters():
        spared = parameter.ndim < 2 or name.split(".")[-1] in ("pos_embed", "cls_token", "reg_token", "position")
        assert (id(parameter) in free) == spared, name
        assert (id(parameter) in decayed) != spared, name


def test_timm_encoder_trains_and_resumes_to_the_bit(tiny, images, tmp_path, monkeypatch):
    """BatchNorm's running statistics are part of the state, and those that are scored have moved."""
    config = replace(tiny, backbone="timm:test_resnet", steps=6, precision="fp32").resolved()

    def run(folder: str):
        (tmp_path / folder).mkdir(exist_ok=True)
        return train.train(config, images.train, tmp_path / folder, checkpoint_seconds=0)[0].state_dict()

    whole = run("whole")
    rate = loop.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", lambda config, step: rate(config, step) if step < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("parts")
    parts = run("parts")
    for key, value in whole.items():
        assert value.equal(parts[key]), key
    means = [value for key, value in whole.items() if key.endswith("running_mean")]
    assert means
    assert all(mean.any() for mean in means)


def test_run_id_of_a_timm_model_is_a_folder_name():
    assert ":" not in make_config("timm:test_vit", "smoke").run_id()
    assert make_config("timm:test_vit", "smoke").run_id().startswith("timm-test_vit-ema-")


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("size", [(2, 3, 5, 8), (1, 4, 9, 3)])
def test_gradients_of_a_depthwise_convolution_are_those_of_its_definition(size, kernel):
    """In float64 against finite differences, and all three against autograd's own."""
    torch.manual_seed(0)
    layer = Depthwise(size[1], kernel).double()
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *given: _Depthwise.apply(*given), (x, layer.weight, layer.bias))
    upstream = torch.randn(size, dtype=torch.float64)
    wanted = [x, layer.weight, layer.bias]
    plain = F.conv2d(x, layer.weight, layer.bias, padding=kernel // 2, groups=size[1])
    expected = torch.autograd.grad((plain * upstream).sum(), wanted)
    for ours, theirs in zip(torch.autograd.grad((layer(x) * upstream).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_frozen_depthwise_convolution_has_a_gradient_of_its_input_alone():
    layer = Depthwise(4, 7).requires_grad_(False)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad.abs().sum() > 0


def test_under_autocast_the_gradient_of_depthwise_weights_is_nearer_to_float64_than_autograds():
    """Products of bfloat16 numbers are summed in float32 and stay there."""
    torch.manual_seed(0)
    layer, x, upstream = Depthwise(16, 7), torch.randn(8, 16, 16, 16), torch.randn(8, 16, 16, 16)
    x, upstream = (t.bfloat16().float() for t in (x, upstream))  # what autocast would make of them is no error here
    weight = layer.weight.detach().double().requires_grad_()
    F.conv2d(x.double(), weight, padding=3, groups=16).backward(upstream.double())
    errors = []
    for forward in (layer, lambda x: F.conv2d(x, layer.weight, layer.bias, padding=3, groups=16)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x)
        assert y.dtype == torch.bfloat16
        y.backward(upstream.bfloat16())
        assert layer.weight.grad.dtype == torch.float32
        errors.append((layer.weight.grad - weight.grad).abs().max().item())
    assert errors[0] < 0.01 * errors[1]


@pytest.mark.parametrize(("tokens", "half", "fused"), [(64, True, False), (257, True, True), (64, False, True)])
def test_attention_of_few_tokens_in_bfloat16_is_two_matrix_products_and_the_same(tokens, half, fused):
    """On a CPU: the fused one's backward pass is several times slower there. The values are the fused one's."""
    torch.manual_seed(0)
    block = TransformerBlock(64)
    nn.init.normal_(block.attention.proj.weight, std=0.1)
    x = torch.randn(2, tokens, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), pytest.MonkeyPatch.context() as patch:
        known, calls = F.scaled_dot_product_attention, []
        patch.setattr(F, "scaled_dot_product_attention", lambda *qkv: calls.append(1) or known(*qkv))
        y = block(x)
    assert bool(calls) is fused
    block.double()
    torch.testing.assert_close(y.double(), block(x.double()), rtol=0.02 if half else 1e-5, atol=0.02 if half else 1e-5)


def published_streams(block, x: torch.Tensor) -> torch.Tensor:
    """The forward pass as the post prints it."""
    f, b = x, torch.flip(x, dims=[1])
    f = block.mixers[0](normed(block.norm1, f)) + f
    f = swiglu(block.mlps[0], normed(block.norms2[0], f)) + f
    b = block.mixers[1](normed(block.norm1, b)) + b
    b = swiglu(block.mlps[1], normed(block.norms2[1], b)) + b
    return f + torch.flip(b, dims=[1])


def vision(block, x: torch.Tensor) -> torch.Tensor:
    """Branches, scan step by step, concatenation, projection."""
    mixer, u = block.mixer, normed(block.norm1, x)
    projected = F.pad(u @ mixer.in_proj.weight.T, (0, 0, 1, 1))
    taps = sum(projected[:, tap : tap + x.shape[1]] * mixer.conv.weight[:, 0, tap] for tap in range(3))
    scanned, beside = F.silu(taps + mixer.conv.bias).chunk(2, -1)
    B, C, dt = (scanned @ mixer.scan_proj.weight.T).split([32, 32, mixer.heads], -1)
    dt, state, outs = F.softplus(dt + mixer.dt_bias), 0, []
    for t in range(x.shape[1]):
        head = scanned[:, t].unflatten(-1, (mixer.heads, 32))
        decay = (dt[:, t] * -mixer.A_log.exp()).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * head)[..., None] * B[:, t, None, None]
        outs.append((state @ C[:, t, None, :, None])[..., 0] + mixer.D[:, None] * head)
    mixed = torch.cat([torch.stack(outs, 1).flatten(2), beside], -1) @ mixer.out_proj.weight.T
    x = x + mixed
    return x + swiglu(block.mlp, normed(block.norm2, x))


def close_to(block, definition) -> None:
    """``block`` with random weights is what ``definition`` says, and so are the gradients of its parameters."""
    for parameter in block.parameters():
        if not getattr(parameter, "_no_weight_decay", False):
            nn.init.normal_(parameter, std=0.3)
    block, x = block.double(), torch.randn(2, 9, 48, dtype=torch.float64)
    upstream, parameters = torch.randn(2, 9, 48, dtype=torch.float64), list(block.parameters())
    ours, theirs = block(x), definition(block, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad((y * upstream).sum(), parameters) for y in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_two_streams_are_the_published_block():
    torch.manual_seed(0)
    close_to(TwoStreamsBlock(48), published_streams)


def test_the_vision_mixer_is_the_published_one_with_our_scan():
    torch.manual_seed(0)
    close_to(VisionBlock(48), vision)


@pytest.mark.parametrize(("name", "option"), [("bimamba", "two_streams"), ("hybrid", "vision_mixer")])
def test_another_mixer_is_matched_in_parameters_and_sees_the_whole_grid(name, option):
    """Both sides have it; ``--match`` solves for its width; the last token reaches the first, which no scan alone lets
    it."""
    usual = make_config(name, "cpu", device="cpu")
    other = match(replace(usual, **{option: True}), f"params:{parameters(usual)}")
    assert other.width != usual.width
    assert parameters(other) == pytest.approx(parameters(usual), rel=0.02)
    kinds = {type(block) for side in ("encoder", "decoder") for block in getattr(Tokenizer(other), side).blocks}
    assert kinds == ({TwoStreamsBlock} if name == "bimamba" else {VisionBlock, TransformerBlock})
    encoder = Tokenizer(replace(other, width=32, depth=2)).encoder
    for parameter in encoder.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    encoder(x)[0, :, 0, 0].sum().backward()
    assert x.grad[0, :, -8:, -8:].abs().sum() > 0


TIMM_S = {  # ours, timm's with the same parameters, and the shape of what they are given
    "Attention": (lambda: Attention(48), lambda: timm.layers.Attention(48, num_heads=2, attn_head_dim=32), (2, 6, 48)),
    "SwiGLU": (lambda: SwiGLU(48, 128), lambda: timm.layers.SwiGLU(48, hidden_features=128, bias=False), (2, 6, 48)),
    "LayerNorm2d": (lambda: LayerNorm2d(48), lambda: timm.layers.LayerNorm2d(48), (2, 48, 5, 6)),
    "RMSNorm2d": (lambda: RMSNorm2d(48), lambda: timm.layers.RmsNorm2d(48), (2, 48, 5, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(48, eps=EPSILON), lambda: timm.layers.RmsNorm(48), (2, 6, 48)),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", TIMM_S)
def test_layers_that_timm_has_are_bit_equal_to_them(name, half):
    """Weights drawn, names of parameters, outputs and gradients: what was trained on timm's goes on with ours."""
    make_ours, make_theirs, shape = TIMM_S[name]
    found = []
    for make in (make_ours, make_theirs):
        torch.manual_seed(0)
        layer, x = make(), torch.randn(shape, requires_grad=True)
        layer.fused_attn = not half  # which timm has one choose; ours does
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = layer(x)
        y.float().square().sum().backward()
        found.append({**layer.state_dict(), "y": y, "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_rotary_positions_are_bit_equal_to_timm_s():
    rope = timm.layers.RotaryEmbeddingCat(32, temperature=100.0, in_pixels=False)
    layer = timm.layers.AttentionRope(48, 2, qkv_bias=False, num_prefix_tokens=0, attn_head_dim=32)
    torch.manual_seed(0)
    ours, x = Attention(48), torch.randn(2, 15, 48)
    layer.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x, *Turns()(3, 5)), layer(x, rope.get_embed([3, 5])))


def test_a_seed_s_rotary_weights_are_those_of_timm_s_time():
    """Then a block replaced its attention by another, for which weights were drawn anew."""
    torch.manual_seed(0)
    block = RotaryBlock(48)
    torch.manual_seed(0)
    TransformerBlock(48)
    assert torch.equal(block.attention.qkv.weight, Attention(48).qkv.weight)


# ------------------------------------------------------------------------------------------------ positions and norms


def rotary_block(block, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Channel pairs as complex numbers: the first half turned by the row, the second by the column, each pair slower
    than the one before."""
    tokens = normed(block.norm1, x)
    q, k, v = (block.attention.qkv(tokens)).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (-1, 32)).transpose(1, 2) for t in (q, k, v))
    speeds = 100.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    rows, columns = (torch.arange(height * width) // width, torch.arange(height * width) % width)
    angles = torch.cat([rows[:, None] * speeds, columns[:, None] * speeds], 1)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (16, 2)).contiguous()) * turn) for t in (q, k))
    mixed = ((q.flatten(-2) @ k.flatten(-2).mT) / 32**0.5).softmax(-1) @ v
    x = x + block.attention.proj(mixed.transpose(1, 2).flatten(2))
    return x + swiglu(block.mlp, normed(block.norm2, x))


@pytest.mark.parametrize(("height", "width"), [(3, 5), (1, 1), (4, 4)])
def test_rotary_attention_is_the_published_one(height, width):
    torch.manual_seed(0)
    block = awaken(RotaryBlock(48)).double()
    x = torch.randn(2, height * width, 48, dtype=torch.float64)
    torch.testing.assert_close(block(x, height, width), rotary_block(block, x, height, width), rtol=1e-6, atol=1e-6)


def test_rotary_attention_knows_distances_alone():
    """Two tokens that attend to each other alone get the same wherever both are moved to, and not when one is."""
    torch.manual_seed(0)
    block = awaken(RotaryBlock(32))

    def told(first: int, second: int) -> torch.Tensor:
        return TransformerBlock.forward(block, pair, *(values[[first, second]] for values in block.turns(6, 6)))

    pair = torch.randn(1, 2, 32)
    torch.testing.assert_close(told(0, 9), told(14, 23))  # one row and three columns apart
    torch.testing.assert_close(told(0, 9), told(26, 35))
    assert not torch.allclose(told(0, 9), told(0, 15))
    assert not torch.allclose(told(0, 1), told(0, 6))  # a column is no row


@pytest.mark.parametrize("name", ["vit", "hybrid"])
def test_with_rotary_positions_there_are_no_others_and_attention_has_them_everywhere(name):
    options = {"rotary": True, "attention": 1}
    for side in build(name, 4, depth=2, **options):
        assert side.position is None
        assert not any(type(block) is TransformerBlock for block in side.blocks)
        assert sum(type(block) is RotaryBlock for block in side.blocks) == (3 if name == "vit" else 2)
    encoder = awaken(build(name, 4, depth=2, **options)[0])
    x = torch.randn(1, 3, SIZE, SIZE)
    moved = encoder(x.flip(3)).flip(3)
    assert not torch.allclose(encoder(x), moved, atol=1e-3)  # it knows where its tokens are
    assert encoder(torch.randn(1, 3, 48, 64)).shape == (1, D, 6, 8)


def test_rms_norm_neither_centres_nor_shifts():
    """NeXtformer's: x / √(mean x²) · weight, of blocks and of what precedes the codes."""
    torch.manual_seed(0)
    encoder = build("convnext", 8, rms_norm=True)[0]
    block = awaken(next(part for part in encoder.modules() if isinstance(part, NeXtformerBlock))).double()
    x = torch.randn(2, block.norm1.weight.numel(), 8, 9, dtype=torch.float64)

    def rms(norm, x):
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "normed", rms)
        torch.testing.assert_close(block(x), nextformer_block(block, x))
    for side in build("convnext", 8, rms_norm=True):
        names = {type(part).__name__ for part in side.modules() if "Norm" in type(part).__name__}
        assert names == {"RMSNorm", "RMSNorm2d"}


@pytest.mark.parametrize("name", ["cnn", "convnext"])
def test_a_pyramid_at_full_resolution_has_blocks_there(name):
    block, norm = {"cnn": ("ResidualBlock", "ReLU"), "convnext": ("NeXtformerBlock", "LayerNorm2d")}[name]
    chosen = backbone(name)
    assert layout(chosen.Encoder(16, 8, D, 48, 2, full_resolution=True)) == [
        *("Conv2d 24", f"{block} 24", f"{block} 24"),  # at 16×16
        *("Downsample 48", f"{block} 48", f"{block} 48", norm, f"Conv2d {D}"),
    ]
    assert layout(chosen.Decoder(16, 8, D, 48, 2, full_resolution=True)) == [
        *("Conv2d 48", f"{block} 48", f"{block} 48"),
        *("Upsample 96", f"{block} 24", f"{block} 24", norm, "Sequential 3"),
    ]


def test_full_resolution_without_a_further_level_is_refused():
    with pytest.raises(UserError, match="full_resolution adds no level to a grid as large as the image; leave it out"):
        make_config("cnn", "smoke", grid_size=32, full_resolution=True).check()
    make_config("cnn", "smoke", grid_size=16, full_resolution=True).check()
