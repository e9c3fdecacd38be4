"""Each backbone still learns what it learned: a smoke run on real images against a floor well below its usual score."""

import pytest

from backbones import BACKBONES
from bench.config import make_config
from bench.store import Store
from bench.tokenizer import Tokenizer
from bench.trial import run_trial

# About a dB below what the smoke preset reaches: more than seeds and machines differ by.
PSNR = {"cnn": 20.0, "convnext": 19.5, "vit": 20.5, "mamba": 20.5, "bimamba": 20.5, "hybrid": 20.5}
PERPLEXITY = 30


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_smoke_run_keeps_its_quality(backbone, tmp_path):
    run = run_trial(make_config(backbone, "smoke"), Store(tmp_path))
    metrics = run.metrics()
    assert metrics["psnr"] > PSNR[backbone]
    assert metrics["perplexity"] > PERPLEXITY
    assert metrics["lpips_alex"] < 0.25
    assert Tokenizer.from_run(run.folder).config.backbone == backbone
