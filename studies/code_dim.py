"""Code length d × quantizer: few dimensions make codes easy to tell apart, and the look-up cheap (Yu et al. 2022).

    python -m studies.code_dim
    python -m studies.code_dim --backbone cnn vit --quantizer l2 --code-dim 2 4 8 16 32 64

Encoders end in a linear layer to d channels and decoders start with one back, so the rate stays the same.
"""

from bench.study import Ablation, main

SWEEP = {"code_dim": (4, 8, 16, 32, 64), "quantizer": ("ema", "l2")}
STUDY = Ablation("code_dim", sweep=SWEEP, backbones=("convnext", "vit"))

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
