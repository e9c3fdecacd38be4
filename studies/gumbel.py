"""How Gumbel codes are kept open and then closed: divergence from uniform choices, and a temperature that falls.

    python -m studies.gumbel --backbone cnn
    python -m studies.gumbel --temperature-end 1 0.0625 --uniform-weight 0 0.005 --preset smoke

DALL-E (Ramesh et al. 2021, appendix A) raises the weight of the divergence to 6.6 and lets the temperature fall to
1/16; its loss is a sum over the image, ours a mean, so weights cannot be carried over. One setting at a time.
"""

from bench.study import Ablation, main

STUDY = Ablation(
    "gumbel",
    sweep={"uniform_weight": (0.0, 0.0005, 0.005), "temperature_end": (1.0, 0.0625)},
    settings={"quantizer": "gumbel"},
    backbones=("cnn",),
    alone=True,
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
