"""Each backbone still learns what it learned: a smoke run on real images against a floor well below its usual score."""

import pytest

from backbones import BACKBONES
from bench.core.store import Store
from bench.tokenizers.config import make_config
from bench.tokenizers.tokenizer import Tokenizer
from bench.tokenizers.trial import run_trial

# A dB below the worst of three seeds in float32 on a CPU, which lie between 21.6 and 22.2 dB (cnn), 20.4 and 21.6
# (convnext), 23.3 and 23.6 (vit), 23.1 and 23.5 (mamba), 21.5 and 23.2 (bimamba), 22.7 and 23.3 (hybrid). Of the same
# runs perplexity is between 46 and 67, LPIPS between 0.142 and 0.171.
PSNR = {"cnn": 20.6, "convnext": 19.4, "vit": 22.3, "mamba": 22.1, "bimamba": 20.5, "hybrid": 21.7}
PERPLEXITY, LPIPS = 36, 0.19


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_smoke_run_keeps_its_quality(backbone, tmp_path):
    run = run_trial(make_config(backbone, "smoke", device="cpu", precision="fp32"), Store(tmp_path))
    metrics = run.metrics()
    assert metrics["psnr"] > PSNR.get(backbone, 19.0)  # of a new one, far above a grey square
    assert metrics["perplexity"] > PERPLEXITY
    assert metrics["lpips_alex"] < LPIPS
    assert Tokenizer.from_run(run.folder).config.backbone == backbone
