"""Do the two cures of grid artefacts help, and together? Overlapping patches × a final convolution, token backbones.

    python -m studies.cures --backbone vit mamba
    python -m studies.cures --patch-overlap True --final-conv False True --preset smoke --plan

The blog post "Lessons in training VQGAN" finds a grid in what transformers and Mamba reconstruct, before training and
after it, and names both cures: they helped, and fell short of a CNN. `grid_energy` sees a pattern that repeats from
patch to patch, `grid_edges` seams between patches, both 0 dB where there is none; `*_init` is that before training.
"""

from bench.study import Ablation, main

STUDY = Ablation(
    "cures",
    sweep={"patch_overlap": (False, True), "final_conv": (False, True)},
    backbones=("vit", "mamba", "bimamba", "hybrid"),
    metric=("grid_energy", "grid_edges"),
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
