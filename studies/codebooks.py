"""Several small codebooks in place of one, at the same bits: side by side (product) or one on what the other left.

    python -m studies.codebooks --backbone cnn vit
    python -m studies.codebooks --quantizer product --codebooks 1 2 4 --preset smoke

Sizes multiply to K, here 256, which is one codebook of 256, two of 16 or four of 4.
"""

from bench.study import Ablation, main

STUDY = Ablation(
    "codebooks",
    sweep={"quantizer": ("product", "residual"), "codebooks": (2, 4)},
    settings={"codebook_size": 256},
    backbones=("cnn", "vit"),
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
