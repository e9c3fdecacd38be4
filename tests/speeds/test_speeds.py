"""What is timed is the same work on either side, and the numbers are what they are called. No test looks at a clock."""

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pytest
import torch

from bench import speed, speeds
from bench.priors.models.sequence import RecurrentLayer
from bench.speeds import commands, contest, growth, layers, pipeline
from bench.speeds.contest import Contest, Disagreement, Other, compete, met
from bench.tokenizers.config import make_config
from bench.tokenizers.costs import static_costs
from bench.tokenizers.train import TokenizerLearner


class Clock:
    """Stands still but for what works say that they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def takes(self, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.now += seconds

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


def known(clock: Clock, **more: object) -> Contest:
    """Ours takes 2 s, a peer 10, a bound 1 counted half, and what both have in common 0.5."""
    others = {
        "peer": Other(clock.takes(10), "peer", 4),
        "bound": Other(clock.takes(1), "bound", 3, times=0.5),
        "common": Other(clock.takes(0.5), "beyond", 1.6),
    }
    return Contest("known", clock.takes(2), others, **more)


def test_numbers_are_those_of_known_times(clock: Clock):
    rows = {row["against"]: row for row in compete("path", known(clock), "cpu", 0.01)}
    assert {name: row["number"] for name, row in rows.items()} == {"peer": 5, "bound": 4, "common": 1.5}
    assert [rows["bound"][name] for name in ("ours", "other", "low", "high")] == [2, 0.5, 4, 4]


def test_a_goal_is_a_least_of_peers_and_a_most_of_all_else(clock: Clock):
    rows = {row["against"]: row for row in compete("path", known(clock), "cpu", 0.01)}
    assert {name: met(row) for name, row in rows.items()} == {"peer": True, "bound": False, "common": True}
    assert met({"kind": "peer", "number": 3.9, "goal": 4}) is False
    assert met({"kind": "memory", "number": 63, "goal": 64}) is True
    assert met({"kind": "memory", "number": None, "goal": 64}) is None


def test_a_slow_round_does_not_count(clock: Clock):
    """All that ran in it was slow."""
    mood = iter([1, 1, *[1, 1, 50, 1, 1]])
    pace = [1.0]

    def ours() -> None:
        pace[0] = next(mood)
        clock.now += 2 * pace[0]

    def peer() -> None:
        clock.now += 10 * pace[0]

    one = Contest("moody", ours, {"peer": Other(peer, "peer")}, rounds=(5, 5))
    (row,) = compete("path", one, "cpu", 1e-9)
    assert (row["rounds"], row["number"], row["low"], row["high"]) == (5, 5, 5, 5)


def test_nothing_is_timed_before_results_agree(clock: Clock):
    def agree() -> None:
        raise Disagreement("apart")

    with pytest.raises(Disagreement):
        compete("path", known(clock, agree=agree), "cpu", 0.01)
    assert clock.now == 0


def test_same_knows_how_far_apart():
    x = torch.tensor([1.0, -4.0])
    contest.same("x", x, x * (1 + 1e-6), 1e-5)
    with pytest.raises(Disagreement, match=r"1\.0e-01"):
        contest.same("x", x, torch.tensor([1.4, -4.0]), 1e-2)
    for broken in ((x * torch.nan, x), (x, x * torch.nan)):
        with pytest.raises(Disagreement):
            contest.same("x", *broken, 1e-2)


@pytest.mark.parametrize("path", ["quantizer", "look-up", "mamba", "sampling"])
def test_ours_agrees_with_the_peers(path: str):
    next(speeds.PATHS[path]("cpu")).agree()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["scoring", "decoding"])
def test_ours_agrees_with_the_packages(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "FILES", 100)
    monkeypatch.setattr(pipeline, "IMAGES", 32)
    contests = speeds.PATHS[path]("cpu")  # kept: files of its contests go with it
    next(contests).agree()


def test_no_path_is_timed_under_two_names():
    assert len({*speeds.PATHS.values()}) == len(speeds.PATHS)


def test_a_wrong_look_up_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layers, "nearest", lambda tokens, codebook: torch.zeros(len(tokens), dtype=torch.int64))
    with pytest.raises(Disagreement, match="distance"):
        next(layers.look_ups("cpu")).agree()


def test_a_prior_that_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch):
    step = RecurrentLayer.step
    monkeypatch.setattr(RecurrentLayer, "step", lambda layer, x, state: step(layer, x, None))
    contests = [one for one in pipeline.samplings("cpu") if one.name.startswith("rnn")]
    with pytest.raises(Disagreement, match="logits at 1"):
        contests[0].agree()


def test_a_wrong_quantizer_is_noticed(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("vector_quantize_pytorch")
    first = next(layers.quantizers("cpu"))
    monkeypatch.setattr(torch.Tensor, "movedim", lambda x, *_: x.flip(1).permute(0, 2, 3, 1))  # other tokens
    with pytest.raises(Disagreement, match="codes are equal"):
        first.agree()


def test_a_power_law_has_its_exponent(clock: Clock):
    made = growth.Growth("size", (1, 2, 4, 8), lambda size, device: clock.takes(3.0 * size**1.5), "1.5")
    rows = speeds.grow("known", made, "cpu")
    assert [row["seconds"] for row in rows] == pytest.approx([3 * size**1.5 for size in (1, 2, 4, 8)])
    assert rows[0]["exponent"] == pytest.approx(1.5)
    assert rows[0]["exponent_at_end"] == pytest.approx(1.5)
    late = growth.Growth("size", (1, 2, 4, 8), lambda size, device: clock.takes(1.0 if size < 8 else 4.0), "")
    assert speeds.grow("known", late, "cpu")[0]["exponent_at_end"] == pytest.approx(2)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_paths(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose goals are met but for the bound, and one whose results differ."""

    def good(device: str) -> Iterator[Contest]:
        yield known(clock)

    def bad(device: str) -> Iterator[Contest]:
        def agree() -> None:
            raise Disagreement("they are 3 apart")

        yield known(clock, agree=agree)

    monkeypatch.setattr(speeds, "PATHS", {"good": good, "bad": bad})


@pytest.mark.usefixtures("two_paths")
def test_tables_are_renewed_by_path_and_check_says_what_was_missed(tmp_path, capsys: pytest.CaptureFixture):
    assert speed.main(["good", "--out", str(tmp_path)]) == 0
    assert speed.main(["good", "--check", "--seconds", "0.1", "--out", str(tmp_path)]) == 1
    rows = pd.read_csv(tmp_path / "speed.csv")
    assert len(rows) == 3
    assert rows.set_index("against").number.to_dict() == {"peer": 5, "bound": 4, "common": 1.5}
    told = capsys.readouterr()
    assert "good, known: 5.00 × as fast as peer (goal 4)" in told.out
    assert "good, known: 4.00 × the time of bound (goal 3, missed)" in told.out
    assert (
        "| good | known | × the time of bound | 4.00 (4.00–4.00) | ≤ 3, **missed** |"
        in (tmp_path / "tables.md").read_text()
    )
    assert (tmp_path / "speed.png").stat().st_size > 5000


@pytest.mark.usefixtures("two_paths")
def test_what_disagrees_is_told_and_its_older_times_are_gone(tmp_path, capsys: pytest.CaptureFixture, monkeypatch):
    assert speed.main(["bad", "--check", "--out", str(tmp_path)]) == 1
    assert "they are 3 apart" in capsys.readouterr().err
    assert not (tmp_path / "speed.csv").exists()
    monkeypatch.setitem(speeds.PATHS, "bad", speeds.PATHS["good"])
    assert speed.main(["--out", str(tmp_path), "good", "bad"]) == 0
    assert set(pd.read_csv(tmp_path / "speed.csv").path) == {"good", "bad"}

    def broken(device: str) -> Iterator[Contest]:
        raise RuntimeError("no kernel image")
        yield

    monkeypatch.setitem(speeds.PATHS, "bad", broken)
    assert speed.main(["bad", "--out", str(tmp_path)]) == 0
    assert "not timed: bad: no kernel image" in " ".join(capsys.readouterr().err.split())
    assert set(pd.read_csv(tmp_path / "speed.csv").path) == {"good"}


def test_tables_are_renewed_by_path_and_device(tmp_path):
    rows = [{"path": path, "device": device, "number": 1} for path in "ab" for device in ("cpu", "cuda")]
    for row in rows:
        speeds.keep(tmp_path / "x.csv", [row], path=row["path"], device=row["device"])
    speeds.keep(tmp_path / "x.csv", [{**rows[0], "number": 2}], path="a", device="cpu")
    table = pd.read_csv(tmp_path / "x.csv").set_index(["path", "device"]).number
    assert table.to_dict() == {("a", "cpu"): 2, ("a", "cuda"): 1, ("b", "cpu"): 1, ("b", "cuda"): 1}


def test_growth_has_a_table_and_a_picture(clock: Clock, tmp_path, monkeypatch: pytest.MonkeyPatch):
    made = growth.Growth("size", (1, 2, 4), lambda size, device: clock.takes(size**2), "2: pairs")
    monkeypatch.setattr(speeds, "GROWTH", {"pairs": made})
    assert speed.main(["growth", "--out", str(tmp_path)]) == 0
    assert "| pairs | size | 1: 1 s, 2: 4 s, 4: 16 s | 2.00 | 2.00 | 2: pairs |" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "growth.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["quantiser"], "there is no path 'quantiser'; choose from quantizer"),
        (["--seconds", "0"], "seconds is 0"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], told: str, tmp_path, capsys: pytest.CaptureFixture):
    assert speed.main([*words, "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert told in said
    assert not (tmp_path / "out").exists()


def test_a_command_that_fails_is_no_faster():
    commands._python("-c", "pass")()
    with pytest.raises(Disagreement, match="exit code 3"):
        commands._python("-c", "raise SystemExit(3)")()


@pytest.mark.parametrize("lpips_weight", [0.0, 1.0])
def test_the_operations_of_a_step_are_those_of_its_passes(lpips_weight: float):
    """Forward, and twice that backward, of the tokenizer; AlexNet's convolutions, forward twice and backward once."""
    config = make_config("cnn", lpips_weight=lpips_weight, device="cpu").resolved()
    learner = TokenizerLearner(config, np.zeros((1, 64, 64, 3), np.uint8))
    costs = static_costs(learner.model)
    # pixels of the output, its channels, those of the input, taps
    alex = [(15**2, 64, 3, 11**2), (7**2, 192, 64, 5**2), *((3**2, *rest, 3**2) for rest in ((384, 192), (256, 384)))]
    alex += [(3**2, 256, 256, 3**2)]
    trunk = sum(2 * math.prod(shape) for shape in alex) if lpips_weight else 0
    expected = config.batch_size * 3 * (costs["flops_encode"] + costs["flops_decode"] + trunk)
    assert pipeline._operations(learner) == expected
