"""A free search per backbone over β, K, grid, code length and learning rate: the best that each can do.

    python -m studies.search --backbone convnext --trials 30
    python -m studies.search --backbone cnn vit --timeout 3600 --workers 2
    python -m studies.search --metric lpips_vgg bits_per_image        quality against rate

Every backbone has a study and a budget of its own. With one metric, a trial is given up when its training loss is worse
than the median of earlier trials at the same step. The report draws the Pareto fronts of whatever was tried.
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
