"""The code that the documentation shows does what the text around it says."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import backbones
from backbones import BACKBONES, Backbone
from bench.analysis.frames import LABELS
from bench.data import DATASETS, load
from bench.metrics import Batch, Setup
from bench.quantizers import QUANTIZERS
from bench.study import Ablation
from bench.tokenizers.config import make_config
from bench.tokenizers.tokenizer import Tokenizer
from bench.tokenizers.train import train

ROOT = Path(__file__).parent.parent
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)


def shown(kind: str) -> ModuleType:
    """The file that the section on ``kind`` shows, as a module."""
    text = (ROOT / "docs" / "extending.md").read_text()
    (code,) = re.findall(rf"```python {kind}\n(.*?)```", text, re.DOTALL)
    module = ModuleType(kind)
    exec(compile(code, f"extending.md, {kind}", "exec"), module.__dict__)
    return module


def trained(tmp_path: Path, backbone: str = "cnn", **settings) -> Tokenizer:
    config = make_config(backbone, "smoke", steps=2, batch_size=4, lpips_weight=0.0, device="cpu", **settings)
    config.check()
    return train(config.resolved(), IMAGES, tmp_path)[0]


def added(page: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """The backbone ``name`` of a package of backbones that has the file of extending.md, in ``folder``, and those lines
    that ``page`` shows for it and nothing else."""
    text = (ROOT / page).read_text()
    (line, entry) = re.search(
        rf'^    (from .* {name})\n    BACKBONES = {{\.\.\., ("{name}": .*)}}$', text, re.MULTILINE
    ).groups()
    (code,) = re.findall(r"```python backbone\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr(backbones, "__path__", [*backbones.__path__, str(folder)])
    monkeypatch.setitem(sys.modules, f"backbones.{name}", None)  # which is then put back
    del sys.modules[f"backbones.{name}"]
    before, dictionary, after = Path(backbones.__file__).read_text().partition("BACKBONES: dict[str, Backbone] = {\n")
    package = {"__name__": "backbones", "__package__": "backbones"}
    exec(
        before.replace("\nclass Backbone", f"\n{line}\n\nclass Backbone", 1) + dictionary + f"{entry},\n{after}",
        package,
    )
    return package["backbone"](name)


def test_a_backbone_needs_its_file_and_the_lines_that_are_shown(tmp_path, monkeypatch):
    made = added("docs/extending.md", "convmixer", tmp_path, monkeypatch)
    assert made.options == {"attention", "full_resolution"}
    monkeypatch.setitem(BACKBONES, "convmixer", made)
    tokenizer = trained(tmp_path, "convmixer")
    assert any(type(part).__name__ == "ConvMixerBlock" for part in tokenizer.encoder.modules())
    assert tokenizer.encode(torch.zeros(2, 3, 32, 32)).shape == (2, 4, 4)


def test_the_lines_for_a_backbone_in_the_readme_are_all_that_it_needs(tmp_path, monkeypatch):
    made = added("README.md", "name", tmp_path, monkeypatch)
    assert made.Encoder(32, 4, 8, 16, 1)(torch.zeros(2, 3, 32, 32)).shape == (2, 8, 4, 4)


def test_a_quantizer_chooses_as_it_says(tmp_path, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "dithered", shown("quantizer").DitheredQuantizer)
    quantizer = trained(tmp_path, quantizer="dithered").quantizer
    tokens = torch.randn(4000, quantizer.code_dim)
    quantizer.replace(torch.ones(quantizer.codebook_size, dtype=torch.bool), tokens[: quantizer.codebook_size])
    still = [quantizer.eval().quantize(tokens).codes for _ in range(2)]
    assert torch.equal(*still)
    noisy = quantizer.train().choose(tokens, quantizer.codebook)
    assert 0 < (noisy.codes != still[0]).float().mean() < 0.5


def test_a_data_set_is_loaded_by_its_name(monkeypatch):
    monkeypatch.setitem(DATASETS, "stripes", shown("data").stripes)
    data = load("stripes", 16)
    assert (len(data.train), len(data.val), len(data.test)) == (1000, 100, 100)
    assert all(len(np.unique(image.reshape(-1, 3), axis=0)) <= 2 for image in data.test)


def test_a_metric_keeps_a_value_per_image():
    scores = shown("metric").AbsoluteScores(Setup(None, torch.device("cpu")))
    x = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    scores.update(Batch(x, x + torch.tensor([0, 1, 5], dtype=torch.uint8).view(3, 1, 1, 1), torch.zeros(3, 1, 1)))
    assert scores.per_image["mae"].tolist() == [0, 1, 5]
    assert scores.result() == {"mae": 2.0}


def test_a_prior_looks_back_only_and_steps_as_it_reads():
    made = shown("prior").GRUPrior(5, (3, 3), 8, 1, 0.0).eval()
    torch.nn.init.normal_(made.head.weight)
    torch.nn.init.normal_(made.layers[0].out.weight)
    codes = torch.randint(5, (2, 3, 3))
    logits, state, before = made.logits(codes).flatten(1, 2), made.start(None, 2), None
    for position, code in enumerate(codes.flatten(1).unbind(1)):
        step, state = made.step(position, before, state)
        torch.testing.assert_close(step, logits[:, position])
        before = code
    assert made.sample(2, torch.Generator().manual_seed(0)).shape == (2, 3, 3)


def test_a_study_sweeps_what_it_says():
    study = shown("study").STUDY
    assert isinstance(study, Ablation)
    assert study.sweep == {"warmup": (0, 50, 200)}


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("*/*.md")), ids=str)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_links_to_sections_have_their_heading():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target, section in re.findall(r"\]\((?!https?:)([^)#\s]*)#([\w-]+)\)", page.read_text()):
            linked = (page.parent / target) if target else page
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert section in slugs, f"{page.name} links to {target}#{section}"


def test_every_metric_is_explained():
    page = (ROOT / "docs" / "metrics.md").read_text()
    named = {name for words in re.findall(r"`([^`\n]+)`", page) for name in re.split(r"[,\s]+", words)}
    series = (
        "psnr_random_",
        "psnr_near_",
        "lpips_random_",
        "lpips_near_",
        "psnr_size_",
        "lpips_size_",
        "equivariance_",
    )
    assert [name for name in LABELS if name not in named and not name.startswith(series)] == []
