"""How many tokens? From one code for the whole image to a 16×16 grid, at one codebook size.

    python -m studies.grid_size --backbone cnn vit --seeds 0 1 2
    python -m studies.grid_size --grid-size 1 4 --preset smoke

Cells spend different bits per image: each grid is ranked by itself, and all meet in the rate-distortion plot.
"""

from bench.study import Ablation, main

STUDY = Ablation("grid_size", sweep={"grid_size": (1, 2, 4, 8, 16)})

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
