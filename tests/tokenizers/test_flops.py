"""FLOPs against closed forms that know the architectures from their papers, not from the code; the same everywhere."""

import math

import pytest
import torch

from backbones import ssd
from bench.priors.config import PriorConfig
from bench.priors.generate import whole_grid_flops
from bench.priors.train import build
from bench.tokenizers.config import make_config
from bench.tokenizers.costs import flops, static_costs
from bench.tokenizers.tokenizer import Tokenizer

SIZE, CODE_DIM, STATE, HEAD, TAPS, CHUNK = 64, 16, 32, 32, 4, 64


def linear(places: int, inputs: int, outputs: int, kernel: int = 1) -> int:
    """A linear map from ``kernel`` inputs to the outputs at each of ``places``; multiply and add."""
    return 2 * places * inputs * kernel * outputs


def swiglu(tokens: int, width: int) -> int:
    return 3 * linear(tokens, width, round(width / 3) * 8)


def attention(tokens: int, width: int, inner: int) -> int:
    """Projections; queries with keys; weights with values."""
    return linear(tokens, width, 3 * inner) + 2 * linear(tokens, inner, tokens) + linear(tokens, inner, width)


def transformer(tokens: int, width: int) -> int:
    return attention(tokens, width, HEAD * math.ceil(width / HEAD)) + swiglu(tokens, width)


def mixer(tokens: int, width: int) -> int:
    """Mamba-2: input projection, convolution, chunked scan (section 6 of its paper), output projection."""
    heads = math.ceil(2 * width / HEAD)
    inner = heads * HEAD
    chunks = math.ceil(tokens / CHUNK)
    sizes = [len(part) for part in torch.arange(tokens).split(math.ceil(tokens / chunks))]
    within = sum(linear(q, STATE, q) + linear(q, q, inner) for q in sizes)  # CBᵀ, then (L ∘ CBᵀ)Δx
    between = sum(linear(q, STATE, inner) for q in sizes[:-1]) + sum(linear(q, STATE, inner) for q in sizes[1:])
    projections = linear(tokens, width, 2 * inner + 2 * STATE + heads) + linear(tokens, inner, width)
    return projections + linear(tokens, 1, inner + 2 * STATE, TAPS) + within + between


def mamba(tokens: int, width: int) -> int:
    return mixer(tokens, width) + swiglu(tokens, width)


def bimamba(tokens: int, width: int) -> int:
    return 2 * mixer(tokens, width) + swiglu(tokens, width)


def residual(pixels: int, channels: int) -> int:
    return 2 * linear(pixels, channels, channels, 9)


def nextformer(pixels: int, channels: int) -> int:
    return linear(pixels, 1, channels, 49) + swiglu(pixels, channels)


def pyramid(block, grid: int, width: int, depth: int, layers: int) -> tuple[int, int]:
    """Both sides of a pyramid of 2×2 steps whose channels double towards the grid, up to four times the first."""
    levels = (SIZE // grid).bit_length() - 1
    sides = [SIZE >> level for level in range(1, levels + 1)]
    channels = [math.ceil(width / min(4, 2 ** (levels - 1 - i)) / 8) * 8 for i in range(levels - 1)] + [width]
    steps = zip(sides, [3, *channels], channels, strict=False)
    down = sum(linear(s * s, i, o, 4) for s, i, o in steps)
    up = sum(linear(s * s, o, 4 * i) for s, i, o in zip(sides[1:], channels, channels[1:], strict=False))
    pixels = linear(sides[0] ** 2, channels[0], 4 * 3, 9)
    blocks = depth * sum(block(s * s, c) for s, c in zip(sides, channels, strict=True))
    blocks += layers * transformer(grid * grid, width)
    code = linear(grid * grid, width, CODE_DIM)
    return down + blocks + code, code + blocks + up + pixels


def tokens(blocks: list, grid: int, width: int, layers: int, overlap: bool = False, conv: bool = False):
    """Both sides of patches, blocks and a tanh head that widens four times."""
    count, patch = grid * grid, (SIZE // grid * (2 if overlap else 1)) ** 2
    body = sum(block(count, width) for block in blocks) + layers * transformer(count, width)
    head = linear(count, width, 4 * width)
    encode = linear(count, 3, width, patch) + body + head + linear(count, 4 * width, CODE_DIM)
    decode = linear(count, CODE_DIM, width) + body + head + linear(count, 4 * width, width)
    return encode, decode + linear(count, width, 3, patch) + (linear(SIZE**2, 3, 3, 9) if conv else 0)


def expected(backbone: str, grid: int, width: int, depth: int, layers: int, **options) -> tuple[int, int]:
    match backbone:
        case "cnn" | "convnext":
            return pyramid({"cnn": residual, "convnext": nextformer}[backbone], grid, width, depth, layers)
        case "hybrid":  # the scan has the larger half
            kinds = [bimamba] * math.ceil(depth / 2) + [transformer] * (depth // 2)
        case _:
            kinds = [{"vit": transformer, "mamba": mamba, "bimamba": bimamba}[backbone]] * depth
    return tokens(kinds, grid, width, layers, **options)


def counted(config) -> tuple[int, int]:
    costs = static_costs(Tokenizer(config).eval())
    return costs["flops_encode"], costs["flops_decode"]


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("grid", [4, 8, 16])
@pytest.mark.parametrize("backbone", ["cnn", "convnext", "vit", "mamba", "bimamba", "hybrid"])
def test_flops_of_a_backbone_are_the_closed_form(backbone, grid, layers):
    config = make_config(backbone, grid_size=grid, width=40, depth=3, code_dim=CODE_DIM, attention=layers, device="cpu")
    assert counted(config) == expected(backbone, grid, 40, 3, layers)


@pytest.mark.parametrize("grid", [8, 16])
def test_flops_of_the_cures_for_grids_are_the_closed_form(grid):
    size = {"grid_size": grid, "width": 40, "depth": 1, "code_dim": CODE_DIM, "device": "cpu"}
    config = make_config("vit", **size, patch_overlap=True, final_conv=True)
    assert counted(config) == expected("vit", grid, 40, 1, 0, overlap=True, conv=True)


@pytest.mark.parametrize("grid", [8, 16])
@pytest.mark.parametrize("name", ["pixelcnn", "rnn", "transformer", "mamba", "independent"])
def test_flops_of_a_prior_are_the_closed_form(name, grid):
    codebook_size, count = 512, grid * grid
    prior = build(PriorConfig("run", name, depth=5, parameters=300_000), codebook_size, (grid, grid), classes=0)
    width = prior.embedding.embedding_dim if name != "independent" else 0
    inner = math.ceil(width / max(1, width // HEAD)) * max(1, width // HEAD)
    gated = linear(count, width, 2 * width, 15) + linear(count, width, 2 * width, 3)  # 3 × 5 above, 1 × 3 to the left
    gated += linear(count, 2 * width, 2 * width) + 2 * linear(count, width, width)
    layer = {
        "pixelcnn": gated,
        "rnn": 2 * linear(count, width, 4 * width) + linear(count, width, width) + swiglu(count, width),
        "transformer": attention(count, width, inner) + swiglu(count, width),
        "mamba": mamba(count, width),
        "independent": 0,
    }[name]
    layers = len(prior.layers) if name != "independent" else 0
    assert whole_grid_flops(prior) == layers * layer + linear(count, width, codebook_size)


def test_flops_of_a_conditional_prior_are_those_of_an_unconditional_one():
    config = PriorConfig("run", "transformer", depth=1)
    width = {"codebook_size": 64, "grid": (4, 4)}
    one, other = (build(config, **width, classes=classes) for classes in (0, 1))  # one row for no label and for one
    assert whole_grid_flops(one) == whole_grid_flops(other)


@pytest.mark.parametrize("backbone", ["vit", "hybrid"])
def test_flops_do_not_depend_on_where_and_how_the_model_runs(backbone, monkeypatch):
    """Kernels differ between devices and hide their work from the counter; a count that asks them differs, too."""
    config = make_config(backbone, width=40, depth=2, device="cpu")
    usual = counted(config)
    with torch.device("meta"):
        assert counted(config) == usual
    with torch.autocast("cpu", torch.bfloat16):
        assert counted(config) == usual
    assert static_costs(Tokenizer(config).train())["flops_encode"] == usual[0]

    def kernel(*arguments, **options):
        raise AssertionError("a kernel was asked")

    monkeypatch.setattr(ssd, "fast_scan", lambda: kernel)
    assert counted(config) == usual


def test_counting_leaves_the_model_as_it_was_and_draws_nothing():
    tokenizer = Tokenizer(make_config("timm:resnet18", device="cpu")).train()  # with BatchNorm's running means
    before, drawn = {name: value.clone() for name, value in tokenizer.state_dict().items()}, torch.get_rng_state()
    static_costs(tokenizer)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    assert all(value.device.type == "cpu" for value in tokenizer.state_dict().values())


def test_flops_grow_with_the_batch_alone_where_images_are_independent():
    encoder = Tokenizer(make_config("hybrid", width=40, depth=2, device="cpu")).encoder
    one, three = (flops(encoder, torch.zeros(n, 3, SIZE, SIZE)) for n in (1, 3))
    assert three == 3 * one


def test_attention_is_what_makes_many_tokens_expensive():
    """At 32×32 tokens a count without attention would miss most of it."""
    size = {"width": 64, "depth": 2, "device": "cpu"}
    few, many = (counted(make_config("vit", grid_size=grid, **size))[0] for grid in (8, 32))
    assert many > 16 * few * 2
