"""The published CelebA sweep of β × learning rate × K on a residual CNN, with its loss and perplexity curves.

    python -m studies.celeba_sweep --plan
    python -m studies.celeba_sweep --data folder:DIR --steps 2000 --lr 1e-3 --seeds 0

64×64 images, 16×16 codes, mean squared error without perceptual loss, 10,000 steps (Vaidyanathan and Shyam,
"Re-implementing VQ-VAE"). They name K = 512, β = 1.25 and a rate of 1e-3 the best of the 36 cells, with a perplexity
above 400, and report that it takes longer to settle with more codes, smaller rates and larger β.
"""

from bench.study import Ablation, Claim, main

CLAIMS = (
    Claim("it takes longer with more codes", "steps_to_perplexity", {"codebook_size": 512}, {"codebook_size": 128}),
    Claim("it takes longer at smaller learning rates", "steps_to_perplexity", {"lr": 1e-5}, {"lr": 1e-3}),
    Claim("it takes longer with larger β", "steps_to_perplexity", {"beta": 1.75}, {"beta": 0.25}),
)

STUDY = Ablation(
    "celeba_sweep",
    sweep={"beta": (0.25, 0.75, 1.25, 1.75), "lr": (1e-3, 1e-4, 1e-5), "codebook_size": (128, 256, 512)},
    settings={
        "data": "celeba",
        "grid_size": 16,
        "code_dim": 64,
        "quantizer": "standard",
        "lpips_weight": 0.0,
        "steps": 10_000,
        "batch_size": 32,
    },
    backbones=("cnn",),
    seeds=(0, 1, 2),
    claims=CLAIMS,
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
