"""Charts in a page: each point has its own words, and the page its own colours."""

import io
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from bench.analysis import looks, vectors
from bench.analysis.charts import STYLE, draw
from bench.analysis.frames import frame
from bench.core.store import Store
from tests.fabricate import sweep

TITLE = f"{{{vectors.SVG}}}title"


def written(figure) -> str:
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg")
    return vectors.with_words(file.getvalue())


def told(svg: str) -> list[tuple[str, str]]:
    """Tag and words of everything that has words."""
    return [
        (element.tag.rpartition("}")[2], title.text)
        for element in ElementTree.fromstring(svg).iter()
        for title in element.findall(TITLE)
    ]


@pytest.mark.parametrize("count", [2, 40])  # as paths of their own, and as uses of one
def test_every_point_has_its_own_words(count):
    axes = (figure := looks.new_figure(2)).subplots()
    names = [f'run {i} <&"' for i in range(count)]
    places = np.arange(count)
    vectors.tell(axes.scatter(places, places[::-1]), names)
    found = told(written(figure))
    assert [words for _, words in found] == names
    places = [
        float(each.get("x"))
        for each in ElementTree.fromstring(written(figure)).iter()
        if each.find(TITLE) is not None and each.get("x")
    ]
    assert places == sorted(places)
    line = (figure := looks.new_figure(2)).subplots().plot([1, 2, 3], [1, 2, 3], marker="o")[0]
    vectors.tell(line, ["a", "b", "c"])
    assert told(written(figure)) == [("use", "a"), ("use", "b"), ("use", "c")]


def test_one_word_is_of_the_whole_line_and_those_of_points_that_are_no_more_are_left_out():
    axes = (figure := looks.new_figure(2)).subplots()
    vectors.tell(axes.plot([1, 2], [1, 2])[0], ["a run"])
    vectors.tell(axes.scatter(range(300), range(300), rasterized=True), [str(i) for i in range(300)])
    assert told(written(figure)) == [("g", "a run")]
    assert vectors.TOLD not in written(figure)


def test_a_chart_in_a_page_has_the_colours_of_the_page():
    axes = (figure := looks.new_figure(2)).subplots()
    axes.plot([1, 2], [1, 2], color="#808080", marker="o")
    axes.text(1, 1, "words", color="black")
    axes.plot([2, 1], [1, 2], color=looks.LOOKS["vit"][0])
    svg = vectors.embedded(written(figure))
    assert "color-mix(in srgb, var(--paper) 50%, var(--ink))" in svg
    assert "fill: color-mix(in srgb, var(--paper) 100%, var(--ink))" in svg  # what was white
    assert looks.LOOKS["vit"][0] in svg
    assert "xmlns" not in svg
    assert not vectors.GREY.search(svg)
    ids = [part.partition('"')[0] for part in svg.split(' id="')[1:]]
    assert ids
    assert all(f"#{name}" in svg for name in ids)


def test_runs_of_a_chart_are_named_with_their_seed_and_score(tmp_path):
    runs = sweep(Store(tmp_path), {"cnn": 0.0, "vit": 0.1}, seeds=(0, 1))
    table = frame(Store(tmp_path).runs())
    charts = {chart.name: chart for chart in draw(table, tmp_path / "plots")}
    svg = charts["sweep_beta"].path.with_suffix(".svg").read_text()
    row = table.set_index("run_id").loc[runs[-1].folder.name]
    assert ("use", f"{runs[-1].folder.name}, seed 1: PSNR dB {row.psnr:.2f}") in told(svg)
    assert sum("seed" in words for _, words in told(svg)) == 4 * len(runs)
    assert charts["sweep_beta"].drawn
    assert not charts["reconstructions"].drawn
