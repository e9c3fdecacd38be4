"""The headline: every backbone, same images, same tokens, as many parameters, several seeds.

    python -m studies.backbones
    python -m studies.backbones --quantizer standard ema l2 --seeds 0 1 2 3 4

More than one quantizer crosses all of them with all backbones.
"""

from bench.study import Ablation, main

STUDY = Ablation("backbones", sweep={"quantizer": ("ema",)})

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
