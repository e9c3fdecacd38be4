"""Whatever shows one setting of a study of several says what became of the others."""

import itertools

import numpy as np
import pandas as pd
import pytest

from bench.analysis.charts import draw
from bench.analysis.frames import PRIOR, frame, settings
from bench.analysis.labels import label_of
from bench.analysis.report import Selection, contents
from bench.core.store import Store
from bench.priors.config import PriorConfig
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate, fabricate_failed, fabricate_prior

GRIDS = {
    "two settings": {"beta": (0.25, 1.0), "lr": (1e-3, 3e-3)},
    "a setting and the bits": {"beta": (0.25, 1.0), "codebook_size": (64, 128)},
    "three settings": {"beta": (0.25, 1.0), "lr": (1e-3, 3e-3), "code_dim": (4, 8)},
}


def cells(sweep: dict[str, tuple]) -> list[dict]:
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def searched(seed: int) -> list[dict]:
    """What a random search leaves behind: no two runs agree in anything."""
    drawn = np.exp(np.random.default_rng(seed).uniform(-5, 0, (4, 2)))
    return [{"beta": float(beta), "lr": float(lr)} for beta, lr in drawn]


@pytest.fixture(params=[*GRIDS, "a search"])
def study(request, tmp_path) -> Store:
    """Two backbones at every cell, or each at its own, with two seeds and two runs that failed."""
    store = Store(tmp_path / "results")
    for number, name in enumerate(("cnn", "vit")):
        found = cells(GRIDS[request.param]) if request.param in GRIDS else searched(number)
        for cell, seed in itertools.product(found, (0, 1)):
            fabricate(store, make_config(name, "smoke", **cell, seed=seed), 0.01 * seed)
        for cell in (found[0], found[-1]):
            fabricate_failed(store, make_config(name, "smoke", **cell, seed=7))
    return store


def test_every_chart_says_what_became_of_the_settings_that_are_not_on_its_axes(study, tmp_path):
    """Fixed at a value, each combination a point, whatever they were, or averaged: by name in any case."""
    table = frame(study.runs())
    shares = pd.DataFrame({"backbone": "cnn", "parameter": settings(table), "importance": 1 / len(settings(table))})
    charts = draw(table, tmp_path / "charts", shares)
    assert {"learning_curves", "codebook_loss", "untrained", "reconstructions", "importance"} <= {
        c.name for c in charts
    }
    for chart in charts:
        swept = set(settings(table)) - {"codebook_size"} if "bits per image" in chart.title else set(settings(table))
        swept -= {"codebook_size"} if chart.name == "rate_distortion" else set()  # its axis
        for name in swept:
            if label_of(name) not in chart.title:
                assert label_of(name) in chart.caption, (chart.name, chart.caption)


def test_every_sheet_says_how_its_rows_came_about(study):
    table = frame(study.runs())
    report = contents(Selection("all", study.runs(), study.root), table, frame([], PRIOR))
    names = [label_of(name) for name in settings(table)]
    for sheet in (report.runs, report.unscored):
        assert all(any(name in note for note in sheet.notes) for name in names)
        assert "nothing is averaged" in " ".join(sheet.notes)
    for block in report.blocks:
        (note,) = (note for note in block.ranking.notes if note.startswith("Each combination of"))
        shown = [label_of(key) for key in block.ranking.keys if key in settings(table)]
        assert all(name in note for name in shown)
        assert note.endswith("averaged over seeds alone.")
        for sheet in block.verdicts.values():
            within = sheet.keys.index("within")
            averaged = any("over " in row[within].text for row in sheet.rows)
            assert averaged == any("paired at equal values" in note for note in sheet.notes)


def test_a_verdict_on_a_setting_names_the_values_of_the_others(tmp_path):
    store = Store(tmp_path)
    for cell, seed in itertools.product(cells(GRIDS["two settings"]), range(3)):
        fabricate(store, make_config("cnn", "smoke", **cell, seed=seed), noise=0.001 * seed)
    report = contents(Selection("all", store.runs(), tmp_path), frame(store.runs()), frame([], PRIOR))
    (sheet,) = report.blocks[0].verdicts.values()
    within = {row[1].text: row[3].text for row in sheet.rows}
    assert within == {"beta=1": "cnn, over lr 0.001, 0.003", "lr=0.003": "cnn, over beta 0.25, 1"}


def test_one_setting_needs_no_such_words(tmp_path):
    store = Store(tmp_path)
    for name, seed in itertools.product(("cnn", "vit"), range(3)):
        fabricate(store, make_config(name, "smoke", seed=seed), noise=0.001 * seed)
    report = contents(Selection("all", store.runs(), tmp_path), frame(store.runs()), frame([], PRIOR))
    sheets = (report.runs, report.unscored, report.blocks[0].ranking, *report.blocks[0].verdicts.values())
    assert not any(words in note for sheet in sheets for note in sheet.notes for words in ("combination", "paired"))


def test_priors_of_several_settings_say_at_which_they_are_shown(tmp_path):
    """Charts show the most common of each kind by name and value, the table all of them."""
    store = Store(tmp_path)
    for name in ("cnn", "vit"):
        over = fabricate(store, make_config(name, "smoke")).folder.name
        for depth, steps, seed in itertools.product((2, 3), (100, 200), (0, 1)):
            if (depth, steps, seed) != (2, 100, 1):
                settings_of = {"depth": depth, "steps": steps, "seed": seed}
                fabricate_prior(store, PriorConfig(over, "rnn", **settings_of), 4.0, 80.0 + depth)
    table, priors = frame(store.runs()), frame(store.priors(), PRIOR)
    charts = {chart.name: chart for chart in draw(table, tmp_path / "charts", priors=priors)}
    for name in ("generation", "samples"):
        assert "at depth = " in charts[name].caption
        assert "steps = " in charts[name].caption
    ((_, sheet),) = contents(Selection("all", store.runs(), tmp_path), table, priors).generation
    assert any("Each combination of depth and steps" in note or "steps and depth" in note for note in sheet.notes)
