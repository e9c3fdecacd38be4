"""Encoder → quantizer → decoder: the codes are all that passes, and a config is all that it takes."""

import json
import math
import re
from dataclasses import asdict, replace
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from backbones import BACKBONES, Backbone, backbone
from bench.core.errors import UserError
from bench.quantizers import QUANTIZERS, Quantizer
from bench.tokenizers import sizes
from bench.tokenizers import tokenizer as module
from bench.tokenizers.sizes import parameter_count
from bench.tokenizers.tokenizer import Tokenizer, to_device

every = pytest.mark.parametrize("quantizer", QUANTIZERS)
# Without codes the decoder sees the encoder's grid: see test_continuous.py among the quantizers.
every_with_codes = pytest.mark.parametrize("quantizer", [name for name, kind in QUANTIZERS.items() if kind.discrete])


@pytest.fixture
def tiny(tiny):
    return replace(tiny, precision="fp32").resolved()


def started(config, z):
    """A tokenizer that knows codes for grids like ``z`` and whose encoder passes on what it is given."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(config)
    tokenizer.encoder = nn.Identity()
    tokenizer.quantizer.initialise(z)
    return tokenizer


@every_with_codes
def test_the_decoder_sees_nothing_but_the_codes(tiny, quantizer):
    """Grids that differ and share their codes give one reconstruction, that of ``decode``; others do not (bug 3)."""
    torch.manual_seed(1)
    z = torch.randn(4, 4, 4, 4)
    tokenizer = started(replace(tiny, quantizer=quantizer).resolved(), z).eval()
    with torch.no_grad():
        x_hat, quantized = tokenizer(z)
        near = z + 0.05 * (quantized.z_q - z) if quantizer not in ("fsq", "lfq") else z + 1e-4
        again, moved = tokenizer(near)
        assert torch.equal(moved.codes, quantized.codes)
        assert not torch.equal(near, z)
        torch.testing.assert_close(again, x_hat, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokenizer.decode(quantized.codes), x_hat.clamp(-1, 1), rtol=1e-4, atol=1e-5)
        assert (tokenizer.decoder(z) - x_hat).abs().max() > 1e-3
        with patch.object(tokenizer, "_check_images"):  # z is what an encoder gives
            assert torch.equal(tokenizer.encode(z), quantized.codes)
        assert (tokenizer(-z)[0] - x_hat).abs().max() > 1e-3


@every_with_codes
def test_in_training_too(tiny, quantizer):
    """What the forward pass returns is the decoder's view of its own codes, before they move (bug 3)."""
    torch.manual_seed(1)
    z = torch.randn(4, 4, 4, 4)
    tokenizer = started(replace(tiny, quantizer=quantizer).resolved(), z).train()
    seen = []
    tokenizer.decoder.register_forward_hook(lambda part, given, y: seen.append(given[0]))
    with torch.no_grad():
        x_hat, quantized = tokenizer(z)
        assert torch.equal(seen[0], quantized.z_q)
        assert len(seen[0].movedim(1, -1).reshape(-1, 4).unique(dim=0)) <= 64
        torch.testing.assert_close(x_hat, tokenizer.decoder(quantized.z_q))


def test_gradients_reach_encoder_and_decoder_through_the_codes(tiny, images):
    tokenizer = Tokenizer(tiny)
    x = torch.from_numpy(images.train[:4]).permute(0, 3, 1, 2).float() / 127.5 - 1
    x_hat = tokenizer(x)[0]
    (x_hat - x).square().mean().backward()
    for part in (tokenizer.encoder, tokenizer.decoder):
        assert sum(parameter.grad.abs().sum() for parameter in part.parameters() if parameter.grad is not None) > 0


def test_decode_clamps_and_training_does_not(tiny):
    """A pixel beyond [-1, 1] is an error that training must see."""
    tokenizer = Tokenizer(tiny).eval()
    last = list(tokenizer.decoder.parameters())[-1]
    nn.init.constant_(last, 9.0)
    x = torch.zeros(2, 3, 32, 32)
    assert tokenizer(x)[0].max() > 5
    images = tokenizer.decode(tokenizer.encode(x))
    assert images.max() == 1
    nn.init.constant_(last, -9.0)
    assert tokenizer.decode(tokenizer.encode(x)).min() == -1


def test_codes_are_a_grid_of_integers(tiny):
    tokenizer = Tokenizer(replace(tiny, grid_size=8)).eval()
    codes = tokenizer.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert codes.shape == (2, 8, 8)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 16
    assert tokenizer.decode(codes).shape == (2, 3, 32, 32)


def test_settings_of_the_backbone_reach_both_sides(tiny, monkeypatch):
    """Sizes in the order that every backbone takes, and to each side the options that it names."""
    built = {}

    def side(name):
        def build(*sizes, **options):
            built[name] = sizes, options
            return nn.Identity()

        return build

    fake = Backbone(side("encoder"), side("decoder"), ("attention", "pretrained"), ("attention", "final_conv"))
    monkeypatch.setitem(BACKBONES, "vit", fake)
    sizes = {"image_size": 64, "grid_size": 8, "code_dim": 5, "width": 24, "depth": 3}
    Tokenizer(replace(tiny, backbone="vit", **sizes, attention=2, pretrained=True, final_conv=True))
    assert built == {
        "encoder": ((64, 8, 5, 24, 3), {"attention": 2, "pretrained": True}),
        "decoder": ((64, 8, 5, 24, 3), {"attention": 2, "final_conv": True}),
    }


def test_the_parts_are_those_of_the_backbone(tiny):
    for name in ("cnn", "vit", "bimamba"):
        options = {"attention": 1}
        options |= {"full_resolution": True} if name == "cnn" else {"patch_overlap": True, "final_conv": True}
        options |= {"token_order": "snake", "two_streams": True} if name == "bimamba" else {}
        options |= {"rotary": True} if name == "vit" else {}
        tokenizer = Tokenizer(replace(tiny, backbone=name, **options))
        chosen = backbone(name)
        for side, build, taken in (
            (tokenizer.encoder, chosen.Encoder, chosen.encoder_options),
            (tokenizer.decoder, chosen.Decoder, chosen.decoder_options),
        ):
            expected = build(32, 4, 4, 16, 1, **{option: options[option] for option in taken})
            shapes = {key: value.shape for key, value in expected.state_dict().items()}
            assert {key: value.shape for key, value in side.state_dict().items()} == shapes


@every
def test_settings_of_the_quantizer_reach_it(tiny, monkeypatch, quantizer):
    """Every one that it names, an open entropy_weight as its own, and the size of the codebook."""
    given = {}
    real = QUANTIZERS[quantizer]

    class Recorded(Quantizer):
        settings = real.settings

        def __init__(self, *sizes, **settings):
            super().__init__(*sizes)
            given.update(settings, sizes=sizes)

    monkeypatch.setitem(QUANTIZERS, quantizer, Recorded)
    values = {"beta": 0.7, "ema_decay": 0.8, "kmeans_init": True, "gradient": "rotation", "temperature": 0.4}
    values |= {"kl_weight": 0.3, "temperature_end": 0.1, "uniform_weight": 0.2, "codebooks": 3}
    config = replace(
        tiny, quantizer=quantizer, codebook_size=64, code_dim=5, revive_after=9, entropy_weight=None, **values
    )
    values |= {"revive_after": 9, "entropy_weight": {"bsq": 0.1, "lfq": 0.1, "simvq": 0.02}.get(quantizer, 0.0)}
    Tokenizer(config)
    assert given == {"sizes": (64, 5), **{name: values[name] for name in real.settings}}


def test_a_grid_that_cannot_be_is_an_error_for_users(tiny):
    with pytest.raises(UserError, match="grid_size 5 does not divide image_size 32"):
        Tokenizer(replace(tiny, grid_size=5))


@pytest.fixture
def finished(tiny, tmp_path):
    """A finished run folder and the tokenizer in it."""
    config = replace(tiny, quantizer="l2", codebook_size=32, beta=0.6, seed=5)
    torch.manual_seed(5)
    tokenizer = Tokenizer(config)
    (tmp_path / "config.json").write_text(json.dumps({"config": asdict(config), "environment": {}}))
    safetensors.torch.save_model(tokenizer, str(tmp_path / "tokenizer.safetensors"))
    (tmp_path / "metrics.json").write_text('{"metrics": {}, "protocol": {}}')
    return tmp_path, tokenizer.eval()


def test_a_run_gives_its_tokenizer_back(finished, images):
    """Config, weights, codes and reconstructions; in eval mode and frozen, so that using it changes nothing."""
    folder, tokenizer = finished
    loaded = Tokenizer.from_run(str(folder))
    assert loaded.config == tokenizer.config
    assert loaded.quantizer.beta == 0.6
    assert loaded.state_dict().keys() == tokenizer.state_dict().keys()
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not any(part.training for part in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.from_numpy(images.test[:4]).permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = loaded.encode(x)
    assert torch.equal(codes, tokenizer.encode(x))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes).detach())


def test_a_run_s_tokenizer_comes_on_the_device_asked_for(finished):
    folder, _ = finished
    assert {tensor.device.type for tensor in Tokenizer.from_run(folder, "meta").state_dict().values()} == {"meta"}
    assert {tensor.device.type for tensor in Tokenizer.from_run(folder).state_dict().values()} == {"cpu"}


def test_an_unfinished_run_gives_none(finished):
    """Weights without scores are those of a run that may go on."""
    folder, _ = finished
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError) as error:
        Tokenizer.from_run(folder)
    assert str(error.value) == f"{folder} holds no finished run (no metrics.json); train one with python -m bench.run"


def test_weights_that_are_not_those_of_the_config_are_refused(finished):
    """Neither one too few, which would leave a random one in place, nor one too many."""
    folder, tokenizer = finished
    state = {name: value.contiguous() for name, value in tokenizer.state_dict().items()}
    name = next(iter(dict(tokenizer.encoder.named_parameters(prefix="encoder"))))
    few = {key: value for key, value in state.items() if key != name}
    for other in (few, state | {"encoder.more": torch.zeros(1)}):
        safetensors.torch.save_file(other, folder / "tokenizer.safetensors")
        with pytest.raises(UserError, match="safetensors does not hold the weights of this tokenizer"):
            Tokenizer.from_run(folder)
    (folder / "tokenizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="does not hold the weights of this tokenizer"):
        Tokenizer.from_run(folder)
    safetensors.torch.save_file(state, folder / "tokenizer.safetensors")
    Tokenizer.from_run(folder)


def test_a_finished_run_needs_no_weights_of_others(finished, monkeypatch):
    """A pretrained encoder is not fetched again; the config still says that it was."""
    folder, _ = finished
    stored = json.loads((folder / "config.json").read_text())
    stored["config"]["pretrained"] = True
    (folder / "config.json").write_text(json.dumps(stored))
    asked = []
    build = Tokenizer.__init__
    monkeypatch.setattr(
        Tokenizer, "__init__", lambda self, config: asked.append(config.pretrained) or build(self, config)
    )
    assert Tokenizer.from_run(folder).config.pretrained
    assert set(asked) == {False}


def test_parameters_are_counted_one_by_one():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))  # buffers are none
    assert parameter_count(module) == 3 * 4 + 4 + 2 * 4
    shared = nn.Sequential(module, module)
    assert parameter_count(shared) == parameter_count(module)


def test_convolutions_are_in_channels_last_layout(tiny):
    tokenizer = to_device(Tokenizer(tiny), "cpu")
    weights = [
        parameter for parameter in tokenizer.parameters() if parameter.ndim == 4 and math.prod(parameter.shape[2:]) > 1
    ]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert isinstance(to_device(nn.Linear(2, 2), "meta").weight, nn.Parameter)
    assert to_device(nn.Linear(2, 2), "meta").weight.device.type == "meta"


def test_a_tokenizer_that_cannot_be_is_refused_before_it_is_built(finished, monkeypatch):
    """A stranger's settings are checked on the device that it shall go to, and its size against the memory there."""
    folder, _ = finished
    asked = []
    monkeypatch.setattr(module, "check_size", lambda config, device: asked.append((config.pretrained, device)))
    Tokenizer.from_run(folder)
    assert asked == [(False, "cpu")]
    with pytest.raises(UserError, match="device 'cuda:77' is not available"):
        Tokenizer.from_run(folder, "cuda:77")
    stored = json.loads((folder / "config.json").read_text())
    stored["config"]["quantizer"] = "next"
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="unknown quantizer 'next'"):
        Tokenizer.from_run(folder)


@pytest.mark.parametrize("backbone", ["cnn", "timm:resnet18"])
def test_the_size_of_a_tokenizer_is_that_of_both_sides_and_its_codebook_as_often_as_it_is_held(
    tiny, monkeypatch, backbone
):
    """Of a model of timm the decoder, which is cnn's, and as much again: none is built for that."""
    asked = []
    monkeypatch.setattr(sizes, "check_memory", lambda *given: asked.append(given))
    both = sizes.parameters(tiny) + tiny.codebook_size * tiny.code_dim
    sizes.check_size(replace(tiny, backbone=backbone), "cuda:1", 3)
    sizes.check_size(replace(tiny, backbone=backbone), "cpu")
    assert asked == [(3 * both, "cuda:1"), (both, "cpu")]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (Image.new("RGB", (32, 32)), "was given PIL.Image.Image; make it of uint8 images"),
        (np.zeros((1, 3, 32, 32), dtype=np.float32), "was given numpy.ndarray"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "was given uint8 (1, 3, 32, 32)"),
        (torch.zeros(3, 32, 32), "was given float32 (3, 32, 32)"),
        (torch.zeros(1, 32, 32, 3), "was given float32 (1, 32, 32, 3)"),
        (torch.zeros(1, 3, 30, 32), "images of 30×32 pixels, and a code stands for 8×8; resize them to 32 a side"),
    ],
)
def test_what_are_no_images_is_one_sentence(tiny, given, told):
    tokenizer = Tokenizer(tiny.resolved()).eval()
    assert tokenizer.encode(torch.zeros(1, 3, 48, 32)).shape == (1, 6, 4)  # another size that fits
    for entry in (tokenizer.encode, tokenizer.encode_with_bits):
        with pytest.raises(UserError, match=re.escape(told)) as error:
            entry(given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (torch.zeros(1, 4, 4), "was given float32 (1, 4, 4)"),
        (torch.zeros(4, 4, dtype=torch.int64), "was given int64 (4, 4)"),
        ([[0]], "was given builtins.list"),
        (torch.full((1, 4, 4), 16), "was given the code 16; codes are from 0 to 15"),
        (torch.full((1, 4, 4), -1), "was given the code -1; codes are from 0 to 15"),
    ],
)
def test_what_are_no_codes_is_one_sentence(tiny, given, told):
    tokenizer = Tokenizer(tiny.resolved()).eval()
    assert tokenizer.decode(torch.full((1, 4, 4), 15)).shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match=re.escape(told)):
        tokenizer.decode(given)
    latent = Tokenizer(replace(tiny, quantizer="none").resolved()).eval()
    with pytest.raises(UserError, match=r"decode takes latents \(B, 4, h, w\) and was given int64"):
        latent.decode(torch.zeros(1, 4, 4, dtype=torch.int64))
