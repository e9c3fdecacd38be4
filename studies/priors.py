"""Rate against generation: every backbone at several grids, and every prior over the codes of each.

    python -m studies.priors
    python -m studies.priors --backbone convnext vit --grid-size 4 8 --prior independent transformer --preset smoke

Backbones have as many parameters as each other, and so have priors. The report shows what each pair costs in bits and
how far its images are from real ones.
"""

from bench.study import PRIORS, Ablation, main

STUDY = Ablation("priors", sweep={"grid_size": (4, 8, 16)}, priors=tuple(PRIORS))

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
