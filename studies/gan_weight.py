"""How much adversary? Weight of the GAN loss, none to strong, for every backbone.

    python -m studies.gan_weight --backbone cnn convnext --seeds 0 1 2
    python -m studies.gan_weight --gan-weight 0 0.5 --gan-norm spectral --plan

Look at `sharpness` beside the distances: a tokenizer without an adversary scores well and looks soft.
"""

from bench.study import Ablation, main

STUDY = Ablation("gan_weight", sweep={"gan_weight": (0.0, 0.1, 0.3, 1.0)})

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
