"""A search per backbone over β, K, grid, code length and learning rate: the best that each can do, on validation.

    python -m studies.search --backbone convnext --trials 30                       the front of rate and distortion
    python -m studies.search --backbone cnn vit --bits-per-image 576 --workers 2   the best at one rate: K and grid tied
    python -m studies.search --backbone cnn vit --bits-per-image 576 --confirm 3   and what is left of it on the test
    python -m studies.search --bits-per-image 576 --metric gfid_vgg16 --prior transformer   the codes that generate best
    python -m studies.search --metric coded_bits_per_image --prior transformer     the front of LPIPS and coded bits

Every backbone has a study and a budget of its own. With one metric, a trial is given up when its training loss is worse
than the median of earlier trials at the same step. The report draws the Pareto fronts of whatever was tried.

With --prior a tokenizer is judged by what that prior makes of its codes: a trial trains both, once per seed, and none
is given up early. Coded bits are a rate, with a distortion beside them: alone, they are fewest where nothing is kept.
"""

from bench.study import Range, Search, main

STUDY = Search(
    "search",
    space={
        "beta": Range(0.05, 4.0, log=True),
        "codebook_size": (128, 256, 512, 1024, 2048),
        "grid_size": (4, 8, 16),
        "code_dim": (4, 8, 16, 32, 64),
        "lr": Range(2e-4, 1e-2, log=True),
    },
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
