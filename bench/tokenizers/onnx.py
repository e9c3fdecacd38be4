"""A tokenizer as two ONNX graphs, encoder.onnx and decoder.onnx, for any number of images: written and then compared.

Both are of float32 images (B, 3, H, W) in [-1, 1] and int64 codes (B, h, w), or the latents of a quantizer without
codes, and of the one image size that the tokenizer was trained on. What is written is run by onnxruntime beside
PyTorch before anybody gets it.
"""

import contextlib
import importlib
import io
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.core.errors import UserError
from bench.core.files import atomic_path

from .tokenizer import Tokenizer

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_ERROR = 1e-4  # of an image in [-1, 1]
ROUNDING = 1e-4  # of a latent's length, by which encoders may differ: sums in another order
DRAWS = 256  # latents around one, among which a tie is looked for


class Agreement(NamedTuple):
    """How the graphs compare with PyTorch on so many ``images``."""

    images: int
    codes: int  # that were compared; of latents without codes none
    ties: int  # of them, how many are another, as near as rounding can tell
    error: float  # the largest of a decoded value in [-1, 1]


class Graph(nn.Module):
    """One side of a tokenizer as a module: ``work`` on its only input."""

    def __init__(self, tokenizer: Tokenizer, work: Callable[[Tokenizer, Tensor], Tensor]):
        super().__init__()
        self.tokenizer, self.work = tokenizer, work

    def forward(self, x: Tensor) -> Tensor:
        return self.work(self.tokenizer, x)


def encoded(tokenizer: Tokenizer, x: Tensor) -> Tensor:
    """``Tokenizer.encode`` without its look at ``x``, which no graph can take."""
    return tokenizer.quantizer(tokenizer.encoder(x)).codes


def decoded(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """``Tokenizer.decode`` likewise."""
    return tokenizer.decoder(tokenizer.quantizer.lookup(codes)).clamp(-1, 1)


def check_packages() -> None:
    """Raises UserError where a package that ``export`` needs is not installed."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"--onnx needs the package {name}; pip install 'vqbench[onnx]'") from error


def export(tokenizer: Tokenizer, images: Tensor, folder: Path) -> Agreement:
    """Writes both graphs of ``tokenizer``, which is on the CPU and in eval mode, into ``folder``, and says how they
    agree with it on ``images`` (B, 3, H, W) of its size. Raises UserError where it cannot be written so, or where they
    do not agree."""
    codes = tokenizer.encode(images)
    write(Graph(tokenizer, encoded), images, ("images", "codes"), folder / ENCODER)
    write(Graph(tokenizer, decoded), codes, ("codes", "images"), folder / DECODER)
    return compare(tokenizer, images, folder)


def write(graph: Graph, example: Tensor, names: tuple[str, str], path: Path) -> None:
    """Writes ``graph`` for inputs such as ``example``, of any number, as the file ``path``; ``names`` are those of what
    goes in and comes out. Raises UserError where ONNX has no word for a part of it."""
    batch = ({0: torch.export.Dim("batch")},)
    try:
        with quiet(), atomic_path(path) as temporary:
            program = torch.onnx.export(
                graph, (example,), dynamo=True, dynamic_shapes=batch, input_names=names[:1], output_names=names[1:]
            )
            forget(program.model)
            program.save(temporary, external_data=False)
    except OSError:
        raise
    except Exception as error:  # exporters raise what they like
        raise refusal(graph.tokenizer, path, "cannot be written as", error) from error


def refusal(tokenizer: Tokenizer, path: Path, what: str, error: Exception) -> UserError:
    """That this kind of tokenizer ``what`` the file ``path``, by what first went wrong."""
    while error.__cause__:
        error = error.__cause__
    said = textwrap.shorten(str(error).partition("\n")[0] or type(error).__name__, 160)
    kind = f"backbone {tokenizer.config.backbone} with quantizer {tokenizer.config.quantizer}"
    return UserError(f"{kind} {what} {path.name} ({said}); leave out --onnx")


def forget(model: Any) -> None:
    """Removes from an onnx_ir ``model`` where in the source its parts come from: paths of this machine."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()


def compare(tokenizer: Tokenizer, images: Tensor, folder: Path) -> Agreement:
    """How what onnxruntime makes of the files in ``folder`` agrees with ``tokenizer``, on all ``images`` at once and on
    the first alone. Raises UserError where it does not."""
    codes, errors, count, ties = tokenizer.encode(images), [], 0, 0
    for some, expected in ((images, codes), (images[:1], codes[:1])):
        try:
            found, decoded_there = run(folder / ENCODER, some), run(folder / DECODER, expected)
        except Exception as error:  # of onnxruntime's, which has no common kind
            raise refusal(tokenizer, folder / ENCODER, "cannot be run for any number of images by", error) from error
        if tokenizer.config.discrete:
            other, count = found != expected, count + expected.numel()
            latents = tokenizer.encoder(some).movedim(1, -1)[other]
            tied = int(near_tie(tokenizer, latents, found[other]).sum()) if len(latents) else 0
            if tied < len(latents):
                told = f"{len(latents) - tied} of {other.numel()} codes of {ENCODER} are not those of PyTorch"
                raise UserError(f"{told}; leave out --onnx")
            ties += tied
        else:
            errors.append((found - expected).abs().max())
        errors.append((decoded_there - tokenizer.decode(expected)).abs().max())
    error = float(torch.stack(errors).max())
    if not error <= LARGEST_ERROR:  # NaN, too
        raise UserError(f"ONNX and PyTorch differ by {error:.1g}, more than {LARGEST_ERROR:g}; leave out --onnx")
    return Agreement(len(images), count, ties, error)


def run(path: Path, x: Tensor) -> Tensor:
    """What onnxruntime makes of ``x`` by the graph in the file ``path``, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(found)


def near_tie(tokenizer: Tokenizer, latents: Tensor, codes: Tensor) -> Tensor:
    """Whether each of ``codes`` (n,) is also PyTorch's for a latent that differs from its own, (n, d), by no more than
    ROUNDING, of DRAWS such: (n,) bool."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(DRAWS, *latents.shape, generator=generator)
    noise *= ROUNDING * latents.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    around = (latents + noise).permute(2, 0, 1)[None]  # (1, d, DRAWS, n), as a grid
    return (tokenizer.quantizer(around).codes[0] == codes).any(0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter from talking of its passes."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
