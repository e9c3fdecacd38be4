"""The SSD scan, the Mamba-2 layer and its uses, held against mamba-ssm's Triton kernels and against transformers."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import BACKBONES
from backbones.mamba import HEAD_DIM, STATE_DIM, BidirectionalMambaBlock
from backbones.ssd import Mamba2, fast_scan, ssd_scan
from tests import triton_interpreter
from tests.triton_interpreter import InTwoPieces, fast_path, layer_with_gradients, slow_path, with_gradients

pytestmark = pytest.mark.xdist_group("interpreted")
needs_kernel = pytest.mark.skipif(fast_scan() is None, reason="needs CUDA and its mamba-ssm: pip install '.[mamba]'")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable]:
    """Calls a function of `triton_interpreter` in the process that has mamba-ssm."""
    missing = [name for name in triton_interpreter.PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; run `make install`")
    with triton_interpreter.start() as process:
        yield lambda function, *args: process.submit(function, *args).result()


def stirred(module: nn.Module) -> nn.Module:
    """No parameter keeps a value, such as zero or one, that would hide what is done with it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """The largest difference over the largest number, for every output and every gradient."""
    assert actual.keys() == expected.keys()
    difference = {name: (actual[name] - expected[name]).abs().max().item() for name in expected}
    error = {name: difference[name] / expected[name].abs().max().item() for name in expected}
    assert max(error.values()) <= tolerance, error


# --- the scan -------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of a scan, and the length of the kernel's chunks; `ssd_scan` keeps its own."""

    length: int
    chunk_size: int
    heads: int = 2
    head_dim: int = 16
    state_dim: int = 16
    groups: int = 1
    batch: int = 1


SCANS = {
    "8x8 tokens": Sizes(64, 256, 3, HEAD_DIM, STATE_DIM),
    "16x16 tokens": Sizes(256, 256, 3, HEAD_DIM, STATE_DIM),
    "Mamba-2's defaults": Sizes(300, 256, head_dim=64, state_dim=128),
    "two groups": Sizes(40, 32, heads=4, groups=2),
    "a group per head": Sizes(20, 32, heads=3, groups=3),
    "odd sizes": Sizes(50, 32, head_dim=24, state_dim=40, batch=2),
    "one step": Sizes(1, 64),
    "one chunk": Sizes(64, 64),
    "one chunk and a step": Sizes(65, 64),
    "whole chunks of 16": Sizes(48, 16),
    "chunks of 128": Sizes(150, 128),
}


def scan_arguments(sizes: Sizes) -> dict[str, Tensor]:
    """Of mamba-ssm's scan, with dt before softplus; they require gradients."""
    length, _, heads, head_dim, state_dim, groups, batch = sizes
    torch.manual_seed(length)
    tensors = {
        "x": torch.randn(batch, length, heads, head_dim),
        "dt": torch.randn(batch, length, heads),
        "A": -torch.empty(heads).uniform_(1, 16),
        "B": torch.randn(batch, length, groups, state_dim),
        "C": torch.randn(batch, length, groups, state_dim),
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads) - 3,
        "initial_states": torch.randn(batch, heads, head_dim, state_dim),
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def our_scan(x, dt, A, B, C, D=None, dt_bias=None, initial_states=None) -> tuple[Tensor, Tensor]:
    """`ssd_scan` with the arguments of mamba-ssm's."""
    dt = dt if dt_bias is None else F.softplus(dt + dt_bias)
    return ssd_scan(x, dt, A, B, C, D, initial_state=initial_states, return_final_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCANS)
def test_scan_is_that_of_mamba_ssm(interpreted: Callable, name: str):
    tensors = scan_arguments(SCANS[name])
    expected = interpreted(triton_interpreter.scan, tensors, SCANS[name].chunk_size)
    assert_same(with_gradients(our_scan(**tensors), tensors), expected)


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["D", "dt_bias", "initial_states"])
def test_optional_arguments_mean_the_same(interpreted: Callable, absent: str):
    tensors = scan_arguments(Sizes(20, 16))
    del tensors[absent]
    if absent == "dt_bias":  # then there is no softplus either
        tensors["dt"] = F.softplus(tensors["dt"] - 3).detach().requires_grad_()
    expected = interpreted(triton_interpreter.scan, tensors, 16)
    assert_same(with_gradients(our_scan(**tensors), tensors), expected)


# --- the layer ------------------------------------------------------------------------------------------------------

LAYERS = {
    "Mamba-2's defaults": {"d_model": 64},
    "ours": {"d_model": 48, "d_state": STATE_DIM, "headdim": HEAD_DIM},
    "two groups, biases": {"d_model": 32, "d_state": 16, "headdim": 16, "ngroups": 2, "bias": True, "chunk_size": 16},
    "two taps, no bias": {"d_model": 32, "d_state": 24, "headdim": 8, "d_conv": 2, "conv_bias": False, "expand": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_that_of_mamba_ssm(interpreted: Callable, name: str):
    """State dicts travel both ways: mamba-ssm's into ours here, ours into mamba-ssm's in `triton_interpreter.twin`."""
    ours = Mamba2(**LAYERS[name])
    state, undecayed, _ = interpreted(triton_interpreter.fresh, LAYERS[name])
    ours.load_state_dict(state)
    assert undecayed == {name for name, p in ours.named_parameters() if getattr(p, "_no_weight_decay", False)}
    u = torch.randn(1, 20, LAYERS[name]["d_model"])
    assert_same(layer_with_gradients(stirred(ours), u), interpreted(triton_interpreter.layer, ours, u))


@pytest.mark.slow
def test_defaults_are_those_of_mamba_ssm(interpreted: Callable):
    _, _, theirs = interpreted(triton_interpreter.fresh, {"d_model": 64})
    ours = {p.name: p.default for p in inspect.signature(Mamba2).parameters.values()}
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [0, 1, 6])
def test_decoding_is_that_of_mamba_ssm(interpreted: Callable, prompt: int):
    """Outputs, and the cache in the end, after a prompt and steps (d_conv - 1 inputs do; mamba-ssm keeps d_conv)."""
    ours = stirred(Mamba2(32, d_state=16, headdim=16, ngroups=2))
    u = torch.randn(2, 10, 32)
    expected, conv, state = interpreted(triton_interpreter.decode, ours, u, prompt)
    outputs, cache = [], ours.initial_cache(2)
    for piece in u.split([prompt] * (prompt > 0) + [1] * (10 - prompt), dim=1):
        out, cache = ours.step(piece, cache)
        outputs.append(out)
    actual = {"outputs": torch.cat(outputs, 1), **cache._asdict()}
    assert_same(actual, {"outputs": expected, "conv": conv[..., 1:].mT, "state": state})


@pytest.mark.slow
def test_bidirectional_block_is_two_layers_of_mamba_ssm(interpreted: Callable):
    block = stirred(BidirectionalMambaBlock(32))
    x = torch.randn(1, 12, 32)
    assert_same(layer_with_gradients(block, x), interpreted(triton_interpreter.bidirectional, block, x))


def test_layer_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch):
    """Its path in PyTorch, a third implementation, has the same parameter names."""
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # its kernels are taken wherever they import
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    pytest.importorskip("transformers", reason="transformers not installed: run `make install`")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    ours = stirred(Mamba2(32, d_state=16, headdim=16, ngroups=2, bias=True))
    sizes = {"hidden_size": 32, "state_size": 16, "num_heads": 4, "head_dim": 16, "n_groups": 2, "num_hidden_layers": 1}
    theirs = Mamba2Mixer(Mamba2Config(**sizes, use_bias=True, chunk_size=16), layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    u = torch.randn(2, 40, 32)
    assert_same(layer_with_gradients(ours, u), layer_with_gradients(theirs, u))


# --- our own modules on mamba-ssm's kernel --------------------------------------------------------------------------


def mamba_layers(module: nn.Module) -> int:
    return sum(isinstance(m, Mamba2) for m in module.modules())


def encoder(name: str) -> nn.Module:
    """To 2×2 codes of 4, from images of 32×32."""
    return stirred(BACKBONES[name].Encoder(32, 2, 4, 32, 2))


MAMBAS = [name for name in BACKBONES if mamba_layers(encoder(name))]


@pytest.mark.slow
@pytest.mark.parametrize("name", MAMBAS)
def test_backbone_runs_on_the_kernel(interpreted: Callable, name: str):
    """Once for each of its Mamba-2 layers, with the results of the PyTorch scan."""
    module, x = encoder(name), torch.randn(1, 3, 32, 32)
    calls, actual = interpreted(fast_path, module, x, torch.float32)
    assert calls == mamba_layers(module)
    assert_same(actual, slow_path(module, x, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2)], ids=str)
def test_layer_and_its_cache_run_on_the_kernel(interpreted: Callable, dtype: torch.dtype, tolerance: float):
    """In float16 for want of an interpreted bfloat16."""
    module, u = InTwoPieces(stirred(Mamba2(32, d_state=16, headdim=16))), torch.randn(1, 20, 32)
    calls, actual = interpreted(fast_path, module, u, dtype)
    assert calls == 2
    assert_same(actual, slow_path(module, u, dtype), tolerance)


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("name", MAMBAS)
def test_backbone_runs_on_the_kernel_on_cuda(name: str):
    """A backbone adds up the roundings of its layers: only where it begins and ends is there a bound for them."""
    module, x = encoder(name).cuda(), torch.randn(4, 3, 32, 32, device="cuda")
    calls, actual = fast_path(module, x, torch.bfloat16)
    expected = slow_path(module, x, torch.bfloat16)
    assert calls == mamba_layers(module)
    ends = "output 0", "gradient of u"
    assert_same({end: actual[end] for end in ends}, {end: expected[end] for end in ends}, tolerance=0.1)


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)], ids=str)
def test_layer_and_its_cache_run_on_the_kernel_on_cuda(dtype: torch.dtype, tolerance: float):
    """In float32 the kernel's products are rounded to TF32."""
    module, u = InTwoPieces(stirred(Mamba2(128))).cuda(), torch.randn(2, 600, 128, device="cuda")
    calls, actual = fast_path(module, u, dtype)
    assert calls == 2
    assert_same(actual, slow_path(module, u, dtype), tolerance)
