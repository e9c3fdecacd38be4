"""Steps to a plateau and roughness of curves whose answers are known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tokenizers.curves import (
    LOSS_SHARE,
    METRICS,
    PERPLEXITY_SHARE,
    STEEP,
    curve_metrics,
    roughness,
    steps_to,
    still_falling,
    undecided,
)

SHARES = pytest.mark.parametrize("share", [PERPLEXITY_SHARE, LOSS_SHARE])
curves = st.lists(st.floats(0.5, 500), min_size=1, max_size=40).map(np.array)


def every(log_every: int, rows: int) -> np.ndarray:
    """The steps of ``rows`` logged rows."""
    return log_every * np.arange(1.0, rows + 1)


def history(rows: int = 100, **columns: np.ndarray) -> list[dict[str, float]]:
    """Rows at steps 10, 20, …"""
    steps = every(10, rows)
    return [{"step": step, **{name: column[i] for name, column in columns.items()}} for i, step in enumerate(steps)]


@SHARES
@given(values=curves, scale=st.floats(1e-3, 1e3))
def test_the_unit_of_a_curve_and_of_its_steps_does_not_matter(share, values, scale):
    """In powers of two, which round nothing."""
    found, scale = steps_to(every(1, len(values)), values, share), 2.0 ** round(math.log2(scale))
    assert steps_to(every(1, len(values)), values * scale, share) == found
    assert steps_to(every(50, len(values)), values, share) == 50 * found


@SHARES
@given(values=curves)
def test_a_curve_that_only_rises_or_only_falls_is_read_exactly(share, values):
    """The first value beyond the bound, looked up: nothing is smoothed away."""
    values = np.sort(values) if share < 1 else np.sort(values)[::-1]
    most = min(2, (len(values) - 1) // 2)
    bound = share * values[len(values) - 1 - most]
    first = next(i for i, value in enumerate(values) if (value >= bound if share < 1 else value <= bound))
    expected = first + 1 if first < len(values) - 1 - most else len(values)
    assert steps_to(every(1, len(values)), values, share) == expected


def test_a_saturating_curve_settles_at_three_time_constants():
    """1 − exp(−t/τ) is 0.95 at τ·ln 20, and exp(−t/τ) above a floor of 1 is 0.05 there."""
    steps = every(10, 400)
    rise, fall = 512 * (1 - np.exp(-steps / 500)), 1 + np.exp(-steps / 500)
    assert steps_to(steps, rise, 0.95) == pytest.approx(500 * math.log(20), abs=10)
    assert steps_to(steps, fall, 1.05) == pytest.approx(500 * math.log(20), abs=10)


@SHARES
@given(st.integers(0, 90), st.floats(1e-3, 1e3))
def test_two_stray_rows_move_the_answer_by_no_more_than_their_neighbours(share, at, factor):
    """Anywhere but among the last five rows, which say where the curve ends."""
    steps = every(10, 100)
    rise = 512 * (1 - np.exp(-steps / 100))
    curve = rise if share < 1 else 1 + 1 / rise
    stray = curve.copy()
    stray[at : at + 2] *= factor
    assert steps_to(steps, stray, share) == pytest.approx(steps_to(steps, curve, share), abs=20)


@SHARES
def test_noise_within_the_band_moves_the_answer_little(share):
    """Of a standard deviation of 1 % of the value, in a curve whose answer is 300 of 1000 steps."""
    generator, steps = np.random.default_rng(0), every(5, 200)
    rise = 1 - np.exp(-steps / 100)
    curve = rise if share < 1 else 2 - rise
    found = [steps_to(steps, curve * (1 + 0.01 * generator.normal(size=200)), share) for _ in range(50)]
    assert np.abs(np.array(found) - steps_to(steps, curve, share)).max() < 60


@SHARES
def test_a_curve_that_leaves_the_band_again_has_not_settled_before(share):
    """Codes that fall out of use: a perplexity that was high is not where it ends."""
    steps, away = every(10, 100), 0.5 if share < 1 else 2.0
    curve = np.ones(100)
    curve[40:60] = away
    assert steps_to(steps, curve, share) == 610
    assert steps_to(steps, np.ones(100), share) == 10
    beyond = np.ones(100)
    beyond[:60] = 1 / away  # high perplexity and low loss are beyond the bound
    assert steps_to(steps, beyond, share) == 10


@SHARES
def test_a_curve_that_never_settles_took_all_steps(share):
    growth, away = (1.1, 0.5) if share < 1 else (1 / 1.1, 2.0)
    assert steps_to(every(10, 100), growth ** np.arange(100.0), share) == 1000
    jumps = np.where(np.arange(100) // 3 % 2, away, 1.0)
    assert steps_to(every(10, 100), jumps, share) >= 960


@SHARES
def test_what_has_no_end_above_zero_has_no_answer(share):
    for values in ([], [1.0, math.nan, 1.0], [1.0, math.inf], [1.0, 0.0], [-1.0, -2.0, -3.0]):
        assert steps_to(every(1, len(values)), np.array(values), share) is None


@given(st.lists(st.floats(-20, 5), min_size=3, max_size=40), st.floats(-5, 5), st.floats(-2, 2))
def test_roughness_knows_neither_scale_nor_rate_of_decay(logs, shift, slope):
    """Of a loss, a · exp(bt) times it: that differs in no second difference of logs."""
    logs = np.array(logs)
    found = roughness(np.exp(logs))
    assert roughness(np.exp(logs + shift)) == pytest.approx(found, abs=1e-8)
    assert roughness(np.exp(logs + slope * np.arange(len(logs)))) == pytest.approx(found, abs=1e-8)
    assert found == pytest.approx(np.mean(np.abs(logs[2:] - 2 * logs[1:-1] + logs[:-2])), abs=1e-8)


def test_roughness_of_curves_of_known_answer():
    assert roughness(3 * np.exp(-np.arange(50) / 7)) == pytest.approx(0, abs=1e-12)
    assert roughness(np.exp([0.0, 0.1] * 25)) == pytest.approx(0.2)  # up and down by ten per cent
    falling = np.exp(-np.arange(200) / 50)
    noise = np.random.default_rng(0).normal(size=200)
    mild, rough = (roughness(falling * np.exp(size * noise)) for size in (0.01, 0.05))
    assert rough == pytest.approx(5 * mild)
    # a second difference of independent noise has variance 6σ²; the mean of |N(0, 1)| is √(2/π)
    assert mild == pytest.approx(0.01 * math.sqrt(6 * 2 / math.pi), rel=0.15)


@pytest.mark.parametrize("losses", [[], [1.0, 1.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0]])
def test_there_is_no_roughness_of_what_has_no_logarithm_or_no_bend(losses):
    assert roughness(np.array(losses)) is None


def test_a_history_has_the_metrics_that_its_columns_allow():
    steps = every(10, 100)
    rise, fall, flat = 1 - np.exp(-steps / 100), 0.1 + np.exp(-steps / 100), np.full(100, 0.01)
    whole = curve_metrics(history(perplexity=512 * rise, reconstruction=fall, quantizer=flat), 0)
    assert whole.keys() == METRICS.keys()
    assert whole["steps_to_perplexity"] == 300
    assert whole["codebook_roughness"] == pytest.approx(0, abs=1e-12)
    assert curve_metrics(history(perplexity=512 * rise), 0) == {"steps_to_perplexity": 300}
    assert curve_metrics(history(perplexity=512 * rise, reconstruction=fall), 0).keys() == {"steps_to_perplexity"}
    assert curve_metrics([], 0) == {}


def test_the_loss_is_reconstruction_and_codebook_loss():
    """Each alone would have settled at once, or elsewhere."""
    flat, late = np.full(100, 1.0), np.where(np.arange(100) < 50, 2.0, 1.0)
    for reconstruction, quantizer in ((flat, late), (late, flat)):
        found = curve_metrics(history(reconstruction=reconstruction, quantizer=quantizer), 0)
        assert found["steps_to_loss"] == 510
    assert curve_metrics(history(reconstruction=flat * 100, quantizer=late), 0)["steps_to_loss"] == 10


def test_the_codebook_is_looked_at_after_the_warm_up():
    """Up to and with the step at which the rate is full, its loss may jump."""
    wild = np.where(np.arange(100) < 30, np.where(np.arange(100) % 2, 9.0, 1.0), 1.0)
    rows = history(quantizer=wild, reconstruction=wild)
    assert curve_metrics(rows, 300)["codebook_roughness"] == pytest.approx(0, abs=1e-12)
    assert curve_metrics(rows, 299)["codebook_roughness"] == pytest.approx(math.log(9) / 69)
    assert "codebook_roughness" not in curve_metrics(rows, 990)


def test_a_run_below_kmeans_at_the_same_bits_is_not_done():
    flat = history(reconstruction=np.ones(100))
    assert undecided({"psnr": 12.0, "psnr_kmeans": 24.04}, flat) == ["12.0 dB below k-means at the same bits"]
    assert undecided({"psnr": 24.04, "psnr_kmeans": 12.0}, flat) == []
    assert undecided({"psnr": 12.0}, flat) == []  # a latent without codes has no reference


def test_a_run_whose_second_half_gains_much_is_not_done():
    """However flat the end is: what counts is from the middle to the end."""
    told = ["the second half of training still took 30 % off the reconstruction loss"]
    for share, reasons in ((0.7, told), (0.95, [])):
        losses = np.r_[np.linspace(2, 1, 40), np.ones(10), np.linspace(1, share, 30), np.full(20, share)]
        assert undecided({}, history(reconstruction=losses)) == reasons
    assert still_falling(history(reconstruction=np.r_[np.full(50, 2.0), np.full(50, 3.0)])) == pytest.approx(-0.5)


@given(losses=st.lists(st.floats(0.5, 2), min_size=20, max_size=300), scale=st.floats(1e-3, 1e3))
def test_how_far_a_loss_falls_has_no_unit(losses, scale):
    plain, scaled = (still_falling([{"step": 1, "reconstruction": x * k} for x in losses]) for k in (1.0, scale))
    assert plain == pytest.approx(scaled)
    assert plain < 1


def test_a_loss_that_is_short_or_broken_tells_nothing():
    assert still_falling(history(19, reconstruction=np.linspace(2, 1, 19))) is None
    assert still_falling(history(50)) is None
    assert still_falling(history(50, reconstruction=np.zeros(50))) is None
    assert undecided({}, []) == []
    assert 0 < STEEP < 1
