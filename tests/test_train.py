"""The training loop: repeatable, resumable to the bit, honest about divergence, and deaf to no setting."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch

from bench import train as module
from bench.config import Config
from bench.files import UserError
from bench.quantizers import QUANTIZERS
from bench.tokenizer import Tokenizer
from bench.train import Diverged, Interrupted, learning_rate, parameter_groups, train

every = pytest.mark.parametrize("quantizer", QUANTIZERS)


def state(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tokenizer.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def run(images, tmp_path):
    """Trains in a fresh folder and returns the scored weights."""

    def run(config: Config, name: str = "run", **options) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return state(train(config.resolved(), images.train, folder, **options)[0])

    return run


@every
def test_same_seed_same_bits(run, tiny, quantizer):
    config = replace(tiny, quantizer=quantizer)
    first = run(config, "a")
    torch.rand(7)  # what happened before must not matter
    assert equal(first, run(config, "b"))
    assert not equal(first, run(replace(config, seed=1), "c"))


@every
@pytest.mark.parametrize("stop", [1, 7, 11])
def test_resume_is_bit_exact(run, tiny, monkeypatch, quantizer, stop):
    """Weights, optimiser, average, codebook statistics and every random draw, in the middle of an epoch (bug 14)."""
    config = replace(tiny, quantizer=quantizer, revive_after=1, augment="blog")
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


def test_resume_continues_the_history_without_gaps_or_repeats(run, tiny, tmp_path, monkeypatch):
    run(tiny, "whole")
    with monkeypatch.context() as patch:
        patch.setattr(module, "learning_rate", lambda config, step: learning_rate(config, step) if step < 6 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tiny, "parts", checkpoint_seconds=0)
    with (tmp_path / "parts/history.jsonl").open("a") as file:
        file.write('{"step": 7, "reconst')  # torn by the crash
    run(tiny, "parts")
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    }
    for row in rows["whole"] + rows["parts"]:
        del row["seconds"]
    assert rows["whole"] == rows["parts"]
    assert [row["step"] for row in rows["whole"]] == list(range(1, 13))
    assert {"reconstruction", "quantizer", "grad_norm", "distortion", "perplexity", "codes_used", "lr"} <= set(
        rows["whole"][0]
    )


def test_no_resume_starts_again(run, tiny):
    config = replace(tiny, steps=4)
    whole = run(config, "whole")
    run(tiny, "other", checkpoint_seconds=0)
    assert equal(run(config, "other", resume=False), whole)


def test_a_damaged_checkpoint_is_refused(run, tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="no checkpoint of this run"):
        run(tiny)


def test_a_signal_saves_and_the_same_call_goes_on(run, tiny, monkeypatch):
    import os
    import signal

    whole = run(tiny, "whole")
    batch = module.batch
    monkeypatch.setattr(
        module,
        "batch",
        lambda i, seed, step, *r: (step == 5 and os.kill(os.getpid(), signal.SIGTERM), batch(i, seed, step, *r))[1],
    )
    with pytest.raises(Interrupted, match="step 6 of 12"):
        run(tiny, "parts")
    monkeypatch.setattr(module, "batch", batch)
    assert equal(run(tiny, "parts"), whole)


def test_divergence_stops_the_run_and_is_never_saved(run, tiny, tmp_path):
    with pytest.raises(Diverged, match="--lr below"):
        run(replace(tiny, lr=1e30, grad_clip=0.0, precision="fp32"), checkpoint_seconds=0)
    checkpoint = tmp_path / "run/checkpoint.pt"
    if checkpoint.exists():
        weights = torch.load(checkpoint, weights_only=True)["tokenizer"]
        assert all(value.isfinite().all() for value in weights.values())


CHANGES = {
    "backbone": "convnext",
    "width": 24,
    "depth": 2,
    "patch_overlap": True,
    "final_conv": True,
    "attention": 1,
    "pretrained": None,  # checked in test_backbones
    "quantizer": "l2",
    "image_size": None,  # the data's; checked below
    "grid_size": 8,
    "codebook_size": 17,
    "code_dim": 5,
    "beta": 1.0,
    "ema_decay": 0.5,
    "kmeans_init": True,
    "entropy_weight": 0.1,
    "gradient": "rotation",
    "temperature": 0.5,
    "revive_after": 1,
    "reconstruction": "l1",
    "lpips_weight": 0.5,
    "lpips_net": "vgg",
    "gan_weight": 1.0,
    "gan_start": 0.7,
    "gan_ramp": 0.9,
    "gan_warmup": 0.0,
    "gan_loss": "nonsaturating",
    "gan_adaptive": False,
    "gan_lr": 1.0,
    "gan_width": 4,
    "gan_layers": 1,
    "gan_norm": "spectral",
    "lecam_weight": 1.0,
    "r1_weight": 1.0,
    "steps": 11,
    "batch_size": 7,
    "lr": 1e-3,
    "warmup": 5,
    "weight_decay": 0.5,
    "grad_clip": 1e-3,
    "weight_ema": 0.1,
    "augment": "none",
    "precision": "bf16",
    "device": None,  # checked in test_config
    "data": None,  # checked in test_trial
    "seed": 1,
}


def test_every_setting_is_in_the_table_of_changes():
    assert CHANGES.keys() == {field.name for field in fields(Config)}


@pytest.mark.parametrize("name", [name for name, value in CHANGES.items() if value is not None])
def test_every_setting_changes_the_result(run, tiny, name):
    """Flags that are parsed and never used (bug 16)."""
    base = replace(tiny, precision="fp32", codebook_size=64 if name == "revive_after" else 16)
    if name == "temperature":
        base = replace(base, quantizer="gumbel")
    if name == "lpips_net":
        base = replace(base, lpips_weight=0.5, steps=2)
    if name in ("patch_overlap", "final_conv"):
        base = replace(base, backbone="vit")
    if name.startswith(("gan_", "lecam_", "r1_")):
        base = replace(base, gan_weight=0.5, gan_start=0.3, gan_warmup=0.2, gan_ramp=0.2, gan_width=8, gan_layers=2)
    changed = replace(base, **{name: CHANGES[name]})
    a, b = run(base, "a"), run(changed, "b")
    assert {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()} or not equal(a, b)


def test_image_size_changes_the_model(tiny):
    sizes = [
        Tokenizer(replace(tiny, image_size=size)).decode(torch.zeros(1, 4, 4, dtype=torch.int64)).shape
        for size in (32, 64)
    ]
    assert sizes == [(1, 3, 32, 32), (1, 3, 64, 64)]


def test_learning_rate_warms_up_and_ends_near_zero(tiny):
    config = replace(tiny, lr=1.0, warmup=10, steps=100)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) <= 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(replace(config, warmup=0), 0) == 1.0


@pytest.mark.parametrize("backbone", ["cnn", "vit", "bimamba"])
def test_weight_decay_spares_what_is_no_weight(tiny, backbone):
    tokenizer = Tokenizer(replace(tiny, backbone=backbone, quantizer="l2"))
    decayed, free = (set(map(id, group["params"])) for group in parameter_groups(tokenizer, 0.1))
    for name, parameter in tokenizer.named_parameters():
        spared = parameter.ndim < 2 or name.split(".")[-1] in ("codebook", "position", "A_log", "D", "dt_bias")
        assert (id(parameter) in free) == spared, name
        assert (id(parameter) in decayed) != spared, name


def test_weight_average_is_the_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average, expected = module.averaged(model, 0.9), 0.0
    for n in range(100):
        with torch.no_grad():
            model.weight.fill_(n)
        average.update_parameters(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = n if n == 0 else decay * expected + (1 - decay) * n
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-4)


def test_training_lowers_the_loss_for_every_quantizer(run, tiny, tmp_path):
    for quantizer in QUANTIZERS:
        run(replace(tiny, quantizer=quantizer, steps=150), quantizer)
        rows = [json.loads(line) for line in (tmp_path / quantizer / "history.jsonl").read_text().splitlines()]
        losses = [row["reconstruction"] for row in rows]
        assert sum(losses[-10:]) < 0.7 * sum(losses[:10])  # batches of eight images differ by as much as training gains
        assert all(math.isfinite(value) for row in rows for value in row.values())
