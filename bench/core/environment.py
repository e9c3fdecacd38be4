"""The machine under a run: its device, its memory, and what its numbers may depend on besides the config."""

import ctypes
import gc
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from backbones import plugins
from backbones.ssd import scan_backend

from . import group

PACKAGES = ("torch", "torchvision", "timm", "lpips", "torch-fidelity", "torchmetrics", "numpy")


def environment() -> dict[str, Any]:
    """What a number may depend on besides the config: versions, commit, machine, and how many of it shared the work."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions |= plugins.packages()
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "platform": platform.platform(),
        "processor": f"{group.size()} × {processor}" if group.size() > 1 else processor,
        "threads": torch.get_num_threads(),
        "scan": scan_backend(),
    }


def _commit() -> str | None:
    """Git commit of this checkout, with a plus sign when files differ from it; None outside one."""
    here = Path(__file__).parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=here, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changed else "")


def has_fast_bf16(device: str) -> bool:
    """Whether bfloat16 matrix arithmetic runs in hardware on ``device``."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() if hasattr(torch.cpu, "_is_avx512_bf16_supported") else False


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], float | None]]:
    """Yields a function that gives the peak memory in MB (2²⁰ bytes) since the context was entered.

    On CUDA what torch allocated; on Linux the process's resident set, interpreter and libraries included; elsewhere
    None, because a number that cannot be reset would carry over from run to run.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 2**20
    else:
        yield (lambda: _peak_resident()) if _reset_peak_resident() else (lambda: None)


def _reset_peak_resident() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed by the run before would count for this one
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _peak_resident() -> float:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
