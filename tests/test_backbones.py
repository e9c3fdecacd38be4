"""Contracts that every backbone keeps, at every grid; and the bugs that public backbones shipped."""

import json
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch

from backbones import BACKBONES, backbone, users
from backbones.layers import TransformerBlock, downsamplings, patches, pyramid
from backbones.mamba import BidirectionalMambaBlock, MambaBlock
from bench import train
from bench.config import PRESETS, make_config
from bench.files import UserError
from bench.quantizers import QUANTIZERS
from bench.tokenizer import Tokenizer, parameter_count, to_device
from bench.train import parameter_groups

import timm  # isort: skip  (after backbones, which repairs torchvision)

TIMM = ("timm:test_resnet", "timm:test_convnext", "timm:test_vit")  # feature maps at 2 to 32, 4 to 32, and 16 pixels
TOKENS = ("vit", "mamba", "bimamba", "hybrid")
every = pytest.mark.parametrize("name", [*BACKBONES, *TIMM])
GRIDS = (1, 4, 8, 16)
SIZE, D, WIDTH = 32, 6, 32


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


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"blog256"}))
def test_presets_match_parameters(preset):
    """Within 5 % of one another, encoder and decoder together: otherwise the comparison is not one of backbones."""
    counts = sizes(preset)
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts


def test_presets_make_the_tokens_that_their_sources_say():
    tokens = {"vqgan64": (64, 8, 1024), "vqvae32": (32, 4, 256), "celeba64": (64, 16, 512)}
    tokens |= {"vitvqgan-s": (256, 32, 8192), "blog256-fair": (256, 32, 8192)}
    for preset, expected in tokens.items():
        for name in BACKBONES:
            config = make_config(name, preset)
            config.check() if config.data == "photos" else None
            assert (config.image_size, config.grid_size, config.codebook_size) == expected
    assert make_config("cnn", "vqvae32").code_dim == make_config("cnn", "celeba64").code_dim == 64
    vit = make_config("vit", "vitvqgan-s")
    assert (vit.width, vit.depth, vit.quantizer) == (512, 8, "l2")


def test_the_blogs_mismatch_is_reproduced_under_its_own_name():
    """4,096 codes of the CNN beside 1,024 of the others, and a tenth of their parameters."""
    published = {name: make_config(name, "blog256") for name in ("convnext", "vit", "mamba", "bimamba")}
    assert {name: config.tokens for name, config in published.items()} == {
        **dict.fromkeys(("vit", "mamba", "bimamba"), 1024),
        "convnext": 4096,
    }
    assert published["convnext"].attention == 1
    counts = sizes("blog256")
    assert min(counts["vit"], counts["mamba"], counts["bimamba"]) > 10 * counts["convnext"]
    assert make_config("convnext", "blog256", grid_size=16).grid_size == 16  # an explicit setting goes first


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
    for size, grid in ((64, 7), (64, 0), (64, 128), (48, 16), (64, -8)):
        with pytest.raises(ValueError, match=str(grid)):
            downsamplings(size, grid)


def test_pyramid_never_grows_towards_the_image():
    assert pyramid(96, 0) == pyramid(96, 1) == [96]
    assert pyramid(96, 3) == [24, 48, 96]
    assert pyramid(96, 6) == [24, 24, 24, 24, 48, 96]


# -------------------------------------------------------------------------------------------------------------- options

CHOICES = {"attention": 2, "patch_overlap": True, "final_conv": True}
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
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"config": asdict(config)}))
    safetensors.torch.save_model(tokenizer, str(tmp_path / "tokenizer.safetensors"))
    loaded = Tokenizer.from_run(tmp_path)
    assert loaded.config == config
    for key, value in tokenizer.state_dict().items():
        assert value.equal(loaded.state_dict()[key]), key


def test_timm_position_embeddings_do_not_decay():
    tokenizer = Tokenizer(make_config("timm:test_vit", "smoke", attention=1))
    decayed, free = (set(map(id, group["params"])) for group in parameter_groups(tokenizer, 0.1))
    for name, parameter in tokenizer.named_parameters():
        spared = parameter.ndim < 2 or name.split(".")[-1] in ("pos_embed", "cls_token", "reg_token", "position")
        assert (id(parameter) in free) == spared, name
        assert (id(parameter) in decayed) != spared, name


def test_timm_encoder_trains_and_resumes_to_the_bit(tiny, images, tmp_path, monkeypatch):
    """BatchNorm's running statistics are part of the state, and those that are scored have moved."""
    config = replace(tiny, backbone="timm:test_resnet", steps=6).resolved()

    def run(folder: str):
        (tmp_path / folder).mkdir(exist_ok=True)
        return train.train(config, images.train, tmp_path / folder, checkpoint_seconds=0)[0].state_dict()

    whole = run("whole")
    rate = train.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda config, step: rate(config, step) if step < 3 else 1 / 0)
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
