"""Weights in files: written whole, and read into the model that they are of or not at all."""

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bench.core.errors import UserError
from bench.core.files import atomic_path, sha256_file
from bench.core.runs import Run

REASON = 160  # characters of what a library says


def write_weights(run: Run, name: str, model: nn.Module) -> None:
    """Writes the scored weights of ``model``, on any device, as the file ``name``."""
    with atomic_path(run.folder / name) as temporary:
        safetensors.torch.save_model(model, str(temporary))


def read_weights(run: Run, name: str, model: nn.Module) -> None:
    """Loads what ``write_weights`` wrote into ``model``. Raises UserError on a damaged file or that of another model,
    such as one that an older version of the code built."""
    check_weights(run, name)
    try:
        load_weights(run.folder / name, model)
    except ValueError as error:
        path = run.folder / name
        raise UserError(f"{path} does not hold the weights of this run ({error}); move that folder") from error


def load_weights(path: Path, model: nn.Module) -> None:
    """Fills ``model`` with the tensors of the safetensors file at ``path``. Raises ValueError, with the reason, where
    ``check_layout`` does, and where some of their numbers are not finite."""
    check_layout(path, model)
    with _told():
        safetensors.torch.load_model(model, path)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")


def check_layout(path: Path, model: nn.Module) -> None:
    """Raises ValueError, with the reason, unless the safetensors file at ``path`` has the tensors of ``model``, which
    may be on the meta device: all of them, no other, and of their shapes. Reads the head of the file alone."""
    with _told(), safetensors.safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in found.items():
        if name not in own:
            raise ValueError(f"there is no place for {name}")
        if shape != own[name]:
            raise ValueError(f"{name} is {shape} and should be {own[name]}")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # shared ones once
    kept = {id(tensor) for name, tensor in _all(model) if name in found}
    for name, tensor in tensors.items():
        if name in own and id(tensor) not in kept:
            raise ValueError(f"{name} is missing")


def _all(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every tensor: those that are shared have several."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextmanager
def _told() -> Iterator[None]:
    """Makes what the library says of a file a ValueError of one line."""
    try:
        yield
    except (RuntimeError, SafetensorError, OSError, ValueError) as error:
        raise ValueError(textwrap.shorten(str(error), REASON)) from error


def check_weights(run: Run, name: str) -> None:
    """Raises UserError where the file ``name`` is no file or gone, or holds other weights than those that the finished
    ``run`` was scored with."""
    path, known = run.folder / name, run.digests().get(name)
    if not path.is_file() and (known is not None or os.path.lexists(path)):
        what = "is no file" if os.path.lexists(path) else "is gone"
        raise UserError(f"{path} {what}, and the run was scored with its weights; move that folder and make it again")
    if known is not None and sha256_file(path) != known:  # older runs have none
        reason = "its digest is that of other weights"
        raise UserError(f"{path} does not hold the weights of this run ({reason}); move that folder")
