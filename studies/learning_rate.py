"""Which learning rate? One rate for all may favour the backbone it was found with: this shows how much.

python -m studies.learning_rate --backbone cnn vit mamba --seeds 0 1 2
"""

import sys

from bench.plan import Ablation
from bench.study import main

STUDY = Ablation("learning_rate", sweep={"lr": (3e-4, 1e-3, 2e-3, 5e-3)})

if __name__ == "__main__":
    sys.exit(main(STUDY, __doc__))
