"""Where the time of a training step goes: parts that are slow by construction are found to be."""

import json
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.run import main
from bench.tokenizers import profile as module
from bench.tokenizers import train
from bench.tokenizers.profile import PARTS, profile

PAUSE = 0.15  # seconds, more than all else takes even beside other work


class _Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backward):
        ctx.pause = PAUSE * backward
        time.sleep(PAUSE * (not backward))
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.pause)
        return grad, None


class Late(nn.Module):
    """A module whose forward or whose backward pass takes PAUSE longer."""

    def __init__(self, slow: nn.Module, backward: bool):
        super().__init__()
        self.slow, self.late = slow, backward

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("slow", "_modules", "late") else getattr(self.slow, name)

    def forward(self, *arguments):
        return _Late.apply(self.slow(*arguments), self.late)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "WARM", 1)
    monkeypatch.setattr(module, "STEPS", 2)


@pytest.fixture
def config(tiny):
    return replace(tiny, gan_weight=0.5, gan_start=0.3, gan_width=8, gan_layers=2, lpips_weight=0.5).resolved()


def slowed(monkeypatch, part: str, backward: bool) -> None:
    """Has every learner that is made a slow ``part``."""
    made = train.TokenizerLearner.__init__

    def make(self, *arguments):
        made(self, *arguments)
        if part == "perceptual":
            self.lpips = Late(self.lpips, backward)
        elif part == "adversary":
            self.adversary.discriminator = Late(self.adversary.discriminator, backward)
        else:
            setattr(self.model, part, Late(getattr(self.model, part), backward))

    monkeypatch.setattr(train.TokenizerLearner, "__init__", make)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("part", ["encoder", "decoder", "perceptual", "adversary"])
def test_a_part_that_takes_long_is_found_to(config, images, tmp_path, monkeypatch, part, backward):
    """Forward or backward, as often as it is passed: no other part takes longer."""
    slowed(monkeypatch, part, backward)
    found = profile(config, images.train, tmp_path / "trace.json")
    assert found[part] > 600 * PAUSE
    assert max(found, key=lambda name: found[name] * (name != "step")) == part


def test_batches_and_what_lies_between_are_told_apart(config, images, tmp_path, monkeypatch):
    batch = train.batch
    monkeypatch.setattr(train, "batch", lambda *arguments: time.sleep(PAUSE) or batch(*arguments))
    assert profile(config, images.train, tmp_path / "trace.json")["batch"] > 600 * PAUSE
    monkeypatch.setattr(train, "batch", batch)
    weigh = train.reconstruction_weight
    monkeypatch.setattr(train, "reconstruction_weight", lambda *them: time.sleep(PAUSE) or weigh(*them))
    assert profile(config, images.train, tmp_path / "trace.json")["rest"] > 600 * PAUSE


def test_parts_add_up_to_a_step_and_are_those_that_it_has(config, images, tmp_path):
    found = profile(config, images.train, tmp_path / "in" / "trace.json")
    assert [name for name in found if name != "step"] == [name for name in PARTS if name != "alignment"]
    assert sum(found.values()) == pytest.approx(2 * found["step"])
    assert min(found.values()) > 0
    names = {event.get("name") for event in json.loads((tmp_path / "in" / "trace.json").read_text())["traceEvents"]}
    assert {f"part {name}" for name in ("step", "encoder", "quantizer", "decoder", "adversary")} <= names
    plain = profile(replace(config, gan_weight=0.0, lpips_weight=0.0), images.train, tmp_path / "trace.json")
    assert {*PARTS} - {*plain} == {"perceptual", "alignment", "adversary"}


def test_nothing_of_it_is_left_in_a_learner(config, images):
    """Training afterwards is as it was, and other learners are not looked at."""
    learner = train.TokenizerLearner(config, images.train)
    with module.ranges(learner):
        assert learner.model.encoder._forward_hooks
    for part in (learner.model.encoder, learner.model.quantizer, learner.model.decoder, learner.lpips):
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


def test_a_profile_trains_nothing_and_says_where_its_traces_are(trial_data, tmp_path, monkeypatch, capsys):
    words = ["--profile", "--backbone", "cnn", "vit", "--preset", "smoke", "--steps", "5", "--width", "16"]
    words += ["--depth", "1", "--lpips-weight", "0", "--device", "cpu", "--results", str(tmp_path)]
    assert main(words) == 0
    said = "".join(capsys.readouterr().out.split())  # wherever lines end
    assert all(word in said for word in ("cnnema", "vitema", "encoder", "optimizer", "step", "profiles"))
    assert "perceptual" not in said
    assert len(list((tmp_path / "profiles").glob("*.json"))) == 2
    assert not (tmp_path / "runs").exists()


def test_a_config_that_cannot_work_is_refused_before_anything_is_timed(tmp_path, capsys):
    assert main(["--profile", "--grid-size", "7", "--results", str(tmp_path)]) == 2
    assert "does not divide" in capsys.readouterr().err
