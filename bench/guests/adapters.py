"""How guests are called: a prefix and what follows it. To add one: write a function and add a line."""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
from PIL import features
from torch import nn

from bench.core.errors import UserError
from bench.core.files import sha256_arrays, sha256_file, sha256_json
from bench.core.store import find_tokenizer
from bench.tokenizers.codecs import FORMATS, FormatCodec, available
from bench.tokenizers.tokenizer import Tokenizer

from .checkpoints import checkpoint
from .guest import Adapted, Guest, Sides


class Place(NamedTuple):
    """Where guests are looked for and put: the results folder, and the device."""

    results: Path
    device: str


def own(name: str, place: Place) -> Guest:
    """``run:ID``, a tokenizer that was trained here, to be scored on other images than those it was."""
    run = find_tokenizer(name, place.results)
    tokenizer = Tokenizer.from_run(run.folder, place.device)
    return Guest(
        name=f"run:{run.folder.name}",
        codec=tokenizer,
        codebook_size=tokenizer.config.codebook_size if tokenizer.config.discrete else None,
        digest=sha256_file(run.folder / "tokenizer.safetensors"),
        device=place.device,
        about={"class": f"{tokenizer.config.backbone} {tokenizer.config.quantizer}", "range": "[-1, 1]"},
        sides=Sides(tokenizer.encoder, tokenizer.decoder),
        lookup=tokenizer.quantizer.lookup if tokenizer.config.discrete else None,
        folder=run.folder,
    )


def image_format(name: str, place: Place) -> Guest:
    """``codec:FORMAT@BITS``: files of at most so many bits, or the smallest, see ``bench.tokenizers.codecs``."""
    kind, _, number = name.partition("@")
    try:
        bits = float(number)
    except ValueError:
        bits = math.nan
    if kind not in available() or not 0 < bits < math.inf:
        known = ", ".join(available())
        raise UserError(f"codec:{name} is no image format and its bits; write codec:webp@2304 ({known})")
    version = features.version(FORMATS[kind].library)
    return Guest(
        name=f"codec:{kind}@{bits:.10g}",
        codec=FormatCodec(kind, bits),
        codebook_size=None,
        digest=sha256_json([kind, bits, PIL.__version__, version]),
        device=place.device,
        about={"class": f"{FORMATS[kind].label} by Pillow {PIL.__version__}, {FORMATS[kind].library} {version}"},
        pixels=True,
    )


def anything(name: str, place: Place) -> Guest:
    """``python:MODULE:FACTORY``: what FACTORY() gives has ``encode``, images (B, 3, H, W) → codes (B, h, w) int64 or
    latents, and ``decode``, the reverse; ``codebook_size`` where there are codes; ``value_range``, (-1, 1) unless it
    says otherwise; and it may have ``encoder``, ``decoder`` (modules, which are counted), ``lookup`` (codes → vectors),
    ``version`` (what tells its weights from others, where it is no module) and ``encode_with_bits`` (see ``Codec``)."""
    module_name, _, factory_name = name.partition(":")
    called, here = f"python:{name}", os.getcwd()
    if not module_name or not factory_name:
        raise UserError(f"{called} names no module and function; write python:package.module:function")
    sys.path.insert(0, here)  # as python -m does, and a console script does not
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{called}: the module {module_name} cannot be imported ({error}); start where it is"
        ) from error
    finally:
        sys.path.remove(here)
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UserError(f"{called}: {module_name} has no function {factory_name}")
    made = factory()
    for part in ("encode", "decode"):
        if not callable(getattr(made, part, None)):
            raise UserError(f"{called}: what {factory_name}() gives has no {part}; see bench.score --help")
    low, high = getattr(made, "value_range", (-1.0, 1.0))
    if isinstance(made, nn.Module):
        made = made.to(place.device).eval().requires_grad_(False)
    sides = getattr(made, "encoder", None), getattr(made, "decoder", None)
    return Guest(
        name=called,
        codec=made if (low, high) == (-1, 1) else Adapted(made, low=low, high=high),
        codebook_size=getattr(made, "codebook_size", None),
        digest=sha256_json([name, _source(module), _state(made), str(getattr(made, "version", ""))]),
        device=place.device,
        about={"class": type(made).__name__, "range": f"[{low:g}, {high:g}]"},
        sides=Sides(*sides) if all(isinstance(side, nn.Module) for side in sides) else None,
        lookup=getattr(made, "lookup", None),
    )


def _source(module: Any) -> str:
    """Digest of the file of a module."""
    path = inspect.getsourcefile(module)
    return sha256_file(Path(path)) if path else ""


def _state(made: Any) -> str:
    """Digest of the weights of a module, in their order."""
    if not isinstance(made, nn.Module):
        return ""
    state = made.state_dict()
    arrays = [state[key].detach().cpu().contiguous().view(torch.uint8).numpy() for key in state if state[key].ndim]
    return sha256_arrays(*arrays)


ADAPTERS: dict[str, Callable[[str, Place], Guest]] = {
    "run": own,
    "diffusers": lambda name, place: checkpoint("diffusers", name, place.device),
    "transformers": lambda name, place: checkpoint("transformers", name, place.device),
    "python": anything,
    "codec": image_format,
}
"""Guests by what stands before the first colon of what they are called by."""

ABOUT: dict[str, str] = {
    "run:ID": "one of ours, on other images than those it was scored on",
    "diffusers:FOLDER": "VQModel or AutoencoderKL as diffusers saves it; or an id on the Hub, which is downloaded",
    "transformers:FOLDER": "JanusVQVAE (LlamaGen's VQ-16) or Emu3VQVAE as transformers saves it; or an id",
    "python:MODULE:FACTORY": "what a function of yours gives: an object with encode and decode",
    "codec:webp@2304": "an image format at so many bits an image: webp, avif or jpeg",
}
"""What each is, in a line."""


def invited(name: str, place: Place) -> Guest:
    """The guest that ``name`` means. Raises UserError where there is none."""
    prefix, _, rest = name.partition(":")
    if prefix not in ADAPTERS or not rest:
        raise UserError(f"{name!r} is no tokenizer to score; write {', '.join(ABOUT)}")
    return ADAPTERS[prefix](rest, place)
