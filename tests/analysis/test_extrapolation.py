"""Power laws of curves that are power laws are found again, and cross where they do."""

import json
import re

import numpy as np
import pytest

from bench.analysis.advice import advice
from bench.analysis.extrapolation import COOL, WARM, Law, crossing, histories, law, outlook
from bench.analysis.frames import frame
from bench.core.store import Store
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate

STEPS = np.arange(10, 2001, 10)


@pytest.mark.parametrize(("floor", "scale", "exponent"), [(0.02, 0.5, 0.5), (0.0, 0.3, 0.2), (0.01, 4.0, 1.0)])
def test_a_power_law_is_found_again(floor, scale, exponent):
    found = law(STEPS, floor + scale * STEPS**-exponent)
    for steps in (100, 2000, 20_000):
        assert found(steps) == pytest.approx(floor + scale * steps**-exponent, rel=0.02)
    assert found.error < 1e-3


def test_noise_costs_little_and_shows_as_error():
    rng = np.random.default_rng(0)
    truth = Law(0.02, 0.5, 0.5, 0.0)
    found = law(STEPS, truth(STEPS) * np.exp(0.05 * rng.standard_normal(len(STEPS))))
    assert found(4000) == pytest.approx(truth(4000), rel=0.1)
    assert 0.03 < found.error < 0.07


def test_warm_up_and_the_falling_rate_are_left_out():
    losses = Law(0.02, 0.5, 0.5, 0.0)(STEPS)
    share = STEPS / STEPS[-1]
    bent = np.select([share < WARM, share > COOL], [9.0, 0.001], losses)
    assert law(STEPS, bent) == law(STEPS, losses)


@pytest.mark.parametrize("losses", [[1.0] * 5, [0.0] * 200, [np.nan] * 200, []])
def test_what_is_no_curve_has_no_law(losses):
    assert law(STEPS[: len(losses)], losses) is None


def test_a_slow_start_that_ends_lower_crosses_where_the_formulas_say():
    quick, slow = Law(0.02, 1.0, 1.0, 0.0), Law(0.01, 1.0, 0.8, 0.0)
    at = crossing(quick, slow, 20)
    assert quick(at) == pytest.approx(slow(at))
    assert quick(0.9 * at) < slow(0.9 * at)
    assert quick(1.1 * at) > slow(1.1 * at)
    assert crossing(slow, quick, 20) == pytest.approx(at)


def test_what_is_below_and_stays_below_does_not_cross():
    assert crossing(Law(0.02, 1.0, 1.0, 0.0), Law(0.03, 1.0, 1.0, 0.0), 100) is None
    late = Law(0.0199, 1.0, 0.99, 0.0)  # at some 670 steps
    assert crossing(Law(0.02, 1.0, 1.0, 0.0), late, 20) == pytest.approx(673, rel=0.01)
    assert crossing(Law(0.02, 1.0, 1.0, 0.0), late, 2) is None  # beyond reach


def store_of(path, laws: dict[str, Law], steps: int = 2000, factors=(0.9, 1.0, 1.1)) -> Store:
    """Seeds of each backbone whose training loss follows a law, times a factor of the seed's own."""
    store = Store(path)
    for backbone, one in laws.items():
        for seed, factor in enumerate(factors):
            run = fabricate(store, make_config(backbone, "smoke", seed=seed, steps=steps, device="cpu"))
            rows = [{"step": int(step), "reconstruction": factor * float(one(step))} for step in STEPS]
            (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return store


TURNING = {"cnn": Law(0.02, 1.0, 1.0, 0.0), "vit": Law(0.018, 10.0, 1.0, 0.0)}  # where 0.02 + 1 / t = 0.018 + 10 / t


def test_a_report_says_what_more_steps_would_do(tmp_path):
    laws = {"cnn": Law(0.02, 1.0, 1.0, 0.0), "vit": Law(0.0199, 1.0, 0.98, 0.0)}
    block = frame(store_of(tmp_path, laws).runs())
    first, second = outlook(histories(block), 2000)
    gain = 1 - laws["cnn"](4000) / laws["cnn"](2000)
    assert f"cnn {gain:.0%}" in first
    assert crossing(laws["cnn"], laws["vit"], 20) < 2000
    assert second.endswith("beyond 2,000 steps no two backbones would change order.")  # they have crossed already
    assert not any("power laws" in one for one in advice(block.assign(steps=[1000, *block.steps[1:]]), []).warnings)
    assert first in advice(block, []).warnings
    flat = frame(store_of(tmp_path / "flat", {"cnn": Law(0.5, 0.1, 1.0, 0.0), "vit": Law(0.4, 0.1, 1.0, 0.0)}).runs())
    assert outlook(histories(flat), 2000) == []


def test_a_crossing_to_come_is_told(tmp_path):
    block = frame(store_of(tmp_path, TURNING).runs())
    (told,) = (sentence for sentence in advice(block, []).warnings if "these would change order" in sentence)
    low, high = (
        float(number.replace(",", "")) for number in re.search(r"at ([\d,]+) to ([\d,]+) steps", told).groups()
    )
    assert low == pytest.approx(9 / 0.002, rel=0.1)
    assert high == pytest.approx(9 / 0.002, rel=0.1)


def test_one_seed_or_seeds_that_disagree_tell_of_no_crossing(tmp_path):
    block = frame(store_of(tmp_path / "one", TURNING, factors=(1.0,)).runs())
    assert len(outlook(histories(block), 2000)) == 1
    store = store_of(tmp_path / "three", TURNING)
    flat = next(run for run in store.runs() if run.config()["seed"] == 1 and run.config()["backbone"] == "vit")
    rows = [{**row, "reconstruction": 0.5} for row in flat.history()]
    (flat.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outlook(histories(frame(store.runs())), 2000)[1].endswith("no two backbones would change order.")
