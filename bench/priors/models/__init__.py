"""Priors over grids of codes, chosen by name: with one, a tokenizer generates images."""

from collections.abc import Callable
from functools import partial

from backbones.plugins import plugged

from .independent import Independent
from .masked import MaskedPrior
from .pixelcnn import PixelCNN
from .prior import Prior
from .sequence import CausalMambaLayer, CausalTransformerLayer, RecurrentLayer, SequencePrior

# Learned priors are built as (codebook_size, grid, width, depth, dropout, classes, unlabelled=…), those that read
# the grid as a sequence also with token_order=…
SEQUENCES: dict[str, Callable[..., Prior]] = {
    "rnn": partial(SequencePrior, RecurrentLayer),
    "transformer": partial(SequencePrior, CausalTransformerLayer),
    "mamba": partial(SequencePrior, CausalMambaLayer),
}
CAUSAL: dict[str, Callable[..., Prior]] = {"pixelcnn": PixelCNN, **SEQUENCES}  # have an order, and so a likelihood
LEARNED: dict[str, Callable[..., Prior]] = {**CAUSAL, "masked": MaskedPrior}
LEARNED |= plugged("priors", {"independent": Independent, **LEARNED})
# ... and the floor under them as (codebook_size, grid, classes)
PRIORS: dict[str, Callable[..., Prior]] = {"independent": Independent, **LEARNED}
# What each is, in a line.
ABOUT: dict[str, str] = {
    "independent": "a histogram of the codes of each position: the floor",
    "pixelcnn": "gated PixelCNN, vertical and horizontal stacks, no blind spot",
    "rnn": "LSTM over the codes in an order",
    "transformer": "causal attention with a key-value cache",
    "mamba": "causal Mamba-2, sampled through its recurrent state",
    "masked": "MaskGIT: attention to all codes that are not hidden, drawn in a few passes",
}
