"""Where a run computes, and in what arithmetic: what ``auto`` stands for on this machine, and whether it is there."""

import os

import torch

from .environment import has_fast_bf16
from .errors import UserError


def resolve_device(device: str) -> str:
    """``device``, or for ``auto`` the GPU where there is one, else the CPU."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(precision: str, device: str) -> str:
    """``precision``, or for ``auto`` bf16 where ``device`` has it in hardware, else fp32."""
    return precision if precision != "auto" else "bf16" if has_fast_bf16(device) else "fp32"


def check_memory(parameters: int, device: str) -> None:
    """Raises UserError where so many float32 ``parameters`` cannot fit into the memory of ``device`` at all."""
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if 4 * parameters > total:
        sizes = f"{4 * parameters / 1e9:,.0f} GB and {device} has {total / 1e9:.0f} GB"
        raise UserError(f"a model of these settings takes {sizes}; take less width, depth, codebook_size or code_dim")


def check_device(device: str) -> None:
    """Raises UserError unless tensors can be made on ``device``, which is not ``auto``, and which goes by one name, as
    the CPU with a number would not: a run is known by its device too."""
    try:
        torch.empty(0, device=device)
        if device.startswith("cpu:"):
            raise RuntimeError("there is one CPU")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} is not available here; use --device cpu") from error
