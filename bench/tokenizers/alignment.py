"""What a latent is aligned with: features of a frozen model of timm, whose weights may come from a file."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from backbones.torchvision_repair import repair
from bench.core.errors import UserError
from bench.core.files import DIGEST, UNREADABLE, named_by_content


def features(model: str, file: str, image_size: int, grid_size: int) -> nn.Module:
    """``timm_encoder.Features`` of timm's ``model``, on the CPU, with the weights in ``file``, or timm's own where that
    is empty. Raises UserError where either cannot be had."""
    repair()
    from backbones import timm_encoder  # and timm, which takes longer than all else here

    state = read(file) if file else None
    try:
        return timm_encoder.Features(model, image_size, grid_size, state)
    except ValueError as error:
        raise UserError(f"{file}: {error}" if file else str(error)) from error


def check_model(name: str) -> None:
    """Raises UserError, with the nearest names, unless timm has a model ``name``."""
    repair()
    from backbones import timm_encoder

    try:
        timm_encoder.check_name(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def read(file: str) -> dict[str, Tensor]:
    """The state dict in ``file``, of safetensors or of ``torch.save``. Raises UserError where it holds none."""
    content(file)
    try:
        state = load_file(file) if file.endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, *UNREADABLE):
        state = None
    if not isinstance(state, dict):
        fix = "name a file of safetensors, or of torch.save with tensors alone"
        raise UserError(f"alignment_file {file} holds no weights that can be read; {fix}")
    return state


def content(file: str) -> str:
    """What stands for the content of ``file`` wherever it lies: ``sha256:`` and 16 digits; of such a word itself.
    Raises UserError where there is no such file."""
    if file.startswith(DIGEST):
        return file
    try:
        if Path(file).exists() and not Path(file).is_file():  # nobody waits for a pipe
            raise UserError(f"alignment_file {file} is not a file; name one with weights of the alignment_model")
        return named_by_content(Path(file))
    except OSError as error:
        fix = "name a file with weights of the alignment_model, or leave it out for those of timm"
        raise UserError(f"alignment_file {file} cannot be read ({error.strerror}); {fix}") from error
