"""Contests of single layers: quantizers, the look-up of codes, Mamba-2, forward and backward."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from backbones.ssd import Mamba2
from backbones.torchvision_repair import repair
from bench.core.device import resolve_precision
from bench.quantizers import QUANTIZERS
from bench.quantizers.codebook import chunk_rows, nearest

from .contest import Contest, Disagreement, Other, same

# K, d, and images of 16×16 tokens: few of the largest codebook, of which a peer holds the distances to all tokens.
CODEBOOKS = ((512, 64, 64), (1024, 64, 64), (8192, 32, 64), (8192, 8, 64), (65_536, 16, 8))
SEQUENCES = ((16, 64, 256), (16, 256, 256), (4, 1024, 256))  # batch, length, width


def quantizers(device: str) -> Iterator[Contest]:
    """The moving-average quantizer in training, forward and backward, against vector-quantize-pytorch's."""
    for codes, length, images in CODEBOOKS:
        torch.manual_seed(0)
        z = torch.randn(images, length, 16, 16, device=device).requires_grad_()
        weight = torch.randn_like(z)
        ours = QUANTIZERS["ema"](codes, length, beta=0.25).to(device)
        others = {"its GEMM": Other(_products(z, ours.codebook), "bound")}
        agree = None
        if (package := optional("vector_quantize_pytorch")) is not None:
            settings = {"decay": 0.99, "commitment_weight": 0.25, "rotation_trick": False}
            theirs = package.VectorQuantize(length, codes, accept_image_fmap=True, **settings).to(device)
            with torch.no_grad():
                theirs._codebook.embed.copy_(ours.codebook[None])
                theirs._codebook.embed_avg.copy_(ours.codebook[None])
            theirs._codebook.initted.fill_(True)
            peer = Other(lambda z=z, w=weight, q=theirs: _backward(q(z)[0], z, w), "peer", 5)
            others["vector-quantize-pytorch"] = peer

            def agree(z: Tensor = z, ours: nn.Module = ours, theirs: nn.Module = theirs) -> None:
                chosen, expected = (q.eval()(z)[1] for q in (ours, theirs))
                ours.train(), theirs.train()
                if (share := float((chosen == expected).float().mean())) < 0.999:  # the rest are ties, but for rounding
                    raise Disagreement(f"only {share:.1%} of the codes are equal")

        yield Contest(
            f"K {codes}, d {length}, {256 * images:,} tokens",
            lambda z=z, w=weight, q=ours: _backward(q(z).z_q, z, w),
            others,
            agree or (lambda: None),
        )


def look_ups(device: str) -> Iterator[Contest]:
    """The nearest code of each token against nothing but the products with all codes, in chunks of the same size."""
    for codes, length, images in CODEBOOKS:
        torch.manual_seed(0)
        z, codebook = torch.randn(images, length, 16, 16, device=device), torch.randn(codes, length, device=device)
        tokens = z.movedim(1, -1).reshape(-1, length)

        def agree(tokens: Tensor = tokens, codebook: Tensor = codebook) -> None:
            some = tokens[:512]
            exact = torch.cdist(some.double(), codebook.double())
            chosen = exact.gather(1, nearest(some, codebook)[:, None])[:, 0]
            same("distance to the chosen code", chosen, exact.min(1).values, 1e-5)

        yield Contest(
            f"K {codes}, d {length}, {256 * images:,} tokens",
            lambda tokens=tokens, codebook=codebook: nearest(tokens, codebook),
            {"its GEMM": Other(_products(z, codebook), "bound", 1.4 if codes >= 8192 else None)},
            agree,
            extra_memory=64 if device == "cpu" else None,  # a GPU's chunks are larger
        )


def _products(z: Tensor, codebook: Tensor) -> Any:
    """The matrix products of a look-up and nothing else."""
    tokens = z.detach().movedim(1, -1).reshape(-1, codebook.shape[1])
    rows = chunk_rows(codebook)
    buffer = torch.empty(rows, len(codebook), device=z.device)

    def work() -> None:
        for chunk in tokens.split(rows):
            torch.mm(chunk, codebook.detach().T, out=buffer[: len(chunk)])

    return work


def mambas(device: str) -> Iterator[Contest]:
    """The Mamba-2 layer, forward and backward, against transformers' (on CUDA mamba-ssm's), in float32 and, where
    that is in hardware, bfloat16."""
    precisions = {"fp32": nullcontext, "bf16": lambda: torch.autocast(torch.device(device).type, torch.bfloat16)}
    if resolve_precision("auto", device) == "fp32":
        del precisions["bf16"]
    for batch, length, width in SEQUENCES:
        torch.manual_seed(0)
        layer = Mamba2(width).to(device)
        u = torch.randn(batch, length, width, device=device).requires_grad_()
        weight = torch.randn_like(u)
        name, peer = _peer_of(layer, device)
        linears = nn.Sequential(nn.Linear(width, layer.in_proj.out_features), _Cut(layer.d_inner), layer.out_proj)
        linears.to(device)
        for precision, context in precisions.items():

            def work(module: nn.Module, context: Any = context, u: Tensor = u, weight: Tensor = weight) -> None:
                with context():
                    y = module(u)
                _backward(y, u, weight, module)

            limit = 2.5 if precision == "fp32" else 5
            others = {"its two linear layers": Other(lambda m=linears, work=work: work(m), "bound", limit)}
            if peer is not None:
                others[name] = Other(lambda m=peer, work=work: work(m), "peer", 2.5)

            def agree(
                u: Tensor = u, weight: Tensor = weight, ours: nn.Module = layer, theirs: nn.Module | None = peer
            ) -> None:
                if theirs is not None:
                    found = [(y := m(u), *torch.autograd.grad((y * weight).sum(), u)) for m in (ours, theirs)]
                    for what, (mine, other) in zip(("output", "gradient"), zip(*found, strict=True), strict=True):
                        same(what, mine, other, 1e-4)

            case = f"{batch} × {length} × {width}, {precision}"
            yield Contest(case, lambda m=layer, work=work: work(m), others, agree)


class _Cut(nn.Module):
    """The first of the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.channels]


def _peer_of(layer: Mamba2, device: str) -> tuple[str, nn.Module | None]:
    """Somebody else's Mamba-2 layer with the same weights, and whose it is; None where no package is installed."""
    if device.startswith("cuda"):
        package = optional("mamba_ssm.modules.mamba2")
        if package is None:
            return "mamba-ssm", None
        theirs = package.Mamba2(layer.in_proj.in_features).to(device)
        theirs.load_state_dict(layer.state_dict())
        return "mamba-ssm", theirs
    with _without("mamba_ssm", "causal_conv1d"):  # whose kernels are taken wherever they import
        package = optional("transformers.models.mamba2.modeling_mamba2")
    if package is None:
        return "transformers", None
    width, heads = layer.in_proj.in_features, layer.nheads
    sizes = {"hidden_size": width, "state_size": layer.d_state, "num_heads": heads, "head_dim": layer.headdim}
    more = {"n_groups": layer.ngroups, "num_hidden_layers": 1, "expand": layer.d_inner // width, "use_bias": False}
    theirs = package.Mamba2Mixer(package.Mamba2Config(**sizes, **more), layer_idx=0)
    theirs.load_state_dict(layer.state_dict())
    return "transformers", theirs


@contextmanager
def _without(*packages: str) -> Iterator[None]:
    """As if they were not installed."""
    before = {name: sys.modules.get(name) for name in packages}
    sys.modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def optional(name: str) -> Any:
    """The module ``name``, or None where its package is not installed."""
    repair()  # many of them import torchvision
    try:
        return import_module(name)
    except ImportError:
        return None


def _backward(y: Tensor, x: Tensor, weight: Tensor, module: nn.Module | None = None) -> None:
    """Gradients of Σ y · weight, dropped again."""
    (y.float() * weight).sum().backward()
    for tensor in (x, *(module.parameters() if module is not None else ())):
        tensor.grad = None
