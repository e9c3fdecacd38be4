"""A batch that a network sees in parts."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_parts(network: Callable[..., Tensor], parts: int, *inputs: Tensor) -> Tensor:
    """``network`` of ``inputs`` (B, …), in so many ``parts`` of the batch, each computed once more in the backward
    pass: the activations of one part alone are held at a time (Chen et al. 2016, "Training Deep Nets with Sublinear
    Memory Cost"). The same numbers up to rounding, where no image of a batch depends on the others."""
    if parts == 1:
        return network(*inputs)
    chunks = zip(*(x.chunk(parts) for x in inputs), strict=True)
    return torch.cat([checkpoint(network, *chunk, use_reentrant=False) for chunk in chunks])
