"""What stands in grey beside a ranking: never ranked, only of equal protocol and budget, with bits of its own."""

from dataclasses import replace

import pytest

from bench import run as command
from bench.analysis import charts, frames, references
from bench.analysis.frames import blocks, coded, continuous, frame
from bench.analysis.rankings import ranking
from bench.analysis.report import write_report
from bench.analysis.slices import protocol_scopes
from bench.analysis.tables import NONE
from bench.core.runs import SCORED, UNDEFINED
from bench.core.store import Store
from bench.quantizers import QUANTIZERS
from bench.tokenizers.config import Config, make_config
from tests.fabricate import fabricate, least

FORMATS = {"psnr_webp": 19.5, "bits_per_image_webp": 2100.0, "bits_per_pixel_webp": 2100 / 1024}
FORMATS |= {"psnr_jpeg": 17.5, "bits_per_image_jpeg": 3000.0, "bits_per_pixel_jpeg": 3000 / 1024}


def smoke(backbone: str = "cnn", quantizer: str = "ema", **settings) -> Config:
    return make_config(backbone, "smoke", quantizer=quantizer, device="cpu", **settings)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


def sheet_of(store: Store):
    """The ranking of the only block."""
    table = frame(store.runs())
    (block,) = blocks(table)
    return ranking(block, table.iloc[:0], continuous(table))


def grey(sheet, key: str) -> dict[str, str]:
    """First column → the text of ``key``, of every reference."""
    place = list(sheet.keys).index(key)
    return {row[0].text: row[place].text for row in sheet.references}


def test_what_is_undefined_is_told_of_exactly_the_quantizers_without_codes():
    assert {*UNDEFINED} == {name for name, kind in QUANTIZERS.items() if not kind.discrete} == {*frames.CONTINUOUS}
    assert all({*names} <= {*SCORED["runs"]} for names in UNDEFINED.values())


@pytest.mark.parametrize("quantizer", [*UNDEFINED, "ema"])
def test_scores_that_a_quantizer_cannot_have_are_not_missed_and_all_others_are(store, quantizer):
    run = fabricate(store, smoke(quantizer=quantizer))
    assert run.finished
    content = least()
    for name in SCORED["runs"]:
        kept = {key: value for key, value in content["metrics"].items() if key != name}
        run.write("metrics.json", {**content, "metrics": kept})
        assert run.finished == (name in UNDEFINED.get(quantizer, ())), name


def test_bits_of_a_frame_are_those_of_the_codes_the_measured_or_missing(store):
    fabricate(store, smoke())
    fabricate(store, smoke(quantizer="none"))
    fabricate(store, smoke(quantizer="kl"), bits_per_image=321.5)
    table = frame(store.runs()).set_index("quantizer")
    assert table.bits_per_image["ema"] == 112
    assert table.bits_per_image["kl"] == 321.5
    assert table.loc["none", ["bits_per_image", "bits_per_pixel", "tokens", "perplexity"]].isna().all()
    assert [list(block.quantizer) for block in blocks(table.reset_index())] == [["ema"]]


def test_latents_without_codes_are_grey_whatever_they_score(store):
    """Under k-means, with the mean over their seeds; the ranking and its marks are those of the codes."""
    for seed in (0, 1):
        fabricate(store, smoke(seed=seed))
        fabricate(store, smoke("vit", seed=seed), 0.01)
    before = sheet_of(store)
    for seed in (0, 1):
        fabricate(store, smoke(quantizer="none", seed=seed), 0.1, 0.02 * seed)
    fabricate(store, smoke("vit", "kl"), 0.2, bits_per_image=100.0)
    sheet = sheet_of(store)
    assert sheet.rows == before.rows
    assert list(grey(sheet, "psnr")) == ["k-means on patches", "cnn, no codes", "vit, KL latent, 100 bits"]
    table = frame(store.runs())
    mean = table[table.quantizer == "none"].psnr.mean()
    assert grey(sheet, "psnr")["cnn, no codes"] == f"{mean:.2f}"
    assert grey(sheet, "n")["cnn, no codes"] == "2"
    assert grey(sheet, "perplexity")["cnn, no codes"] == grey(sheet, "bits_per_image")["cnn, no codes"] == NONE
    assert grey(sheet, "bits_per_image")["vit, KL latent, 100 bits"] == "100"
    assert not any(cell.best for row in sheet.references for cell in row)


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 7},
        {"lr": 0.5},
        {"grid_size": 8},
        {"code_dim": 3},
        {"batch_size": 5},
        {"width": 9},
        {"lpips_weight": 0},
    ],
    ids=str,
)
def test_only_the_same_budget_stands_beside(store, other):
    fabricate(store, smoke())
    fabricate(store, smoke(quantizer="none", **other))
    assert list(grey(sheet_of(store), "psnr")) == ["k-means on patches"]


@pytest.mark.parametrize("other", [{"fingerprint": "0" * 64}, {"version": 9}, {"split": "test"}, {"count": 3}], ids=str)
def test_only_what_was_scored_alike_stands_beside(store, other):
    fabricate(store, smoke())
    fabricate(store, smoke(quantizer="none"), **other)
    assert list(grey(sheet_of(store), "psnr")) == ["k-means on patches"]


def test_settings_of_other_quantizers_do_not_part_them(store):
    """K, β and the seed say nothing of a latent without codes."""
    fabricate(store, smoke(beta=0.7, codebook_size=64, seed=3))
    fabricate(store, smoke(quantizer="none", codebook_size=128))
    assert list(grey(sheet_of(store), "psnr")) == ["k-means on patches", "cnn, no codes"]


def test_what_the_codes_lose_is_no_codes_less_the_best_row_of_the_backbone(store):
    fabricate(store, smoke(), psnr=20.0)
    fabricate(store, smoke(beta=1.0), psnr=20.5)
    fabricate(store, smoke(beta=1.0, steps=999), psnr=29.0)  # of another budget
    fabricate(store, smoke("vit"), psnr=19.0)
    fabricate(store, smoke("vit", "none"), psnr=18.5)
    fabricate(store, smoke(quantizer="none"), psnr=22.0)
    (note,) = [note for note in sheet_of(store).notes if note.startswith("What codes cost")]
    assert note.endswith("cnn 1.50 dB, vit −0.50 dB.")


def test_formats_are_grey_with_the_bits_that_they_took(store):
    fabricate(store, smoke(), **FORMATS)
    sheet = sheet_of(store)
    assert grey(sheet, "psnr") == {
        "k-means on patches": grey(sheet, "psnr")["k-means on patches"],
        "WebP, 2100 bits": "19.50",
        "JPEG, 3000 bits": "17.50",
    }
    assert list(grey(sheet, "bits_per_image").values()) == ["112", "2100", "3000"]
    assert [note for note in sheet.notes if "AVIF" in note and "could not write" in note]


def test_formats_and_latents_stand_at_the_rate_that_they_took(store):
    """Within the axes, and the caption and the legend name them; no codes are a line across."""
    fabricate(store, smoke(), **FORMATS)
    for seed, bits in ((0, 0.2), (1, 0.4)):
        fabricate(store, smoke(quantizer="kl", seed=seed), bits_per_pixel=bits, psnr=23.0)
    fabricate(store, smoke(quantizer="none"), psnr=24.0)
    (scope,) = protocol_scopes(frame(store.runs()))
    assert list(scope.rows.quantizer) == ["ema"]
    (drawing,) = charts.rate_distortion(scope)
    axes = next(axes for axes in drawing.figure.axes if axes.get_ylabel().startswith("PSNR"))
    found = [[list(line.get_xdata()), list(line.get_ydata())] for line in axes.get_lines()]
    assert [[FORMATS["bits_per_pixel_webp"]], [19.5]] in found
    assert [[FORMATS["bits_per_pixel_jpeg"]], [17.5]] in found
    assert [[pytest.approx(0.3)], [23.0]] in found
    assert [[0, 1], [24.0, 24.0]] in found
    low, high = axes.get_xlim()
    assert low < 112 / 1024 < FORMATS["bits_per_pixel_jpeg"] < high
    words = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert words == ["cnn", "k-means on patches", "WebP", "JPEG", "KL latent", "no codes"]
    for word in ("WebP, JPEG", "KL latent", "without codes"):
        assert word in drawing.caption


def test_a_report_of_latents_alone_ranks_nothing(store, monkeypatch):
    fabricate(store, smoke(quantizer="none"))
    page = write_report([], store.root).page.read_text()
    assert "none" in page
    assert not list(blocks(frame(store.runs())))
    fabricate(store, smoke())
    text = write_report([], store.root).page.with_name("tables.md").read_text()
    assert "| cnn, no codes |" in text


def test_the_terminal_shows_them_below_the_codes(store):
    configs = [smoke(), smoke(quantizer="none"), smoke(quantizer="kl")]
    runs = [
        fabricate(store, configs[0], psnr=20.0, **FORMATS),
        fabricate(store, configs[1], psnr=21.0),
        fabricate(store, configs[2], psnr=20.5),
    ]
    table = command.result_table(runs[::-1])
    names, _, *_ = (list(column.cells) for column in table.columns)
    assert names == ["cnn ema 0", "k-means on patches", "WebP, 2100 bits", "JPEG, 3000 bits", "cnn kl 0", "cnn none 0"]
    assert [row.style for row in table.rows] == [None] + 5 * ["bright_black"]
    assert table.title == "112 bits per image: 16 codes of K = 128"
    assert (
        "What codes cost in PSNR, from the same network without them to its best row with them: cnn 1.00 dB."
        in table.caption
    )
    alone = command.result_table(runs[1:2])
    assert list(alone.columns[0].cells) == ["cnn none 0"]
    assert alone.title == "no codes"


def test_coded_rows_and_continuous_ones_are_all_that_are_finished(store):
    fabricate(store, smoke())
    fabricate(store, smoke(quantizer="none"))
    table = frame(store.runs())
    assert len(coded(table)) == len(continuous(table)) == 1
    assert continuous(table.assign(status="crashed")).empty
    assert references.beside(coded(table), continuous(table)).quantizer.tolist() == ["none"]
    assert references.beside(coded(table).assign(lr=9.0), continuous(table)).empty
    assert replace(smoke(quantizer="none")).discrete is False
