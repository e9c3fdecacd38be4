"""What the blog post "Lessons in training VQGAN" claims, one by one, with an answer to each.

    python -m studies.blog_claims --preset blog64         as published: the CNN with 4 times the codes, a tenth the size
    python -m studies.blog_claims --preset blog64-fair    as many codes and parameters for all
    python -m studies.blog_claims --preset blog256        the post's own sizes; for GPUs

`convnext` in the NeXtformer form stands for the post's CNN. Every token backbone is also trained with either cure of
grid artefacts. `grid_edges` and `grid_energy` see them, `*_init` before training; `codebook_roughness` is how jagged
the codebook loss fell. Where the bits of two sides differ, the answer says so.
"""

from bench.study import Ablation, Claim, main

TOKENS = ("vit", "mamba", "bimamba")
PLAIN = {"patch_overlap": False, "final_conv": False}
CNN = {"backbone": "convnext"}

CLAIMS = (
    *(Claim("the CNN is a clear winner", "lpips_vgg", {"backbone": name, **PLAIN}, CNN) for name in TOKENS),
    Claim("bidirectional and plain Mamba perform alike", "psnr", {"backbone": "bimamba"}, {"backbone": "mamba"}, 0.1),
    *(
        Claim("attention and Mamba show grids, the CNN does not", metric, {"backbone": name, **PLAIN}, CNN)
        for metric in ("grid_edges_init", "grid_edges")
        for name in TOKENS
    ),
    *(
        Claim(
            f"{words} help performance",
            "lpips_vgg",
            {"backbone": name, **PLAIN},
            {"backbone": name, **PLAIN, cure: True},
        )
        for name in TOKENS
        for cure, words in (("patch_overlap", "overlapping patches"), ("final_conv", "extra convolutions"))
    ),
    *(
        Claim("the CNN's codebook loss falls most smoothly", "codebook_roughness", {"backbone": name, **PLAIN}, CNN)
        for name in TOKENS
    ),
)
STUDY = Ablation(
    "blog_claims",
    sweep={"patch_overlap": (False, True), "final_conv": (False, True)},
    alone=True,
    backbones=("convnext", *TOKENS),
    claims=CLAIMS,
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
