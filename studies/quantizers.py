"""Quantizers × backbones at one rate: what codes cost depends on how they are learned, and perhaps on who learns them.

    python -m studies.quantizers --backbone cnn vit
    python -m studies.quantizers --quantizer ema ibq bsq none --preset smoke

`none` has no codes: what it reconstructs better than a row was lost to that row's codes.
"""

from bench.study import Ablation, main

QUANTIZERS = ("standard", "ema", "l2", "ema_l2", "gumbel", "ibq", "product", "bsq", "none")
STUDY = Ablation("quantizers", sweep={"quantizer": QUANTIZERS}, backbones=("cnn", "convnext", "vit"))

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
