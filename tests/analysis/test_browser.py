"""The page in a browser: it sorts, filters, hides columns and looks closer, asks nobody for anything, and complains of
nothing."""

import pytest

from bench.analysis.report import write_report
from bench.core.store import Store
from bench.tokenizers.config import make_config
from tests.browser import VARIABLE, browse, find
from tests.fabricate import fabricate, fabricate_failed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find() is None, reason=f"no Chromium: {VARIABLE} names none, and none is on PATH"),
]
COLUMN = """(key => {
  const head = document.querySelector(`#runs th[data-key="${key}"]`);
  return [...head.closest("table").tBodies[0].rows].filter(row => !row.hidden)
    .map(row => row.cells[head.cellIndex].firstChild.textContent.trim());
})"""
TYPE = """(text => {
  const field = document.querySelector("#runs input[type=search]");
  field.value = text; field.dispatchEvent(new Event("input"));
  return document.querySelector("#runs output").value;
})"""
CLICK = "(key => document.querySelector(`#runs th[data-key='${key}'] button`).click())"
SORTED = "(key => document.querySelector(`#runs th[data-key='${key}']`).getAttribute('aria-sort'))"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of three backbones with two seeds each, and of a run that failed."""
    store = Store(tmp_path_factory.mktemp("browser"))
    for backbone, quality in {"cnn": 0.0, "vit": 0.03, "convnext": 0.01}.items():
        for seed in (0, 1):
            config = make_config(backbone, "smoke", seed=seed)
            fabricate(store, config, quality, perplexity=float(len(backbone)) ** 3 + seed)
    fabricate_failed(store, make_config("mamba", "smoke"))
    written = write_report([], store.root).page
    with browse(find()) as tab:
        tab.open(written)
        yield tab
        assert tab.errors == []
        assert [address for address in tab.requests if not address.startswith(("file:", "data:"))] == []
        assert [address for address in tab.requests if address.startswith("file:")] == [written.resolve().as_uri()]


def test_a_click_on_a_heading_sorts_the_better_first_and_then_the_other_way_round(page):
    """Numbers as numbers, and missing ones last."""
    page.run(f"{TYPE}('')")
    seen = []
    for key in ("perplexity", "perplexity", "fid_vgg16", "backbone"):
        page.run(f"{CLICK}('{key}')")
        seen.append((page.run(f"{SORTED}('{key}')"), page.run(f"{COLUMN}('{key}')")))
    assert seen[0] == ("descending", ["513", "512", "28", "28", "27", "27", "–"])
    assert seen[1] == ("ascending", ["27", "27", "28", "28", "512", "513", "–"])
    assert seen[2] == ("ascending", ["94.0", "94.0", "98.0", "98.0", "100.0", "100.0", "–"])
    assert seen[3] == ("ascending", ["cnn", "cnn", "convnext", "convnext", "mamba", "vit", "vit"])
    assert page.run("document.querySelectorAll('#runs [aria-sort]').length") == 1


def test_headings_are_reached_and_sorted_by_keyboard(page):
    page.run("document.querySelector(`#runs th[data-key='seed'] button`).focus()")
    page.press("Enter")
    assert page.run(f"{SORTED}('seed')") == "ascending"
    page.press(" ")
    assert page.run(f"{SORTED}('seed')") == "descending"
    page.press("Tab")
    assert page.run("document.activeElement.closest('th').dataset.key") == "status"


def test_a_filter_leaves_rows_with_all_words_and_such_values(page):
    assert page.run(f"{TYPE}('vit')") == "2 of 7 rows"
    assert page.run(f"{COLUMN}('backbone')") == ["vit", "vit"]
    assert page.run(f"{TYPE}('perplexity>27.5 finished')") == "4 of 7 rows"
    assert {*page.run(f"{COLUMN}('backbone')")} == {"cnn", "convnext", "vit"}
    assert page.run(f"{TYPE}('seed=1 perplexity<=28')") == "2 of 7 rows"
    assert page.run(f"{TYPE}('no such run')") == "0 of 7 rows"
    assert page.run(f"{TYPE}('')") == ""
    assert len(page.run(f"{COLUMN}('backbone')")) == 7


def test_columns_are_hidden_and_shown_and_costs_have_room(page):
    shown = "(key => !document.querySelector(`#block-1 th[data-key='${key}']`).hidden)"
    box = """(label => {
      const all = [...document.querySelectorAll("#block-1 .tools label")];
      all.find(each => each.textContent.startsWith(label)).querySelector("input").click();
    })"""
    assert not page.run(f"{shown}('sharpness')")
    page.run(f"{box}('sharpness')")
    assert page.run(f"{shown}('sharpness')")
    page.run(f"{box}('sharpness')")
    costs = ("bits_per_image", "params", "flops", "images_per_second_decode", "train_seconds")
    for key in costs:
        right = page.run(f"document.querySelector('#block-1 th[data-key={key}]').getBoundingClientRect().right")
        assert 0 < right < 1400, key


def test_a_row_leads_to_its_run(page):
    page.run("document.querySelector('#block-1 tbody a').click()")
    assert page.run("document.querySelector(':target').closest('#runs') !== null")


def test_the_viewer_slides_zooms_and_turns_to_other_images_on_all_tiles(page):
    page.run("""(() => {
      const form = document.querySelector("#viewer form");
      form.line.value = 25; form.zoom.value = 4; form.image.value = 2;
      form.dispatchEvent(new Event("input"));
    })()""")
    for kind in ("original", "made"):
        visible = f"[...document.querySelectorAll('.lens')].map(lens => [...lens.querySelectorAll('.{kind}')]"
        assert page.run(f"{visible}.map((each, i) => each.hidden ? -1 : i).filter(i => i >= 0))") == [[2]] * 3
    seen = """[...document.querySelectorAll(".lens")].map(lens => {
      const picture = lens.querySelector(".made:not([hidden])"), style = getComputedStyle(picture);
      const box = picture.getBoundingClientRect(), from = lens.getBoundingClientRect().left;
      const cut = parseFloat(style.clipPath.split(" ").pop()) / 100;
      return [box.width / lens.clientWidth, (box.left + box.width * cut - from) / lens.clientWidth];
    })"""
    for zoom, cut in page.run(seen):
        assert zoom == pytest.approx(4, rel=0.02)
        assert cut == pytest.approx(0.25, abs=0.02)  # the line is where it was, whatever the zoom


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_but_tables_and_charts_is_wider_than_the_window(page, width, dark):
    page.scheme(dark)
    page.resize(width, 900)
    assert page.run("document.documentElement.scrollWidth") <= width
    paper = page.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark
    ink = "getComputedStyle(document.querySelector('.chart svg text')).fill"
    assert page.run(ink) != "rgb(38, 38, 38)" or not dark
    page.resize(1400, 900)
    page.scheme(False)
