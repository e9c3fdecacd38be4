"""mamba-ssm itself on the CPU: its Triton kernels, interpreted, for the tests that hold ours against them.

Triton decides at its first import whether it compiles or interprets kernels, and mamba-ssm takes a GPU for granted.
What persuades them changes a whole process. So they get one of their own, `start()`, and the functions below are what
is sent there. All of mamba-ssm runs as it is but the convolution, which it leaves to PyTorch without causal-conv1d, and
the fused kernel (`use_mem_eff_path`), which it has not got then. Both need CUDA.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import multiprocessing
import os
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from backbones import ssd
from backbones.mamba import BidirectionalMambaBlock
from backbones.torchvision_repair import repair

PACKAGES = ("triton", "einops", "huggingface_hub", "mamba_ssm")


def start() -> ProcessPoolExecutor:
    """A process in which mamba-ssm imports and runs without a GPU; `submit` one of the functions below to it."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # inherited, and so there before any import
        process.submit(_persuade).result()
    return process


def _persuade() -> None:
    """Has the next import of mamba-ssm succeed, and its kernels run, without a GPU."""
    repair()  # the modules that are sent here have layers of timm in them
    import triton

    autotune = triton.autotune

    def autotune_to_largest(configs: list, *args: Any, **options: Any) -> Callable:
        """No timing, and the largest blocks: the interpreter's costs are per block, not per number."""
        return autotune([max(configs, key=_block_size)], *args, **options)

    triton.autotune = autotune_to_largest
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=1)
    sys.modules["causal_conv1d"] = None  # wherever it is installed, it needs a GPU
    package = types.ModuleType("mamba_ssm")  # whose own __init__ imports Mamba-1's compiled scan
    package.__path__ = list(importlib.util.find_spec("mamba_ssm").submodule_search_locations)
    sys.modules["mamba_ssm"] = package


def _block_size(config: Any) -> int:
    return math.prod(size for name, size in config.kwargs.items() if name.startswith("BLOCK_SIZE"))


def with_gradients(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, and the gradients of a fixed random projection of them, so that no two errors cancel."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out.shape, generator=generator).to(out.device) for out in outputs]
    loss = sum((out.float() * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def layer_with_gradients(layer: nn.Module, u: Tensor) -> dict[str, Tensor]:
    """`with_gradients` of ``layer`` at ``u``, for u and every parameter."""
    u = u.detach().requires_grad_()
    return with_gradients((layer(u),), {"u": u, **dict(layer.named_parameters())})


class InTwoPieces(nn.Module):
    """A Mamba-2 layer that reads half of a sequence, and the other half with the cache that this left."""

    def __init__(self, layer: ssd.Mamba2) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor) -> Tensor:
        """u (b, l, d_model), l >= 2 -> (b, l, d_model)."""
        early, late = u.chunk(2, dim=1)
        early, cache = self.layer.step(early, self.layer.initial_cache(len(u)))
        return torch.cat([early, self.layer.step(late, cache)[0]], 1)


def fast_path(module: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[int, dict[str, Tensor]]:
    """``module``, ours, with mamba-ssm's kernel, autocast to ``dtype``: calls of the kernel, `layer_with_gradients`.

    On the CPU, in the process of `start()`, it takes the path that it takes on CUDA.
    """
    with contextlib.nullcontext() if x.is_cuda else _as_if_on_cuda():
        kernel = mock.Mock(wraps=ssd.fast_scan())
        with mock.patch.object(ssd, "fast_scan", return_value=kernel), _autocast(x, dtype):
            measured = layer_with_gradients(module, x)
    return kernel.call_count, measured


def slow_path(module: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same with the PyTorch scan, wherever x is."""
    with mock.patch.object(ssd, "fast_scan", return_value=None), _autocast(x, dtype):
        return layer_with_gradients(module, x)


def _autocast(x: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def _as_if_on_cuda() -> Iterator[None]:
    available = mock.patch.object(torch.cuda, "is_available", return_value=True)
    with available, mock.patch.object(torch.Tensor, "is_cuda", True):
        yield


# --- sent to the process of `start()` -------------------------------------------------------------------------------


def scan(tensors: dict[str, Tensor], chunk_size: int) -> dict[str, Tensor]:
    """mamba_chunk_scan_combined: y, the final state, and gradients for ``tensors``, which are its arguments.

    With a dt_bias among them, dt is taken through softplus.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    options = {"dt_softplus": "dt_bias" in tensors, "return_final_states": True}
    return with_gradients(mamba_chunk_scan_combined(**tensors, chunk_size=chunk_size, **options), tensors)


def fresh(arguments: dict[str, Any]) -> tuple[dict[str, Tensor], set[str], dict[str, Any]]:
    """Of a new mamba-ssm Mamba2: its state dict, the parameters free of weight decay, and the defaults of arguments."""
    from mamba_ssm.modules.mamba2 import Mamba2

    layer = Mamba2(**arguments)
    undecayed = {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    return layer.state_dict(), undecayed, {p.name: p.default for p in inspect.signature(Mamba2).parameters.values()}


def twin(ours: ssd.Mamba2) -> nn.Module:
    """mamba-ssm's Mamba2 of the same sizes, with the weights of ``ours``."""
    from mamba_ssm.modules.mamba2 import Mamba2

    d_model = ours.in_proj.in_features
    theirs = Mamba2(
        d_model,
        d_state=ours.d_state,
        d_conv=ours.d_conv,
        expand=ours.d_inner // d_model,
        headdim=ours.headdim,
        ngroups=ours.ngroups,
        bias=ours.in_proj.bias is not None,
        conv_bias=ours.conv1d.bias is not None,
        chunk_size=ours.chunk_size,
        use_mem_eff_path=False,
        layer_idx=0,
    )
    theirs.load_state_dict(ours.state_dict())
    return theirs


def layer(ours: ssd.Mamba2, u: Tensor) -> dict[str, Tensor]:
    """`layer_with_gradients` of the `twin` of ``ours``."""
    return layer_with_gradients(twin(ours), u)


def bidirectional(block: BidirectionalMambaBlock, x: Tensor) -> dict[str, Tensor]:
    """`layer_with_gradients` of what ``block`` should be, written out with twins of its mixers."""
    block.forward_mixer, block.backward_mixer = twin(block.forward_mixer), twin(block.backward_mixer)
    last_to_first = torch.arange(x.shape[1] - 1, -1, -1)

    def by_definition(x: Tensor) -> Tensor:
        tokens = block.norm1(x)
        left_to_right = block.forward_mixer(tokens)
        right_to_left = block.backward_mixer(tokens[:, last_to_first])[:, last_to_first]
        x = x + left_to_right + right_to_left
        return x + block.mlp(block.norm2(x))

    block.forward = by_definition
    return layer_with_gradients(block, x)


@torch.no_grad()
def decode(ours: ssd.Mamba2, u: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `twin` of ``ours`` reads ``prompt`` tokens at once and the others one by one, by Triton's state update.

    Returns outputs (b, l, d_model), the convolution's latest d_conv inputs (b, conv_dim, d_conv), the scan's state.
    """
    theirs = twin(ours)
    conv, state = caches = theirs.allocate_inference_cache(len(u), u.shape[1])
    # What mamba-ssm's InferenceParams would hold.
    inference = types.SimpleNamespace(key_value_memory_dict={0: caches}, seqlen_offset=0)
    outputs = [theirs(u[:, :prompt], inference_params=inference)] if prompt else []
    outputs += [theirs.step(u_t, conv, state)[0] for u_t in u[:, prompt:].split(1, dim=1)]
    return torch.cat(outputs, 1), conv, state
