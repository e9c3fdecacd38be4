"""A batch that networks see in parts: the numbers of the whole one, with the memory of a part."""

import json
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bench.core.errors import UserError
from bench.tokenizers.config import Config, make_config
from bench.tokenizers.train import TokenizerLearner, train
from bench.tokenizers.trial import run_trial
from bench.training.parts import in_parts
from tests.training.test_group import CASES, GAN, TINY, images

R1 = make_config("cnn", "smoke", **TINY, **GAN, lecam_weight=0.1, r1_weight=1.0)


def rows(config: Config, folder: Path, **options) -> tuple[list[dict], dict[str, torch.Tensor]]:
    folder.mkdir()
    model, _ = train(config.resolved(), images(), folder, **options)
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()], model.state_dict()


@pytest.mark.parametrize("case", [*CASES, "r1"])
def test_a_batch_in_parts_gives_the_curves_and_weights_of_a_whole_one(case, tmp_path):
    config = CASES.get(case, R1)
    (whole, weights), (parts, others) = rows(config, tmp_path / "1"), rows(config, tmp_path / "3", accumulate=3)
    for one, other in zip(whole, parts, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds"}:
            assert other[name] == pytest.approx(one[name], rel=2e-4, abs=2e-6), name
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_may_go_on_in_parts(tmp_path):
    """They are no setting of it: its folder is that of the same run."""
    config = make_config("cnn", "smoke", **TINY).resolved()
    learner = TokenizerLearner(config, images(), 3)
    assert learner.config.run_id() == config.run_id()
    with pytest.raises(UserError, match="accumulate is 7; a batch of 6 images has 1 to 6 parts"):
        run_trial(config, tmp_path, accumulate=7)
    with pytest.raises(UserError, match="accumulate is 0"):
        run_trial(config, tmp_path, accumulate=0)


def kept(parts: int) -> int:
    """Bytes that the graph of a step's networks holds until the backward pass."""
    config = make_config("cnn", "smoke", **{**TINY, "batch_size": 12}).resolved()
    learner, held = TokenizerLearner(config, images(), parts), []
    x = torch.randn(12, 3, 16, 16)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.numel() * tensor.element_size() * (len(tensor) in (4, 12)))  # of images, not of weights
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        in_parts(learner.model.encoder, parts, x).sum()
    return sum(held)


def test_what_is_held_for_the_backward_pass_is_the_images_alone():
    assert kept(3) < kept(1) / 5


def test_parts_are_joined_in_their_order():
    x, y = torch.arange(7.0)[:, None], torch.arange(7.0)[:, None] * 10
    assert torch.equal(in_parts(lambda a, b: a + b, 3, x, y), x + y)
