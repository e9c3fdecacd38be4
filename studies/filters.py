"""Do filters that are not needed cost the prior? Width of the tokenizer against how well priors predict its codes.

    python -m studies.filters --backbone cnn vit
    python -m studies.filters --width 16 64 --prior transformer --preset smoke

A wider encoder may fit what its decoder wants of a code and nobody could guess from its neighbours: reconstructions get
better, codes harder. The rate is the same in all cells, so `coded_bits_per_token` may be compared, with that of
`independent`, which sees how evenly codes are used and nothing else, and `gfid_vgg16`. The exercise that asks for a
tokenizer whose codes are easy to model ("Auto-Quantized Vectorial Variation Encoders") has few filters in the encoder's
last convolution: those are the length of a code, which `studies.code_dim` sweeps.
"""

from bench.study import Ablation, main

STUDY = Ablation(
    "filters",
    sweep={"width": (16, 32, 64, 128, 256)},
    backbones=("cnn",),
    priors=("independent", "transformer"),
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
