"""How few codes may an image have for a prior's sake? K × grid, and priors over the codes of each.

    python -m studies.prior_rate --backbone cnn
    python -m studies.prior_rate --codebook-size 512 1024 --grid-size 8 --prior transformer --preset smoke

The smaller the grid and the codebook, the easier the codes are to model, says an exercise in generative models
("Auto-Quantized Vectorial Variation Encoders"). Of 64×64 images it takes 8×8 codes of 1024, finds that 512 do as well,
and expects 16×16 to look better decoded and worse generated. Compare `gfid_vgg16`, which sees both sides, and
`coded_bits_per_image`; bits per token alone favour small codebooks.
"""

from bench.study import Ablation, main

STUDY = Ablation(
    "prior_rate",
    sweep={"codebook_size": (128, 256, 512, 1024), "grid_size": (4, 8, 16)},
    backbones=("convnext",),
    priors=("pixelcnn", "transformer"),
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
