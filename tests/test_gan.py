"""The adversary: right signs, no leaks, both optimisers in step, and nothing at all when it is switched off."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import train as module
from bench.discriminator import LECAM_DECAY, Adversary, PatchGAN
from bench.files import UserError
from bench.losses import ADAPTIVE_CAP, ADVERSARIAL, adaptive_weight, gradient_penalty, lecam
from bench.train import train

every_loss = pytest.mark.parametrize("name", ADVERSARIAL)
every_norm = pytest.mark.parametrize("norm", ["group", "spectral"])


@pytest.fixture
def gan(tiny):
    """Discriminator from step 2, seen by the tokenizer from step 4, fully from step 7, of 12."""
    shares = {"gan_start": 4 / 12, "gan_warmup": 2 / 12, "gan_ramp": 3 / 12}
    return replace(tiny, gan_weight=0.5, gan_width=8, gan_layers=2, **shares).resolved()


@pytest.fixture
def run(images, tmp_path):
    def run(config, name="run", **options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return train(config.resolved(), images.train, folder, **options)[0].state_dict()

    return run


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_loss
def test_high_logits_mean_real_to_both_sides(name):
    """Swapped arguments of the two sides (bug 12), by the signs of all gradients."""
    real, fake = (torch.zeros(8, requires_grad=True) for _ in range(2))
    ADVERSARIAL[name].discriminator(real, fake).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    seen = torch.zeros(8, requires_grad=True)
    ADVERSARIAL[name].generator(seen).backward()
    assert (seen.grad < 0).all()


def test_losses_are_the_formulas():
    torch.manual_seed(0)
    real, fake = torch.randn(2, 50) * 2
    ones, zeros = torch.ones(50), torch.zeros(50)
    entropy = F.binary_cross_entropy_with_logits
    logistic, hinge = ADVERSARIAL["nonsaturating"], ADVERSARIAL["hinge"]
    torch.testing.assert_close(logistic.discriminator(real, fake), (entropy(real, ones) + entropy(fake, zeros)) / 2)
    torch.testing.assert_close(logistic.generator(fake), entropy(fake, ones))
    assert hinge.discriminator(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -5.0])) == 0  # beyond the margin
    assert hinge.discriminator(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    assert hinge.generator(torch.tensor([3.0, 1.0])) == -2


def test_adaptive_weight_is_the_ratio_of_gradients_and_stays_finite():
    layer = nn.Parameter(torch.tensor([3.0, 4.0]))
    fidelity = (layer * torch.tensor([3.0, 4.0])).sum()  # gradient norm 5
    weak = (layer * torch.tensor([0.0, 0.5])).sum()  # gradient norm 0.5
    assert float(adaptive_weight(fidelity, weak, layer)) == pytest.approx(5 / (0.5 + 1e-4))
    nothing = (layer * 0).sum()
    assert float(adaptive_weight(fidelity, nothing, layer)) == pytest.approx(ADAPTIVE_CAP)  # 5 / 1e-4, capped
    assert float(adaptive_weight(nothing, weak, layer)) == 0
    assert float(adaptive_weight(fidelity, (layer * math.inf).sum(), layer)) == 0
    assert float(adaptive_weight(fidelity * math.nan, weak, layer)) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert adaptive_weight(fidelity, weak, layer).dtype == torch.float32
    weight = adaptive_weight(fidelity, weak, layer)
    assert not weight.requires_grad
    (weight * weak).backward()  # the graphs are still there


@every_norm
def test_logits_of_an_image_are_its_own(norm):
    """BatchNorm would couple real and reconstructed images (bug 13)."""
    torch.manual_seed(0)
    net = PatchGAN(8, 3, norm).train()
    x = torch.randn(4, 3, 64, 64)
    [net(x) for _ in range(3)]  # spectral norm's power iteration moves the weights a little at every pass
    alone, together = net.eval()(x[:1]), net(x)[:1]
    torch.testing.assert_close(alone, together)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in net.modules())


def test_patches_are_of_70_pixels():
    """The receptive field of the three-layer PatchGAN, by gradient."""
    net = PatchGAN(8, 3, "spectral").eval()  # GroupNorm would let every logit see the whole image a little
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = net(x)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    touched = x.grad.abs().sum(1)[0].nonzero()
    assert (touched.max(0).values - touched.min(0).values + 1).tolist() == [70, 70]


def test_spectral_norm_bounds_the_weights():
    net = PatchGAN(8, 2, "spectral").train()
    [net(torch.randn(2, 3, 32, 32)) for _ in range(50)]
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("extra", [{}, {"lecam_weight": 1.0}, {"r1_weight": 1.0}])
def test_gradients_stay_on_their_side(gan, extra):
    """The generator's step leaves none in the discriminator, nor the other way round (bug 12)."""
    adversary = Adversary(replace(gan, **extra))
    x, x_hat = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32, requires_grad=True)
    adversary.generator_loss(x_hat).backward()
    assert all(parameter.grad is None for parameter in adversary.parameters())
    assert all(parameter.requires_grad for parameter in adversary.parameters())
    assert x_hat.grad.abs().sum() > 0
    x_hat.grad = None
    adversary.total(adversary.discriminator_losses(x, x_hat)).backward()
    assert x_hat.grad is None
    assert x.grad is None
    assert all(parameter.grad is not None for parameter in adversary.parameters())


def test_lecam_is_the_formula_and_follows_the_averages(gan):
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 0.0])
    # real above fake's average −1: 2², 4²; fake below real's average 2: 4², 2²
    assert float(lecam(real, fake, torch.tensor(2.0), torch.tensor(-1.0))) == pytest.approx(10 + 10)
    assert float(lecam(-real, -fake, torch.tensor(-9.0), torch.tensor(9.0))) == 0
    adversary = Adversary(replace(gan, lecam_weight=1.0))
    terms = adversary.discriminator_losses(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
    assert float(adversary.average_real) == pytest.approx(float(terms["logits_real"]) * (1 - LECAM_DECAY), rel=1e-4)
    assert float(adversary.average_fake) == pytest.approx(float(terms["logits_fake"]) * (1 - LECAM_DECAY), rel=1e-4)


def test_r1_of_a_linear_discriminator_is_half_its_squared_norm():
    weight = torch.randn(3, 8, 8)
    x = torch.randn(5, 3, 8, 8, requires_grad=True)
    penalty = gradient_penalty(x, (x * weight).sum((1, 2, 3)))
    torch.testing.assert_close(penalty, 0.5 * weight.square().sum())


def test_terms_are_weighted_once(gan):
    adversary = Adversary(replace(gan, lecam_weight=3.0, r1_weight=5.0))
    terms = {"discriminator": torch.tensor(1.0), "lecam": torch.tensor(10.0), "r1": torch.tensor(100.0)}
    assert float(adversary.total(terms)) == 1 + 30 + 500


def test_schedule(gan):
    adversary = Adversary(replace(gan, steps=100, gan_start=0.5, gan_warmup=0.2, gan_ramp=0.1, warmup=10, gan_lr=0.5))
    assert (adversary.first, adversary.start) == (30, 50)
    weights = [adversary.weight(step) for step in range(100)]
    assert weights[:50] == [0] * 50
    assert weights[50] == pytest.approx(0.1)
    assert weights[59:] == [1] * 41
    rates = [adversary.learning_rate(step, 1.0) for step in range(30, 100)]
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert set(rates[10:]) == {0.5}


@pytest.mark.parametrize("adaptive", [True, False])
def test_without_weight_or_before_its_start_it_changes_nothing(run, gan, adaptive):
    """Bit for bit: weight 0 is no discriminator, and one that is not seen yet is as good as none."""
    plain = run(replace(gan, gan_weight=0.0), "plain")
    unseen = replace(gan, gan_start=1.0, gan_warmup=0.5, gan_adaptive=adaptive)
    assert equal(plain, run(unseen, "unseen"))
    assert not equal(plain, run(gan, "seen"))


@pytest.mark.parametrize("stop", [1, 3, 5, 9])
def test_resume_is_bit_exact(run, gan, monkeypatch, stop):
    """With the discriminator's weights, optimiser and averages (bug 14)."""
    config = replace(gan, lecam_weight=1.0, r1_weight=0.1, gan_norm="spectral")
    whole = run(config, "whole")
    batch = module.batch

    def crash(images, seed, step, *rest):
        if step == stop and rest[1] != "none":
            raise KeyboardInterrupt
        return batch(images, seed, step, *rest)

    monkeypatch.setattr(module, "batch", crash)
    with pytest.raises(KeyboardInterrupt):
        run(config, "parts", checkpoint_seconds=0)
    monkeypatch.setattr(module, "batch", batch)
    assert equal(run(config, "parts"), whole)


def test_both_sides_see_the_same_batch_and_step_once_per_step(run, gan, monkeypatch):
    """Bugs 13 and 15."""
    seen = {"generator": [], "discriminator": []}
    optimisers = []

    class Spy(Adversary):
        def generator_loss(self, x_hat):
            seen["generator"].append(x_hat.detach().clone())
            return super().generator_loss(x_hat)

        def discriminator_losses(self, x, x_hat):
            seen["discriminator"].append(x_hat.detach().clone())
            return super().discriminator_losses(x, x_hat)

    class Recorded(torch.optim.AdamW):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            optimisers.append(self)

    monkeypatch.setattr(module, "Adversary", Spy)
    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    run(gan)
    assert len(seen["generator"]) == 8
    assert len(seen["discriminator"]) == 10
    assert all(torch.equal(a, b) for a, b in zip(seen["generator"], seen["discriminator"][2:], strict=True))
    counts = [{int(state["step"]) for state in optimiser.state.values()} for optimiser in optimisers]
    assert counts == [{12}, {10}]


def test_every_term_is_logged_unweighted_from_its_first_step(run, gan, tmp_path):
    run(replace(gan, lecam_weight=1.0, r1_weight=1.0, gan_loss="nonsaturating"), "logged")
    rows = [json.loads(line) for line in (tmp_path / "logged/history.jsonl").read_text().splitlines()]
    late = {"discriminator", "logits_real", "logits_fake", "lecam", "r1"}
    assert [late <= row.keys() for row in rows] == [False] * 2 + [True] * 10
    assert [{"gan", "gan_scale"} <= row.keys() for row in rows] == [False] * 4 + [True] * 8
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[4]["gan"] == pytest.approx(math.log(2), rel=0.5)  # not scaled by gan_weight or the ramp


@pytest.mark.parametrize("name", ["gan_start", "gan_ramp", "gan_warmup"])
def test_shares_are_shares(tiny, name):
    with pytest.raises(UserError, match=rf"{name} is 1.5; .* 0 to 1"):
        replace(tiny, **{name: 1.5}).check()
