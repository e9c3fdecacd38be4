"""Mamba first, attention last: the order of MambaVision (Hatamizadeh & Kautz 2024, arXiv 2407.08083), on tokens.

Of each side's blocks the first half mixes by a state space and the second by self-attention, which recovers the global
context that a scan loses (the paper's ablation of hybrid patterns). Of an odd depth the scan has the larger half.

Not taken from the paper: its convolutional stages and windows, since all backbones of tokens here share patches and one
grid; and its mixer, a Mamba-1 scan behind an ordinary convolution, beside a branch without scan, which lets a token
know what comes after it. Here two Mamba-2 layers do, which read the tokens in either direction.
"""

from functools import partial

from .layers import TokenDecoder, TokenEncoder, TransformerBlock
from .mamba import BidirectionalMambaBlock

KINDS = [BidirectionalMambaBlock, TransformerBlock]

Encoder = partial(TokenEncoder, KINDS)
Decoder = partial(TokenDecoder, KINDS)
