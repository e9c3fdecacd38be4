"""The adversary: right signs, no leaks, both optimisers in step, and nothing at all when it is switched off."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

from bench.core.errors import UserError
from bench.data import batch
from bench.metrics import perceptual
from bench.tokenizers import train as module
from bench.tokenizers.discriminator import LECAM_DECAY, Adversary, PatchGAN
from bench.tokenizers.losses import ADAPTIVE_CAP, ADVERSARIAL, RECONSTRUCTION, adaptive_weight, gradient_penalty, lecam
from bench.tokenizers.tokenizer import Tokenizer
from tests.watched import Crash, Toy, adamw, checkpoint, same

every_loss = pytest.mark.parametrize("name", ADVERSARIAL)
every_norm = pytest.mark.parametrize("norm", ["group", "spectral"])


@pytest.fixture
def gan(tiny):
    """Discriminator from step 2, seen by the tokenizer from step 4, fully from step 7, of 12."""
    shares = {"gan_start": 4 / 12, "gan_warmup": 2 / 12, "gan_ramp": 3 / 12, "precision": "fp32"}
    return replace(tiny, gan_weight=0.5, gan_width=8, gan_layers=2, batch_size=4, **shares).resolved()


# ----------------------------------------------------------------------------------------------------------- the losses


def test_reconstruction_losses_are_the_formulas():
    torch.manual_seed(0)
    x_hat, x = torch.randn(2, 4, 3, 8, 8)
    torch.testing.assert_close(RECONSTRUCTION["l1"](x_hat, x), (x_hat - x).abs().mean())
    torch.testing.assert_close(RECONSTRUCTION["l2"](x_hat, x), (x_hat - x).square().mean())


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
    margins = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    torch.testing.assert_close(hinge.discriminator(real, fake), margins / 2)
    torch.testing.assert_close(hinge.generator(fake), -fake.mean())
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


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_patchgan_is_the_paper_s_layer_by_layer(layers):
    """Isola et al. 2017, section 6.1.2: C64-C128-C256-C512 of 4×4 convolutions, the last of stride 1, then one to a
    single channel; no norm after the first; leaky ReLUs of slope 0.2; channels double up to eight times."""
    torch.manual_seed(0)
    net = PatchGAN(8, layers, "group").eval()
    convolutions = [part for part in net.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in net.modules() if isinstance(part, nn.GroupNorm)]
    assert not any("parametrizations" in name for name in net.state_dict())  # which would rescale the weights
    channels = [3, *(8 * min(2**level, 8) for level in range(layers + 1)), 1]
    assert [part.in_channels for part in convolutions] == channels[:-1]
    assert [part.out_channels for part in convolutions] == channels[1:]
    assert [part.bias is not None for part in convolutions] == [True, *[False] * layers, True]
    assert [part.num_groups for part in norms] == [min(32, width) for width in channels[2:-1]]
    with torch.no_grad():
        for part in norms:
            part.weight.uniform_(0.5, 2)
            part.bias.uniform_(-1, 1)
    x = y = torch.randn(2, 3, 64, 64)
    for level, part in enumerate(convolutions):
        y = F.conv2d(y, part.weight, part.bias, stride=2 if level < layers else 1, padding=1)
        if 0 < level <= layers:
            norm = norms[level - 1]
            y = F.group_norm(y, norm.num_groups, norm.weight, norm.bias)
        if level <= layers:
            y = torch.where(y > 0, y, 0.2 * y)
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)


def test_settings_of_the_discriminator_reach_it(gan):
    """gan_width, gan_layers, gan_norm and gan_loss."""
    for width, layers, norm, loss in ((8, 2, "group", "hinge"), (4, 3, "spectral", "nonsaturating")):
        config = replace(gan, gan_width=width, gan_layers=layers, gan_norm=norm, gan_loss=loss)
        adversary = Adversary(config)
        parts = list(adversary.discriminator.modules())
        convolutions = [part for part in parts if isinstance(part, nn.Conv2d)]
        assert len(convolutions) == layers + 2
        assert convolutions[0].out_channels == width
        normed = [nn.utils.parametrize.is_parametrized(part) for part in convolutions]
        assert set(normed) == {norm == "spectral"}
        assert any(isinstance(part, nn.GroupNorm) for part in parts) == (norm == "group")
        x, x_hat = torch.randn(2, 2, 3, 32, 32)
        adversary.eval()
        real, fake = adversary.discriminator(x), adversary.discriminator(x_hat)
        terms = adversary.discriminator_losses(x, x_hat)
        torch.testing.assert_close(terms["discriminator"], ADVERSARIAL[loss].discriminator(real, fake))
        torch.testing.assert_close(adversary.generator_loss(x_hat), ADVERSARIAL[loss].generator(fake))
        assert terms.keys() == {"discriminator", "logits_real", "logits_fake"}


def test_spectral_norm_bounds_the_weights():
    net = PatchGAN(8, 2, "spectral").train()
    [net(torch.randn(2, 3, 32, 32)) for _ in range(50)]
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 4
    for layer in layers:
        assert layer.bias is not None  # no norm follows that would take it out
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


def test_lecam_is_the_formula():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 0.0])
    # real above fake's average −1: 2², 4²; fake below real's average 2: 4², 2²
    assert float(lecam(real, fake, torch.tensor(2.0), torch.tensor(-1.0))) == pytest.approx(10 + 10)
    assert float(lecam(real, fake, torch.tensor(1.0), torch.tensor(-2.0))) == pytest.approx(17 + 5)  # 3², 5²; 3², 1²
    assert float(lecam(-real, -fake, torch.tensor(-9.0), torch.tensor(9.0))) == 0


def test_lecam_compares_either_side_with_the_other_s_average_of_before(gan):
    """By the adversary, with averages that differ; both then follow their own side's logits, slowly."""
    torch.manual_seed(0)
    adversary = Adversary(replace(gan, lecam_weight=1.0))
    average_real, average_fake = 0.2, -0.3
    for _ in range(3):
        adversary.average_real.fill_(average_real)
        adversary.average_fake.fill_(average_fake)
        x, x_hat = torch.randn(2, 4, 3, 32, 32)
        real, fake = adversary.discriminator(x).detach(), adversary.discriminator(x_hat).detach()
        terms = adversary.discriminator_losses(x, x_hat)
        excess = (real - average_fake).clamp(min=0).square().mean() + (average_real - fake).clamp(min=0).square().mean()
        assert float(terms["lecam"].detach()) == pytest.approx(float(excess), rel=1e-4)
        assert float(terms["logits_real"]) == pytest.approx(float(real.mean()), rel=1e-3)
        assert float(terms["logits_fake"]) == pytest.approx(float(fake.mean()), rel=1e-3)
        for average, logits, name in ((average_real, real, "average_real"), (average_fake, fake, "average_fake")):
            moved = LECAM_DECAY * average + (1 - LECAM_DECAY) * float(logits.mean())
            assert float(getattr(adversary, name)) == pytest.approx(moved, rel=1e-5)
        average_real, average_fake = 0.7, 0.1
    assert LECAM_DECAY == 0.99
    assert not adversary.average_real.requires_grad


def test_r1_of_a_linear_discriminator_is_half_its_squared_norm():
    weight = torch.randn(3, 8, 8)
    x = torch.randn(5, 3, 8, 8, requires_grad=True)
    penalty = gradient_penalty(x, (x * weight).sum((1, 2, 3)))
    torch.testing.assert_close(penalty, 0.5 * weight.square().sum())


def test_r1_sums_an_image_s_patches_averages_over_images_and_can_be_minimised():
    """Two patches of logits a·x² and 3a·x²: an image's gradient is 8a·x, half its square 32a²x², whose derivative at a
    is 64a·x²."""
    x = torch.randn(5, 3, 8, 8, requires_grad=True)
    a = torch.tensor(0.7, requires_grad=True)
    penalty = gradient_penalty(x, torch.stack([a * x.square(), 3 * a * x.square()]))
    torch.testing.assert_close(penalty, 32 * (a * x).square().sum((1, 2, 3)).mean())
    (slope,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(slope, 64 * a.detach() * x.detach().square().sum((1, 2, 3)).mean())


def test_terms_are_weighted_once(gan):
    adversary = Adversary(replace(gan, lecam_weight=3.0, r1_weight=5.0))
    terms = {"discriminator": torch.tensor(1.0), "lecam": torch.tensor(10.0), "r1": torch.tensor(100.0)}
    assert float(adversary.total(terms)) == 1 + 30 + 500
    assert float(adversary.total({"discriminator": torch.tensor(1.0)})) == 1
    assert float(adversary.total({name: terms[name] for name in ("discriminator", "r1")})) == 501


def test_schedule(gan):
    """Warm-up before the start, a ramp from the start, a warm-up of the rate from the first step."""
    adversary = Adversary(replace(gan, steps=100, gan_start=0.5, gan_warmup=0.2, gan_ramp=0.1, warmup=10, gan_lr=0.5))
    assert (adversary.first, adversary.start) == (30, 50)
    weights = [adversary.weight(step) for step in range(100)]
    assert weights == pytest.approx([0] * 50 + [n / 10 for n in range(1, 11)] + [1] * 40)
    rates = [adversary.learning_rate(step, 3.0) for step in range(30, 100)]
    assert rates == pytest.approx([0.15 * n for n in range(1, 11)] + [1.5] * 60)


def test_schedule_at_its_ends(gan):
    at_once = Adversary(replace(gan, gan_start=0.0, gan_warmup=0.5, gan_ramp=0.0, warmup=0))
    assert (at_once.first, at_once.start) == (0, 0)
    assert [at_once.weight(step) for step in range(12)] == [1] * 12
    assert at_once.learning_rate(0, 1.0) == pytest.approx(gan.gan_lr)
    alone = Adversary(replace(gan, gan_start=0.5, gan_warmup=0.0))
    assert (alone.first, alone.start) == (6, 6)
    assert Adversary(replace(gan, gan_start=1.0)).start == 12  # never seen
    assert Adversary(replace(gan, steps=10, gan_start=0.48, gan_warmup=0.17)).first == 5 - 2  # rounded


# ------------------------------------------------------------------------------------------------------------- the loop


def written_out(config, images):
    """Training in its plainest words, on two sides at once: what VQGAN's equations 4 to 7 say, with LeCAM and R1.

    Returns the tokenizer's weights, their average, the discriminator's weights, and a dict of every step's terms.
    """
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer(config).to(memory_format=torch.channels_last).train()
    with torch.random.fork_rng():
        discriminator = PatchGAN(config.gan_width, config.gan_layers, config.gan_norm)
        discriminator = discriminator.to(memory_format=torch.channels_last).train()
    module.initialise_codebook(tokenizer, images, torch.autocast("cpu", torch.bfloat16, enabled=False))
    named = list(tokenizer.named_parameters())
    matrices = [p for name, p in named if p.ndim > 1 and not name.endswith(("codebook", "position"))]
    vectors = [p for name, p in named if p.ndim < 2 or name.endswith(("codebook", "position"))]
    ours, theirs = [p for _, p in named], list(discriminator.parameters())
    decay = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, discriminator_optimizer = (
        AdamW(decay, betas=(0.9, 0.95)),
        AdamW(theirs, betas=(0.5, 0.9), weight_decay=0.0),
    )
    mean_real = mean_fake = 0.0
    averages, log = None, []
    start = round(config.gan_start * config.steps)
    first = start - round(config.gan_warmup * config.steps)
    for step in range(config.steps):
        torch.manual_seed(config.seed * 2**32 + step)
        warm = min(1, (step + 1) / config.warmup)
        rate = config.lr * warm * (1 + math.cos(math.pi * step / config.steps)) / 2
        x = batch(images, config.seed, step, config.batch_size, config.augment, "cpu")
        quantized = tokenizer.quantizer(tokenizer.encoder(x))
        x_hat = tokenizer.decoder(quantized.z_q)
        difference = x_hat - x
        fidelity = difference.abs().mean() if config.reconstruction == "l1" else difference.square().mean()
        terms = {"reconstruction": fidelity, "quantizer": quantized.loss, "distortion": quantized.distortion}
        if config.lpips_weight:
            terms["lpips"] = perceptual(config.lpips_net, torch.device("cpu"))(x_hat, x).mean()
            fidelity = fidelity + config.lpips_weight * terms["lpips"]
        loss = fidelity + quantized.loss
        if step >= start:
            logits = discriminator(x_hat)
            terms["gan"] = -logits.mean() if config.gan_loss == "hinge" else F.softplus(-logits).mean()
            terms["gan_scale"] = torch.ones(())
            if config.gan_adaptive:
                last = tokenizer.decoder.last_layer
                pulls = [
                    torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (fidelity, terms["gan"])
                ]
                terms["gan_scale"] = (pulls[0] / (pulls[1] + 1e-4)).detach()
            ramp = min(1, (step + 1 - start) / round(config.gan_ramp * config.steps))
            loss = loss + config.gan_weight * ramp * terms["gan_scale"] * terms["gan"]
        apply(optimizer, ours, torch.autograd.grad(loss, ours, allow_unused=True), rate, config.grad_clip, terms)
        if averages is None:
            averages = [p.detach().clone() for p in ours]
        else:
            keep = min(config.weight_ema, (1 + step) / (10 + step))
            averages = [keep * mean + (1 - keep) * p.detach() for mean, p in zip(averages, ours, strict=True)]
        if step >= first:
            real = x.detach().requires_grad_()
            logits_real, logits_fake = discriminator(real), discriminator(x_hat.detach())
            if config.gan_loss == "hinge":
                terms["discriminator"] = ((1 - logits_real).clamp(0).mean() + (1 + logits_fake).clamp(0).mean()) / 2
            else:
                terms["discriminator"] = (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()) / 2
            total = terms["discriminator"]
            terms["logits_real"], terms["logits_fake"] = logits_real.mean(), logits_fake.mean()
            if config.lecam_weight:
                terms["lecam"] = (logits_real - mean_fake).clamp(0).square().mean()
                terms["lecam"] = terms["lecam"] + (mean_real - logits_fake).clamp(0).square().mean()
                total = total + config.lecam_weight * terms["lecam"]
                mean_real = 0.99 * mean_real + 0.01 * float(logits_real.detach().mean())
                mean_fake = 0.99 * mean_fake + 0.01 * float(logits_fake.detach().mean())
            if config.r1_weight:
                slope = torch.autograd.grad(logits_real.sum(), real, create_graph=True)[0]
                terms["r1"] = slope.square().sum((1, 2, 3)).mean() / 2
                total = total + config.r1_weight * terms["r1"]
            rate = config.gan_lr * rate * min(1, (step + 1 - first) / config.warmup)
            apply(discriminator_optimizer, theirs, torch.autograd.grad(total, theirs), rate, config.grad_clip, {})
        log.append({name: float(value.detach()) for name, value in terms.items()})
    return tokenizer.state_dict(), averages, discriminator.state_dict(), log


def apply(optimizer, parameters, gradients, rate, clip, terms):
    """One update, by gradients of a norm of at most ``clip``."""
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    terms["grad_norm"] = torch.stack([gradient.norm() for gradient in gradients]).norm()
    share = min(1.0, clip / float(terms["grad_norm"])) if clip else 1.0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * share
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


ALGORITHMS = {
    "all of it": {
        **{"lpips_weight": 0.3, "gan_weight": 0.7, "lecam_weight": 0.4, "r1_weight": 0.2, "reconstruction": "l1"},
        **{"grad_clip": 0.05, "gan_lr": 0.6, "weight_ema": 0.2, "weight_decay": 0.3, "warmup": 4, "gan_loss": "hinge"},
    },
    "a plain adversary": {
        **{"gan_weight": 0.2, "gan_adaptive": False, "gan_loss": "nonsaturating", "gan_norm": "spectral"},
        **{"grad_clip": 0.0, "quantizer": "standard", "beta": 0.5},
    },
}


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_a_run_is_the_algorithm_written_out(watch, gan, kind):
    """Both sides' weights, the average, and every term of the log (bugs 12, 13 and 15)."""
    config = replace(gan, **ALGORITHMS[kind])
    weights, averages, discriminator, log = written_out(config, watch.images)
    trained = watch.train(config)
    stored = checkpoint(trained.folder)
    for name, value in weights.items():
        torch.testing.assert_close(stored["tokenizer"][name], value, rtol=1e-2, atol=2e-4, msg=name)
    for (name, found), value in zip(trained.tokenizer.named_parameters(), averages, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-2, atol=2e-4, msg=name)
    for name, value in discriminator.items():
        torch.testing.assert_close(stored["adversary"][f"discriminator.{name}"], value, rtol=1e-2, atol=1e-4, msg=name)
    for row, terms in zip(trained.rows, log, strict=True):
        own = {name: value for name, value in row.items() if name in terms}
        assert own == pytest.approx(terms, rel=2e-3, abs=1e-5)
        assert row.keys() == terms.keys() | {"step", "lr", "seconds", "perplexity", "codes_used"}


@pytest.mark.parametrize("adaptive", [True, False])
def test_without_weight_or_before_its_start_it_changes_nothing(watch, gan, adaptive):
    """Bit for bit: weight 0 is no discriminator, and one that is not seen yet is as good as none."""
    plain = watch.train(replace(gan, gan_weight=0.0), "plain")
    assert len(plain.optimisers) == 1
    unseen = replace(gan, gan_start=1.0, gan_warmup=0.5, gan_adaptive=adaptive)
    assert same(plain.weights, watch.train(unseen, "unseen").weights)
    seen = watch.train(gan, "seen")
    assert not same(plain.weights, seen.weights)
    for name in plain.rows[0].keys() - {"seconds"}:  # up to the first step of the ramp, whose loss sees it
        assert [row[name] for row in seen.rows[:4]] == [row[name] for row in plain.rows[:4]]


@pytest.mark.parametrize("gan_norm", ["group", "spectral"])
def test_resume_is_bit_exact(watch, gan, gan_norm):
    """With the discriminator's weights, its optimiser and LeCAM's averages, all of which have moved where the run is
    stopped: after its first steps, in the ramp and at full weight (bug 14)."""
    config = replace(gan, lecam_weight=1.0, r1_weight=0.1, gan_norm=gan_norm)
    whole = watch.train(config, "whole")
    first = Adversary(config).state_dict()
    for stop in (3, 6, 9):
        with pytest.raises(Crash):
            watch.train(config, "parts", crash_at=stop)
        stored = checkpoint(watch.folder / "parts")
        assert stored["at"] == (stop, float(stop))
        assert {int(moments["step"]) for moments in stored["discriminator_optimizer"]["state"].values()} == {stop - 2}
        assert all(moments["exp_avg"].any() for moments in stored["discriminator_optimizer"]["state"].values())
        assert stored["adversary"]["average_real"] != 0
        assert stored["adversary"]["average_fake"] != 0
        assert stored["adversary"].keys() == first.keys()
    parts = watch.train(config, "parts")
    assert same(parts.weights, whole.weights)
    assert same(checkpoint(parts.folder), checkpoint(whole.folder))
    assert parts.rows == whole.rows


def test_an_adversary_that_an_older_version_stopped_goes_on(watch, gan):
    """Its checkpoint calls the discriminator's optimizer and the averaged weights by other names."""
    gan = replace(gan, steps=5)
    whole = watch.train(gan, "whole")
    with pytest.raises(Crash):
        watch.train(gan, "parts", crash_at=3)
    old = {"ema": "average", "discriminator_optimizer": "rival"}
    stored = {old.get(name, name): part for name, part in checkpoint(watch.folder / "parts").items()}
    torch.save(stored, watch.folder / "parts/checkpoint.pt")
    assert same(watch.train(gan, "parts").weights, whole.weights)


def test_both_sides_see_the_same_batch_and_step_once_per_step(watch, gan, monkeypatch):
    """Images, too, not only reconstructions (bugs 13 and 15)."""
    seen = {"generator": [], "discriminator": []}

    class Spy(Adversary):
        def generator_loss(self, x_hat):
            seen["generator"].append(x_hat.detach().clone())
            return super().generator_loss(x_hat)

        def discriminator_losses(self, x, x_hat):
            seen["discriminator"].append((x.clone(), x_hat.detach().clone()))
            return super().discriminator_losses(x, x_hat)

    monkeypatch.setattr(module, "Adversary", Spy)
    trained = watch.train(gan)
    assert (len(seen["generator"]), len(seen["discriminator"])) == (8, 10)
    for step, (x, x_hat) in enumerate(seen["discriminator"], 2):
        assert torch.equal(x, batch(watch.images, 0, step, 4, "flip", "cpu"))
        if step >= 4:
            assert torch.equal(x_hat, seen["generator"][step - 4])
    counts = [{int(state["step"]) for state in optimiser.state.values()} for optimiser in trained.optimisers]
    assert counts == [{12}, {10}]


def test_the_discriminator_is_updated_by_adamw_at_its_share_of_the_rate(watch, gan):
    """Betas 0.5 and 0.9, no decay, clipped; gan_lr of the tokenizer's own rate, warmed up from its first step."""
    config = replace(gan, gan_lr=0.3, weight_decay=0.5, grad_clip=0.05, warmup=4, lr=0.01)
    trained = watch.train(config)
    assert len(trained.discriminator) == 10
    for number, (ours, theirs) in enumerate(zip(trained.steps[2:], trained.discriminator, strict=True)):
        assert theirs.rates == pytest.approx([0.3 * min(1, (number + 1) / 4) * ours.rates[0]])
        assert theirs.decays == [0.0]
        assert theirs.norm() <= 0.05 * (1 + 1e-4)
    for step, expected in zip(trained.discriminator, adamw(trained.discriminator, (0.5, 0.9)), strict=True):
        for after, weight in zip(step.after, expected, strict=True):
            torch.testing.assert_close(after.double(), weight, rtol=1e-4, atol=1e-6)


def test_grad_clip_bounds_the_discriminator_too_and_0_does_not(watch, gan):
    free = watch.train(replace(gan, grad_clip=0.0), "free").discriminator[0]
    bound = free.norm() / 4
    clipped = watch.train(replace(gan, grad_clip=bound), "clipped").discriminator
    assert clipped[0].norm() == pytest.approx(bound, rel=1e-4)
    assert all(step.norm() <= bound * (1 + 1e-4) for step in clipped)


def tokenizer_gradients(trained, step):
    return torch.cat([gradient.flatten() for gradient in trained.steps[step].gradients])


@pytest.mark.parametrize("lpips_weight", [0.0, 0.5])
def test_the_adaptive_scale_is_the_ratio_with_lpips_and_without_the_quantizer_s_loss(
    watch, gan, monkeypatch, lpips_weight
):
    """Measured at the decoder's last layer."""
    config = replace(gan, lpips_weight=lpips_weight, gan_start=0.0, gan_warmup=0.0, steps=1, warmup=0, beta=50.0)
    asked = []

    def ratio(fidelity, adversarial, layer):
        asked.append((float(fidelity.detach()), layer.shape))
        return adaptive_weight(fidelity, adversarial, layer)

    monkeypatch.setattr(module, "adaptive_weight", ratio)
    (row,) = watch.train(config).rows
    torch.manual_seed(0)
    shape = Tokenizer(config).decoder.last_layer.shape
    expected = row["reconstruction"] + lpips_weight * row.get("lpips", 0.0)
    assert asked == [(pytest.approx(expected, rel=1e-5), shape)]


def test_gan_weight_and_ramp_scale_the_adversary_s_gradient_alone(watch, gan):
    """Linear in either: twice the weight pulls twice as far from the gradient without an adversary."""
    base = replace(gan, gan_adaptive=False, grad_clip=0.0, gan_start=0.0, gan_warmup=0.0, gan_ramp=0.5, steps=2)
    first = {
        name: tokenizer_gradients(watch.train(replace(base, **changes), name), 0)
        for name, changes in {
            "without": {"gan_weight": 0.0},
            "once": {"gan_weight": 0.5},
            "twice": {"gan_weight": 1.0},
            "half": {"gan_weight": 1.0, "gan_ramp": 1.0},
        }.items()
    }
    pull = first["once"] - first["without"]
    assert pull.norm() > 0.001 * first["without"].norm()
    torch.testing.assert_close(first["twice"] - first["without"], 2 * pull, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(first["half"], first["once"], rtol=1e-2, atol=1e-5)


def test_an_adaptive_adversary_pulls_as_hard_as_the_fidelity_does(watch, gan):
    """At the last layer, times gan_weight: scale and gradient are those of one step."""
    base = replace(gan, grad_clip=0.0, gan_start=0.0, gan_warmup=0.0, gan_ramp=0.0, steps=1, gan_weight=0.5)
    plain, fixed, adaptive = (
        watch.train(replace(base, **changes), name)
        for name, changes in (
            ("plain", {"gan_weight": 0.0}),
            ("fixed", {"gan_adaptive": False}),
            ("adaptive", {"gan_adaptive": True}),
        )
    )
    assert fixed.rows[0]["gan_scale"] == 1
    scale = adaptive.rows[0]["gan_scale"]
    pulls = [tokenizer_gradients(run, 0) - tokenizer_gradients(plain, 0) for run in (fixed, adaptive)]
    assert float(pulls[1].norm() / pulls[0].norm()) == pytest.approx(scale, rel=1e-3)


@pytest.mark.parametrize("name", ["lecam_weight", "r1_weight"])
def test_regularisers_scale_their_own_gradient_alone(watch, gan, name):
    """That of the discriminator, linearly; the log has the term unweighted."""
    base = replace(gan, grad_clip=0.0, gan_start=0.0, gan_warmup=0.0, steps=1)
    runs = [watch.train(replace(base, **{name: weight}), f"{weight}") for weight in (0.0, 1.0, 3.0)]
    none, once, thrice = (torch.cat([g.flatten() for g in run.discriminator[0].gradients]) for run in runs)
    assert (once - none).norm() > 0
    torch.testing.assert_close(thrice - none, 3 * (once - none), rtol=1e-2, atol=1e-5)
    term = name.removesuffix("_weight")
    assert [term in run.rows[0] for run in runs] == [False, True, True]
    assert runs[1].rows[0][term] == pytest.approx(runs[2].rows[0][term])
    assert same(runs[0].weights, runs[2].weights)  # the tokenizer's first step has not seen it


def test_gan_start_and_warmup_set_the_steps_at_which_things_begin(watch, gan, monkeypatch):
    """Shares of 12 steps: which terms each row has."""
    monkeypatch.setattr(module, "Tokenizer", Toy)
    for start, warmup, seen, trained in ((4, 2, 4, 2), (6, 0, 6, 6), (2, 5, 2, 0), (0, 0, 0, 0)):
        config = replace(gan, gan_start=start / 12, gan_warmup=warmup / 12)
        rows = watch.train(config, f"{start} {warmup}").rows
        assert [{"gan", "gan_scale"} <= row.keys() for row in rows] == [step >= seen for step in range(12)]
        assert ["discriminator" in row for row in rows] == [step >= trained for step in range(12)]


@pytest.mark.parametrize("name", ["gan_start", "gan_ramp", "gan_warmup"])
def test_shares_are_shares(tiny, name):
    with pytest.raises(UserError, match=rf"{name} is 1.5; .* 0 to 1"):
        replace(tiny, **{name: 1.5}).check()


@every_loss
def test_adversarial_losses_are_float32_under_bf16(gan, name):
    adversary = Adversary(replace(gan, gan_loss=name, lecam_weight=1.0, r1_weight=1.0))
    x, x_hat = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = adversary.generator_loss(x_hat), adversary.discriminator_losses(x, x_hat)
        logits = adversary.discriminator(x_hat)
    assert logits.dtype == torch.bfloat16
    assert {loss.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
    torch.testing.assert_close(loss, ADVERSARIAL[name].generator(logits.float()))
