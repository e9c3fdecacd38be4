"""Mamba first, attention last: the order of MambaVision (Hatamizadeh & Kautz 2024, arXiv 2407.08083), on tokens.

Taken from the paper: in a stage of N blocks the first half mixes by a state space and the second by self-attention,
which recovers the global context that a scan loses (its macro architecture, and its ablation of hybrid patterns). Each
side of the codes is one such stage, so the decoder ends in attention too. Of an odd depth the scan has the larger
half; depth 1 is a Mamba block alone.

Not taken: the paper's convolutional stages and its windows, since all backbones of tokens here share patches and one
grid; and its mixer, a Mamba-1 scan behind an ordinary convolution, beside a branch without scan. Both of those let a
token know what comes after it; here two Mamba-2 layers do, which read the tokens in either direction.
"""

from functools import partial

from .layers import TokenDecoder, TokenEncoder, TransformerBlock
from .mamba import BidirectionalMambaBlock

KINDS = [BidirectionalMambaBlock, TransformerBlock]

Encoder = partial(TokenEncoder, KINDS)
Decoder = partial(TokenDecoder, KINDS)
