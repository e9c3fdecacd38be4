"""Settings that belong together, by name: what --preset takes.

An entry consists of Config fields, of ``about``, what it is in a line, and of three that say how large the models are.
``params`` is the budget of encoder and decoder together, for which the width of every backbone is solved; ``depth`` is
for backbones without one of their own; ``own`` is what one backbone has to itself, such as a depth that suits it, or a
width, which is then not solved. So a backbone that no entry names has a size in all of them. timm:MODEL has the size of
cnn, whose decoder it has.
"""

from typing import Any

_VITVQGAN: dict[str, Any] = {
    "image_size": 256,
    "grid_size": 32,
    "codebook_size": 8192,
    "code_dim": 32,
    "quantizer": "l2",
    "lpips_weight": 0.1,
    "lpips_net": "vgg",
    "steps": 30_000,
    "batch_size": 32,
    "lr": 3e-4,
    "warmup": 1000,
    "weight_ema": 0.999,
}
# those of ViT-VQGAN Small, whose 8 blocks of width 512 a side are as published
_SMALL: dict[str, Any] = {
    "params": 54_900_000,
    "depth": 8,
    "own": {"cnn": {"depth": 2}, "convnext": {"depth": 2}, "vit": {"width": 512}, "bimamba": {"depth": 6}},
}

_NEXTFORMER = {"attention": 1, "rms_norm": True, "full_resolution": True}  # the CNN of "Lessons in training VQGAN"
# its comparison on images of 64×64 pixels, with the cheaper network of LPIPS
_BLOG64: dict[str, Any] = {
    "grid_size": 8,
    "codebook_size": 1024,
    "code_dim": 32,
    "quantizer": "l2",
    "lpips_weight": 0.1,
    "steps": 1000,
    "lr": 1e-3,
    "augment": "blog",
    "depth": 2,
}

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "about": "proves that everything works, in half a minute: 32×32 to 4×4 codes, 275 k parameters",
        "image_size": 32,
        "grid_size": 4,
        "codebook_size": 128,
        "steps": 150,
        "params": 275_200,
        "depth": 2,
        # 56 has 1.2 % fewer parameters than the others, 57 would be the nearest; runs are published with it
        "own": {"cnn": {"depth": 3}, "convnext": {"width": 56, "depth": 3}},
    },
    "cpu": {
        "about": "a real comparison on two CPU cores, two minutes a backbone: 64×64 to 8×8 codes, 856 k parameters",
        "params": 856_000,
        "depth": 2,
        # 128 has 1.1 % more parameters than the others, 127 would be the nearest; runs are published with it
        "own": {"cnn": {"width": 128, "depth": 1}, "hybrid": {"depth": 3}},
    },
    "vqgan64": {
        "about": "VQGAN (Esser et al. 2021) with adversary and LPIPS: 64×64 to 8×8 codes, 10 M parameters",
        "grid_size": 8,
        "codebook_size": 1024,
        "code_dim": 32,
        "reconstruction": "l1",
        "lpips_weight": 1.0,
        "gan_weight": 0.8,
        "gan_start": 0.3,
        "steps": 50_000,
        "batch_size": 32,
        "lr": 3e-4,
        "warmup": 1000,
        "weight_ema": 0.999,
        "params": 10_000_000,
        "depth": 6,
        "own": {"cnn": {"depth": 2}, "convnext": {"depth": 2}, "bimamba": {"depth": 4}},
    },
    "vqvae32": {
        "about": "a first VQ-VAE: 32×32 to 4×4 codes of 64 numbers, K = 256, 1 M parameters",
        "image_size": 32,
        "grid_size": 4,
        "codebook_size": 256,
        "code_dim": 64,
        "quantizer": "standard",
        "lpips_weight": 0.0,
        "steps": 20_000,
        "batch_size": 64,
        "lr": 1e-3,
        "weight_ema": 0.999,
        "params": 966_000,
        "depth": 3,
        "own": {"cnn": {"depth": 2}, "convnext": {"depth": 2}, "bimamba": {"depth": 2}},
    },
    # the published CelebA sweep (see studies/celeba_sweep.py) at the best of its cells: 64×64 to 16×16 codes, residual
    # layers of 128 channels, mean squared error alone; the other backbones with the parameters of this CNN
    "celeba64": {
        "about": "the published CelebA sweep at its best cell: 64×64 to 16×16 codes, 1.6 M parameters",
        "data": "celeba",
        "grid_size": 16,
        "codebook_size": 512,
        "code_dim": 64,
        "quantizer": "standard",
        "beta": 1.25,
        "lpips_weight": 0.0,
        "steps": 10_000,
        "batch_size": 32,
        "lr": 1e-3,
        "params": 1_566_000,
        "depth": 3,
        "own": {
            "cnn": {"width": 128, "depth": 2},  # as published
            "convnext": {"depth": 2},
            "vit": {"width": 128},  # 3.8 % fewer parameters; 129 has one more head and 3.4 % more
            "bimamba": {"depth": 2},
        },
    },
    # ViT-VQGAN Small (Yu et al. 2022, section 3): 256×256 to 32×32 codes of 32 numbers on the sphere, K = 8192; 8
    # blocks of width 512 a side, and the other backbones with as many parameters
    "vitvqgan-s": {
        "about": "ViT-VQGAN Small (Yu et al. 2022): 256×256 to 32×32 codes, K = 8192, 55 M parameters",
        **{**_VITVQGAN, **_SMALL, "gan_weight": 0.1},
    },
    # the comparison of the blog post "Lessons in training VQGAN", as its code had it: the CNN with 64×64 codes beside
    # 32×32 of the others, and a tenth of their parameters. Reports will not rank these rows
    "blog256": {
        "about": 'the comparison of "Lessons in training VQGAN" as published, of unequal sizes: 256×256',
        **_VITVQGAN,
        "augment": "blog",
        "params": 179_000_000,  # of the ViT, for backbones that the post had not
        "depth": 12,
        "own": {
            "cnn": {"width": 384, "depth": 2},
            "convnext": {
                "width": 384,
                "depth": 2,
                "grid_size": 64,
                **_NEXTFORMER,
            },
            **{name: {"width": 768} for name in ("vit", "mamba", "bimamba", "hybrid")},
        },
    },
    # the same question on equal footing: 32×32 codes, a transformer layer on either side of them (of width 512 in the
    # ViT, as its 8 blocks) and as many parameters for all
    "blog256-fair": {
        "about": "the same with as many codes and parameters for all: 256×256 to 32×32 codes, 61 M parameters",
        **{**_VITVQGAN, **_SMALL, "augment": "blog", "attention": 1, "params": 61_220_000},
    },
    # both at the size of CPUs: 64 pixels a side, whose 8×8 and 16×16 codes have the strides of the post's
    "blog64": {
        "about": "blog256 at the size of CPUs: 64×64, convnext with four times the codes and a tenth of the parameters",
        **{**_BLOG64, "params": 2_400_000},
        "own": {"convnext": {**_NEXTFORMER, "width": 48, "depth": 2, "grid_size": 16}},
    },
    "blog64-fair": {
        "about": "blog256-fair at the size of CPUs: 64×64 to 8×8 codes, 1 M parameters for all",
        **{**_BLOG64, "attention": 1, "params": 1_000_000},
        "own": {},
    },
}
