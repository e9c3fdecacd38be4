"""Vector quantizers: siblings with one interface.

A quantizer maps the encoder's grid ``z`` (B, d, h, w) to one of ``codebook_size`` code vectors per token and lets the
decoder's gradient through. They differ in what a code is and how it learns:

========== ============================================================================================
standard   codebook loss ‖sg[z] − e‖² and commitment β‖z − sg[e]‖² (van den Oord et al. 2017, eq. 3)
ema        e follows an exponential moving average of its tokens; commitment only (same paper, appendix A.1)
l2         standard, with z and e on the unit sphere (Yu et al. 2022, ViT-VQGAN, section 3.2)
ema_l2     ema on the unit sphere
gumbel     a code sampled by nearness in training; no codebook loss (Jang et al. 2017; Ramesh et al. 2021, DALL-E)
ibq        standard, with a gradient through the choice that reaches all codes (Shi et al. 2024)
product    ema in several small codebooks, each for its share of the components (Jégou et al. 2011)
bsq        the signs of log2 K projected components on the unit sphere (Zhao et al. 2024)
fsq        each of a few projected components rounded to its own levels (Mentzer et al. 2024)
lfq        the signs of log2 K projected components (Yu et al. 2024, MAGVIT-2)
simvq      frozen codes, moved by one learned linear layer (Zhu et al. 2024)
residual   several small codebooks, each for what is left over before it (Lee et al. 2022; Zeghidour et al. 2021)
none       z as it is, without codes: what they cost shows beside it
kl         a Gaussian per component, without codes; its rate is a divergence (Kingma & Welling 2014)
========== ============================================================================================

fsq, lfq, simvq and residual stand on the optional package vector-quantize-pytorch (``packaged``). none and kl have
``discrete = False``: they are references, never ranked against codes.

Tricks that suit several of them are arguments: k-means for the first codes, an entropy penalty, the rotation trick.
ViT-VQGAN's factorised codes need none: encoders end in a linear layer to ``code_dim`` channels and decoders start with
one back, so a small code_dim is a look-up in a small projected space, with a codebook of K·d numbers.

All arithmetic is float32 whatever the autocast: distances of nearby codes differ by less than bfloat16 resolves.
"""

from backbones.plugins import plugged

from .codebook import GRADIENTS, Quantized, Quantizer, nearest
from .continuous import KLQuantizer, NoQuantizer
from .learned import (
    EMAL2Quantizer,
    EMAQuantizer,
    GumbelQuantizer,
    IBQQuantizer,
    L2Quantizer,
    ProductQuantizer,
    StandardQuantizer,
)
from .packaged import ResidualQuantizer, SimVQQuantizer
from .rounded import BSQQuantizer, FSQQuantizer, LFQQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "standard": StandardQuantizer,
    "ema": EMAQuantizer,
    "l2": L2Quantizer,
    "ema_l2": EMAL2Quantizer,
    "gumbel": GumbelQuantizer,
    "ibq": IBQQuantizer,
    "product": ProductQuantizer,
    "bsq": BSQQuantizer,
    "fsq": FSQQuantizer,
    "lfq": LFQQuantizer,
    "simvq": SimVQQuantizer,
    "residual": ResidualQuantizer,
    "none": NoQuantizer,
    "kl": KLQuantizer,
}
QUANTIZERS |= plugged("quantizers", QUANTIZERS)

# Of the entropy penalty, where Config leaves it open. Without it lfq falls to a handful of codes, and simvq, which
# resets none, used half of 512 on the photographs and scored 0.8 dB lower. All others: none.
ENTROPY_WEIGHT: dict[str, float] = {"bsq": 0.1, "lfq": 0.1, "simvq": 0.02}
