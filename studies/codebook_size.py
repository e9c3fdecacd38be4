"""How many codes? K from 64 to 4096 at one grid: quality, perplexity and usage against bits.

    python -m studies.codebook_size --backbone cnn vit --seeds 0 1 2
    python -m studies.codebook_size --quantizer l2 --codebook-size 512 8192

Cells spend different bits per image: each K is ranked by itself, and all meet in the rate-distortion plot.
"""

from bench.study import Ablation, main

STUDY = Ablation("codebook_size", sweep={"codebook_size": (64, 256, 1024, 4096)})

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
