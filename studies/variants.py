"""Options of the backbones, one at a time: what does each gain over the backbone as it is, at as many parameters?

    python -m studies.variants --match params:856000
    python -m studies.variants --backbone mamba bimamba --token-order raster hilbert cross --preset smoke

Every backbone is trained as it is and with each option that it takes: order of the tokens (Vim, VMamba), two streams
(a published comparison), MambaVision's mixer, rotary positions, RMSNorm and blocks at full resolution (NeXtformer),
overlapping patches and a final convolution (cures of grid artefacts), and attention beside the codes. Options are not
combined; `--match` gives each the width at which it has as many parameters.
"""

from bench.study import Ablation, main

SWEEP = {
    "token_order": ("raster", "hilbert", "cross"),
    **dict.fromkeys(("two_streams", "vision_mixer", "rotary", "rms_norm", "full_resolution"), (False, True)),
    **dict.fromkeys(("patch_overlap", "final_conv"), (False, True)),
    "attention": (0, 1),
}
STUDY = Ablation("variants", sweep=SWEEP, alone=True)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
