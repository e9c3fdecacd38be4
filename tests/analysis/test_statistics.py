"""Verdicts: right about known effects, silent about noise, and blind to everything that is not paired."""

import cProfile
import itertools
import warnings
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from bench.analysis import statistics
from bench.analysis.frames import METRICS, blocks, frame
from bench.analysis.statistics import (
    FEWEST,
    IMAGE_SEEDS,
    Images,
    Verdict,
    backbone_verdicts,
    sentences,
    setting_verdicts,
)
from bench.core.store import Store
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate, sweep

FOUR = ("cnn", "convnext", "vit", "mamba")


@pytest.fixture(autouse=True)
def no_warnings():
    """Nothing here may warn: not of NaN, not of lost precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def rows(scores, **metrics) -> pd.DataFrame:
    """A block without run folders from (Config, LPIPS) pairs; ``metrics`` are further columns."""
    table = pd.DataFrame([{**asdict(config), "lpips_alex": score} for config, score in scores])
    unscored = dict.fromkeys(METRICS.keys() - {"lpips_alex"}, np.nan)
    return table.assign(**{**unscored, "folder": "nowhere", "params": 1_000_000.0, **metrics}).copy()  # in one piece


def block(names=("cnn", "vit"), seeds=range(5), betas=(0.25,), effects=None, noise=0.01, draw=0) -> pd.DataFrame:
    """Backbones × betas × seeds; LPIPS is 0.3 + effect of the backbone + effect of the seed + noise."""
    generator = np.random.default_rng(draw)
    difficulty = {seed: 0.05 * generator.normal() for seed in seeds}
    scores = []
    for name, beta, seed in itertools.product(names, betas, seeds):
        score = 0.3 + (effects or {}).get(name, 0.0) + difficulty[seed] + noise * generator.normal()
        scores.append((make_config(name, "smoke", seed=seed, beta=beta), score))
    return rows(scores)


def only(verdicts: list[Verdict]) -> Verdict:
    """The one verdict there is."""
    (verdict,) = verdicts
    return verdict


def swapped(verdict: Verdict) -> Verdict:
    """What the same data say about b against a."""
    return replace(
        verdict,
        a=verdict.b,
        b=verdict.a,
        difference=-verdict.difference,
        interval=(-verdict.interval[1], -verdict.interval[0]),
        image_interval=verdict.image_interval and (-verdict.image_interval[1], -verdict.image_interval[0]),
    )


def same(one: Verdict, other: Verdict) -> None:
    """Equal words and, up to rounding, equal numbers."""
    for name, value in vars(one).items():
        if isinstance(value, str) or value is None:
            assert getattr(other, name) == value, name
        else:
            assert getattr(other, name) == pytest.approx(value, abs=1e-12, nan_ok=True), name


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_one_pair_is_scipys_paired_t_test_over_means_of_seeds():
    table = block(betas=(0.25, 1.0))
    means = table.groupby(["backbone", "seed"]).lpips_alex.mean()
    expected = stats.ttest_rel(means["cnn"], means["vit"])
    verdict = only(backbone_verdicts(table))
    assert (verdict.metric, verdict.a, verdict.b, verdict.n) == ("lpips_alex", "cnn", "vit", 5)
    assert verdict.difference == pytest.approx((means["cnn"] - means["vit"]).mean())
    assert verdict.p == pytest.approx(expected.pvalue)
    assert verdict.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert verdict.image_interval is None
    assert verdict.within == "over beta 0.25, 1"


def test_holm_over_all_comparisons_of_a_call():
    table = block(FOUR, effects={"vit": 0.02, "mamba": 0.005})
    scores = {name: part.sort_values("seed").lpips_alex.to_numpy() for name, part in table.groupby("backbone")}
    raw = [stats.ttest_rel(scores[a], scores[b]).pvalue for a, b in itertools.combinations(sorted(FOUR), 2)]
    assert [v.p for v in backbone_verdicts(table)] == pytest.approx(list(multipletests(raw, method="holm")[1]))
    alone = only(backbone_verdicts(table[table.backbone.isin(["cnn", "vit"])])).p
    assert next(v.p for v in backbone_verdicts(table) if (v.a, v.b) == ("cnn", "vit")) > alone


def test_settings_are_one_family_across_backbones_and_fields():
    table = block(FOUR, betas=(0.25, 0.5, 1.0))
    raw = []
    for name in sorted(FOUR):
        part = table[table.backbone == name].pivot_table(index="seed", columns="beta", values="lpips_alex")
        raw += [stats.ttest_rel(part[beta], part[0.25]).pvalue for beta in (0.5, 1.0)]
    verdicts = setting_verdicts(table)
    assert [(v.within, v.a, v.b) for v in verdicts[:2]] == [
        ("cnn", "beta=0.5", "beta=0.25"),
        ("cnn", "beta=1", "beta=0.25"),
    ]
    assert [v.p for v in verdicts] == pytest.approx(list(multipletests(raw, method="holm")[1]))


def test_image_interval_is_the_bootstrap_of_averaged_image_differences(tmp_path):
    runs = sweep(Store(tmp_path), {"cnn": 0.0, "vit": 0.004}, seeds=range(IMAGE_SEEDS + 1))
    verdict = next(v for v in backbone_verdicts(frame(runs)) if v.metric == "lpips_alex")
    images = {"cnn": [], "vit": []}
    for run in runs:
        if run.config()["seed"] < IMAGE_SEEDS:
            images[run.config()["backbone"]].append(np.load(run.folder / "per_image.npz")["lpips_alex"])
    difference = np.mean(images["cnn"], axis=0, dtype=float) - np.mean(images["vit"], axis=0, dtype=float)
    error = difference.std() / np.sqrt(len(difference))
    expected = stats.norm.interval(0.95, loc=difference.mean(), scale=error)
    assert verdict.n == IMAGE_SEEDS + 1
    assert verdict.image_interval == pytest.approx(expected, abs=0.15 * error)


@pytest.mark.parametrize("count", [3, 4, 10])
def test_interval_and_p_are_scipys_for_any_differences(count):
    for draw in range(20):
        differences = np.random.default_rng([count, draw]).normal(draw / 20, 1, count)
        expected = stats.ttest_1samp(differences, 0)
        interval, p = statistics.paired_t(differences)
        assert p == pytest.approx(expected.pvalue, rel=1e-9)
        assert interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)


def test_holms_adjustment_is_that_of_statsmodels_for_any_p_values():
    """In any order, with ties, and never above 1 nor below what was given."""
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 6, 20):
        p = np.round(generator.beta(0.5, 2, count), 2)
        assert statistics.holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))
    assert statistics.holm([]) == []


@pytest.mark.parametrize(("p", "found"), [(0.049, True), (0.051, False), (0.024, True), (0.1, False)])
def test_a_verdict_is_an_adjusted_p_below_five_percent(p, found):
    """Five seeds whose mean difference is just so many standard errors; the interval leaves out 0 at the same point."""
    noise = np.array([0.3, -0.1, 0.2, -0.5, 0.1])
    shift = stats.sem(noise) * stats.t.isf(p / 2, 4)
    scores = [(make_config("cnn", "smoke", seed=seed), 0.5) for seed in range(5)]
    scores += [(make_config("vit", "smoke", seed=seed), 0.5 + noise[seed] + shift) for seed in range(5)]
    verdict = only(backbone_verdicts(rows(scores)))
    assert verdict.p == pytest.approx(p)
    assert verdict.better == ("cnn" if found else None)
    assert (verdict.interval[1] < 0) == found


def test_intervals_over_images_do_not_depend_on_who_else_is_compared():
    """All comparisons see the same resampled images, and the same ones each time."""
    one, other = np.random.default_rng(0).normal(size=(2, 64))
    alone = statistics._image_intervals({5: one})[5]
    together = statistics._image_intervals({5: one, 7: other, 9: one + 3, 11: -one})
    assert alone == statistics._image_intervals({5: one})[5]
    assert together[5] == pytest.approx(alone)
    assert together[9] == pytest.approx((alone[0] + 3, alone[1] + 3))
    assert alone[0] < one.mean() < alone[1]
    assert statistics._image_intervals({}) == {}


# -- symmetries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdicts", [backbone_verdicts, setting_verdicts])
def test_row_order_does_not_matter(verdicts, tmp_path):
    table = frame(sweep(Store(tmp_path), {"cnn": 0.0, "vit": 0.01, "mamba": 0.01})).drop(index=[3, 10])
    for one, other in zip(verdicts(table), verdicts(table.sample(frac=1, random_state=1)), strict=True):
        same(one, other)


def test_swapping_the_names_swaps_the_signs_and_nothing_else(tmp_path):
    table = frame(sweep(Store(tmp_path), {"cnn": 0.0, "vit": 0.01}))
    exchanged = table.assign(backbone=table.backbone.map({"cnn": "vit", "vit": "cnn"}))
    for one, other in zip(backbone_verdicts(table), backbone_verdicts(exchanged), strict=True):
        assert one.better == "vit"
        same(swapped(one), replace(other, a="vit", b="cnn", better="vit"))
        assert one.sentence().replace("vit", "?").replace("cnn", "vit").replace("?", "cnn") == other.sentence()


# -- right about effects ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "better"),
    [("lpips_alex", "lower"), ("fid", "lower"), ("psnr", "higher"), ("perplexity", "higher"), ("usage", "higher")],
)
def test_the_better_is_who_scores_better(metric, better):
    """By a difference that is the same in every seed, in each direction."""
    for gap, order in ((-0.1, "lower"), (0.1, "higher")):
        table = block(("cnn",))
        table[metric] = table.lpips_alex
        table = pd.concat([table, table.assign(backbone="vit", **{metric: table[metric] + gap})], ignore_index=True)
        verdict = only(backbone_verdicts(table, [metric]))
        assert verdict.difference == pytest.approx(-gap)
        assert verdict.better == ("vit" if order == better else "cnn")


def test_known_effects_give_the_right_words(tmp_path):
    table = frame(sweep(Store(tmp_path), {"cnn": 0.0, "convnext": 0.03, "vit": 0.0}))
    verdicts = backbone_verdicts(only(list(blocks(table))))
    found = {(v.metric, v.a, v.b): v.better for v in verdicts}
    for metric in ("lpips_alex", "lpips_vgg", "psnr"):  # lower, lower, higher is better
        assert found[metric, "cnn", "convnext"] == "convnext"
        assert found[metric, "convnext", "vit"] == "convnext"
        assert found[metric, "cnn", "vit"] is None
    sentences = [v.sentence() for v in verdicts]
    assert any(text.startswith("over beta 0.25, 1: convnext better than cnn by 0.0") for text in sentences)
    assert any("cnn and vit not distinguishable in PSNR dB: difference " in text for text in sentences)
    assert all("3 paired seeds; over images [" in text for text in sentences)


def test_a_better_setting_is_named_with_its_backbone(tmp_path):
    store, generator = Store(tmp_path), np.random.default_rng(0)
    runs = [
        fabricate(store, make_config(name, "smoke", beta=beta, seed=seed), gain * beta, 0.001 * generator.normal())
        for name, gain in (("cnn", 0.02), ("vit", 0.0))
        for beta in (0.25, 1.0)
        for seed in range(4)
    ]
    found = {v.within: v for v in setting_verdicts(frame(runs), ["psnr"])}
    assert found["cnn"].better == "beta=1"
    assert found["cnn"].sentence().startswith("cnn: beta=1 better than beta=0.25 by 0.")
    assert found["vit"].better is None


def test_the_reference_is_the_default_else_the_smallest():
    betas = [(v.a, v.b) for v in setting_verdicts(block(betas=(2.0, 0.1, 0.25)))]
    assert betas[:2] == [("beta=0.1", "beta=0.25"), ("beta=2", "beta=0.25")]
    assert {v.b for v in setting_verdicts(block(betas=(2.0, 0.1)))} == {"beta=0.1"}


def test_images_can_veto_but_not_make_a_verdict(tmp_path):
    """Every seed finds the same mean difference, but it hangs on one image out of 64."""
    store, runs = Store(tmp_path), []
    for name, seed in itertools.product(("cnn", "vit"), range(5)):
        run = fabricate(store, make_config(name, "smoke", seed=seed))
        noise = np.random.default_rng([seed, len(name)]).normal(size=64) * 1e-4
        scores = 0.3 + noise + (name == "vit") * np.eye(64)[0]
        np.savez(run.folder / "per_image.npz", lpips_alex=scores)
        run.write(
            "metrics.json", {"metrics": run.metrics() | {"lpips_alex": scores.mean()}, "protocol": run.protocol()}
        )
        runs.append(run)
    verdict = only(backbone_verdicts(frame(runs), ["lpips_alex"]))
    assert verdict.p < 1e-6
    assert verdict.image_interval[1] > -1e-3
    assert verdict.better is None
    for run in runs:
        (run.folder / "per_image.npz").unlink()
    verdict = only(backbone_verdicts(frame(runs), ["lpips_alex"]))
    assert (verdict.image_interval, verdict.better) == (None, "cnn")


def found_something(table: pd.DataFrame) -> bool:
    return any(v.better for v in backbone_verdicts(table))


def test_without_an_effect_a_family_is_wrong_at_the_level_or_less():
    """Four equal sides, three seeds: six comparisons a draw, one false verdict is a failure."""
    draws, false = 300, 0
    for scores in np.random.default_rng(0).normal(size=(draws, 4, 3)):
        pairs = itertools.combinations(scores, 2)
        false += min(statistics.holm([statistics.paired_t(a - b)[1] for a, b in pairs])) < 0.05
    assert 0 < false <= stats.binom.ppf(0.999, draws, 0.05)  # none would mean that the level is far from used


@pytest.mark.slow
def test_without_an_effect_false_verdicts_stay_below_the_level():
    """The same through tables of four equal backbones with two betas, which are averaged."""
    draws = 300
    false = sum(found_something(block(FOUR, range(3), (0.25, 1.0), draw=draw)) for draw in range(draws))
    assert 0 < false <= stats.binom.ppf(0.999, draws, 0.05)


def test_a_real_effect_is_found_as_often_as_a_t_test_finds_it():
    """Of two standard deviations of one run, at five seeds: the power is that of the noncentral t distribution."""
    draws, effects = 60, {"convnext": -0.02}
    far = 0.02 / (0.01 * np.sqrt(2 / 5))
    power = stats.nct.sf(stats.t.isf(0.025, 4), 4, far)
    verdicts = [
        v for draw in range(draws) for v in backbone_verdicts(block(("cnn", "convnext"), effects=effects, draw=draw))
    ]
    low, high = stats.binom.interval(0.99, draws, power)
    assert low <= sum(v.better == "convnext" for v in verdicts) <= high
    assert not any(v.better == "cnn" for v in verdicts)


@pytest.mark.slow
def test_without_an_effect_false_verdicts_stay_below_the_level_with_image_files(tmp_path):
    draws, false = 60, 0
    for draw in range(draws):
        runs = sweep(Store(tmp_path / str(draw)), dict.fromkeys(FOUR, 0.0), draw=draw)
        false += any(v.better for v in backbone_verdicts(frame(runs), ["lpips_alex"]))
    assert false <= stats.binom.ppf(0.999, draws, 0.05)


# -- what is paired ---------------------------------------------------------------------------------------------------


def test_only_shared_seeds_count():
    table = block()
    outlier = rows([(make_config("cnn", "smoke", seed=9), 90.0)])
    same(only(backbone_verdicts(table)), only(backbone_verdicts(pd.concat([table, outlier], ignore_index=True))))


def test_pairs_with_equally_many_cells_share_what_they_share():
    """Also where the two lack different seeds, or the same ones of one setting."""
    whole = block(seeds=range(5), betas=(0.25, 1.0))
    lost = (whole.backbone == "cnn") & (whole.seed == 0) | (whole.backbone == "vit") & (whole.seed == 4)
    assert only(backbone_verdicts(whole[~lost], ["lpips_alex"])).n == 3
    hole = (whole.seed == 2) & (whole.beta == 1.0)
    verdict = only(backbone_verdicts(whole[~hole], ["lpips_alex"]))
    same = only(backbone_verdicts(whole[whole.seed != 2], ["lpips_alex"]))
    assert (verdict.n, verdict.difference, verdict.p) == (4, same.difference, same.p)


def test_only_shared_settings_count():
    """cnn ran hard settings that vit was spared: equal where both ran, so no verdict, though the means differ a lot."""
    shared = block(noise=0.001)
    hard = block(("cnn",), betas=(1.0, 4.0), effects={"cnn": 0.5})
    table = pd.concat([shared, hard], ignore_index=True)
    means = table.groupby("backbone").lpips_alex.mean()
    assert means["cnn"] - means["vit"] > 0.3
    verdict = only(backbone_verdicts(table))
    assert verdict.within == "over beta 0.25"
    same(replace(only(backbone_verdicts(shared)), within=verdict.within), verdict)


def test_other_swept_settings_are_paired_too():
    """beta=1 was run at the easy K alone; within that K it changes nothing."""
    easy = block(("cnn",), betas=(0.25, 1.0), noise=0.001)
    hard = block(("cnn",), effects={"cnn": 0.5}).assign(codebook_size=512)
    verdicts = {v.a: v for v in setting_verdicts(pd.concat([easy, hard], ignore_index=True))}
    assert abs(verdicts["beta=1"].difference) < 0.01
    assert verdicts["beta=1"].better is None
    assert verdicts["codebook_size=128"].better == "codebook_size=128"


def test_missing_runs_leave_a_complete_rectangle():
    """What is averaged is the same in every seed, whatever is missing."""
    full = block(betas=(0.25, 0.5, 1.0))
    gone = (full.backbone == "vit") & (full.beta == 0.5) & (full.seed > 1)
    verdict = only(backbone_verdicts(full[~gone]))
    assert (verdict.n, verdict.within) == (5, "over beta 0.25, 1")
    same(verdict, only(backbone_verdicts(full[full.beta != 0.5])))

    lost = (full.backbone == "vit") & (full.beta == 0.5) & (full.seed == 4)
    verdict = only(backbone_verdicts(full[~lost]))
    assert (verdict.n, verdict.within) == (4, "over beta 0.25, 0.5, 1")
    same(verdict, only(backbone_verdicts(full[full.seed < 4])))


@pytest.mark.parametrize("lost", [0.25, 0.5, 1.0])
def test_of_rectangles_of_equal_size_the_one_with_more_seeds_counts(lost):
    """4 seeds of 3 settings and 6 of 2 are 12 pairs each; wherever the runs are missing, seeds are the evidence."""
    full = block(seeds=range(6), betas=(0.25, 0.5, 1.0))
    gone = (full.backbone == "vit") & (full.beta == lost) & (full.seed > 3)
    verdict = only(backbone_verdicts(full[~gone]))
    assert verdict.n == 6
    same(verdict, only(backbone_verdicts(full[full.beta != lost])))


def test_fewer_settings_rather_than_too_few_seeds():
    full = block(seeds=range(FEWEST), betas=(0.25, 0.5, 1.0))
    gone = (full.backbone == "vit") & (full.beta > 0.25) & (full.seed == 0)
    verdict = only(backbone_verdicts(full[~gone]))
    assert (verdict.n, verdict.within) == (FEWEST, "over beta 0.25")


def test_missing_scores_are_left_out():
    table = block(seeds=range(6))
    table.loc[(table.backbone == "vit") & (table.seed == 5), "lpips_alex"] = np.nan
    same(only(backbone_verdicts(table)), only(backbone_verdicts(table[table.seed < 5])))
    assert backbone_verdicts(table.assign(lpips_alex=np.nan)) == []
    assert backbone_verdicts(table.assign(lpips_alex=table.lpips_alex.where(table.backbone == "vit"))) == []


def test_repeats_on_another_device_are_not_further_evidence():
    table = block()
    repeats = table.assign(device="cuda:1", lpips_alex=table.lpips_alex + 0.02)
    verdict = only(backbone_verdicts(pd.concat([table, repeats], ignore_index=True)))
    same(only(backbone_verdicts(table)), verdict)


def test_swept_sizes_are_paired_at_equal_budgets():
    """A cnn that also ran at double size is compared with vit at vit's size only, whatever the widths are called."""
    table = block(effects={"cnn": -0.03})
    double = block(("cnn",), effects={"cnn": -0.3}).assign(width=999, params=2_000_000.0)
    both = pd.concat([table.assign(params=1_000_000 + 40_000 * (table.backbone == "vit")), double], ignore_index=True)
    verdict = only(backbone_verdicts(both))
    assert verdict.within == "over M parameters 1.02"
    same(replace(only(backbone_verdicts(table)), within=verdict.within), verdict)
    assert only(setting_verdicts(both)).a == "width=999"


def test_a_setting_that_changes_the_width_is_compared_at_equal_budgets():
    """As an option that is matched; at another budget nothing is compared with it."""
    table = block(("cnn",), effects={"cnn": 0.0}).assign(attention=0, width=64, params=1_000_000.0)
    option = block(("cnn",), effects={"cnn": -0.3}).assign(attention=1, width=50, params=1_010_000.0)
    (verdict,) = (v for v in setting_verdicts(pd.concat([table, option], ignore_index=True)) if v.n)
    assert (verdict.a, verdict.b, verdict.n) == ("attention=1", "attention=0", 5)
    larger = pd.concat([table, option.assign(params=1_500_000.0)], ignore_index=True)
    assert not any(v.n for v in setting_verdicts(larger))


@pytest.mark.parametrize(("ratio", "shared"), [(1.0, 5), (1.05, 5), (1.09, 5), (1.12, 0), (1.2, 0), (1.4, 0)])
def test_models_more_than_a_tenth_apart_are_no_pair(ratio, shared):
    """vit at ``ratio`` times the parameters of the smaller cnn; another cnn is three times as large."""
    table = block(noise=0.001).assign(width=lambda t: 64)
    table["params"] = 1e6 * np.where(table.backbone == "vit", ratio, 1.0)
    large = block(("cnn",)).assign(width=999, params=3e6)
    (verdict,) = backbone_verdicts(pd.concat([table, large], ignore_index=True))
    assert verdict.n == shared


def test_a_sentence_lists_few_values_and_gives_the_range_of_many():
    few, many = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0), (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0)
    assert only(backbone_verdicts(block(betas=few))).within == "over beta 0.25, 0.5, 1, 2, 3, 4"
    assert only(backbone_verdicts(block(betas=many))).within == "over beta 0.25 to 8 (7 values)"


# -- degenerate cases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [True, False])
def test_identical_runs_are_not_distinguishable(images, tmp_path):
    runs = [fabricate(Store(tmp_path), make_config("cnn", "smoke", seed=seed)) for seed in range(3)]
    table = frame(runs) if images else frame(runs).assign(folder="nowhere")
    twins = pd.concat([table, table.assign(backbone="vit")], ignore_index=True)
    for verdict in backbone_verdicts(twins):
        assert (verdict.difference, verdict.interval, verdict.p, verdict.better) == (0, (0, 0), 1, None)
        assert verdict.image_interval == ((0, 0) if images else None)
        assert ": difference 0.00" in verdict.sentence()
        assert "nan" not in verdict.sentence()


def test_a_difference_without_spread_is_taken_as_certain():
    table = block(("cnn",))
    verdict = only(
        backbone_verdicts(pd.concat([table, table.assign(backbone="vit", lpips_alex=table.lpips_alex - 0.1)]))
    )
    assert verdict.interval == pytest.approx((0.1, 0.1))
    assert verdict.p < 1e-12
    assert verdict.better == "vit"


def test_words_below_three_seeds():
    two = rows(
        [
            (make_config(name, "smoke", seed=seed), 0.3 - 0.012 * (name == "cnn"))
            for name in FOUR[::2]
            for seed in (0, 1)
        ]
    )
    verdict = only(backbone_verdicts(two))
    assert verdict.sentence() == (
        "cnn 0.012 LPIPS alex lower than vit on 2 paired seeds: too few for an interval (3 needed)"
    )
    assert (verdict.interval, verdict.image_interval, verdict.p, verdict.better) == (None, None, None, None)
    one = only(backbone_verdicts(two[two.seed == 0].assign(lpips_alex=0.3)))
    assert one.sentence() == "cnn and vit equal in LPIPS alex on 1 paired seed: too few for an interval (3 needed)"
    none = only(backbone_verdicts(two[(two.backbone == "cnn") == (two.seed == 0)]))
    assert none.sentence() == "cnn and vit share no seed and setting"
    assert none.n == 0


def test_pairs_without_a_seed_in_common_are_one_sentence():
    apart = [(make_config(name, "smoke", seed=seed), 0.3) for seed, name in enumerate(FOUR[:3])]
    verdicts = backbone_verdicts(rows(apart), ("lpips_alex", "lpips_vgg"))
    assert len(verdicts) > 2
    a, b, c = sorted(FOUR[:3])
    assert sentences(verdicts) == [f"not compared, since no pair shares a seed and setting: {a}, {b}, {c}"]
    alike = backbone_verdicts(rows([(make_config(name, "smoke"), 0.3) for name in FOUR[:3]]))
    assert sentences(alike) == [one.sentence() for one in alike]


def test_words_of_a_verdict():
    verdict = Verdict(
        "lpips_alex", "convnext", "vit", "", 5, -0.021, (-0.027, -0.015), (-0.025, -0.017), 0.01, "convnext"
    )
    assert verdict.sentence() == (
        "convnext better than vit by 0.021 LPIPS alex [0.015, 0.027], 5 paired seeds; over images [0.017, 0.025]"
    )
    verdict = Verdict("psnr", "cnn", "vit", "", 3, 0.02, (-0.1, 0.14), None, 0.6, None)
    assert verdict.sentence() == (
        "cnn and vit not distinguishable in PSNR dB: difference 0.02 [-0.10, 0.14], 3 paired seeds"
    )
    zero = replace(verdict, difference=-0.001)
    assert "difference 0.00 [-0.10, 0.14]" in zero.sentence()
    corrected = replace(verdict, interval=(0.01, 0.03), p=0.12)
    assert corrected.sentence().endswith(
        "[0.010, 0.030], 3 paired seeds, but p 0.12 after correction for all pairs (the interval is of this one alone)"
    )


def test_nothing_to_compare_gives_no_verdict():
    assert backbone_verdicts(block(("cnn",))) == []
    assert setting_verdicts(block()) == []


# -- cost -------------------------------------------------------------------------------------------------------------


def test_files_are_read_once_and_only_where_an_interval_is_made(tmp_path, monkeypatch):
    opened = []
    load = np.load
    monkeypatch.setattr(statistics.np, "load", lambda path: opened.append(path) or load(path))
    table = frame(sweep(Store(tmp_path), dict.fromkeys(FOUR, 0.0), seeds=range(IMAGE_SEEDS + 2)))
    backbone_verdicts(table[table.seed < FEWEST - 1])
    assert opened == []
    backbone_verdicts(table)
    assert len(opened) == len(set(opened)) == 4 * 2 * IMAGE_SEEDS


def test_of_a_very_large_block_scores_are_read_of_part_of_the_settings(tmp_path, monkeypatch):
    """The same part each time, a file of every side of every pair; what is said of seeds is the same."""
    table = frame(sweep(Store(tmp_path), dict.fromkeys(("cnn", "vit"), 0.0), np.linspace(0.1, 1, 10), range(FEWEST)))
    whole, verdicts = Images(table), backbone_verdicts(table)
    assert (whole.part, list(whole.some(pd.RangeIndex(10)))) == (1, list(range(10)))
    monkeypatch.setattr(statistics, "IMAGE_RUNS", 2 * 3 * IMAGE_SEEDS)
    read = Images(table)
    found = backbone_verdicts(table, read=read)
    assert read.part == 0.3
    assert len(read._read) == 2 * 3 * IMAGE_SEEDS
    assert found == backbone_verdicts(table)
    blind = [replace(one, image_interval=None, better=None) for one in found]
    assert blind == [replace(one, image_interval=None, better=None) for one in verdicts]
    assert all(one.image_interval != other.image_interval for one, other in zip(found, verdicts, strict=True))
    assert len(Images(table).some(pd.RangeIndex(1))) == 1


def calls(work) -> int:
    """How many functions ``work`` calls, Python's own included."""
    profile = cProfile.Profile()
    profile.runcall(work)
    return sum(entry.callcount for entry in profile.getstats())


def test_the_work_grows_with_the_trials_of_a_search_and_not_with_their_square():
    """Most of which share no setting with any other."""

    def trials(count: int) -> pd.DataFrame:
        values = np.linspace(0.1, 1, count)
        configs = [make_config("cnn", "smoke", beta=0.1 * value, lr=0.01 * value) for value in values]
        return rows((config, float(value)) for config, value in zip(configs, values, strict=True))

    few, many = trials(60), trials(120)
    assert {verdict.n for verdict in setting_verdicts(many)} == {0}
    assert len(setting_verdicts(many, ("lpips_alex",))) == 2 * 119
    assert calls(lambda: setting_verdicts(many)) < 1.5 * calls(lambda: setting_verdicts(few))


def test_the_work_of_an_ablation_hardly_grows_with_its_seeds():
    """They are rows of a table, not objects: of ten times as many by far less than twice the calls."""
    few, many = (block(FOUR, range(count), np.linspace(0.1, 1, 5)) for count in (20, 200))
    work = lambda table: backbone_verdicts(table) + setting_verdicts(table)  # noqa: E731
    assert len(work(many)) == 6 + 4 * 4
    assert calls(lambda: work(many)) < 1.5 * calls(lambda: work(few))


@pytest.mark.parametrize("unit", [1e-14, 1e-3, 1e9])
def test_the_t_test_does_not_depend_on_the_unit(unit):
    """Neither does what counts as equal up to rounding."""
    differences = np.array([0.5, -0.25, 1.0, 0.75])
    interval, p = statistics.paired_t(differences)
    assert 0 < p < 1
    found, same = statistics.paired_t(unit * differences)
    assert same == pytest.approx(p)
    assert found == pytest.approx([unit * end for end in interval], rel=1e-9, abs=0)
    assert statistics.paired_t(unit * np.array([0.1 + 0.2, 0.3, 0.3]))[1] == 0


def test_numbers_have_the_digits_of_their_metric_however_wide_the_interval():
    """A wide interval takes none away, a narrow one adds what tells its ends apart."""
    digits = int(METRICS["psnr"].form[1:-1])
    for half, expected in ((500.0, digits), (0.0005, 4)):
        verdict = Verdict("psnr", "a", "b", "", 3, 0.0, (-half, half), None, 0.5, None)
        assert f"[{-half:.{expected}f}, {half:.{expected}f}]" in verdict.sentence()


def test_verdicts_on_settings_come_one_backbone_after_the_other():
    full = pd.concat([block(betas=(0.25, 1.0)).assign(codebook_size=k) for k in (256, 512)], ignore_index=True)
    verdicts = setting_verdicts(full, ["lpips_alex"])
    shared = ["over beta 0.25, 1", "over codebook_size 256, 512"]  # averaged: those of the other setting
    assert [verdict.within for verdict in verdicts] == [f"{name}, {over}" for name in ("cnn", "vit") for over in shared]
    assert [verdict.a for verdict in verdicts[:2]] == [verdict.a for verdict in verdicts[2:]]
    assert len({verdict.a for verdict in verdicts}) == 2
