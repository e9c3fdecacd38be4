"""What a tokenizer costs: parameters, FLOPs, throughput, memory."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .tokenizer import Tokenizer, parameter_count

THROUGHPUT_BATCH = 64
THROUGHPUT_SECONDS = 10.0  # after which nothing more is timed: large models on a CPU


@torch.no_grad()
def static_costs(tokenizer: Tokenizer) -> dict[str, int]:
    """Parameters and FLOPs of either side, for one image. Leaves the tokenizer as it was.

    A FLOP is one addition or multiplication of a convolution, matrix product or attention, as torch's FlopCounterMode
    counts them; element-wise work and the codebook look-up (2·tokens·K·d) are left out.
    """
    config, device = tokenizer.config, next(tokenizer.parameters()).device
    x = torch.zeros(1, 3, config.image_size, config.image_size, device=device)
    z = torch.zeros(1, config.code_dim, config.grid_size, config.grid_size, device=device)
    return {
        "params_encoder": parameter_count(tokenizer.encoder),
        "params_decoder": parameter_count(tokenizer.decoder),
        "flops_encode": _flops(tokenizer.encoder, x),
        "flops_decode": _flops(tokenizer.decoder, z),
    }


def _flops(module: torch.nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


@torch.no_grad()
def throughput(tokenizer: Tokenizer) -> dict[str, float]:
    """Images per second of encode and decode, in float32 and batches of 64: the best of three after one to warm up, or
    of fewer where they take more than 10 s in all."""
    config, device = tokenizer.config, next(tokenizer.parameters()).device
    x = torch.zeros(THROUGHPUT_BATCH, 3, config.image_size, config.image_size, device=device)
    codes = tokenizer.encode(x.uniform_(-1, 1))
    return {
        "images_per_second_encode": THROUGHPUT_BATCH / _best_seconds(lambda: tokenizer.encode(x), device),
        "images_per_second_decode": THROUGHPUT_BATCH / _best_seconds(lambda: tokenizer.decode(codes), device),
    }


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    seconds: list[float] = []
    while len(seconds) < 4 and sum(seconds) < THROUGHPUT_SECONDS:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:] or seconds)


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
