"""The report: what is bold, what is refused, what a page may hold, and that equal runs give equal bytes."""

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest
from fabricate import fabricate, fabricate_failed, fabricate_prior, sweep
from PIL import Image

from bench import charts, index, report
from bench.config import make_config
from bench.files import UserError
from bench.frames import CLOCKED, CONFIG, METRICS, blocks, frame, prior_frame, with_rates
from bench.prior_config import PriorConfig
from bench.report import LIMIT, NONE, contents, markdown, ranking, run_list, select, write_report
from bench.store import Store

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
    monkeypatch.setattr(index, "importances", lambda table, metric: None)


def report_of(store, *names):
    selection = select(names, store.root)
    return contents(selection, frame(selection.runs), prior_frame(store.priors()))


def ranked(store) -> report.Sheet:
    """The ranking of the only block."""
    table = frame(store.runs())
    (block,) = blocks(table)
    return ranking(block, table[table.status == "diverged"])


def cells(sheet, key) -> dict:
    """First column → the cell of ``key``, for every row of ``sheet``."""
    return {row[0].text: row[list(sheet.keys).index(key)] for row in sheet.rows}


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


def test_clocks_of_different_machines_are_not_ranked(store):
    runs = [fabricate(store, make_config(backbone, "smoke")) for backbone in ("cnn", "vit")]
    assert all(bold(ranked(store), name) == {"cnn"} for name in CLOCKED)
    changed = json.loads((runs[0].folder / "config.json").read_text())
    changed["environment"]["threads"] = 64
    runs[0].write("config.json", changed)
    sheet = ranked(store)
    assert all(bold(sheet, name) == set() for name in CLOCKED)
    assert bold(sheet, "params") == {"cnn"}
    assert any("2 different machines" in note and METRICS["train_seconds"].label in note for note in sheet.notes)


def test_spread_needs_two_seeds(store):
    fabricate(store, make_config("cnn", "smoke"))
    assert cells(ranked(store), "psnr")["cnn"].spread == ""
    assert not any("±" in cell.text + cell.spread for row in ranked(store).rows for cell in row)
    fabricate(store, make_config("cnn", "smoke", seed=1), noise=0.01)
    cell, table = cells(ranked(store), "psnr")["cnn"], frame(store.runs())
    assert cell.text == f"{table.psnr.mean():.2f}"
    assert cell.spread == f"± {table.psnr.std():.2f}"
    assert cells(ranked(store), "params")["cnn"].spread == ""


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
    assert sheet.notes == [f"The first {LIMIT} of 600 rows. All are in runs.csv."]


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
    assert report.main(["--results", str(store.root)]) == 2
    assert "no runs below" in capsys.readouterr().err
    run = fabricate(store, make_config("cnn", "smoke"))
    store.extend_study("beta", {"kind": "ablation", "sweep": ["beta"], "metrics": ["psnr"]}, {"cnn-ema-0": {}})
    with pytest.raises(UserError, match="no runs of study beta below"):
        select(["beta"], store.root)
    with pytest.raises(UserError, match=rf"'gamma' .* studies: beta; runs: {run.folder.name}"):
        select(["gamma"], store.root)
    with pytest.raises(UserError, match="is a file"):
        write_report([], store.root, run.folder / "config.json")


def test_all_failed_is_still_a_report(store, sketched, capsys):
    for seed, status in enumerate(("diverged", "crashed", "out_of_memory")):
        fabricate_failed(store, make_config("cnn", "smoke", seed=seed), status)
    assert report.main(["--results", str(store.root)]) == 0
    out = store.root / "reports" / "all"
    page = (out / "report.html").read_text()
    assert "No run has scores" in page
    assert all(f"it {status}" in page for status in ("diverged", "crashed", "out_of_memory"))
    assert "1 diverged, 1 crashed, 1 out of memory" in capsys.readouterr().out
    assert len(pd.read_csv(out / "runs.csv")) == 3
    assert "out" in (out / "tables.md").read_text()


def test_data_round_trip(store, sketched):
    """CSV gives the frame back; Parquet every metric of every run, also where a setting was text in one run."""
    runs = sweep(store, EFFECTS, seeds=(0, 1))
    fabricate_failed(store, make_config("vit", "smoke", seed=5))
    odd = json.loads((runs[0].folder / "config.json").read_text())
    odd["config"]["beta"] = "auto"
    runs[0].write("config.json", odd)
    table = frame(store.runs())
    out = write_report([], store.root).page.parent

    flat = pd.read_csv(out / "runs.csv", float_precision="round_trip", dtype={"beta": object})
    assert list(flat) == list(table)
    for name in table:
        values, empty = table[name], ("", None)
        assert [None if pd.isna(v) else str(v) for v in flat[name]] == [
            None if v in empty or pd.isna(v) else str(v) for v in values
        ] or (flat[name] - values).abs().max() == 0, name

    long = pd.read_parquet(out / "runs.parquet")
    assert list(long) == ["run_id", *CONFIG, "status", "metric", "value"]
    assert long.value.dtype == "float64"
    assert long.value.notna().all()
    assert long.seed.dtype == "int64"
    assert set(long.beta) == {"auto", "0.25", "1.0"}
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
        assert reference.startswith("data:image/png;base64,") or reference.removeprefix("#") in page.ids, reference
    assert not re.search(r"url\(|@import|https?:", text)
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
    for name in ("report.html", "tables.md", "runs.csv", "runs.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.slow
def test_with_real_charts_equal_runs_give_an_equal_page(store, tmp_path):
    sweep(store, EFFECTS)
    written = [write_report([], store.root, tmp_path / name) for name in "ab"]
    assert written[0].page.read_bytes() == written[1].page.read_bytes()
    assert len(Page(written[0].page.read_text()).references) > len(written[0].charts) > 1
    assert all(chart.path.is_file() for chart in written[0].charts)


CLICKS = """<script>
const [table] = document.getElementsByTagName("table"), log = [];
for (const [column, times] of %s) {
  const heading = [...table.rows[0].cells].find(cell => cell.textContent.startsWith(column));
  for (let i = 0; i < times; i++) heading.firstElementChild.click();
  log.push([heading.getAttribute("aria-sort"), table.querySelectorAll("[aria-sort]").length,
            [...table.tBodies[0].rows].map(row => row.cells[heading.cellIndex].textContent)]);
}
document.body.replaceChildren(JSON.stringify(log));
</script></body>"""


@pytest.mark.slow
def test_a_click_on_a_heading_sorts(store, sketched, tmp_path):
    """Numbers as numbers, the better first, again the other way round, missing last, the reference row not at all."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium to drive")
    for backbone, quality in {"cnn": 0.0, "vit": 0.03, "convnext": 0.01}.items():
        fabricate(store, make_config(backbone, "smoke"), quality, perplexity=float(len(backbone)) ** 3)
    fabricate_failed(store, make_config("mamba", "smoke"))
    page = write_report([], store.root).page
    clicks = [["perplexity", 1], ["perplexity", 1], ["FID vgg16", 1], ["backbone", 1], ["backbone", 1]]
    page.write_text(page.read_text().replace("</body>", CLICKS % json.dumps(clicks)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [chromium, *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    log = json.loads(re.search(r"<body>(\[.*\])\s*</body>", done.stdout, re.S)[1])
    assert {entry[1] for entry in log} == {1}
    assert [entry[0] for entry in log] == ["descending", "ascending", "ascending", "ascending", "descending"]
    assert log[0][2] == ["512", "27", "27", NONE]
    assert log[1][2] == ["27", "27", "512", NONE]
    assert log[2][2] == ["94.0", "98.0", "100.0", NONE]
    assert log[3][2] == ["cnn", "convnext", "mamba", "vit"]
    assert log[4][2] == ["vit", "mamba", "convnext", "cnn"]


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
        f"photos 32×32, {bits} bits per image before coding, 512 samples, temperature 1" for bits in (112, 448)
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


def test_rates_of_nothing_are_drawn_too(store, tmp_path):
    """One code in all costs no bits, which a logarithmic axis has no place for."""
    over = fabricate(store, make_config("cnn", "smoke", codebook_size=2))
    fabricate_prior(store, PriorConfig(over.folder.name, "rnn"), 0.0, 30.0)
    assert write_report((), store.root, tmp_path).charts


def test_the_entropy_coded_rate_joins_the_table(with_priors):
    table = with_rates(frame(with_priors.runs()), prior_frame(with_priors.priors()))
    expected = table.grid_size**2 * (4.0 + 0.2 * (table.backbone == "vit"))
    assert list(table.coded_bits_per_image) == pytest.approx(list(expected))
    assert (table.coded_bits_per_pixel < table.bits_per_pixel).all()
    bare = with_rates(frame(with_priors.runs()), prior_frame([]))
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
    assert "## Generation: photos 32×32, 112 bits per image" in (tmp_path / "tables.md").read_text()
    assert len(pd.read_csv(tmp_path / "priors.csv")) == 17
    assert "Hollow" in next(chart.caption for chart in written.charts if chart.name == "rate_distortion")
