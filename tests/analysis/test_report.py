"""The report: what is bold, what is refused, what a page may hold, and that equal runs give equal bytes."""

import io
import itertools
import json
import math
import os
import re
import shlex
from dataclasses import asdict, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.table import Table

from backbones import BACKBONES
from bench import diff
from bench import report as command
from bench.analysis import charts, data, rankings, report, statistics, tables
from bench.analysis.frames import CLOCKED, CONFIG, METRICS, PRIOR, blocks, frame, load_runs, with_rates
from bench.analysis.page import html
from bench.analysis.rankings import LIMIT, RANKED, generation, ranking, refusals, run_list, verdict_list
from bench.analysis.report import Report, Selection, contents, markdown, select, write_report
from bench.analysis.slices import protocol_scopes
from bench.analysis.statistics import Verdict
from bench.analysis.tables import NONE, heading
from bench.core.errors import UserError
from bench.core.progress import SafeConsole
from bench.core.store import Store
from bench.metrics import EVALUATORS
from bench.priors.config import PriorConfig
from bench.priors.pixels import BITS
from bench.tokenizers.config import Config, make_config
from tests.fabricate import fabricate, fabricate_failed, fabricate_prior, seal, sweep

EFFECTS = {"cnn": 0.0, "vit": 0.03}
HOSTILE = "folder:/data/<script>alert('x')</script>|*[a](b)"
VOID = {"meta", "link", "img", "br", "hr", "input"}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def sketched(monkeypatch):
    """One small picture in place of the charts, which have tests of their own."""

    def draw(table, folder, importances=None, priors=None):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "dot.png")
        return [charts.Chart("dot", "A dot", "One dot.", folder / "dot.png")]

    monkeypatch.setattr(charts, "draw", draw)


def report_of(store, *names):
    selection = select(names, store.root)
    return contents(selection, frame(selection.runs), frame(store.priors(), PRIOR))


def ranked(store) -> tables.Sheet:
    """The ranking of the only block."""
    table = frame(store.runs())
    (block,) = blocks(table)
    return ranking(block, table[table.status == "diverged"])


def made(*runs: tuple[Config, dict], status="finished") -> pd.DataFrame:
    """A frame of runs without folders: (Config, metrics or other columns) each."""
    rows = []
    for number, (config, values) in enumerate(runs):
        bits = config.grid_size**2 * math.log2(config.codebook_size)
        row = {"run_id": f"run{number}", "status": status, "reason": "", **asdict(config), "folder": "nowhere"}
        row |= {"processor": "x", "threads": 2, "tokens": config.grid_size**2, "bits_per_image": bits}
        if status == "finished":
            row |= {
                "protocol_data": "photos",
                "protocol_scored_on": "test",
                "protocol_count": 64,
                "protocol_fingerprint": "f" * 64,
            }
            row |= {"params": 1e6, "flops": 1e8, "train_seconds": 30.0}
        rows.append({**row, "bits_per_pixel": bits / config.image_size**2, **values})
    columns = dict.fromkeys([*frame([]).columns, *(name for row in rows for name in row)])
    table = pd.DataFrame(rows, columns=list(columns))
    numeric = [name for name in table if name in METRICS or name.endswith("_kmeans")]
    return table.astype(dict.fromkeys(numeric, float))


def smoke(backbone="cnn", **settings) -> Config:
    return make_config(backbone, "smoke", **settings)


def cells(sheet, key) -> dict:
    """First column → the cell of ``key``, for every row of ``sheet``."""
    return {row[0].text.removesuffix(" †"): row[list(sheet.keys).index(key)] for row in sheet.rows}


def bold(sheet, key) -> set[str]:
    return {name for name, cell in cells(sheet, key).items() if cell.best}


def test_the_best_of_a_column_is_marked(store):
    """Lower LPIPS and higher PSNR; nothing where all are equal; k-means never, though its LPIPS is lower here."""
    for backbone, quality in {"cnn": 0.0, "vit": 0.03, "convnext": 0.01}.items():
        fabricate(store, make_config(backbone, "smoke"), quality, lpips_alex_kmeans=0.0)
    sheet = ranked(store)
    assert bold(sheet, "lpips_alex") == bold(sheet, "psnr") == bold(sheet, "fid_vgg16") == {"vit"}
    assert bold(sheet, "bits_per_image") == bold(sheet, "usage") == set()
    assert not any(cell.best for row in sheet.references for cell in row)
    assert [row[0].text for row in sheet.rows] == ["vit", "convnext", "cnn"]
    assert METRICS[sheet.order].better == "lower"


def test_ties_as_shown_are_all_marked(store):
    for backbone, psnr in {"cnn": 24.001, "vit": 24.004, "convnext": 23.0}.items():
        fabricate(store, make_config(backbone, "smoke"), psnr=psnr)
    assert bold(ranked(store), "psnr") == {"cnn", "vit"}


@pytest.mark.parametrize("machine", [{"threads": 64}, {"processor": "y"}])
def test_clocks_of_different_machines_are_not_ranked(machine):
    clocked = [name for name in CLOCKED if name in METRICS]
    scores = {"lpips_alex": 0.3, "params": 1e6} | dict.fromkeys(clocked, 10.0)
    other = {name: 2 * value for name, value in scores.items()}
    failed = made((smoke(), {}), status="diverged")[:0]
    sheet = ranking(made((smoke(), scores), (smoke("vit"), other)), failed)
    assert {name: bold(sheet, name) for name in clocked} == {
        "train_seconds": {"cnn"},
        "images_per_second_encode": {"vit"},
        "images_per_second_decode": {"vit"},
    }
    sheet = ranking(made((smoke(), scores), (smoke("vit"), other | machine)), failed)
    assert all(bold(sheet, name) == set() for name in clocked)
    assert bold(sheet, "params") == {"cnn"}
    assert any("2 different machines" in note and METRICS["train_seconds"].label in note for note in sheet.notes)


def test_clocks_of_a_busy_machine_are_not_ranked():
    scores = {"lpips_alex": 0.3, "params": 1e6, "images_per_second_decode": 100.0}
    times = {"cnn": (10.0, 12.0), "vit": (20.0, 20.0)}
    rows = [(smoke(who, seed=i), scores | {"train_seconds": t}) for who, ts in times.items() for i, t in enumerate(ts)]
    failed = made((smoke(), {}), status="diverged")[:0]
    sheet = ranking(made(*rows), failed)
    assert bold(sheet, "train_seconds") == set()
    assert (
        "Not ranked, as equal work differs from seed to seed, so that the machine was busy: train s (×1.2)."
        in sheet.notes
    )
    steady = [
        (config, values | {"train_seconds": 10.0 if config.backbone == "cnn" else 20.0}) for config, values in rows
    ]
    sheet = ranking(made(*steady), failed)
    assert bold(sheet, "train_seconds") == {"cnn"}
    assert not any("busy" in note for note in sheet.notes)


def test_a_cell_is_the_mean_over_seeds_and_their_sample_deviation():
    """One seed has no deviation; what follows from the settings has none either; parameters are in millions."""
    values = [20.0, 21.0, 25.0]
    runs = [(smoke(seed=seed), {"psnr": psnr, "params": 1_230_000}) for seed, psnr in enumerate(values)]
    sheet = ranking(made(*runs), made()[:0])
    assert cells(sheet, "psnr")["cnn"][:3] == ("22.00", "± 2.65", 22.0)
    assert cells(sheet, "params")["cnn"][:2] == ("1.23", "")
    assert [cells(sheet, name)["cnn"].text for name in ("n", "failed")] == ["3", "0"]
    alone = ranking(made(runs[0]), made()[:0])
    assert not any("±" in cell.text + cell.spread for row in alone.rows for cell in row)


HIGHER = {"psnr", "ssim", "perplexity", "usage", "images_per_second_encode", "images_per_second_decode"}


def test_the_best_mean_of_every_column_is_marked_and_that_of_the_main_metric_comes_first():
    """Three backbones score 100, 200 and 300, in millions where a column is: the largest is best in some."""
    scale = {"params": 1e6, "flops": 1e6}
    names = [name for name in RANKED if name not in ("bits_per_image", "lpips_alex", "lpips_vgg")]
    values = {"cnn": 200.0, "vit": 300.0, "mamba": 100.0}
    rows = [(smoke(who), {name: v * scale.get(name, 1) for name in names}) for who, v in values.items()]
    sheet = ranking(made(*rows), made()[:0])
    for name in names:
        indifferent = name == "sharpness" or name.startswith("steps_to_")
        expected = {"vit"} if name in HIGHER else set() if indifferent else {"mamba"}
        assert bold(sheet, name) == expected, name
    assert sheet.order == "psnr"  # no LPIPS was scored
    assert list(cells(sheet, "n")) == ["vit", "cnn", "mamba"]
    with_lpips = [(config, {"psnr": scores["psnr"], "lpips_vgg": scores["psnr"]}) for config, scores in rows]
    sheet = ranking(made(*with_lpips), made()[:0])
    assert sheet.order == "lpips_vgg"
    assert list(cells(sheet, "n")) == ["mamba", "cnn", "vit"]


def test_kmeans_stands_below_with_the_scores_of_its_own_grid_and_k():
    """Under the columns of the scores that it is the reference of, and never among what is ranked."""
    runs = [
        (smoke(grid_size=4, codebook_size=256), {"psnr": 20.0, "psnr_kmeans": 18.0, "lpips_vgg_kmeans": 0.5}),
        (smoke(grid_size=8, codebook_size=4), {"psnr": 21.0, "psnr_kmeans": 17.0, "lpips_vgg_kmeans": 0.6}),
    ]
    runs = [(config, {**scores, "lpips_vgg": 0.7}) for config, scores in runs]
    sheet = ranking(made(*runs), made()[:0])
    keys = ["backbone", "grid_size", "codebook_size", "bits_per_image", "psnr", "lpips_vgg", "params"]
    places = [list(sheet.keys).index(key) if key in sheet.keys else None for key in keys]
    found = [[row[i].text if i is not None else NONE for i in places] for row in sheet.references]
    assert found == [
        ["k-means on patches", "4", "256", "128", "18.00", "0.500", NONE],
        ["k-means on patches", "8", "4", "128", "17.00", "0.600", NONE],
    ]
    assert [row[0].text for row in sheet.rows] == ["cnn", "cnn"]


def test_headings_point_to_the_better():
    arrows = {"psnr": "↑", "lpips_vgg": "↓", "sharpness": "", "precision_vgg16": "↑", "gfid": "↓", "copy_rate": ""}
    assert {key: re.sub("[^↑↓]", "", heading(key)) for key in arrows} == arrows
    assert heading("params") == "parameters M\u00a0↓"
    assert heading("beta") == "beta"


def test_a_refusal_gives_each_fields_value_and_that_of_the_first_block():
    """(bug 17)"""
    first, second = made((smoke(), {})), made((smoke(), {"protocol_count": 99}))
    third = made((smoke(codebook_size=256), {}))
    assert [[cell.text for cell in row] for row in refusals([first, second, third]).rows] == [
        ["2", "count", "99", "64"],
        ["3", "bits_per_image", "128", "112"],
    ]
    assert refusals([first]).rows == []


def test_a_verdict_is_listed_with_its_signs_and_named_better():
    one = Verdict("psnr", "cnn", "vit", "", 5, -0.5, (-0.75, -0.25), (-0.6, -0.4), 0.012, "vit")
    none = replace(one, better=None)
    few = Verdict("psnr", "cnn", "vit", "", 2, 0.5, None, None, None, None)
    texts = [[cell.text for cell in row] for row in verdict_list([one, none, few]).rows]
    seeds, images = "−0.750 to −0.250", "−0.600 to −0.400"
    assert texts[0] == ["PSNR dB", "cnn", "vit", "", "5", "−0.500", seeds, images, "0.012", "vit better"]
    assert texts[1][-1] == "not distinguishable"
    assert texts[2] == ["PSNR dB", "cnn", "vit", "", "2", "+0.500", NONE, NONE, NONE, "too few seeds"]


def test_swept_is_what_varies_among_scored_runs_that_were_measured_alike():
    """Neither the settings of unfinished runs, nor widths that follow from others, nor what sets two blocks apart."""
    runs = [(smoke(beta=beta, width=width), {"psnr": 20.0}) for beta, width in ((0.25, 20), (1.0, 24))]
    other = (make_config("cnn", "cpu", beta=0.25), {"psnr": 20.0, "protocol_fingerprint": "e" * 64})
    unfinished = made((smoke(beta=0.5, lr=1.0), {}), status="unfinished")
    table = pd.concat([made(*runs, other), unfinished], ignore_index=True)
    found = contents(Selection("all", [], Path("results")), table, frame([], PRIOR))
    assert found.facts["swept"] == "beta 0.25, 1"
    wide = [(smoke(width=width, depth=depth), {"psnr": 20.0}) for width in (20, 24) for depth in (1, 2)]
    assert about(*wide).facts["swept"] == "width 20, 24; depth 1, 2"


def test_of_few_images_a_frechet_distance_is_told_as_biased():
    for count, told in ((999, True), (1000, False)):
        table = made((smoke(), {"lpips_alex": 0.3, "fid_vgg16": 20.0, "protocol_count": count}))
        notes = ranking(table, table[:0]).notes
        assert any("Fréchet distances of fewer than 1,000 images" in note for note in notes) is told
    table = made((smoke(), {"lpips_alex": 0.3, "protocol_count": 9}))
    assert not any("Fréchet" in one for one in ranking(table, table[:0]).notes)


def test_a_wall_of_verdicts_is_folded_on_the_page(store):
    """Six backbones have fifteen pairs in two metrics: the first are in sight, all are there."""
    for name in BACKBONES:
        for seed in range(3):
            fabricate(store, smoke(name, seed=seed))
    found = report_of(store)
    (block,) = found.blocks
    assert len(block.headline) == 30
    page = unescape(html(found, [], None, store.root))
    first, _, rest = page.partition("22 more sentences on backbones</summary>")
    assert all(sentence in first for sentence in block.headline[:8])
    assert all(sentence in rest and sentence not in first for sentence in block.headline[8:])


def test_the_facts_count_every_run_once(tmp_path):
    configs = (smoke(), smoke(seed=1), smoke("vit", beta=1.0), smoke("vit"))
    done = made(*((config, {"psnr": 20.0}) for config in configs))
    rest = [made((smoke(seed=seed), {}), status=status) for seed, status in ((2, "pruned"), (3, "unfinished"))]
    table = pd.concat([done, *rest], ignore_index=True)
    study = {"kind": "ablation", "runs": {letter: {} for letter in "abcdefgh"}}
    facts = contents(Selection("beta", [], tmp_path, study), table, frame([], PRIOR)).facts
    assert facts["runs"] == "4 finished, 1 pruned, 1 unfinished, 2 planned but not started"
    assert (facts["backbones"], facts["swept"], facts["seeds"]) == ("cnn, vit", "beta 0.25, 1", "0, 1, 2, 3")


def test_only_a_metric_that_some_run_was_trained_on_is_flattered():
    def said(**settings) -> str:
        notes = ranking(made((smoke(**settings), {"psnr": 20.0})), made()[:0]).notes
        return " ".join(note for note in notes if "trained on" in note)

    assert said(lpips_weight=0.0) == ""
    assert "trained on LPIPS alex, which" in said()
    assert "trained on LPIPS vgg, which" in said(lpips_net="vgg")


# -- rankings of priors, without folders


def prior_rows(*rows: dict) -> pd.DataFrame:
    """A frame of finished priors."""
    usual = {"status": "finished", "tokenizer": "t", "backbone": "cnn", "grid_size": 4, "codebook_size": 128}
    usual |= {"image_size": 32, "data": "photos", "samples": 512, "temperature": 1.0, "top_k": 0, "seed": 0}
    usual |= {"protocol_count": 64, "protocol_extractor_vgg16": "v", "processor": "x", "threads": 2}
    usual |= {"protocol_scored_on": "test"}
    usual |= {"coded_bits_per_token": 4.0, "coded_bits_per_token_independent": 6.5, "prior": "rnn"}
    columns = dict.fromkeys([*frame([], PRIOR).columns, *usual, *(name for row in rows for name in row)])
    return pd.DataFrame([usual | row for row in rows], columns=list(columns))


def test_pixels_are_never_ranked_beside_codes():
    """Of as many bits, scored alike but for what they are, in one frame; that table alone tells what its bits are."""
    of_pixels = {"backbone": "pixels", "grid_size": math.nan, "codebook_size": 256, "bits_per_image": 112}
    rows = [{"gfid_vgg16": 80.0}, {"gfid_vgg16": 70.0, **of_pixels, "protocol_codes": "pixels"}]
    (_, codes), (_, pixels) = generation(prior_rows(*rows))
    assert [[row[0].text for row in sheet.rows] for sheet in (codes, pixels)] == [["cnn"], ["pixels"]]
    assert [BITS in sheet.notes for sheet in (codes, pixels)] == [False, True]


def test_priors_of_equal_bits_are_ranked_by_how_far_their_images_are():
    """(bug 17) 4×4 codes of K = 256 and 8×8 of K = 4 share a table, 4×4 of K = 128 does not."""
    rows = [
        {"grid_size": 4, "codebook_size": 256, "gfid_vgg16": 80.0, "precision_vgg16": 0.3, "coded_bits_per_token": 5.0},
        {"grid_size": 8, "codebook_size": 4, "gfid_vgg16": 70.0, "precision_vgg16": 0.6, "coded_bits_per_token": 1.0},
        {"grid_size": 4, "codebook_size": 128, "gfid_vgg16": 60.0},
    ]
    tables = dict(generation(prior_rows(*rows)))
    assert [title.split(",")[1].strip() for title in tables] == [
        f"{n} bits per image before coding" for n in (112, 128)
    ]
    sheet = list(tables.values())[1]
    assert [row[list(sheet.keys).index("gfid_vgg16")].text for row in sheet.rows] == ["70.0", "80.0"]
    best = {key: [cell.text for cell in column if cell.best] for key, column in zip(sheet.keys, zip(*sheet.rows))}  # noqa: B905
    assert (best["gfid_vgg16"], best["precision_vgg16"], best["coded_bits_per_token"]) == (
        ["70.0"],
        ["0.60"],
        ["1.000"],
    )


def test_real_and_shuffled_codes_are_those_of_the_backbone_in_their_row():
    rows = [
        {"backbone": name, "prior": prior, "gfid_vgg16": value + 30, "gfid_vgg16_real": value}
        | {"gfid_vgg16_shuffled": 2 * value}
        for name, value in (("cnn", 40.0), ("vit", 60.0))
        for prior in ("rnn", "mamba")
    ]
    ((_, sheet),) = generation(prior_rows(*rows))
    places = [list(sheet.keys).index(key) for key in ("backbone", "prior", "gfid_vgg16")]
    assert [[row[at].text for at in places] for row in sheet.references] == [
        *(["cnn", "real codes", "40.0"], ["vit", "real codes", "60.0"]),
        *(["cnn", "shuffled codes", "80.0"], ["vit", "shuffled codes", "120.0"]),
    ]


def test_priors_are_ranked_by_inceptions_distance_only_where_all_have_it():
    rows = [{"prior": "rnn", "gfid_vgg16": 80.0, "gfid": 10.0}, {"prior": "mamba", "gfid_vgg16": 70.0, "gfid": 20.0}]
    ((_, sheet),) = generation(prior_rows(*rows))
    assert (sheet.order, [row[1].text for row in sheet.rows]) == ("gfid", ["rnn", "mamba"])
    ((_, sheet),) = generation(prior_rows(rows[0], rows[1] | {"gfid": math.nan}))
    assert (sheet.order, [row[1].text for row in sheet.rows]) == ("gfid_vgg16", ["mamba", "rnn"])


def test_the_bits_of_a_prior_without_an_order_are_said_to_be_a_bound():
    for name, said in (("masked", 1), ("rnn", 0)):
        ((_, sheet),) = generation(prior_rows({"prior": name, "gfid_vgg16": 80.0}))
        assert sum("Bits of masked are an upper bound" in note for note in sheet.notes) == said


def test_a_priors_row_averages_its_seeds_and_bounds_are_averages_too():
    rows = [
        {"seed": seed, "gfid_vgg16": value, "gfid_vgg16_real": real, "gfid_vgg16_shuffled": 2 * value}
        for seed, value, real in ((0, 80.0, 50.0), (1, 90.0, 54.0))
    ]
    rows = [row | {"images_per_second_sample": 9.0} for row in rows]
    table = prior_rows(*rows, {"prior": "mamba", "gfid_vgg16": 60.0, "images_per_second_sample": 5.0, "threads": 8})
    ((_, sheet),) = generation(table)
    place = list(sheet.keys).index("gfid_vgg16")
    found = {row[1].text: (row[place].text, row[place].spread) for row in sheet.rows}
    assert found == {"rnn": ("85.0", "± 7.1"), "mamba": ("60.0", "")}
    bounds = {row[1].text: row[place].text for row in sheet.references}
    assert bounds == {"real codes": "52.0", "shuffled codes": "170.0"}
    clock = list(sheet.keys).index("images_per_second_sample")
    assert not any(row[clock].best for row in sheet.rows)  # of two machines
    ((_, sheet),) = generation(table.assign(threads=2))
    assert [row[1].text for row in sheet.rows if row[clock].best] == ["rnn"]


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_verdicts_need_three_seeds(store, seeds):
    sweep(store, EFFECTS, betas=(0.25,), seeds=range(seeds))
    (block,) = report_of(store).blocks
    assert all(("too few" in sentence) == (seeds < 3) for sentence in block.headline)
    assert {row[-1].text for row in block.verdicts["Backbones against each other"].rows} == {
        "vit better" if seeds == 3 else "too few seeds"
    }


def test_the_headline_is_the_main_metric_and_psnr(store):
    sweep(store, EFFECTS)
    (block,) = report_of(store).blocks
    assert ["LPIPS vgg" in block.headline[0], "PSNR" in block.headline[1]] == [True, True]
    assert len(block.headline) == 2
    assert block.within == "over beta 0.25, 1"
    assert not any("over beta" in sentence for sentence in block.headline)
    assert any("beta=1" in sentence for sentence in block.others)


def test_failures_are_counted_but_pruned_runs_did_not_fail(store):
    fabricate(store, make_config("cnn", "smoke"))
    fabricate_failed(store, make_config("cnn", "smoke", seed=1))
    fabricate_failed(store, make_config("cnn", "smoke", seed=2), "pruned")
    fabricate_failed(store, make_config("vit", "smoke"))
    found = report_of(store)
    failed = cells(found.blocks[0].ranking, "failed")
    assert {name: cell.text for name, cell in failed.items()} == {"cnn": "1", "vit": "1"}
    assert cells(found.blocks[0].ranking, "psnr")["vit"].text == NONE
    assert [row[0].text for row in found.unscored.rows] == ["diverged", "diverged", "pruned"]
    assert found.facts["runs"] == "1 finished, 2 diverged, 1 pruned"


def test_blocks_never_share_a_ranking_and_the_refusal_says_why(store):
    sweep(store, EFFECTS, betas=(0.25,))
    fabricate(store, make_config("mamba", "smoke", codebook_size=256), 0.2)
    fabricate(store, make_config("convnext", "smoke"), 0.2, data="other", count=99, fingerprint="0123456789" * 6)
    found = report_of(store)
    shown = [{row[0].text for row in block.ranking.rows} for block in found.blocks]
    assert sorted(map(sorted, shown)) == [["cnn", "vit"], ["convnext"], ["mamba"]]
    texts = [tuple(cell.text for cell in row) for row in found.refusals.rows]
    assert ("2", "bits_per_image", "128", "112") in texts
    assert ("3", "data", "other", "photos") in texts
    assert ("3", "count", "99", "64") in texts
    assert ("3", "fingerprint", "0123456789…", "ffffffffff…") in texts
    number = {row[-1].text: row[0].text for row in found.runs.rows}
    assert len(number) == 8
    assert {n for name, n in number.items() if name.startswith(("cnn", "vit"))} == {"1"}


def test_runs_scored_on_validation_and_on_the_test_never_share_a_ranking(store):
    """And whatever names what was scored says which it was."""
    for backbone in ("cnn", "vit"):
        fabricate(store, make_config(backbone, "smoke"))
    fabricate(store, make_config("mamba", "smoke", split="val"), 0.2)
    found = report_of(store)
    shown = [sorted(row[0].text for row in block.ranking.rows) for block in found.blocks]
    assert shown == [["cnn", "vit"], ["mamba"]]
    assert [tuple(cell.text for cell in row) for row in found.refusals.rows] == [("2", "scored_on", "val", "test")]
    for block, split in zip(found.blocks, ("test", "val"), strict=True):
        assert f"scored on {split};" in " ".join(block.ranking.notes)
    assert [" validation images), " in block.title for block in found.blocks] == [False, True]
    notes = [scope.note for scope in protocol_scopes(frame(store.runs()))]
    assert [note.partition(".")[0] for note in notes] == [
        "photos, 64 test images of 32×32",
        "photos, 64 validation images of 32×32",
    ]


def test_runs_of_an_older_protocol_are_told_apart(store):
    """It did not say that it scored validation, which was all that there was."""
    fabricate(store, make_config("cnn", "smoke"), version=3)
    older = fabricate(store, make_config("vit", "smoke"), 0.2, version=2)
    stored = json.loads((older.folder / "metrics.json").read_text())
    stored = stored.get("content", stored)
    del stored["protocol"]["scored_on"]
    older.write("metrics.json", {name: stored[name] for name in ("metrics", "protocol")})
    found = report_of(store)
    shown = [[row[0].text for row in block.ranking.rows] for block in found.blocks]
    assert sorted(shown) == [["cnn"], ["vit"]]
    differ = {row[1].text: {row[2].text, row[3].text} for row in found.refusals.rows}
    assert differ == {"version": {"2", "3"}, "scored_on": {"val", "test"}}


def test_uneven_settings_and_the_trained_metric_are_named(store):
    sweep(store, EFFECTS)
    notes = " ".join(ranked(store).notes)
    assert "Not equal across backbones: width (cnn 40, vit 64), depth (cnn 3, vit 2)." in notes
    assert "trained on LPIPS alex" in notes
    assert "photos" in notes
    assert "count 64" in notes


def test_kmeans_of_every_grid_and_k_of_a_block(store):
    fabricate(store, make_config("cnn", "smoke", grid_size=4, codebook_size=256))
    fabricate(store, make_config("cnn", "smoke", grid_size=8, codebook_size=4))
    sheet = ranked(store)
    keys = [list(sheet.keys).index(name) for name in ("backbone", "grid_size", "codebook_size")]
    assert [[row[key].text for key in keys] for row in sheet.references] == [
        ["k-means on patches", "4", "256"],
        ["k-means on patches", "8", "4"],
    ]


def test_long_lists_are_cut_and_say_so(store):
    sweep(store, EFFECTS, seeds=(0,))
    table = pd.concat([frame(store.runs())] * 150, ignore_index=True)
    sheet = run_list(table, list(blocks(table)))
    assert len(sheet.rows) == LIMIT
    assert sheet.notes[-1] == f"The first {LIMIT} of 600 rows. All are in runs_wide.csv."


def test_selection_by_study_path_id_and_folder(store):
    runs = sweep(store, EFFECTS, betas=(0.25,), seeds=(0, 1))
    planned = {run.folder.name: {} for run in runs[:2]} | {"cnn-ema-0": {}}
    store.extend_study("beta", {"kind": "ablation", "sweep": ["beta"], "metrics": ["psnr"]}, planned)
    by_name = select(["beta"], store.root)
    by_path = select([str(store.root / "studies" / "beta.json")], store.root.parent)
    assert by_name.name == by_path.name == "beta"
    assert {run.folder for run in by_name.runs} == {run.folder for run in by_path.runs} == {r.folder for r in runs[:2]}
    assert report_of(store, "beta").facts["runs"] == "2 finished, 1 planned but not started"
    assert len(select([], store.root).runs) == len(select([str(store.root)], store.root.parent).runs) == 4
    both = select(["beta", runs[0].folder.name, str(runs[2].folder)], store.root)
    assert both.name == "selection"
    assert [run.folder.name for run in both.runs] == sorted(run.folder.name for run in runs[:3])


def test_nothing_to_report_is_one_sentence(store, capsys):
    assert command.main(["--results", str(store.root)]) == 2
    assert "no runs below" in capsys.readouterr().err
    run = fabricate(store, make_config("cnn", "smoke"))
    store.extend_study("beta", {"kind": "ablation", "sweep": ["beta"], "metrics": ["psnr"]}, {"cnn-ema-0": {}})
    with pytest.raises(UserError, match="no runs of study beta below"):
        select(["beta"], store.root)
    with pytest.raises(UserError, match=rf"'gamma' .* studies: beta; runs: {run.folder.name}"):
        select(["gamma"], store.root)
    with pytest.raises(UserError, match="is no folder; name one with --out"):
        write_report([], store.root, run.folder / "config.json")


def test_the_command_reports_what_is_named_into_the_folder_that_is_given(store, sketched, tmp_path):
    runs = sweep(store, EFFECTS, seeds=(0, 1, 2))
    names = [run.folder.name for run in runs if run.config()["backbone"] == "cnn"]
    assert command.main([*names, "--results", str(store.root), "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out/runs_wide.csv")
    assert sorted(table.run_id) == sorted(names)


def test_all_failed_is_still_a_report(store, sketched, capsys):
    for seed, status in enumerate(("diverged", "crashed", "out_of_memory")):
        fabricate_failed(store, make_config("cnn", "smoke", seed=seed), status)
    assert command.main(["--results", str(store.root)]) == 0
    out = store.root / "reports" / "all"
    page = (out / "report.html").read_text()
    assert "No run has scores" in page
    assert all(f"it {status}" in page for status in ("diverged", "crashed", "out_of_memory"))
    assert "1 diverged, 1 crashed, 1 out of memory" in capsys.readouterr().out
    assert len(pd.read_csv(out / "runs_wide.csv")) == 3
    assert "out" in (out / "tables.md").read_text()


def test_importances_are_of_runs_that_were_measured_the_same_way(store, sketched):
    asked = []
    runs = sweep(store, EFFECTS, seeds=(0, 1))
    fabricate(store, make_config("cnn", "smoke", data="cifar10"), data="cifar10", fingerprint="0" * 64)
    write_report([], store.root, importances=lambda table, metric: asked.append(sorted(table.run_id)))
    assert asked == [sorted(run.folder.name for run in runs)]


def test_data_round_trip(store, sketched):
    """CSV gives the frame back; Parquet every metric of every run, also where a number was written as a whole one."""
    runs = sweep(store, EFFECTS, seeds=(0, 1))
    fabricate_failed(store, make_config("vit", "smoke", seed=5))
    odd = json.loads((runs[0].folder / "config.json").read_text())
    odd["config"]["beta"] = 1
    runs[0].write("config.json", odd)
    table = frame(store.runs())
    out = write_report([], store.root).page.parent

    flat = pd.read_csv(out / "runs_wide.csv", float_precision="round_trip")
    assert list(flat) == list(table)
    for name in table:
        values, empty = table[name], ("", None)
        assert [None if pd.isna(v) else str(v) for v in flat[name]] == [
            None if v in empty or pd.isna(v) else str(v) for v in values
        ] or (flat[name] - values).abs().max() == 0, name

    long = pd.read_parquet(out / "runs_long.parquet")
    assert list(long) == ["run_id", *CONFIG, "status", "metric", "value"]
    assert long.value.dtype == "float64"
    assert long.value.notna().all()
    assert long.seed.dtype == "int64"
    assert set(long.beta) == {0.25, 1.0}
    wide = long.pivot(index="run_id", columns="metric", values="value")
    expected = table.set_index("run_id")[list(wide)]
    pd.testing.assert_frame_equal(wide, expected, check_names=False, check_like=True)
    assert wide.psnr.notna().sum() == 8
    assert wide.bits_per_image.notna().sum() == 9


class Page(HTMLParser):
    """Checks that elements nest and close; collects references, ids, script elements, and the cells of all tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.ids, self.tables, self.scripts = [], [], set(), [], 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [attributes[name] for name in ("src", "href", "srcset", "action") if name in attributes]
        self.ids.add(attributes.get("id"))
        self.scripts += tag == "script"
        assert not any(name.startswith("on") for name in attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def test_page_is_one_wellformed_file_and_escapes_names(store, sketched):
    sweep(store, EFFECTS)
    fabricate(store, make_config("cnn", "smoke", data=HOSTILE), data=HOSTILE, split="</style><img src=x onerror=y>")
    fabricate_failed(store, make_config("vit", "smoke", data=HOSTILE))
    text = write_report([], store.root).page.read_text()
    page = Page(text)
    assert page.scripts == 1
    assert page.references
    for reference in page.references:
        beside = (store.root / "reports/all" / unquote(reference)).is_file()  # a file of a run
        assert reference.startswith("data:image/png;base64,") or reference.removeprefix("#") in page.ids or beside
    assert not re.search(r"url\((?!#)|@import|https?:", text)
    assert "&lt;script&gt;alert(" in text
    escaped = (store.root / "reports" / "all" / "tables.md").read_text()
    assert r"\<script\>alert('x')\</script\>\|\*[a\](b)" in escaped
    assert not re.search(r"(?<!\\)<", escaped)


def test_page_and_markdown_show_the_same_cells(store, sketched):
    sweep(store, EFFECTS)
    found = report_of(store)
    sheet = found.blocks[0].ranking
    expected = [[f"{cell.text} {cell.spread}".strip() for cell in row] for row in (*sheet.rows, *sheet.references)]
    table = Page(write_report([], store.root).page.read_text()).tables[0]
    assert [[text.strip() for text in row] for row in table[1:]] == expected
    lines = [line for line in markdown(found).splitlines() if line.startswith("|")][2 : 2 + len(expected)]
    assert [[text.strip(" *") for text in line.strip("|").split("|")] for line in lines] == expected


def test_equal_runs_give_equal_bytes(store, sketched, tmp_path):
    runs = sweep(store, EFFECTS)
    names = [run.folder.name for run in runs]
    write_report(names, store.root, tmp_path / "a")
    write_report(names[::-1], store.root, tmp_path / "b")
    for name in ("report.html", "tables.md", "runs_wide.csv", "runs_long.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.slow
def test_with_real_charts_equal_runs_give_an_equal_page(store, tmp_path):
    sweep(store, EFFECTS)
    written = [write_report([], store.root, tmp_path / name) for name in "ab"]
    assert written[0].page.read_bytes() == written[1].page.read_bytes()
    assert len(Page(written[0].page.read_text()).references) > len(written[0].charts) > 1
    assert all(chart.path.is_file() for chart in written[0].charts)


# -- priors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_priors(store):
    """Two backbones × two grids × two seeds, with two priors each: the transformer is better everywhere."""
    for name, grid, seed in itertools.product(("cnn", "vit"), (4, 8), (0, 1)):
        over = fabricate(store, make_config(name, "smoke", grid_size=grid, seed=seed), 0.01 * seed)
        for prior, bits, distance in (
            ("independent", 6.5, 140),
            ("transformer", 4.0 + 0.2 * (name == "vit"), 80 + grid),
        ):
            fabricate_prior(store, PriorConfig(over.folder.name, prior, seed=seed), bits, distance + seed)
    return store


def test_priors_are_ranked_within_equal_bits(with_priors):
    generation = dict(report_of(with_priors).generation)
    assert list(generation) == [
        f"photos 32×32 (64 test images), {bits} bits per image before coding, 512 samples, temperature 1"
        for bits in (112, 448)
    ]
    for grid, sheet in zip((4, 8), generation.values(), strict=True):
        assert sheet.order == "gfid_vgg16"
        texts = [[cell.text for cell in row] for row in sheet.rows]
        assert [row[:3] for row in texts] == [
            ["cnn", "transformer", "2"],
            ["vit", "transformer", "2"],
            ["cnn", "independent", "2"],
            ["vit", "independent", "2"],
        ]
        place = sheet.keys.index("gfid_vgg16")
        assert [row[place] for row in texts] == [f"{80.5 + grid:.1f}"] * 2 + ["140.5"] * 2
        rates = sheet.rows[0][sheet.keys.index("coded_bits_per_token")]
        assert (rates.text, rates.best) == ("4.000", True)
        names = [[cell.text for cell in row][:2] for row in sheet.references]
        assert names == [[b, f"{kind} codes"] for kind in ("real", "shuffled") for b in ("cnn", "vit")]


def test_no_prior_is_averaged_with_others_or_lost(with_priors):
    """Other ways of sampling have tables of their own; otherwise trained priors and tokenizers have rows."""
    first = next(run for run in with_priors.runs() if run.config()["grid_size"] == 4).folder.name
    fabricate_prior(with_priors, PriorConfig(first, "transformer", temperature=0.5), 4.0, 10.0)
    fabricate_prior(with_priors, PriorConfig(first, "transformer", steps=9000), 3.0, 20.0)
    longer = fabricate(with_priors, make_config("cnn", "smoke", grid_size=4, steps=9999))
    fabricate_prior(with_priors, PriorConfig(longer.folder.name, "transformer"), 2.0, 30.0)
    generation = report_of(with_priors).generation
    assert sorted(len(sheet.rows) for _, sheet in generation) == [1, 4, 6]
    sheet = next(sheet for _, sheet in generation if len(sheet.rows) == 6)
    assert {"steps", "tokenizer_steps"} <= set(sheet.keys)
    place = sheet.keys.index("gfid_vgg16")
    assert [row[place].text for row in sheet.rows[:2]] == ["20.0", "30.0"]


def test_priors_sampled_in_another_way_do_not_count_as_left_out_for_their_settings(with_priors, tmp_path):
    over = with_priors.runs()[0].folder.name
    fabricate_prior(with_priors, PriorConfig(over, "transformer", temperature=0.5), 4.0, 10.0)

    def caption() -> str:
        made = charts.draw(frame([]), tmp_path, priors=frame(with_priors.priors(), PRIOR))
        return next(chart.caption for chart in made if chart.name == "generation")

    assert caption().startswith("16 priors, means over seeds; 512 samples each, at temperature 1,")
    fabricate_prior(with_priors, PriorConfig(over, "transformer", steps=9000), 3.0, 20.0)
    assert caption().startswith("16 of 17 priors, those with equal settings, at steps = 400, means over")


def test_rates_of_nothing_are_drawn_too(store, tmp_path):
    """One code in all costs no bits, which a logarithmic axis has no place for."""
    over = fabricate(store, make_config("cnn", "smoke", codebook_size=2))
    fabricate_prior(store, PriorConfig(over.folder.name, "rnn"), 0.0, 30.0)
    assert write_report((), store.root, tmp_path).charts


def test_the_entropy_coded_rate_joins_the_table(with_priors):
    table = with_rates(frame(with_priors.runs()), frame(with_priors.priors(), PRIOR))
    expected = table.grid_size**2 * (4.0 + 0.2 * (table.backbone == "vit"))
    assert list(table.coded_bits_per_image) == pytest.approx(list(expected))
    assert (table.coded_bits_per_pixel < table.bits_per_pixel).all()
    bare = with_rates(frame(with_priors.runs()), frame([], PRIOR))
    assert bare.coded_bits_per_pixel.isna().all()


def test_priors_reach_page_markdown_and_files(with_priors, tmp_path):
    failed = fabricate_prior(with_priors, PriorConfig(with_priors.runs()[0].folder.name, "mamba"), 4.0, 80.0)
    (failed.folder / "metrics.json").unlink()
    failed.fail("diverged", "not finite by step 3")
    written = write_report((), with_priors.root, tmp_path)
    assert {"generation", "samples", "rate_distortion"} <= {chart.name for chart in written.charts}
    page = written.page.read_text()
    assert 'id="generation"' in page
    assert "Priors without scores" in page
    assert "not finite by step 3" in page
    assert "## Generation: photos 32×32 (64 test images), 112 bits per image" in (tmp_path / "tables.md").read_text()
    assert len(pd.read_csv(tmp_path / "priors_wide.csv")) == 17
    assert "Hollow" in next(chart.caption for chart in written.charts if chart.name == "rate_distortion")


# -- words, lists and pages, without folders --------------------------------------------------------------------------


NOBODY = pd.DataFrame(columns=list(frame([]).columns))


def texts(sheet) -> list[list[str]]:
    return [[cell.text for cell in row] for row in sheet.rows]


def about(*runs, name="all") -> Report:
    """The report of runs without folders."""
    return contents(Selection(name, [], Path("results")), made(*runs), frame([], PRIOR))


def test_who_costs_more_in_every_budget_is_marked_and_the_mark_explained():
    costs = {"cnn": (1e6, 1e8, 30.0), "vit": (1e6, 1e8, 30.0), "mamba": (2e6, 2e8, 60.0)}
    budgets = ("params", "flops", "train_seconds")
    runs = [(smoke(who), {"psnr": 20.0, **dict(zip(budgets, own, strict=True))}) for who, own in costs.items()]
    sheet = ranking(made(*runs), NOBODY)
    assert sorted(row[0] for row in texts(sheet)) == ["cnn", "mamba †", "vit"]
    (note,) = [note for note in sheet.notes if "†" in note]
    assert "median in every budget (parameters 2%, FLOPs 2%, train s 5%)" in note
    assert not any("†" in note for note in ranking(made(*runs[:2]), NOBODY).notes)


def test_a_list_is_cut_at_the_limit_and_only_then_says_so(monkeypatch):
    monkeypatch.setattr(rankings, "LIMIT", 2)
    runs = [(smoke(beta=float(beta)), {"psnr": beta}) for beta in (1, 2, 3)]
    one = Verdict("psnr", "cnn", "vit", "", 2, 0.5, None, None, None, None)
    for count in (2, 3):
        cut = ["The first 2 of 3 rows."] * (count == 3)
        sheet = ranking(made(*runs[:count]), NOBODY)
        assert len(sheet.rows) == 2
        assert [note for note in sheet.notes if "first" in note] == cut
        assert cells(sheet, "psnr")["cnn"].text == f"{count - 1}.00"  # the best come first
        assert list(verdict_list([one] * count).notes) == cut
        assert len(verdict_list([one] * count).rows) == 2
        priors = prior_rows(*({"steps": beta, "gfid_vgg16": 80.0} for beta in range(count)))
        ((_, sheet),) = generation(priors)
        assert [note for note in sheet.notes if "The first" in note] == cut
    assert report._few(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert report._few(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"
    assert report._few([]) == "none"


def test_titles_name_what_is_reported_and_number_several_blocks():
    """Grid and K where all rows have the same."""
    one = about((smoke(seed=0), {"psnr": 20.0}), (smoke(seed=1), {"psnr": 20.0}))
    assert [block.title for block in one.blocks] == [
        "photos 32×32 (64 test images), 112 bits per image (4×4 codes, K = 128)"
    ]
    several = about(
        *((smoke(), {"psnr": 20.0}), (smoke(grid_size=8, codebook_size=4), {"psnr": 20.0})),
        (smoke(codebook_size=256), {"psnr": 20.0}),
    )
    assert [block.title for block in several.blocks] == [
        "1. photos 32×32 (64 test images), 112 bits per image (4×4 codes, K = 128)",
        "2. photos 32×32 (64 test images), 128 bits per image",
    ]
    titles = {name: about((smoke(), {"psnr": 20.0}), name=name).title for name in ("all", "selection", "beta")}
    assert titles == {"all": "All runs", "selection": "Selected runs", "beta": "Study beta"}


def test_priors_over_runs_on_validation_say_so():
    row = {"gfid_vgg16": 80.0, "top_k": 50, "temperature": 0.9, "coded_bits_per_token_independent": 6.5}
    ((title, sheet),) = generation(prior_rows(row | {"protocol_scored_on": "val"}))
    assert title.startswith("photos 32×32 (64 validation images), 112 bits per image before coding, ")
    assert "against all 64 validation images of photos at 32×32" in sheet.notes[0]


def test_priors_are_introduced_by_how_they_were_sampled_and_those_without_scores_listed():
    rows = [
        {"gfid_vgg16": 80.0, "top_k": 50, "temperature": 0.9, "coded_bits_per_token_independent": 6.5},
        {"gfid_vgg16": 90.0, "top_k": 50, "temperature": 0.9, "coded_bits_per_token_independent": 6.25, "seed": 1},
        {"status": "crashed", "reason": "it crashed", "prior": "mamba", "seed": 7},
    ]
    (title, sheet), (last, others) = generation(prior_rows(*rows))
    sampling = "512 samples, temperature 0.9, top 50"
    assert title == f"photos 32×32 (64 test images), 112 bits per image before coding, {sampling}"
    assert sheet.notes[0] == (
        f"{sampling}, against all 64 test images of photos at 32×32; bits on their codes. "
        "Extractor: v. Independent codes take 6.25 to 6.50 bits per token."
    )
    assert (last, texts(others)) == ("Priors without scores", [["crashed", "it crashed", "mamba", "7", "t"]])
    ((title, _),) = generation(prior_rows(rows[0] | {"top_k": 0}))
    assert title.endswith("temperature 0.9")


def test_a_verdict_has_a_digit_more_than_its_metric_and_who_is_better_is_marked():
    one = Verdict("kid_vgg16", "cnn", "vit", "beta=1", 5, 0.00123, (0.001, 0.002), None, 0.012, "vit")
    sheet = verdict_list([one, replace(one, better=None)])
    assert sheet.notes[0].startswith("Intervals are of each pair alone; p is corrected for the number of pairs")
    assert texts(sheet)[0] == [
        *("KID vgg16", "cnn", "vit", "beta=1", "5", "+0.00123", "+0.00100 to +0.00200", NONE, "0.012", "vit better")
    ]
    assert [[bool(cell.best) for cell in row] for row in sheet.rows] == [[False] * 9 + [True], [False] * 10]
    assert [cell.order for cell in sheet.rows[0][4:]] == [5, 0.00123, 0.001, None, 0.012, "vit better"]


def test_failures_are_listed_by_status_with_what_was_set():
    runs = [
        (smoke(beta=beta), {"status": status})
        for beta, status in ((1.0, "pruned"), (2.0, "crashed"), (3.0, "diverged"))
    ]
    sheet = rankings.failures(made(*runs, status="crashed"))
    assert list(sheet.keys) == ["status", "reason", "backbone", "beta", "seed", "run_id"]
    assert [[row[0], row[3]] for row in texts(sheet)] == [["crashed", "2"], ["diverged", "3"], ["pruned", "1"]]


def test_all_runs_are_listed_in_the_order_of_block_backbone_setting_and_seed():
    """Numbers as numbers; with the scores that some run has, and without block numbers where there is one block."""
    runs = [
        (smoke(who, beta=beta, seed=seed), {}) for who in ("vit", "cnn") for beta in (10.0, 9.0) for seed in (11, 2)
    ]
    runs[0][1].update(psnr=20.0)
    table = made(*runs)
    sheet = run_list(table, [table])
    assert list(sheet.keys) == [
        "backbone",
        "beta",
        "seed",
        "status",
        "psnr",
        "bits_per_image",
        "params",
        "flops",
        "run_id",
    ]
    found = [row[:3] for row in texts(sheet)]
    assert found == [[who, beta, seed] for who in ("cnn", "vit") for beta in ("9", "10") for seed in ("2", "11")]
    first, second = table[table.beta == 9.0], table[table.beta == 10.0]
    sheet = run_list(table, [first, second])
    assert sheet.keys[0] == "block"
    assert [row[0] for row in texts(sheet)] == ["1"] * 4 + ["2"] * 4
    table = pd.concat([table, made((smoke(), {}), status="crashed")], ignore_index=True)
    assert [row[0] for row in texts(run_list(table, [first, second]))] == ["1"] * 4 + ["2"] * 4 + [NONE]


def test_a_cell_is_formatted_like_its_column_and_sorted_by_its_value():
    assert tables.cell("psnr", 20.126, 0.5)[:4] == ("20.13", "± 0.50", 20.126, False)
    assert tables.cell("psnr", 20.126, math.nan, "20.13")[:4] == ("20.13", "", 20.126, True)
    assert tables.cell("flops", 12_345_000_000.0, 5e6)[:4] == ("12,345", "± 5", 12_345_000_000.0, False)
    assert tables.cell("beta", 0.1)[:4] == ("0.1", "", 0.1, False)
    assert tables.cell("backbone", "vit")[:4] == ("vit", "", "vit", False)
    assert tables.cell("psnr", math.nan, 0.5, NONE)[:4] == (NONE, "", None, False)
    assert tables.text_of(None) == "none"
    assert (tables.text_of(True), tables.text_of(np.False_)) == ("yes", "no")
    assert [tables.text_of(value, "grid_edges") for value in (-0.04, 0.04, -0.06)] == ["0.0", "0.0", "-0.1"]
    assert rankings._short(f"{'ab' * 32} decade 0123456789abcdef") == "ababababab… decade 0123456789abcdef"
    assert rankings._signed([-0.5], "+.2f") == "−0.50"
    assert rankings._signed(None, "+.2f") == rankings._signed([math.nan], "+.2f") == NONE


def test_a_protocol_is_one_line_and_shared_settings_are_those_of_all_rows():
    digest = "0123456789" * 6
    measured = {"protocol_split": f"a {digest}", "protocol_image_size": 32, "protocol_extractor_vgg16": None}
    table = made((smoke(beta=1.0), measured), (smoke(beta=2.0), measured | {"augment": None}))
    (line,) = [note for note in ranking(table.assign(psnr=1.0), NOBODY).notes if note.startswith("Protocol")]
    assert (
        line
        == "Protocol: data photos; split a 0123456789…; scored on test; count 64; image size 32; extractor vgg16 none."
    )
    equal = report._equal(table)
    assert (equal["backbone"], equal["codebook_size"]) == ("cnn", "128")
    assert not {"beta", "augment"} & set(equal)


def test_facts_give_values_in_order_and_of_many_both_ends():
    assert report._values(pd.Series([10, 9, None, 9])) == "9, 10"
    assert report._values(pd.Series(["b", 10.0, "a", 9.0])) == "9, 10, a, b"
    assert report._values(pd.Series(range(16))) == ", ".join(map(str, range(16)))
    assert report._values(pd.Series(range(20))) == "0 to 19 (20 values)"
    facts = about((smoke(), {"psnr": 20.0})).facts
    assert facts == {"backbones": "cnn", "swept": "nothing", "seeds": "0", "runs": "1 finished"}


CELL, GAP = tables.Cell, tables.Cell(NONE)


def test_columns_of_numbers_may_have_gaps_and_are_aligned_to_the_right():
    sheet = tables.Sheet(
        ["backbone", "psnr"], [[CELL("vit", order="vit"), CELL("2.00", "± 1", 2.0, True)], [CELL("a\n|b"), GAP]]
    )
    assert sheet.numeric == [False, True]
    assert tables.as_markdown(sheet).splitlines() == [
        *("| backbone | PSNR dB ↑ |", "| --- | ---: |"),
        *("| vit | **2.00 ± 1** |", r"| a \|b | – |"),
    ]


def test_markdown_has_facts_rankings_and_verdicts_and_no_heading_without_rows(store):
    sweep(store, EFFECTS)
    found = report_of(store)
    text = markdown(found)
    assert text.startswith("# All runs\n\n**photos 32×32")
    assert "\n\n- backbones: cnn, vit\n- swept: beta 0.25, 1\n" in text
    assert "\n\nover beta 0.25, 1:\n\n- " in text
    assert all(f"\n- {tables.inline(sentence)}" in text for sentence in found.blocks[0].headline)
    assert not re.search("^## (Not ranked|Without)", text, re.M)
    failed = fabricate_failed(store, make_config("vit", "smoke", seed=9))
    fabricate(store, make_config("vit", "smoke", codebook_size=16))
    text = markdown(report_of(store))
    assert text.index("\n## Not ranked against each other\n") < text.index("\n## Without scores\n")
    assert failed.folder.name.replace("_", r"\_") in text.split("## Without scores")[1]


def test_a_verdict_is_told_once_and_says_of_which_runs_it_holds(store):
    sweep(store, EFFECTS)
    (block,) = report_of(store).blocks
    told = block.headline + block.others
    assert len(set(told)) == len(told) == sum(len(sheet.rows) for sheet in block.verdicts.values())
    assert list(block.verdicts) == ["Backbones against each other", "Settings within a backbone"]
    (alone,) = about((smoke(), {"psnr": 20.0})).blocks
    assert (alone.headline, alone.others, alone.verdicts) == ([], [], {})


def test_of_very_many_verdicts_the_page_has_the_first_and_says_so(store, monkeypatch):
    sweep(store, EFFECTS)
    (whole,) = report_of(store).blocks
    assert whole.more == len(whole.others) > 2
    assert f"{whole.more} more verdicts</summary>" in report.html(report_of(store), [], None, store.root)
    monkeypatch.setattr(rankings, "LIMIT", 2)
    found = report_of(store)
    (block,) = found.blocks
    assert (block.others, block.more) == (whole.others[:2], whole.more)
    assert f"{whole.more} more verdicts, of which the first 2</summary>" in report.html(found, [], None, store.root)


def test_verdicts_say_that_scores_of_images_are_those_of_part_of_the_settings(store, monkeypatch):
    sweep(store, EFFECTS)
    part = "Intervals over images are of a random 25.0% of these settings."
    (whole,) = report_of(store).blocks
    monkeypatch.setattr(statistics, "IMAGE_RUNS", statistics.IMAGE_SEEDS)
    (block,) = report_of(store).blocks
    assert all(part in sheet.notes for sheet in block.verdicts.values())
    assert not any(part in sheet.notes for sheet in whole.verdicts.values())


def test_the_terminal_shows_the_first_rows_their_settings_and_the_verdicts(store, capsys):
    sweep(store, EFFECTS, betas=(0.25, 1.0, 2.0, 4.0, 8.0))
    fabricate(store, make_config("vit", "smoke", codebook_size=16))
    found = report_of(store)
    report.show(found)
    out = capsys.readouterr().out
    block = found.blocks[1]
    table = out[out.rindex(block.title.split(",")[0]) :].split("\nover beta")[0].splitlines()
    rows = [line.split() for line in table if line.split()[:1] in (["cnn"], ["vit"], ["k-means"])]
    assert [row[:2] for row in rows[:-1]] == [row[:2] for row in texts(block.ranking)[:8]]
    assert rows[-1][0] == "k-means"
    assert {"backbone", "beta", "seeds", "LPIPS", "PSNR", "perplexity"} <= set(" ".join(table).split())
    assert not {"FID", "SSIM", "failed"} & set(" ".join(table).split())
    assert all(sentence in out for sentence in block.headline)
    assert "2 blocks are not ranked against each other: they differ in bits_per_image." in out
    assert out.endswith("Runs: 31 finished.\n")


def test_the_terminal_is_silent_about_what_there_is_not(capsys):
    report.show(about((smoke(), {"psnr": 20.0})))
    out = capsys.readouterr().out
    assert not {"ranked", "Generation", "over"} & set(out.split())


def test_charts_of_an_earlier_report_go_and_those_of_another_worker_stay(store, sketched, tmp_path):
    fabricate(store, smoke())
    plots = tmp_path / "out" / "plots"
    plots.mkdir(parents=True)
    for name in ("old.png", "old.svg", ".dot.png.tmp"):
        (plots / name).write_text("")
    assert command.main(["--results", str(store.root), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in plots.iterdir()} == {"dot.png", ".dot.png.tmp"}
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (store.root / "reports").exists()
    assert write_report([], store.root).page == store.root / "reports" / "all" / "report.html"


def test_a_study_is_known_by_how_its_name_begins_where_no_other_begins_so(store):
    run = fabricate(store, smoke())
    for name in ("beta-cpu", "beta-smoke", "lr-smoke"):
        store.extend_study(name, {"kind": "ablation", "sweep": [], "metrics": ["psnr"]}, {run.folder.name: {}})
    assert select(["lr"], store.root).name == "lr-smoke"
    for name in ("beta", ""):
        with pytest.raises(UserError, match="unknown study or run"):
            select([name], store.root)


def test_a_report_ends_with_commands_that_go_on_from_its_best_runs(store, sketched, capsys):
    """The two best rows in their order; the best that has its weights."""
    quality = {"vit": 0.2, "mamba": 0.1, "cnn": 0.0}
    best, second, last = (fabricate(store, smoke(name), better) for name, better in quality.items())
    (last.folder / "tokenizer.safetensors").touch()
    write_report([], store.root)
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[-2:]]
    assert lines[0][-2:] == [str(best.folder), str(second.folder)]
    assert lines[1][-3:] == ["-m", "bench.prior", str(last.folder)]
    assert diff.main(lines[0][-2:]) == 0


def test_priors_over_other_runs_are_not_in_the_report(with_priors, sketched):
    over = with_priors.runs()[0].folder.name
    written = write_report([over], with_priors.root)
    assert set(pd.read_csv(written.page.parent / "priors_wide.csv").tokenizer) == {over}


def test_a_page_shows_each_chart_with_its_caption_and_each_cell_with_what_it_is_sorted_by(store, sketched):
    sweep(store, EFFECTS)
    found = report_of(store)
    text = write_report([], store.root).page.read_text()
    assert re.search(
        r'<h3>A dot</h3>\s*<div class="chart" tabindex="0"><img src="data:image/png;base64,[^"]+" alt="A dot"></div>'
        r"\s*<figcaption>One dot.<",
        text,
    )
    ranked_rows = found.blocks[0].ranking
    head = re.search(r"<thead>.*?</thead>", text, re.S)[0]
    assert re.findall(r'<th[^>]*aria-sort="(\w+)"', head) == ["ascending"]  # by an LPIPS
    assert re.findall(r'data-first="(\w+)"', head)[list(ranked_rows.keys).index("psnr")] == "descending"
    body = re.search(r"<tbody>.*?</tbody>", text, re.S)[0]
    expected = ["" if cell.order is None else str(cell.order) for row in ranked_rows.rows for cell in row]
    assert re.findall(r'data-order="([^"]*)"', body) == expected
    assert body.count("<b>") == sum(cell.best for row in ranked_rows.rows for cell in row)
    assert len(re.findall(r'<td class="number"', body)) == sum(ranked_rows.numeric) * len(ranked_rows.rows)
    assert all(f"<li>{sentence}</li>" in text for sentence in found.blocks[0].headline)
    assert f"{len(found.blocks[0].others)} more verdicts" in text
    assert "<p>Over beta 0.25, 1:</p>" in text


def test_the_ranking_has_all_that_evaluators_measure():
    """In their order, but for what says the same again; a metric that is added needs no entry elsewhere."""
    names = [name for evaluator in EVALUATORS for name in evaluator.METRICS]
    shown = list(rankings.SCORES)
    assert shown == [name for name in names if name in shown]
    assert set(names) - set(shown) == {
        *("dead_codes", "tokens", "bits_per_image", "bits_per_pixel", "grid_energy_init", "grid_edges_init")
    }


# -- small print ------------------------------------------------------------------------------------------------------


def test_both_metrics_that_runs_were_trained_on_are_named():
    runs = [(smoke(lpips_net=net, seed=seed), {"psnr": 20.0}) for seed, net in enumerate(("vgg", "alex", "vgg"))]
    assert rankings.trained_on(made(*runs)) == "LPIPS alex and LPIPS vgg"
    assert rankings.trained_on(made(*runs).assign(lpips_net="squeeze")) == "lpips_squeeze"  # of another version


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of that many columns in place of the output; gives what was written there."""

    def of(columns: int) -> io.StringIO:
        console = SafeConsole(file=io.StringIO(), force_terminal=True, width=columns, highlight=False)
        for module in (report, tables):
            monkeypatch.setattr(module, "stdout", console)
        return console.file

    return of


def test_a_table_without_room_on_a_terminal_says_what_it_leaves_out(terminal, monkeypatch):
    def table() -> Table:
        made = Table("first", "second\nwords", "third", box=None)
        made.add_row("a" * 10, "b" * 10, "c" * 10)
        return made

    written = terminal(25)
    tables.put(table(), "the report", ["fourth"])
    assert "b" * 10 in written.getvalue()
    assert "ccc" not in written.getvalue().partition("No room")[0]
    assert "No room for fourth, third: see the report." in written.getvalue()
    written = terminal(80)
    tables.put(table(), "the report")
    assert "c" * 10 in written.getvalue()
    assert "No room" not in written.getvalue()
    narrow = SafeConsole(file=io.StringIO(), width=25)
    monkeypatch.setattr(tables, "stdout", narrow)  # a pipe or a file
    tables.put(table(), "the report")
    assert "c" * 10 in narrow.file.getvalue()


def test_a_narrow_terminal_shows_the_main_metric_and_says_what_else_there_is(store, terminal):
    for beta in (0.1234567, 0.5):
        fabricate(store, smoke(beta=beta, lr=beta / 100))
    written = terminal(46)
    report.show(report_of(store))
    table, _, said = re.sub("\x1b\\[[0-9;]*m", "", written.getvalue()).partition("No room for")
    assert said.startswith(" seeds, PSNR dB ↑, perplexity ↑: see the report.")
    assert {"0.12346", "0.0012346", "LPIPS"} <= {*table.split()}
    assert max(map(len, table[table.rindex("photos 32×32") :].splitlines())) <= 46


def test_rows_beyond_the_first_are_counted(store, terminal):
    for number in range(10):
        fabricate(store, smoke(beta=0.1 + number))
    written = terminal(100)
    report.show(report_of(store))
    assert "2 more rows in the report." in written.getvalue()


def test_what_instruments_found_of_latents_without_codes_stands_in_grey():
    found = {"lpips_vgg": 0.4, "loss_random": 1.5, "equivariance_cell": 0.25}
    other = {"bits_per_image": math.nan, "lpips_vgg": 0.2, "equivariance_cell": 0.125}
    table = made((smoke(), found), (smoke(quantizer="none"), other))
    coded, latents = table[:1].copy(), table[1:]
    sheet = rankings.instruments(coded, latents)
    assert [[cell.text for cell in row] for row in sheet.rows] == [["cnn", "1", "1.50", "0.25"]]
    assert [[cell.text for cell in row] for row in sheet.references] == [["cnn, no codes", "1", NONE, "0.12"]]
    coded[["loss_random", "equivariance_cell"]] = math.nan
    sheet = rankings.instruments(coded, latents)  # looked at alone
    assert (sheet.rows, len(sheet.references)) == ([], 1)
    assert rankings.instruments(coded, latents.assign(equivariance_cell=math.nan)).references == []


def test_the_protocol_says_how_many_images_were_trained_on():
    def line(*counts: int) -> str:
        table = made(*((smoke(train_images=count), {"psnr": 1.0}) for count in counts))
        (line,) = [note for note in ranking(table, NOBODY).notes if note.startswith("Protocol")]
        return line

    assert "trained on" not in line(0)
    assert "; trained on 1000 of the training images; " in line(1000)
    assert "; trained on all or 1000 of the training images; " in line(1000, 0)


def test_a_setting_has_five_digits_and_a_whole_number_all():
    assert tables.text_of(1_234_567_890) == "1234567890"
    assert tables.text_of(0.000123456789) == "0.00012346"
    assert tables.text_of(1.3715264) == "1.3715"
    assert tables.text_of(20_000.0) == "20000"


def test_facts_tell_the_kind_of_a_study_first_and_failures_in_words(tmp_path):
    table = made((smoke(), {"status": "out_of_memory"}), (smoke(seed=1), {"status": "timed_out"}))
    study = {"kind": "search", "sweep": ["beta"], "metrics": ["psnr"], "runs": {"a": {}, "b": {}}}
    facts = contents(Selection("beta", [], tmp_path, study), table, frame([], PRIOR)).facts
    assert next(iter(facts.items())) == ("kind", "search")
    assert facts["runs"] == "1 out of memory, 1 timed out"


def test_the_terminal_shows_the_first_blocks_alone_and_names_once_what_sets_them_apart(capsys):
    runs = [(smoke(codebook_size=2**k), {"psnr": 20.0}) for k in range(1, 11)]
    found = about(*runs)
    report.show(found)
    out = " ".join(capsys.readouterr().out.split())
    shown = [block.title.partition(" (")[0] in out for block in found.blocks]
    assert shown == [True] * report.BRIEF + [False] * 2
    assert "10 blocks are not ranked against each other: they differ in bits_per_image. Runs" in out


def test_the_terminal_counts_the_rows_of_priors_whatever_their_data_is_called(with_priors, capsys):
    """Brackets are no markup there."""
    found = report_of(with_priors)
    titles = [title.replace("photos", "folder:/[/]/[red]faces") for title, _ in found.generation]
    report.show(found._replace(generation=[(title, sheet) for title, (_, sheet) in zip(titles, found.generation)]))  # noqa: B905
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith("Generation, ")]
    assert told == [f"Generation, {title}: 4 rows; see the report." for title in titles]


def test_without_priors_there_is_no_table_of_them(store, sketched):
    fabricate(store, smoke())
    folder = write_report([], store.root).page.parent
    assert {path.name for path in folder.glob("*.*")} == {
        "report.html",
        "tables.md",
        "runs_wide.csv",
        "runs_long.parquet",
        "columns.csv",
    }
    assert not any(name.startswith("coded_") for name in pd.read_csv(folder / "runs_wide.csv"))


def test_a_run_that_is_named_twice_counts_once(store, tmp_path):
    run = fabricate(store, smoke())
    (tmp_path / "link").symlink_to(store.root / "runs")
    through = tmp_path / "link" / run.folder.name
    selection = select([run.folder.name, str(run.folder), str(through)], store.root)
    assert [found.folder.name for found in selection.runs] == [run.folder.name]


def test_runs_of_a_study_that_were_not_started_are_no_runs(store):
    header = {"kind": "ablation", "sweep": [], "metrics": ["psnr"]}
    store.extend_study("beta", header, {"cnn-ema-0": {}, fabricate(store, smoke()).folder.name: {}})
    (store.root / "runs" / "cnn-ema-0").mkdir()
    assert len(select(["beta"], store.root).runs) == 1


def test_a_study_comes_before_a_folder_of_its_name(store, tmp_path, monkeypatch):
    run = fabricate(store, smoke())
    store.extend_study("beta", {"kind": "ablation", "sweep": [], "metrics": ["psnr"]}, {run.folder.name: {}})
    elsewhere = Store(tmp_path / "beta")
    for seed in (1, 2):
        fabricate(elsewhere, smoke(seed=seed))
    monkeypatch.chdir(tmp_path)
    assert [found.folder.name for found in select(["beta"], store.root).runs] == [run.folder.name]
    assert select([str(elsewhere.root)], store.root).root == elsewhere.root


def test_long_data_is_in_the_order_of_runs_and_their_metrics(store, sketched):
    for seed in (1, 0):
        fabricate(store, smoke(seed=seed))
    long = pd.read_parquet(write_report([], store.root).page.parent / "runs_long.parquet")
    order = list(zip(long.run_id, long.metric, strict=True))
    assert order == sorted(order)
    assert {"psnr", "psnr_kmeans", "bits_per_image"} <= set(long.metric)
    assert set(long.status) == {"finished"}


def test_long_data_in_parts_is_the_long_data(tmp_path, monkeypatch):
    """As pandas melts it at once, types included: also where a part has a column without a single value."""
    rows = [
        asdict(smoke(seed=seed)) | {"run_id": f"{9 - seed}", "status": "finished", "psnr": 20.0 + seed, "ssim": None}
        for seed in range(5)
    ]
    rows[0]["lpips_net"] = None
    rows[3] |= {"ssim": 0.5, "psnr_kmeans": 3.0, "val_loss": "no metric"}
    table = pd.DataFrame(rows)
    keys = ["run_id", *CONFIG, "status"]
    whole = table.melt(keys, ["psnr", "psnr_kmeans", "ssim"], "metric", "value").dropna(subset="value")
    whole = whole.sort_values(["run_id", "metric"], ignore_index=True).astype({"value": float})
    for size in (1, 2, 100):
        monkeypatch.setattr(data, "ROWS", size)
        data.write_data(table, table[:0], tmp_path)
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "runs_long.parquet"), whole)
    data.write_data(table[:0], table[:0], tmp_path)
    assert pd.read_parquet(tmp_path / "runs_long.parquet").empty


def test_what_the_terminal_leaves_out_is_failed_and_every_score_but_three():
    """The main metric, PSNR and perplexity stay."""
    scores = {"psnr": 20.0, "ssim": 0.5, "perplexity": 9.0, "lpips_alex": 0.3}
    found = about((smoke(), scores), (smoke("vit"), scores))
    keys = found.blocks[0].ranking.keys
    assert [key for key in keys if key in RANKED] == [
        *("lpips_alex", "psnr", "ssim", "perplexity", "bits_per_image", "params", "flops", "train_seconds")
    ]
    assert list(keys)[:3] == ["backbone", "n", "failed"]
    assert found.blocks[0].ranking.order == "lpips_alex"


def test_settings_that_differ_between_backbones_are_named_with_whose_they_are():
    runs = [(smoke("cnn", width=8), {"psnr": 20.0}), (smoke("vit", width=16, depth=3), {"psnr": 21.0})]
    (note,) = [note for note in ranking(made(*runs), NOBODY).notes if note.startswith("Not equal")]
    assert "width (cnn 8, vit 16)" in note
    assert note.endswith(".")
    assert "beta" not in note


def test_a_table_of_scores_names_its_groups_and_those_that_diverged(capsys):
    scores = {"psnr": 20.0, "psnr_real": 25.0}
    real = ("real", 0, tables.with_suffix(scores, "_real"))
    groups = [
        tables.Group([("a", 2.5e6, scores), ("b", 0, {**scores, "psnr": 21.0})], [real], ["c"], "first"),
        tables.Group([("d", 1e6, {"psnr": 19.0})], [("none", 3e6, {"psnr": 26.0})]),
    ]
    table = tables.score_table("run", ["psnr", "ssim"], groups, "a title")
    assert [column.header for column in table.columns] == ["run", "M\npar.", "PSNR\ndB\n↑"]
    assert table.title == "a title"
    names, sizes, scored = (list(column.cells) for column in table.columns)
    assert names == ["[italic]first[/]", "a", "b", "c", "real", "d", "none"]
    assert sizes == ["", "2.50", NONE, "[red]diverged[/]", NONE, "1.00", "3.00"]
    assert scored == ["", "20.00", "[bold]21.00[/]", "", "25.00", "19.00", "26.00"]


def test_the_headline_leaves_out_where_it_holds_only_if_all_hold_there(store):
    """Else each sentence says it."""
    sweep(store, EFFECTS)
    fabricate(store, smoke("mamba", beta=0.25))
    (block,) = report_of(store).blocks
    assert block.within == ""
    assert (
        sum("over beta 0.25, 1: cnn" in sentence or "over beta 0.25, 1: vit" in sentence for sentence in block.headline)
        == 2
    )


def test_the_page_says_so_where_there_is_nothing_to_compare(store, sketched):
    fabricate(store, smoke())
    text = write_report([], store.root).page.read_text()
    assert "One backbone with one setting: nothing to compare." in text
    assert 'href="#verdicts"' not in text
    nav = re.search(r"<nav.*?</nav>", text, re.S)[0]
    assert re.findall(r'href="#(\w+)-?\d*"', nav) == ["summary", "block", "viewer", "charts", "runs", "reading"]
    fabricate(store, smoke("vit"))
    fabricate(store, smoke(codebook_size=16))
    fabricate_failed(store, smoke(seed=5))
    text = write_report([], store.root).page.read_text()
    places = [
        "summary",
        "block-1",
        "block-2",
        "refusals",
        "viewer",
        "charts",
        "verdicts",
        "unscored",
        "runs",
        "reading",
    ]
    nav = re.search(r"<nav.*?</nav>", text, re.S)[0]
    assert re.findall(r'href="#([\w-]+)"', nav) == places
    assert all(f'<section id="{place}">' in text for place in places)
    assert "Only rows of the same block may be compared." in text


# -- damaged runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metrics": {"psnr": "x"}, "protocol": {}}', '{"metrics": 1e400}'])
def test_one_damaged_run_is_named_and_the_others_are_reported(store, sketched, capsys, content):
    """It counts as damaged, with its file and what is wrong, on the page, in the tables and in the terminal."""
    runs = sweep(store, EFFECTS, seeds=(0, 1))
    (runs[0].folder / "metrics.json").write_text(content)
    page = write_report([], store.root).page
    said = capsys.readouterr()
    assert f"{len(runs) - 1} finished, 1 damaged" in said.out
    for text in (page.read_text(), (page.parent / "tables.md").read_text().replace("\\_", "_")):
        assert "is damaged" in text
        assert runs[0].folder.name in text
    assert (pd.read_parquet(page.parent / "runs_long.parquet").metric == "psnr").sum() == len(runs) - 1


def test_scores_per_image_of_another_run_are_named_and_left_out(store, sketched, capsys):
    """Two whole files of equal size that were swapped: the verdicts do without them, and the report says so."""
    runs = sweep(store, EFFECTS, betas=(0.25,))
    first, second = runs[0].folder / "per_image.npz", runs[-1].folder / "per_image.npz"
    assert "over images" in markdown(report_of(store))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    page = write_report([], store.root).page
    assert f"{len(runs)} finished" in (said := capsys.readouterr()).out
    assert "over images" not in said.out
    for path in (first, second):
        assert f"left out: {path} is damaged: its mean lpips_" in said.err
        assert f"{path} is damaged: its mean lpips_" in unescape(page.read_text())


@pytest.mark.parametrize("how", ["longer", "emptied", "a pipe"])
@pytest.mark.parametrize("name", ["history.jsonl", "samples.npz", "untrained.npz", "per_image.npz"])
def test_a_file_that_a_run_did_not_end_with_is_named(store, sketched, capsys, name, how):
    """By its digest, of a tokenizer and of a prior; all runs stay in, and nothing shows the file. One that is gone is
    named as well; in a run of an older version, which has no digests, nothing is."""
    runs = sweep(store, EFFECTS, betas=(0.25,), seeds=(0, 1))
    runs.append(fabricate_prior(store, PriorConfig(runs[0].folder.name, "rnn"), 5.0, 100.0))
    paths = [run.folder / name for run in runs if (run.folder / name).is_file()]
    for run in runs[:3] + runs[4:]:
        seal(run)
    for path in paths[::4]:
        content = path.read_bytes() + b"\n" if how == "longer" else b""  # which reads as before
        path.unlink()
        os.mkfifo(path) if how == "a pipe" else path.write_bytes(content)
    write_report([], store.root)
    said = capsys.readouterr()
    assert "4 finished" in said.out
    for path in paths[::4]:
        assert said.err.count(f"left out: {path} is damaged: ") == 1
    assert said.err.count("left out: ") == len(paths[::4])
    assert runs[0].history() == [] or name != "history.jsonl"
    for path in paths[::4]:
        path.unlink()
    paths[3].write_bytes(paths[1].read_bytes())
    write_report([], store.root)
    said = capsys.readouterr().err
    for path in paths[::4]:
        assert said.count(f"left out: {path} is gone, and what shows it does without") == 1
    assert said.count("left out: ") == len(paths[::4])


def test_of_very_many_runs_not_all_files_are_checked_and_the_report_says_so(store, sketched, capsys, monkeypatch):
    monkeypatch.setattr(report, "CHECKED", 3)
    for run in sweep(store, EFFECTS, betas=(0.25,), seeds=(0, 1)):
        seal(run)
        (run.folder / "history.jsonl").write_text("")
    write_report([], store.root)
    said = capsys.readouterr().err
    assert "more than 3 runs: their files are checked where they are read, and not all of them" in said
    assert "left out" not in said


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"codebook_size": 0}, "codebook_size is 0; it must be at least 1"),
        ({"width": "4"}, "width is '4'; it must be a whole number"),
        ({"beta": [0.25]}, "beta is [0.25]; it must be a number"),
        ({"backbone": {}}, "backbone is {}; it must be text"),
        (None, "it is empty"),
    ],
)
def test_a_run_whose_settings_cannot_be_read_is_left_out_by_name(store, sketched, capsys, change, what):
    runs = sweep(store, EFFECTS, seeds=(0, 1))
    path = runs[0].folder / "config.json"
    stored = json.loads(path.read_text())
    path.write_text("" if change is None else json.dumps({**stored, "config": {**stored["config"], **change}}))
    page = write_report([], store.root).page
    said = capsys.readouterr()
    assert f"left out: {path} is damaged: {what}" in said.err
    assert f"{len(runs) - 1} finished, 1 damaged" in said.out
    assert f"{path} is damaged: {what}" in unescape(page.read_text())
    assert "## Damaged, and left out" in (page.parent / "tables.md").read_text()
    with pytest.warns(UserWarning, match="is damaged"):
        assert len(load_runs(store.root)) == len(runs) - 1


def test_a_damaged_prior_is_named_and_does_not_count_as_a_run(store, sketched, capsys):
    runs = sweep(store, EFFECTS, seeds=(0,))
    folder = store.root / "priors" / "rnn-x"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("[]")
    write_report([], store.root)
    said = capsys.readouterr()
    assert f"left out: {folder / 'config.json'} is damaged: a list where an object belongs" in said.err
    assert f"Runs: {len(runs)} finished.\n" in said.out


def test_when_every_run_is_damaged_the_report_says_so(store, sketched, capsys):
    for run in sweep(store, EFFECTS, seeds=(0,)):
        (run.folder / "config.json").write_text("")
    write_report([], store.root)
    assert "damaged.\n" in capsys.readouterr().out


def test_nothing_that_a_run_tells_steers_a_terminal_or_a_page(store, sketched, capsys):
    """A stranger's reason, folder and machine are text."""
    sweep(store, EFFECTS, seeds=(0,))
    failed = store.run(make_config("cnn", "smoke", seed=9))
    fabricate_failed(store, make_config("cnn", "smoke", seed=9))
    reason = '{"status": "crashed", "reason": "<script>alert(1)</script> \x1b[2J"}'
    (failed.folder / "failure.json").write_text(reason)
    page = write_report([], store.root).page
    said = capsys.readouterr()
    for text in (said.out, said.err, page.read_text(), (page.parent / "tables.md").read_text()):
        assert "\x1b" not in text
        assert "<script>alert" not in text


def test_damaged_runs_of_a_study_are_not_said_to_be_planned(store, sketched, capsys):
    runs = sweep(store, EFFECTS, seeds=(0,))
    names = [*(run.folder.name for run in runs), "cnn-ema-0"]
    store.extend_study("beta", {"kind": "ablation", "sweep": [], "metrics": ["psnr"]}, {name: {} for name in names})
    (runs[0].folder / "config.json").write_text("")
    write_report(["beta"], store.root)
    assert f"Runs: {len(runs) - 1} finished, 1 damaged, 1 planned but not started.\n" in capsys.readouterr().out


def test_a_folder_whose_name_is_no_text_is_left_out_by_name(store, sketched, capsys):
    runs = sweep(store, EFFECTS, seeds=(0,))
    os.rename(runs[0].folder, os.fsencode(runs[0].folder) + b"\xff")
    write_report([], store.root)
    said = capsys.readouterr()
    assert "has a name that is no text; rename that folder" in said.err
    assert f"{len(runs) - 1} finished, 1 damaged" in said.out


def test_a_prior_over_something_that_is_no_name_is_over_none(store):
    folder = store.root / "priors" / "rnn-x"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"config": {"tokenizer": [1]}, "environment": {}}')
    assert not report._is_over({"cnn"}, store.priors()[0])
