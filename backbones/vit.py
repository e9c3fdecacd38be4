"""ViT-VQGAN (Yu et al. 2022): a vision transformer on either side of the codes."""

from functools import partial

from .layers import TokenDecoder, TokenEncoder, TransformerBlock

Encoder = partial(TokenEncoder, [TransformerBlock])
Decoder = partial(TokenDecoder, [TransformerBlock])
