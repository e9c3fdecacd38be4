"""How much commitment? β from a tenth to twice the codebook loss.

    python -m studies.beta --backbone cnn convnext vit mamba --preset smoke --seeds 0 1 2
    python -m studies.beta --beta 0.25 1.0 --plan

β weighs how strongly encoder outputs are pulled towards their codes (van den Oord et al. 2017, equation 3).
"""

from bench.study import Ablation, main

STUDY = Ablation("beta", sweep={"beta": (0.1, 0.25, 0.5, 1.0, 2.0)})

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
