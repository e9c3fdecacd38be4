"""Each backbone still learns what it learned: a smoke run on real images against a floor well below its usual score."""

import pytest

from backbones import BACKBONES
from bench.core.store import Store
from bench.tokenizers.config import make_config
from bench.tokenizers.tokenizer import Tokenizer
from bench.tokenizers.trial import run_trial

# Half a dB below the worst of three seeds in float32 on a CPU, which lie between 15.7 and 16.1 dB (cnn), 15.9 and 16.6
# (convnext), 17.4 and 17.6 (vit), 17.1 and 17.2 (mamba), 17.1 and 17.3 (bimamba), 17.1 and 17.2 (hybrid). Of the same
# runs perplexity is between 49 and 74, LPIPS between 0.142 and 0.224. Every image in its mean colour is 14.9 dB.
PSNR = {"cnn": 15.2, "convnext": 15.4, "vit": 16.9, "mamba": 16.6, "bimamba": 16.6, "hybrid": 16.6}
PERPLEXITY, LPIPS = 36, 0.25


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_smoke_run_keeps_its_quality(backbone, tmp_path):
    run = run_trial(make_config(backbone, "smoke", device="cpu", precision="fp32"), Store(tmp_path))
    metrics = run.metrics()
    assert metrics["psnr"] > PSNR.get(backbone, 15.0)  # of a new one, above images in their mean colour
    assert metrics["perplexity"] > PERPLEXITY
    assert metrics["lpips_alex"] < LPIPS
    assert Tokenizer.from_run(run.folder).config.backbone == backbone
