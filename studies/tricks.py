"""Tricks of training, one at a time, with codes that are learned by gradient: what does each gain over doing without?

    python -m studies.tricks --backbone cnn vit
    python -m studies.tricks --entropy-weight 0 0.01 0.1 --preset smoke

Codes that start as centroids of k-means; the rotation trick; an entropy penalty against unused codes (MAGVIT-v2);
codes in disuse that are never revived, where by default they are after 50 steps; and a pixel loss that is scaled up,
from the start or towards the end of training, as an exercise in generative models proposes.
"""

from bench.study import Ablation, main

SWEEP = {
    "kmeans_init": (False, True),
    "gradient": ("straight_through", "rotation"),
    "entropy_weight": (0.0, 0.01),
    "revive_after": (50, 0),
    "reconstruction_weight": (1.0, 4.0),
    "reconstruction_end": (1.0, 4.0),
}
STUDY = Ablation("tricks", sweep=SWEEP, settings={"quantizer": "standard"}, backbones=("cnn", "vit"), alone=True)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
