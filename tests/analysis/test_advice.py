"""What a report opens with: a recommendation where one is due, and else what would settle it."""

import json
import math
from html import unescape

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.analysis import advice as room
from bench.analysis.advice import advice, seeds_needed, settles
from bench.analysis.frames import blocks, frame, main_metric
from bench.analysis.page import html
from bench.analysis.rankings import verdict_list
from bench.analysis.report import contents, markdown, select, show
from bench.analysis.statistics import backbone_verdicts
from bench.analysis.verdict import FEWEST, LEVEL, Verdict
from bench.core.store import Store
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate, sweep

SMOKE = {"betas": (0.25,), "seeds": (0, 1, 2, 3)}


def told(store: Store):
    """The advice on the only block of ``store``."""
    (block,) = blocks(frame(store.runs()))
    return advice(block, backbone_verdicts(block, (main_metric(block), "psnr")))


def settle(store: Store) -> None:
    """Makes the curves of all runs end flat."""
    for run in store.runs():
        rows = [{**row, "reconstruction": 1.0} for row in run.history()]
        (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


@settings(deadline=None)
@given(st.floats(0.05, 8), st.sampled_from([0.05, 0.05 / 3, 0.05 / 15]))
def test_seeds_are_those_of_the_power_of_a_paired_t_test(effect, level):
    from statsmodels.stats.power import TTestPower

    def power(count):
        return TTestPower().power(effect, count, level)

    found = seeds_needed(0.01 * effect, 0.01, level)
    assert found == seeds_needed(-effect, 1.0, level)  # neither unit nor direction counts
    if found is None:
        assert power(room.MOST) < room.POWER + 1e-3
    else:
        assert not power(found) < room.POWER - 1e-3  # of very large effects it is no number
        assert found == FEWEST or not power(found - 1) > room.POWER + 1e-3


def test_no_seeds_tell_equals_apart_and_the_fewest_do_where_seeds_agree():
    assert seeds_needed(0.0, 1.0, 0.05) is None
    assert seeds_needed(1e-4, 1.0, 0.05) is None
    assert seeds_needed(0.1, 0.0, 0.05) == FEWEST


def test_the_best_is_recommended_over_the_second_with_how_sure_that_is(store):
    sweep(store, {"cnn": 0.0, "vit": 0.02, "mamba": 0.05}, spread=0.001, **SMOKE)
    settle(store)
    found = told(store)
    assert found.line.startswith("Take mamba: better than vit, the second, by 0.0")
    assert "LPIPS vgg [0.0" in found.line
    assert "4 paired seeds, p " in found.line
    assert found.warnings == []


def test_the_best_is_the_best_also_where_lower_is_worse(store):
    for backbone, psnr in {"cnn": 22.0, "vit": 24.0}.items():
        for seed in range(3):
            fabricate(store, make_config(backbone, "smoke", seed=seed), psnr=psnr + seed * 0.01)
    (block,) = blocks(frame(store.runs()).drop(columns=["lpips_alex", "lpips_vgg"]).assign(lpips_alex=math.nan))
    block = block.assign(lpips_vgg=math.nan, folder="nowhere")
    assert advice(block, backbone_verdicts(block, ("psnr",))).line.startswith("Take vit: better than cnn")


def test_what_is_not_decided_says_how_many_seeds_would(store):
    sweep(store, {"cnn": 0.0, "vit": 0.001}, spread=0.004, draw=3, **SMOKE)
    settle(store)
    line = told(store).line
    assert line.startswith("Not distinguishable: ")
    (block,) = blocks(frame(store.runs()))
    (pair,) = backbone_verdicts(block, (main_metric(block),))
    scores = block.pivot(index="seed", columns="backbone", values=main_metric(block))
    spread = (scores.cnn - scores.vit).std()
    assert pair.spread == pytest.approx(spread)
    count = seeds_needed(pair.difference, spread, LEVEL) - 4
    assert f"about {count} more seeds of both (paired t test, power 80%, α 0.05 / 1" in line
    assert "more steps" not in line


@pytest.mark.parametrize(("seeds", "more"), [(1, "2 more seeds"), (2, "1 more seed of")])
def test_fewer_seeds_than_a_verdict_takes_are_asked_for(store, seeds, more):
    sweep(store, {"cnn": 0.0, "vit": 0.1}, (0.25,), range(seeds))
    line = told(store).line
    assert line.startswith("Not distinguishable: vit leads cnn by 0.1")
    assert f"What would settle it: {more}" in line


def test_the_level_is_divided_among_the_pairs_that_are_not_decided():
    pair = Verdict("psnr", "a", "b", "", 4, 0.5, (-0.1, 1.1), None, 0.2, None)
    assert settles(pair, 3).startswith(f"about {seeds_needed(0.5, pair.spread, LEVEL / 3) - 4} more seeds")
    assert seeds_needed(0.5, pair.spread, LEVEL / 3) > seeds_needed(0.5, pair.spread, LEVEL)


def test_images_and_not_seeds_settle_what_images_leave_open():
    pair = Verdict("psnr", "a", "b", "", 4, 0.5, (0.4, 0.6), (-0.1, 1.1), 0.001, None)
    assert settles(pair, 1) == "more images to score, over which the interval holds 0"
    equal = Verdict("psnr", "a", "b", "", 4, 0.0, (0.0, 0.0), None, 1.0, None)
    assert "take the cheaper one" in settles(equal, 1)


def test_nobody_is_recommended_alone_or_beside_whom_nothing_is_shared(store):
    fabricate(store, make_config("cnn", "smoke", seed=0))
    assert told(store).line == "No recommendation: cnn is alone."
    fabricate(store, make_config("vit", "smoke", seed=1))
    assert told(store).line == "No recommendation: cnn and vit share no seed and setting."


def test_who_is_below_kmeans_is_named_and_not_recommended(store):
    for backbone, psnr in {"cnn": 20.0, "vit": 21.0, "mamba": 24.0}.items():
        for seed in range(3):
            config = make_config(backbone, "smoke", seed=seed)
            quality = {"cnn": 0.0, "vit": 0.05, "mamba": 0.0}[backbone] + seed * 0.0001
            fabricate(store, config, quality, psnr=psnr, psnr_kmeans=22.5)
    settle(store)
    found = told(store)
    assert found.line.startswith("No recommendation: vit is ahead of ")
    assert found.line.endswith("but below k-means on patches.")
    against, warning = found.warnings
    assert "is ahead of vit in" in against  # of mamba, or of cnn, which is second by LPIPS
    assert warning.startswith("Below k-means on patches at the same bits, in PSNR: cnn by 2.50 dB, vit by 1.50 dB.")
    (block,) = blocks(frame(store.runs()))
    for one in backbone_verdicts(block.assign(folder="nowhere")):
        both = {one.a, one.b} == {"cnn", "vit"}
        assert ("both below k-means in PSNR" in one.sentence()) == both
        assert verdict_list([one]).rows[0][-1].text.endswith(", both below k-means in PSNR") == both


def test_curves_that_still_fall_are_a_warning_and_may_settle_it(store):
    sweep(store, {"cnn": 0.0, "vit": 0.0}, spread=0.004, **SMOKE)
    settle(store)
    for run in store.runs():
        if run.config()["backbone"] == "vit":
            losses = np.linspace(2.0, 1.0, len(run.history()))
            rows = [{**row, "reconstruction": loss} for row, loss in zip(run.history(), losses, strict=True)]
            (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = told(store)
    warning = found.warnings[0]
    assert "lowered the reconstruction loss of vit by 3" in warning
    assert found.line.endswith("or more steps for all, whose curves still fall.")


def test_page_markdown_and_terminal_open_with_it(store, capsys):
    sweep(store, {"cnn": 0.0, "vit": 0.03}, spread=0.001, **SMOKE)
    selection = select([], store.root)
    report = contents(selection, frame(selection.runs), frame([]))
    (block,) = report.blocks
    line, (warning, *others), _ = block.advice
    show(report)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"{block.title}. {line} {warning}")
    text = markdown(report).replace("\\", "")
    assert text.split("\n\n")[1:3] == [
        f"**{block.title}.** {line}",
        "\n".join(f"- {each}" for each in (warning, *others)),
    ]
    page = unescape(html(report, [], None, store.root))
    assert page.index(line) < page.index('<dl class="facts">')
    assert page.index(warning) < page.index('<dl class="facts">')


def test_metrics_that_see_it_otherwise_are_told(store):
    """vit leads in LPIPS and PSNR, and has the worse FID and seams."""
    sweep(store, {"cnn": 0.0, "vit": 0.03}, spread=0.001, **SMOKE)
    settle(store)
    block = next(iter(blocks(frame(store.runs()))))
    vit = block.backbone == "vit"
    block = block.assign(fid_vgg16=np.where(vit, 418.0, 327.0), grid_edges=np.where(vit, 3.5, 0.4))
    (warning,) = advice(block, backbone_verdicts(block, (main_metric(block),))).warnings
    assert warning == (
        "Other metrics see it otherwise: cnn is ahead of vit in FID vgg16 (327.0 against 418.0), "
        "grid edges dB (0.4 against 3.5)."
    )
    alike = block.assign(fid_vgg16=np.where(vit, 327.01, 327.0), grid_edges=0.4)  # as far as tables show
    assert advice(alike, backbone_verdicts(alike, (main_metric(alike),))).warnings == []


def test_of_runs_of_several_lengths_the_longest_count(store):
    """cnn leads at 150 steps, and vit at 300."""
    sweep(store, {"cnn": 0.03, "vit": 0.0}, spread=0.001, **SMOKE)
    for backbone, quality in {"cnn": 0.0, "vit": 0.03}.items():
        for seed in SMOKE["seeds"]:
            config = make_config(backbone, "smoke", seed=seed, steps=300, device="cpu")
            fabricate(store, config, quality=quality, noise=0.001 * seed)
    settle(store)
    selection = select([], store.root)
    (block,) = contents(selection, frame(selection.runs), frame([])).blocks
    assert block.advice.line.startswith("At 300 steps, the most that were run: take vit: better than cnn")
    assert "over steps" not in block.advice.line
