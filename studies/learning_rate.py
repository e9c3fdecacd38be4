"""Which learning rate? One rate for all may favour the backbone it was found with: this shows how much.

python -m studies.learning_rate --backbone cnn vit mamba --seeds 0 1 2
"""

from bench.study import Ablation, main

STUDY = Ablation("learning_rate", sweep={"lr": (3e-4, 1e-3, 2e-3, 5e-3)})

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
