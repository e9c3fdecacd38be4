"""What a tokenizer costs: parameters, FLOPs, throughput, memory."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.metrics import Codec, Metric

from .config import Config
from .sizes import parameter_count, remembered
from .tokenizer import Tokenizer

# Of a run; ``images_seen``, memory and seconds are taken while it trains and is scored (``run_trial``), ``params`` and
# ``flops`` are the sums of both sides.
METRICS: dict[str, Metric] = {
    "images_seen": Metric("images seen", ",.0f", ""),
    "params": Metric("parameters", ",.0f", "lower"),
    "params_encoder": Metric("parameters encoder", ",.0f", "lower"),
    "params_decoder": Metric("parameters decoder", ",.0f", "lower"),
    "flops": Metric("FLOPs", ",.0f", "lower"),
    "flops_encode": Metric("FLOPs encode", ",.0f", "lower"),
    "flops_decode": Metric("FLOPs decode", ",.0f", "lower"),
    "images_per_second_encode": Metric("encode images/s", ".0f", "higher"),
    "images_per_second_decode": Metric("decode images/s", ".0f", "higher"),
    "peak_memory_mb": Metric("peak memory MB", ".0f", "lower"),
    "train_seconds": Metric("train s", ".0f", "lower"),
    "score_seconds": Metric("score s", ".0f", ""),
}
THROUGHPUT_BATCH = 64
THROUGHPUT_SECONDS = 10.0  # after which nothing more is timed: large models on a CPU


def static_costs(tokenizer: Tokenizer) -> dict[str, int]:
    """Parameters of either side, and their FLOPs for one image (see ``flops``); nothing is computed on a device."""
    config = tokenizer.config
    x = torch.zeros(1, 3, config.image_size, config.image_size, device="meta")
    z = torch.zeros(1, config.code_dim, config.grid_size, config.grid_size, device="meta")
    return {
        "params_encoder": parameter_count(tokenizer.encoder),
        "params_decoder": parameter_count(tokenizer.decoder),
        "flops_encode": flops(tokenizer.encoder, x),
        "flops_decode": flops(tokenizer.decoder, z),
    }


def shape_costs(config: Config) -> dict[str, int]:
    """``static_costs`` of what ``config`` describes, for which nothing is allocated and no weights are fetched."""

    def count() -> dict[str, int]:
        with torch.device("meta"):
            return static_costs(Tokenizer(replace(config, pretrained=False)))

    return remembered(config, "costs", count)


@torch.no_grad()
def flops(module: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of one pass of ``module`` over ``inputs``; a multiplication with its addition is two.

    Counted are convolutions, linear and recurrent layers, both products of attention (over all tokens, where it is
    causal too) and the products of the Mamba-2 scan as ``ssd_scan`` makes them, in chunks of up to 64 tokens. Left out
    are element-wise work, norms, softmax and running sums, and the look-ups of codes (2·tokens·K·d) and embeddings.

    A function of shapes alone: on the meta device, where the pass runs, attention and scan are plain products instead
    of kernels that differ between devices and that torch's FlopCounterMode does not know.
    """
    from torch.utils.flop_counter import FlopCounterMode  # and triton, where that is installed

    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    shapes = {name: tensor.to("meta") for name, tensor in tensors}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        functional_call(module, shapes, tuple(x.to("meta") for x in inputs))
    return counter.get_total_flops()


@torch.no_grad()
def throughput(codec: Codec, image_size: int, device: str) -> dict[str, float]:
    """Images of that size per second of encode and decode, in float32 and batches of 64: the best of three after one to
    warm up, or of fewer where they take more than 10 s in all."""
    place = torch.device(device)
    x = torch.zeros(THROUGHPUT_BATCH, 3, image_size, image_size, device=place)
    codes = codec.encode(x.uniform_(-1, 1))
    return {
        "images_per_second_encode": THROUGHPUT_BATCH / _best_seconds(lambda: codec.encode(x), place),
        "images_per_second_decode": THROUGHPUT_BATCH / _best_seconds(lambda: codec.decode(codes), place),
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
