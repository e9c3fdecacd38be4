"""Charts: each shows the slice that its caption names, and nothing in the table can make them fail."""

import itertools
import json
import math
import shutil
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from backbones import BACKBONES
from bench.analysis import charts, fronts, galleries, labels, looks, slices
from bench.analysis.charts import draw
from bench.analysis.frames import METRICS, PRIOR, frame, main_metric
from bench.analysis.fronts import pareto
from bench.analysis.slices import Scope, controlled
from bench.core.store import Store
from bench.instruments import INSTRUMENTS
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate, fabricate_failed, sweep

# A warning of matplotlib, NumPy or pandas is a failure.
pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("error::RuntimeWarning")]

PRIOR_EXTRA = ("gfid_vgg16_real", "gkid_vgg16_real", "protocol_count", "protocol_scored_on")
FIVE = ("cnn", "convnext", "vit", "mamba", "bimamba")


def words(path) -> str:
    """All text of an SVG."""
    return "\n".join(element.text or "" for element in ElementTree.parse(path).iter() if element.tag.endswith("text"))


def scope(table: pd.DataFrame, *fields: str) -> Scope:
    finished = table.status == "finished"
    return Scope(table[finished], table[~finished], list(fields), "", "", "")


def lines(axes) -> dict[str, np.ndarray]:
    """Colour → heights of the joined means on an axes."""
    return {line.get_color(): line.get_ydata() for line in axes.get_lines() if line.get_marker() not in ("_", "None")}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Two backbones × 2 β × 2 K × 2 seeds, one more seed at the default β and the smaller K, and one diverged run."""
    store = Store(tmp_path_factory.mktemp("charts"))
    noise = np.random.default_rng(0).normal(scale=0.01, size=100)
    settings = [(beta, k, seed) for beta in (0.25, 1.0) for k in (64, 128) for seed in (0, 1)] + [(0.25, 64, 2)]
    for i, (beta, k, seed) in enumerate(settings):
        for backbone, quality in (("cnn", 0.02), ("vit", 0.0)):
            config = make_config(backbone, "smoke", beta=beta, codebook_size=k, seed=seed)
            fabricate(store, config, quality + k / 2000, noise[i])
    failed = fabricate_failed(store, make_config("vit", "smoke", codebook_size=128, seed=7))
    rows = [{"step": s, "reconstruction": 1 / s if s < 4 else math.inf, "perplexity": 3.0} for s in (1, 2, 3, 4)]
    (failed.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return store


@pytest.fixture(scope="module")
def drawn(store, tmp_path_factory):
    """The charts of ``store`` by name."""
    shares = pd.DataFrame({"backbone": ["cnn", "cnn", "vit"], "parameter": ["beta", "seed", "beta"]})
    with warnings.catch_warnings():  # the mark above does not reach fixtures of a module
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        made = draw(frame(store.runs()), tmp_path_factory.mktemp("drawn"), shares.assign(importance=[0.7, 0.3, 1.0]))
    return {chart.name: chart for chart in made}


def test_a_study_gives_these_charts_in_reading_order(drawn):
    assert list(drawn) == [
        "sweep_codebook_size",
        "sweep_beta_96bits",
        "sweep_beta_112bits",
        "heatmap_backbone_codebook_size",
        "heatmap_backbone_beta_96bits",
        "heatmap_backbone_beta_112bits",
        "rate_distortion",
        "cost_96bits",
        "cost_112bits",
        "learning_curves",
        "codebook_loss",
        "untrained",
        "reconstructions",
        "reconstructions_codebook_size",
        "importance",
    ]


def test_every_chart_is_a_png_and_an_svg_whose_text_is_text(drawn):
    folder = next(iter(drawn.values())).path.parent
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    for name, chart in drawn.items():
        assert chart.path == folder / f"{name}.png"
        with Image.open(chart.path) as picture:
            picture.load()
            assert picture.width == round(looks.WIDTH * looks.DPI)
        text = words(folder / f"{name}.svg")
        assert chart.title not in text  # it stands in the PNG, and above where the SVG is shown
        assert 0 < chart.head < 0.3 * looks.DPI
        assert "mathdefault" not in text
        assert chart.caption.endswith(".")


def test_captions_name_the_slice_and_what_is_left_out(drawn):
    assert "10 of 18 scored runs, 2 to 3 seeds a point, at β = 0.25." in drawn["sweep_codebook_size"].caption
    assert "1 failed or unfinished run is left out." in drawn["sweep_codebook_size"].caption
    assert "bits of an image differ" in drawn["sweep_codebook_size"].caption
    assert "10 of 10 scored runs, 2 to 3 seeds a point." in drawn["sweep_beta_96bits"].caption
    assert "8 of 8 scored runs, 2 seeds a point. 1 failed" in drawn["sweep_beta_112bits"].caption
    assert "failed" not in drawn["sweep_beta_96bits"].caption
    assert "at β = 0.25" in drawn["rate_distortion"].caption
    assert "at K = 64, β = 0.25" in drawn["reconstructions"].caption
    assert "bits of an image differ" in drawn["reconstructions_codebook_size"].caption
    assert all("photos, 64 test images of 32×32." in c.caption for n, c in drawn.items() if n != "importance")
    assert drawn["cost_96bits"].title == "LPIPS vgg against cost, 96 bits per image"


def test_a_diverged_run_is_dashed_to_where_it_stopped(drawn, store):
    assert "stopped" in words(drawn["learning_curves"].path.with_suffix(".svg"))
    (drawing,) = galleries.learning_curves(scope(frame(store.runs())))
    dashed = [line for axes in drawing.figure.axes for line in axes.get_lines() if line.get_linestyle() == "--"]
    crosses = [line for axes in drawing.figure.axes for line in axes.get_lines() if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in dashed] == [[1, 2, 3], [1, 2, 3, 4]]  # loss, while finite; perplexity
    assert [line.get_xdata()[0] for line in crosses] == [3, 4]
    assert drawing.caption.startswith("Thin: 11 of 19 runs")


def test_lines_are_the_means_of_the_slice(store):
    table = frame(store.runs())
    (drawing,) = charts.sweeps(scope(table, "codebook_size"))
    rows = table[(table.status == "finished") & (table.beta == 0.25)]
    for axes, metric in zip(drawing.figure.axes, ("lpips_vgg", "fid_vgg16", "psnr", "perplexity"), strict=True):
        assert METRICS[metric].label in axes.get_ylabel()
        means = rows.groupby(["backbone", "codebook_size"])[metric].mean()
        for backbone in ("cnn", "vit"):
            np.testing.assert_allclose(lines(axes)[looks.LOOKS[backbone][0]], means[backbone])
    reference = next(line for line in drawing.figure.axes[0].get_lines() if line.get_marker() == "_")
    np.testing.assert_allclose(reference.get_ydata(), rows.groupby("codebook_size").lpips_vgg_kmeans.mean())


def test_heat_maps_and_rate_distortion_show_means(store):
    table = frame(store.runs())
    rows = table[(table.status == "finished") & (table.beta == 0.25)]
    means = rows.groupby(["backbone", "codebook_size"]).lpips_vgg.mean()
    (drawing,) = charts.heatmaps(scope(table, "codebook_size"))
    np.testing.assert_allclose(drawing.figure.axes[0].collections[0].get_array().ravel(), means)
    (drawing,) = charts.rate_distortion(scope(table, "codebook_size"))
    np.testing.assert_allclose(lines(drawing.figure.axes[0])[looks.LOOKS["vit"][0]], means["vit"])
    np.testing.assert_allclose(drawing.figure.axes[0].get_xticks(), [96 / 1024, 112 / 1024])


@pytest.mark.parametrize("values", [(64, 128), (64,)])
def test_kmeans_looks_in_the_legend_as_among_the_points(values):
    """A line of marks, or of a single rate, which joins nothing, a mark."""
    scores = {"psnr": 20.0, "psnr_kmeans": 21.0, "psnr_webp": 22.0, "bits_per_pixel_webp": 0.1}
    rows = [{"codebook_size": value, "bits_per_pixel": value / 1024, **scores} for value in values]
    (drawing,) = charts.rate_distortion(scope(made(*rows)))
    (shown,) = (line for line in drawing.figure.axes[0].get_lines() if line.get_marker() == "_")
    (entry,) = (one for one in drawing.figure.legends[0].legend_handles if one.get_label() == "k-means on patches")
    looks_of = [(line.get_marker(), line.get_linestyle(), line.get_color()) for line in (shown, entry)]
    assert looks_of[0] == looks_of[1]
    assert (shown.get_linestyle() == "None") is (len(values) == 1)


def test_learning_curves_of_few_steps_have_whole_ones(store):
    _, grid = galleries._curve_axes(["reconstruction"], [""])
    (axes,) = grid.values()
    axes.set_xlim(1, 3)
    assert all(tick == round(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize(("metric", "best"), [("lpips_vgg", 0.2), ("psnr", 22.0)])
def test_the_best_place_of_a_heat_map_is_the_yellow_one(metric, best):
    """Where less is better the least, where more is better the most."""
    values = {"lpips_vgg": (0.2, 0.3, 0.4, 0.5), "psnr": (19.0, 20.0, 21.0, 22.0)}[metric]
    cells = itertools.product(("cnn", "vit"), (0.25, 1.0))
    rows = [
        {"backbone": name, "beta": beta, "seed": 0, "status": "finished", "lpips_weight": 0.0, metric: value}
        for (name, beta), value in zip(cells, values, strict=True)
    ]
    (drawing,) = charts.heatmaps(scope(pd.DataFrame(rows, columns=frame([]).columns), "beta"))
    mesh = drawing.figure.axes[0].collections[0]
    mesh.update_scalarmappable()
    red, _, blue = np.array([colour[:3] for colour in mesh.get_facecolors()]).T
    assert mesh.get_array().ravel()[np.argmax(red - blue)] == best


def test_the_bold_curve_is_the_mean_of_the_finished_seeds(tmp_path):
    """Thin: one per run; the run that failed is in no mean."""
    store = Store(tmp_path)
    losses = {0: (1.0, 0.5), 1: (3.0, 0.25), 2: (9.0, 9.0)}
    for seed, loss in losses.items():
        config = make_config("cnn", "smoke", seed=seed)
        run = fabricate(store, config) if seed < 2 else fabricate_failed(store, config)
        rows = [{"step": s, "reconstruction": v, "perplexity": 3.0} for s, v in zip((10, 20), loss, strict=True)]
        (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (drawing,) = galleries.learning_curves(scope(frame(store.runs())))
    drawn = [line for line in drawing.figure.axes[0].get_lines() if len(line.get_xdata()) == 2]
    bold = max(drawn, key=lambda line: line.get_linewidth())
    assert list(bold.get_ydata()) == [2.0, 0.375]
    assert list(bold.get_xdata()) == [10, 20]
    thin = sorted(tuple(line.get_ydata()) for line in drawn if line is not bold)
    assert thin == sorted(losses.values())


def test_a_bar_of_importance_is_its_share_and_the_largest_is_on_top():
    shares = pd.DataFrame(
        [("cnn", "beta", 0.2), ("cnn", "lr", 0.8), ("vit", "beta", 0.3), ("vit", "lr", 0.7)],
        columns=["backbone", "parameter", "importance"],
    )
    axes = charts.importance(shares).figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["learning rate", "β"]
    assert axes.yaxis_inverted()
    widths = {(round(bar.get_y() + bar.get_height() / 2), bar.get_facecolor()): bar.get_width() for bar in axes.patches}
    assert sorted(width for (place, _), width in widths.items() if place == 0) == [0.7, 0.8]
    assert sorted(width for (place, _), width in widths.items() if place == 1) == [0.2, 0.3]


def test_a_gallery_shows_each_runs_own_reconstructions_of_its_lowest_seed(tmp_path):
    store = Store(tmp_path)
    for number, (name, seed) in enumerate(itertools.product(("cnn", "vit"), (1, 0))):
        run = fabricate(store, make_config(name, "smoke", seed=seed))
        x = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        np.savez(run.folder / "samples.npz", x=x, x_hat=x + 50 * number + 50)
    (drawing,) = galleries.reconstructions(scope(frame(store.runs())))
    picture = np.asarray(drawing.figure.axes[0].images[0].get_array())
    third = len(picture) // 3
    assert [int(picture[third * row + third // 2, 4, 0]) for row in range(3)] == [0, 100, 200]
    labels = [label.get_text().split("\n")[0] for label in drawing.figure.axes[0].get_yticklabels()]
    assert labels == ["original", "cnn", "vit"]
    heights = drawing.figure.axes[0].get_yticks()
    assert [int(picture[int(height), 4, 0]) for height in heights] == [0, 100, 200]  # each label beside its row


def test_generation_is_drawn_at_each_priors_mean_rate_and_distance():
    rows = [
        {"backbone": "cnn", "prior": prior, "grid_size": grid, "codebook_size": 64, "seed": seed, "samples": 512}
        | {"coded_bits_per_pixel": rate + 0.01 * seed, "gfid_vgg16": distance + seed, "gfid_vgg16_real": 40.0 + grid}
        | {"gkid_vgg16_real": 0.1, "temperature": 1.0, "protocol_count": 64, "data": "photos", "image_size": 32}
        | {"protocol_scored_on": "test"}
        for prior, grid, rate, distance in (("rnn", 4, 0.1, 80.0), ("rnn", 8, 0.4, 60.0), ("mamba", 4, 0.2, 70.0))
        for seed in (0, 1)
    ]
    (drawing,) = charts.generation(pd.DataFrame(rows, columns=[*frame([], PRIOR).columns, *PRIOR_EXTRA]), 6)
    (axes,) = drawing.figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("bits per pixel under the prior ↓", "gFID vgg16 ↓")
    shown = {line.get_marker(): line.get_xydata().round(6).tolist() for line in axes.get_lines()}
    assert shown[looks.PRIOR_MARKERS["rnn"]] == [[0.105, 80.5], [0.405, 60.5]]
    assert shown[looks.PRIOR_MARKERS["mamba"]] == [[0.205, 70.5]]
    assert {y for _, y in shown["None"]} == {44.0}  # real codes, at the grid where they are best


def test_equal_tables_give_equal_bytes(store, tmp_path):
    table = frame(run for run in store.runs() if run.config()["codebook_size"] == 64)
    for folder in ("a", "b"):
        draw(table, tmp_path / folder)
    names = [path.name for path in (tmp_path / "a").iterdir()]
    assert len(names) == 16
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_other_settings_stand_at_their_most_common_combination(store):
    table = frame(store.runs())
    rows, fixed = controlled(table[table.status == "finished"], ["beta"])
    assert fixed == {"codebook_size": 64}
    assert len(rows) == 10
    assert set(rows.codebook_size) == {64}
    rows, fixed = controlled(table[table.status == "finished"], [])
    assert fixed == {"codebook_size": 64, "beta": 0.25}
    assert set(rows.seed) == {0, 1, 2}


@pytest.mark.parametrize("betas", [(0.25, 1.0, 4.0), (4.0, 1.0, 0.25), (0.1, 0.25, 4.0)])
def test_equally_common_settings_are_decided_by_the_default(betas):
    rows = [{"backbone": "cnn", "seed": 0, "beta": beta, "lr": lr} for beta in betas for lr in (1e-3, 4e-3)]
    table = pd.DataFrame(rows, columns=frame([]).columns)
    rows, fixed = controlled(table, ["lr"])
    assert fixed == {"beta": 0.25}
    assert set(rows.lr) == {1e-3, 4e-3}
    _, fixed = controlled(pd.concat([table, table[table.beta == 4.0]], ignore_index=True), ["lr"])
    assert fixed == {"beta": 4.0}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_pareto_front_is_what_no_point_dominates(points):
    points = np.array(points, dtype=float)
    beaten = [any((other <= own).all() and (other < own).any() for other in points) for own in points]
    assert list(~pareto(pd.Series(points[:, 0]), pd.Series(points[:, 1]))) == beaten


def test_the_ringed_points_of_a_faster_decoder_are_the_fast_and_good(tmp_path):
    store = Store(tmp_path)
    for name, quality, speed in (("cnn", 0.0, 300.0), ("vit", 0.1, 200.0), ("mamba", 0.05, 100.0)):
        fabricate(store, make_config(name, "smoke"), quality, images_per_second_decode=speed, params_encoder=1)
    (drawing,) = charts.cost(scope(frame(store.runs())))
    axes = next(axes for axes in drawing.figure.axes if axes.get_xlabel() == "decode images/s ↑")
    ringed = axes.collections[-1].get_offsets()
    assert list(ringed[:, 0]) == [300, 200]


@pytest.mark.parametrize(("cost", "metric"), [("params", "psnr"), ("images_per_second_decode", "lpips_vgg")])
def test_labels_beside_rings_touch_neither_points_nor_each_other(tmp_path, cost, metric):
    """Whichever direction of cost and score is better; not where several settings or none were swept."""
    values = [(1.0, 20.0), (2.0, 25.0), (2.5, 22.0), (3.0, 24.0), (4.0, 30.0), (5.0, 21.0)]
    signs = [1 if METRICS[name].better == better else -1 for name, better in ((cost, "lower"), (metric, "higher"))]
    rows = [
        {"beta": 1.0 + i, cost: 6e6 + signs[0] * x * 1e6, metric: 40 + signs[1] * y} for i, (x, y) in enumerate(values)
    ]
    missing = dict.fromkeys(("params", "flops", "train_seconds", "images_per_second_decode"))
    (drawing,) = charts.cost(scope(made(*(missing | row for row in rows))))
    charts._saved(drawing, tmp_path)
    drawing.figure.set_dpi(looks.DPI)
    (axes,) = drawing.figure.axes
    assert [label.get_text() for label in axes.texts] == ["1", "2", "5"]
    boxes = [label.get_window_extent() for label in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = axes.transData.transform([(row[cost], row[metric]) for row in rows])
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
    for box, (x, y) in zip(boxes, points[[0, 1, 4]], strict=True):  # on the cheaper and better side
        assert (box.x1 < x) == (METRICS[cost].better == "lower")
        assert (box.y0 > y) == (METRICS[metric].better == "higher")
    assert "Beside the rings: β. " in drawing.caption
    several = [missing | row | {"lr": 0.1 + i} for i, row in enumerate(rows)]
    backbones = [missing | row | {"beta": 1.0, "backbone": who} for row, who in zip(rows, FIVE, strict=False)]
    for others in (several, backbones):
        (drawing,) = charts.cost(scope(made(*others)))
        assert not drawing.figure.axes[0].texts
        assert "Beside" not in drawing.caption


def test_not_all_rings_of_a_long_front_have_words(monkeypatch):
    """They would lie on one another."""
    monkeypatch.setattr(fronts, "NAMED", 3)
    costs = dict.fromkeys(("flops", "train_seconds", "images_per_second_decode"))
    rows = [costs | {"beta": 1.0 + i, "params": 1e6 * (1 + i), "psnr": 20.0 + i} for i in range(6)]
    (drawing,) = charts.cost(scope(made(*rows)))
    (axes,) = drawing.figure.axes
    assert [label.get_text() for label in axes.texts] == ["1", "2", "3"]
    assert "Beside the 3 cheapest rings: β. " in drawing.caption
    assert len(axes.collections[-1].get_offsets()) == 6


def test_a_backbone_looks_the_same_in_every_company(tmp_path):
    known = [tuple(looks.look_of(name).values()) for name in BACKBONES]
    assert len({colour for colour, _ in known}) == len({marker for _, marker in known}) == len(BACKBONES)
    alone, together = Store(tmp_path / "1"), Store(tmp_path / "2")
    sweep(alone, {"vit": 0.0}, seeds=(0, 1))
    sweep(together, {"cnn": 0.0, "vit": 0.0}, seeds=(0, 1))
    colours = []
    for store in (alone, together):
        (drawing,) = charts.sweeps(scope(frame(store.runs()), "beta"))
        colours.append(set(lines(drawing.figure.axes[0])))
    assert colours == [{looks.LOOKS["vit"][0]}, {looks.LOOKS["cnn"][0], looks.LOOKS["vit"][0]}]


def test_without_scores_nothing_is_drawn(tmp_path):
    assert draw(frame([]), tmp_path / "none") == []
    store = Store(tmp_path)
    failed = [fabricate_failed(store, make_config("cnn", "smoke", beta=beta)) for beta in (0.25, 1.0)]
    assert draw(frame(failed), tmp_path / "none") == []
    assert main_metric(frame(failed)) == "psnr"
    assert not (tmp_path / "none").exists()


def test_one_run_gives_its_curves_and_its_pictures(tmp_path):
    run = fabricate(Store(tmp_path), make_config("cnn", "smoke"))
    names = ["learning_curves", "untrained", "reconstructions"]
    assert [chart.name for chart in draw(frame([run]), tmp_path / "c")] == names


def test_ranks_by_an_lpips_that_no_run_was_trained_on(tmp_path):
    def main(lpips_scored="lpips_alex lpips_vgg", **settings):
        row = {"status": "finished", "lpips_weight": 0.05, "lpips_net": "alex", "psnr": 20.0, **settings}
        row |= dict.fromkeys(lpips_scored.split(), 0.3)
        return main_metric(pd.DataFrame([row], columns=frame([]).columns))

    assert main() == "lpips_vgg"
    assert main(lpips_weight=0.0) == "lpips_alex"
    assert main(lpips_net="vgg") == "lpips_alex"
    assert main("lpips_alex") == "lpips_alex"
    assert main("") == "psnr"


def test_protocols_do_not_share_a_chart_and_small_ones_are_counted(tmp_path):
    store = Store(tmp_path)
    for i, data in enumerate(("photos", "cifar10", "stl10", "celeba")):
        for seed in range(4 - i):
            config = make_config("cnn", "smoke", data=data, seed=seed)
            fabricate(store, config, data=data, fingerprint=f"{i}" * 64)
    made = draw(frame(store.runs()), tmp_path / "charts")
    assert [chart.name for chart in made if chart.name.startswith("learning_curves")] == [
        f"learning_curves_protocol{i}" for i in (1, 2, 3)
    ]
    assert [chart.title for chart in made[:2]] == ["Learning curves, data photos", "Learning curves, data cifar10"]
    assert "Thin: 4 of 4 runs" in made[0].caption
    assert all("1 smaller groups with another protocol are not drawn." in chart.caption for chart in made)


def test_many_blocks_are_cut_to_the_largest(tmp_path, monkeypatch):
    store = Store(tmp_path)
    for k in (8, 16, 32, 64):
        for backbone in ("cnn", "vit"):
            for seed in range(1 if k == 16 else 2):
                fabricate(store, make_config(backbone, "smoke", codebook_size=k, seed=seed))
    monkeypatch.setattr(slices, "BLOCKS", 3)
    monkeypatch.setattr(charts, "CHARTS", [(charts.cost, "block")])
    made = draw(frame(store.runs()), tmp_path / "charts")
    assert [chart.name for chart in made] == [f"cost_{bits}bits" for bits in (48, 80, 96)]
    assert all("1 smaller blocks of other bits per image are not drawn." in chart.caption for chart in made)
    assert all("photos, 64 test images of 32×32. 1 smaller" in chart.caption for chart in made)


def test_times_of_two_machines_are_left_out(tmp_path):
    store = Store(tmp_path)
    runs = [fabricate(store, make_config(name, "smoke")) for name in ("cnn", "vit")]
    (drawing,) = charts.cost(scope(frame(runs)))
    assert [axes.get_xlabel() for axes in drawing.figure.axes] == [
        "parameters ↓",
        "FLOPs ↓",
        "train s ↓",
        "decode images/s ↑",
    ]
    runs[0].write("config.json", {"config": runs[0].config(), "environment": {"processor": "y", "threads": 2}})
    (drawing,) = charts.cost(scope(frame(runs)))
    assert [axes.get_xlabel() for axes in drawing.figure.axes] == ["parameters ↓", "FLOPs ↓"]
    assert "Times are left out" in drawing.caption


def test_a_random_search_shows_points_and_each_backbones_best_run(tmp_path):
    generator = np.random.default_rng(0)
    store = Store(tmp_path)
    for backbone in ("cnn", "vit"):
        for quality in (0.0, 0.1, 0.05):
            beta, lr = np.exp(generator.uniform(-3, 0, 2))
            fabricate(store, make_config(backbone, "smoke", beta=float(beta), lr=float(lr)), quality)
    table = frame(store.runs())
    for drawing, other in zip(charts.sweeps(scope(table, "beta", "lr")), ("learning rate", "β"), strict=True):
        assert drawing.caption == (f"All 6 scored runs, whatever their {other}: this one's own effect does not show.")
        assert not drawing.figure.axes[0].get_lines()
    (drawing,) = galleries.reconstructions(scope(table))
    assert "each backbone's best by LPIPS vgg (β and learning rate differ)" in drawing.caption
    labels = [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()]
    best = table.groupby("backbone").lpips_vgg.min()
    assert labels[0] == "original"
    assert [label.split("\n")[:2] for label in labels[1:]] == [[n, f"LPIPS vgg {s:.3f}"] for n, s in best.items()]


def test_only_the_same_images_are_shown_side_by_side(tmp_path):
    store = Store(tmp_path)
    runs = [fabricate(store, make_config(name, "smoke")) for name in ("cnn", "mamba", "vit")]
    with np.load(runs[1].folder / "samples.npz") as arrays:
        np.savez(runs[1].folder / "samples.npz", x=255 - arrays["x"], x_hat=arrays["x_hat"])
    (drawing,) = galleries.reconstructions(scope(frame(runs)))
    labels = [label.get_text().split("\n")[0] for label in drawing.figure.axes[0].get_yticklabels()]
    assert labels == ["original", "cnn", "vit"]
    assert "1 of 3 runs kept other images and are left out." in drawing.caption
    (runs[0].folder / "samples.npz").unlink()
    (runs[1].folder / "samples.npz").write_bytes(b"PK torn")
    (drawing,) = galleries.reconstructions(scope(frame(runs)))
    assert len(drawing.figure.axes[0].get_yticklabels()) == 2


def test_few_learning_curves_are_read_of_many_runs(tmp_path, monkeypatch):
    store = Store(tmp_path)
    sweep(store, {"cnn": 0.0, "vit": 0.0}, betas=(0.25, 1.0, 2.0), seeds=range(3))
    read = []
    history = galleries._history
    monkeypatch.setattr(galleries, "_history", lambda folder: read.append(folder) or history(folder))
    monkeypatch.setattr(galleries, "CURVES", 12)
    (drawing,) = galleries.learning_curves(scope(frame(store.runs())))
    assert len(read) == len(set(read)) == 12
    assert "12 of 18 runs, at most 2 seeds of a setting" in drawing.caption


def test_gaps_in_the_table_are_left_out(tmp_path):
    store = Store(tmp_path)
    sweep(store, {"cnn": 0.0, "vit": 0.0}, seeds=(0, 1))
    fabricate(store, replace(make_config("cnn", "smoke"), quantizer="l2"))
    table = frame(store.runs())
    (store.runs()[0].folder / "history.jsonl").write_text('{"step": 1, "rec')
    (store.runs()[1].folder / "history.jsonl").write_text("")
    shutil.rmtree(store.runs()[2].folder)
    gappy = table.assign(
        backbone=table.backbone.replace("vit", "gone $x^$"),  # a backbone that was since renamed
        perplexity=np.nan,
        params=np.nan,
        train_seconds=table.train_seconds.where(table.index > 3),
        psnr=table.psnr.where(table.index != 1),
        lpips_vgg=table.lpips_vgg.where(table.index != 3),
        processor=None,
        beta=table.beta.where(table.index != 4),
    )
    gappy = pd.concat([gappy, gappy.tail(2)])  # the same labels twice
    names = [chart.name for chart in draw(gappy, tmp_path / "charts")]
    assert {"sweep_beta", "cost", "learning_curves", "reconstructions"} <= set(names)
    assert draw(gappy.assign(lpips_vgg=np.nan, lpips_alex=np.nan, psnr=np.nan), tmp_path / "none") == []


# -- parts, on tables without folders ---------------------------------------------------------------------------------


def made(*rows: dict) -> pd.DataFrame:
    """A frame of finished runs without folders; what a row does not say is the same in all."""
    usual = {"status": "finished", "backbone": "cnn", "seed": 0, "folder": "nowhere", "processor": "x", "threads": 2}
    usual |= {"data": "photos", "image_size": 32, "grid_size": 4, "codebook_size": 64, "lpips_weight": 0.0}
    usual |= {"beta": 0.25, "protocol_data": "photos", "protocol_count": 64, "psnr": 20.0}
    usual |= {"protocol_scored_on": "test"}
    columns = dict.fromkeys([*frame([]).columns, *usual, *(name for row in rows for name in row)])
    table = pd.DataFrame([usual | row for row in rows], columns=list(columns))
    table["bits_per_image"] = table.grid_size**2 * np.log2(table.codebook_size)
    table["bits_per_pixel"] = table.bits_per_image / table.image_size**2
    return table.astype({name: float for name in table if name in METRICS or name.endswith("_kmeans")})


def made_priors(*rows: dict) -> pd.DataFrame:
    """A frame of finished priors; what a row does not say is the same in all."""
    usual = {"status": "finished", "backbone": "cnn", "prior": "rnn", "seed": 0, "grid_size": 4, "codebook_size": 64}
    usual |= {"coded_bits_per_token": 4.0, "coded_bits_per_pixel": 0.1, "gfid_vgg16": 80.0, "gfid_vgg16_real": 40.0}
    usual |= {"gkid_vgg16_real": 0.1, "samples": 512, "temperature": 1.0, "protocol_count": 64, "data": "photos"}
    usual |= {"image_size": 32, "folder": "nowhere", "protocol_data": "photos", "protocol_scored_on": "test"}
    columns = dict.fromkeys([*frame([], PRIOR).columns, *usual, *(name for row in rows for name in row)])
    return pd.DataFrame([usual | row for row in rows], columns=list(columns))


def entries(figure) -> dict[str, tuple]:
    """What the legend of ``figure`` says: label → colour and marker."""
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    looks = [(line.get_color(), line.get_marker()) for line in legend.get_lines()]
    return dict(zip(labels, looks, strict=True))


def axis_of(values: list, name: str):
    axes = looks.new_figure(2).subplots()
    looks.scale_x(axes, pd.Series(values), name)
    return axes


def ticks(axes) -> dict[float, str]:
    return dict(zip(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()], strict=True))


@pytest.mark.parametrize(
    ("name", "values", "base", "label"),
    [
        ("beta", [1.0, 0.25, 0.5, 0.25], None, "β"),  # a ratio of 4
        ("beta", [0.0, 2.0, 4.0], None, "β"),  # zero has no logarithm
        ("lr", [1e-2, 1e-4, 1e-3], 10, "learning rate"),
        ("depth", [1, 10], 10, "depth"),
        ("codebook_size", [128, 64], 2, "K"),
        ("bits_per_pixel", [0.5, 0.25], 2, "bits per pixel ↓"),
    ],
)
def test_an_axis_of_numbers_has_ticks_at_the_values(name, values, base, label):
    """Logarithmic to base 2 where bits stand on it, to base 10 from a ratio of 10 on, else plain."""
    axes = axis_of(values, name)
    assert axes.get_xscale() == ("log" if base else "linear")
    assert base is None or axes.xaxis.get_transform().base == base
    assert ticks(axes) == {value: f"{value:.3g}" for value in sorted(set(values))}
    assert axes.get_xlabel() == label
    assert len(axes.xaxis.get_minorticklocs()) == 0


def test_an_axis_of_words_has_a_tick_for_each_and_room_at_both_ends():
    axes = axis_of(["l2", "ema", "l2"], "quantizer")
    assert ticks(axes) == {0: "ema", 1: "l2"}
    assert axes.get_xlim() == (-0.5, 1.5)
    assert ticks(axis_of([True, False], "kmeans_init")) == {0: "False", 1: "True"}
    assert len(ticks(axis_of([f"w{i:02}" for i in range(20)], "quantizer"))) == 20


def test_numbers_that_stand_close_have_round_ticks_and_words_slanted_labels():
    """Where labels at the values would touch; the more so the longer they are."""

    def slant(values: list) -> set[float]:
        return {label.get_rotation() for label in axis_of(values, "quantizer").get_xticklabels()}

    assert slant(["ema", "l2"]) == {0}
    assert slant([f"a long name {i}" for i in range(4)]) == {45}
    assert set(ticks(axis_of([1.0, 1.1, 2.0], "beta"))) == {1.0, 1.1, 2.0}
    for close in ([1.0, 1.05, 1.5, 2.0], [1.01, 1.11, 2.01], [1.013 * (i + 1) for i in range(20)]):
        axes = axis_of(close, "beta")
        axes.plot(close, close)
        assert close[1] not in axes.get_xticks()
        axes.figure.draw_without_rendering()
        inside = [label.get_text() for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if at]
        assert len(inside) >= 3
        assert all(len(text) <= 4 for text in inside)
    axes = axis_of([1e-4, 1.1e-4, 1e-2], "lr")
    axes.plot([1e-4, 1e-2], [0, 1])
    axes.figure.draw_without_rendering()
    assert {"0.0001", "0.0003", "0.001", "0.01"} <= {label.get_text() for label in axes.get_xticklabels()}
    assert axis_of([0.125, 0.13, 0.625], "bits_per_pixel").get_xscale() == "log"


def test_a_logarithmic_axis_has_plain_numbers_at_ones_twos_and_fives():
    axes = looks.new_figure(2).subplots()
    axes.set_yscale("log")
    axes.set_ylim(0.1, 10)
    looks.plain_log(axes.yaxis)
    axes.figure.draw_without_rendering()
    shown = [text.get_text() for text in axes.get_yticklabels() if 0.1 <= text.get_position()[1] <= 10]
    assert shown == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
    assert not any(text.get_text() for text in axes.get_yticklabels(minor=True))


def test_values_stand_in_order_and_of_many_the_range_is_kept():
    """Numbers by size, words by letters, and of more than fit some between both ends."""
    assert looks.levels_of(pd.Series([100, 9, 10, 9])) == [9, 10, 100]
    assert looks.levels_of(pd.Series(["b", None, "a"])) == ["a", "b"]
    assert looks.levels_of(pd.Series(range(9)), 3) == [0, 4, 8]
    assert looks.levels_of(pd.Series([3, 1]), 8) == [1, 3]
    assert list(looks.places_of(pd.Series([4, 2, 4]))) == [4, 2, 4]
    assert list(looks.places_of(pd.Series(["l2", "ema", "fsq"]))) == [2, 0, 1]
    assert list(looks.places_of(pd.Series([True, False]))) == [1, 0]


def test_values_are_shown_in_few_characters():
    shown = {0.123456: "0.123", 12.0: "12", 128: "128", "ema": "ema", "folder:/a/b/birds": "birds", "a/b": "a/b"}
    assert {value: labels.brief(value) for value in shown} == shown
    assert labels.brief("x" * 24) == "x" * 24
    assert labels.brief("0123456789" * 3) == "01234567…"
    assert labels.label_of("psnr") == "PSNR dB ↑"
    assert labels.label_of("code_dim") == "d"
    assert labels.label_of("weight_decay") == "weight decay"
    assert labels.label_of("sharpness") == "sharpness"


@pytest.mark.parametrize("field", ["beta", "quantizer"])
def test_a_mean_has_the_standard_deviation_of_its_seeds_on_both_sides(field):
    """A band where values are numbers; where they are words a bar, those of two backbones side by side."""
    values = {"beta": (0.25, 1.0), "quantizer": ("ema", "l2")}[field]
    scores = (20.0, 21.0, 25.0)
    cells = itertools.product((("vit", 0.0), ("cnn", 5.0)), enumerate(values), enumerate(scores))
    rows = [
        {"backbone": who, field: value, "seed": seed, "psnr": psnr + more + i}
        for (who, more), (i, value), (seed, psnr) in cells
    ]
    (drawing,) = charts.sweeps(scope(made(*rows), field))
    (axes,) = drawing.figure.axes
    spread = np.std(scores, ddof=1)
    expected = {
        who: [(22 + more + i - spread, 22 + more + i + spread) for i in (0, 1)]
        for who, more in (("cnn", 5), ("vit", 0))
    }
    if field == "beta":
        bands = [found for found in axes.collections if "PolyCollection" in type(found).__name__]
        found = {
            who: [tuple(sorted({y for x, y in band.get_paths()[0].vertices if x == value})) for value in values]
            for who, band in zip(("cnn", "vit"), bands, strict=True)
        }
        assert drawing.caption.startswith("Line and band: mean ± standard deviation over seeds. 12 of 12 scored runs")
    else:
        bars = [container[2][0].get_segments() for container in axes.containers]
        found = {
            who: [tuple(y for _, y in segment) for segment in own]
            for who, own in zip(("cnn", "vit"), bars, strict=True)
        }
        places = [[segment[0][0] for segment in own] for own in bars]
        assert places[0][0] < 0 < places[1][0]  # cnn to the left of the tick, vit to its right
        assert np.mean(places, axis=0) == pytest.approx([0, 1])
        assert drawing.caption.startswith("Marker and bar: mean ± standard deviation over seeds.")
    for who, pairs in expected.items():
        np.testing.assert_allclose(found[who], pairs)


def test_a_legend_shows_each_backbone_as_it_is_drawn():
    rows = [
        {"backbone": who, "beta": beta, "psnr": beta, "psnr_kmeans": 9.0}
        for who in ("vit", "cnn")
        for beta in (1.0, 2.0)
    ]
    (drawing,) = charts.sweeps(scope(made(*rows), "beta"))
    shown = entries(drawing.figure)
    assert list(shown) == ["cnn", "vit", "k-means on patches"]
    drawn = {line.get_color(): line.get_marker() for line in drawing.figure.axes[0].get_lines()}
    assert all(drawn[colour] == marker for colour, marker in list(shown.values())[:2])
    assert shown["cnn"] == tuple(looks.look_of("cnn").values())
    (drawing,) = charts.sweeps(scope(made(*rows).drop(columns="psnr_kmeans"), "beta"))
    assert list(entries(drawing.figure)) == ["cnn", "vit"]


def test_three_metrics_have_three_panels():
    """The main one first, FID before that of VGG, none twice and none that was not scored."""
    rows = [{"beta": beta, "fid": 9.0, "fid_vgg16": 8.0, "perplexity": 7.0} for beta in (1.0, 2.0)]
    (drawing,) = charts.sweeps(scope(made(*rows), "beta"))
    assert [axes.get_ylabel() for axes in drawing.figure.axes] == ["PSNR dB ↑", "FID ↓", "perplexity ↑"]
    rows = [{"beta": beta, "fid_vgg16": 8.0, "lpips_alex": 0.5} for beta in (1.0, 2.0)]
    (drawing,) = charts.sweeps(scope(made(*rows), "beta"))
    assert [axes.get_ylabel() for axes in drawing.figure.axes] == ["LPIPS alex ↓", "FID vgg16 ↓", "PSNR dB ↑"]


def test_several_runs_that_are_left_out_are_counted():
    table = made({"beta": 1.0}, {"beta": 2.0}, {"seed": 1, "status": "crashed"}, {"seed": 2, "status": "unfinished"})
    (drawing,) = charts.sweeps(scope(table, "beta"))
    assert drawing.caption.endswith("2 of 2 scored runs, 1 seed a point. 2 failed or unfinished runs are left out.")
    assert drawing.title == "Effect of β"


def test_a_heat_map_names_rows_columns_and_the_spread_of_a_place():
    """A place without runs is grey, and the caption says so; more than a dozen columns are no heat map."""
    cells = [("cnn", 0.25, 20.0), ("cnn", 0.25, 22.0), ("vit", 0.25, 30.0), ("vit", 1.0, 31.0)]
    rows = [{"backbone": who, "beta": beta, "seed": i, "psnr": psnr} for i, (who, beta, psnr) in enumerate(cells)]
    (drawing,) = charts.heatmaps(scope(made(*rows), "beta"))
    axes, bar = drawing.figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cnn", "vit"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.25", "1"]
    assert [text.get_text() for text in axes.texts] == ["21.00\n±1.41", "30.00", "31.00"]
    assert axes.get_xlabel() == "β"
    assert bar.get_ylabel() == "PSNR dB ↑\nyellow is best"
    assert drawing.caption.endswith(" Grey: no run has a score.")
    (drawing,) = charts.heatmaps(scope(made(*rows, {"beta": 1.0}), "beta"))
    assert "Grey" not in drawing.caption
    many = [{"backbone": who, "beta": 1.0 + beta} for beta in range(charts.HEAT_VALUES + 1) for who in ("cnn", "vit")]
    assert not list(charts.heatmaps(scope(made(*many), "beta")))
    assert list(charts.heatmaps(scope(made(*many[:-2]), "beta")))


def curves_of(drawing) -> list[list[list[float]]]:
    """Of the first axes, the joined means in order: x and y of each."""
    joined = [
        line for line in drawing.figure.axes[0].get_lines() if line.get_marker() == looks.look_of("cnn")["marker"]
    ]
    return [[list(line.get_xdata() * 1024), list(line.get_ydata())] for line in joined]


def test_rate_and_distortion_joins_equal_grids_where_k_is_swept():
    """Else the grids of one K are joined. Perplexity is no distortion."""
    psnr = {(4, 64): 20.0, (4, 256): 21.0, (8, 64): 26.0, (8, 256): 28.0}
    rows = [
        {"grid_size": grid, "codebook_size": k, "psnr": value, "perplexity": 9.0} for (grid, k), value in psnr.items()
    ]
    (drawing,) = charts.rate_distortion(scope(made(*rows)))
    assert curves_of(drawing) == [[[96, 128], [20, 21]], [[384, 512], [26, 28]]]
    assert drawing.caption.startswith("Lines join equal grid sizes; bands: ± standard deviation.")
    assert {axes.get_ylabel() for axes in drawing.figure.axes} == {"PSNR dB ↑"}
    (drawing,) = charts.rate_distortion(scope(made(*rows[::2])))
    assert curves_of(drawing) == [[[96, 384], [20, 26]]]
    assert drawing.caption.startswith("Lines join means over seeds; bands")
    assert not list(charts.rate_distortion(scope(made(rows[0], rows[0] | {"seed": 1}))))


def test_hollow_points_stand_at_the_coded_rate_within_the_axis_and_are_explained():
    rates = {64: (96 / 1024, 0.04), 256: (128 / 1024, 0.06)}
    rows = [{"codebook_size": k, "psnr": 20.0 + k, "coded_bits_per_pixel": coded} for k, (_, coded) in rates.items()]
    (drawing,) = charts.rate_distortion(scope(made(*rows, {"codebook_size": 1024})))
    axes = drawing.figure.axes[0]
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[coded, 20.0 + k]] for k, (_, coded) in rates.items()]
    dotted = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert [sorted(line.get_xdata()) for line in dotted] == [sorted(pair) for pair in rates.values()]
    low, high = axes.get_xlim()
    assert low < 0.04
    assert high > 160 / 1024
    assert ticks(axes)[0.04] == "0.04"
    assert entries(drawing.figure)["entropy-coded"] == ("0.4", "o")
    assert "Hollow: the same at the rate of an entropy coder" in drawing.caption


def test_each_kind_of_prior_is_shown_at_its_own_usual_settings():
    """Grid and K may differ."""
    rows = [{"prior": "rnn", "steps": steps, "grid_size": grid} for steps, grid in ((1, 4), (1, 8), (2, 4))]
    rows += [{"prior": "mamba", "steps": steps, "seed": seed} for seed, steps in enumerate((3, 2, 3))]
    rows += [{"prior": "rnn", "steps": 1, "seed": 3}, {"prior": "rnn", "steps": 1, "seed": 4}]
    shown = slices.usual(made_priors(*rows))
    assert sorted(zip(shown.prior, shown.steps, strict=True)) == [("mamba", 3)] * 2 + [("rnn", 1)] * 4
    assert set(shown.grid_size) == {4, 8}


def test_priors_of_one_protocol_share_a_chart_and_their_legend_names_backbones_and_priors():
    rows = [{"prior": prior, "seed": seed} for prior in ("rnn", "mamba") for seed in (0, 1)]
    others = [{"protocol_data": "other", "data": "other", "seed": seed} for seed in range(3)]
    (drawing,) = charts._drawings(made(), None, made_priors(*others, *rows))
    assert drawing.caption.startswith("4 priors, means over seeds; 512 samples each, at temperature 1, against all 64")
    shown = entries(drawing.figure)
    assert shown["cnn"][0] == looks.LOOKS["cnn"][0]
    assert {name: shown[name][1] for name in ("rnn", "mamba")} == {n: looks.PRIOR_MARKERS[n] for n in ("rnn", "mamba")}
    assert "real codes" in shown


def test_every_prior_of_a_search_is_a_point_whatever_its_tokenizers_settings():
    """Nor is one prior averaged with another over the same codes."""
    rows = [{"tokenizer": name, "tokenizer_lr": lr} for lr, name in ((0.1, "a"), (0.2, "b"), (0.3, "c"), (0.3, "c"))]
    rows = [{**row, "run_id": str(i)} for i, row in enumerate(rows)]
    drawings = charts._drawings(made().assign(role=None), None, made_priors(*rows))
    (drawing,) = (one for one in drawings if one.name == "generation")
    assert drawing.caption.startswith("4 priors, each a point; 512 samples each")
    assert "Lines join" not in drawing.caption
    (line,) = (line for line in drawing.figure.axes[0].get_lines() if line.get_marker() != "None")
    assert (line.get_linestyle(), len(line.get_xydata())) == ("None", 4)


@pytest.mark.parametrize(("rates", "scale"), [((0.1, 0.3), "linear"), ((0.1, 0.5), "log")])
def test_rates_far_apart_stand_on_a_logarithmic_axis(rates, scale):
    (drawing,) = charts.generation(made_priors(*({"coded_bits_per_pixel": rate} for rate in rates)), 2)
    assert drawing.figure.axes[0].get_xscale() == scale


def test_samples_are_of_the_largest_grid_and_the_lowest_seed_lowest_rate_first(tmp_path):
    rows, shade = [], itertools.count(10, 10)
    for prior, rate in (("mamba", 0.3), ("rnn", 0.2)):
        for grid, seed in ((8, 1), (8, 0), (4, 0)):
            folder = tmp_path / f"{prior}{grid}{seed}"
            folder.mkdir()
            np.savez(
                folder / "samples.npz", x=np.full((galleries.PICTURES + 2, 128, 2, 3), next(shade), dtype=np.uint8)
            )
            row = {"prior": prior, "grid_size": grid, "seed": seed, "folder": str(folder)}
            rows.append(row | {"coded_bits_per_pixel": rate, "coded_bits_per_token": 10 * rate})
    (drawing,) = galleries.samples(made_priors(*rows))
    (axes,) = drawing.figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["rnn\nover cnn\n2.00 bits", "mamba\nover cnn\n3.00 bits"]
    picture = np.asarray(axes.images[0].get_array())
    assert [int(picture[int(height), 0, 0]) for height in axes.get_yticks()] == [50, 20]
    assert picture.shape[1] == galleries.PICTURES * 4 - 2
    assert "of seed 0, at the grid of 8×8 codes, lowest rate first" in drawing.caption
    assert not list(galleries.samples(made_priors({"folder": str(tmp_path / "none")})))


def costs(*rows: dict) -> pd.DataFrame:
    """Finished runs with what a tokenizer costs."""
    usual = {"params": 1e6, "flops": 1e8, "train_seconds": 30.0, "images_per_second_decode": 100.0}
    return made(*(usual | row for row in rows))


def test_a_point_of_cost_is_a_mean_with_its_deviation_over_seeds():
    cells = [("cnn", 0, 20.0), ("cnn", 1, 24.0), ("vit", 0, 30.0)]
    rows = [{"backbone": who, "seed": seed, "psnr": psnr, "params": 1e6 + 1e6 * seed} for who, seed, psnr in cells]
    (drawing,) = charts.cost(scope(costs(*rows)))
    assert drawing.title == "PSNR dB against cost"
    axes = drawing.figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("parameters ↓", "PSNR dB ↑")
    points = {bar[0].get_color(): bar[0].get_xydata().tolist() for bar in axes.containers}
    assert points == {looks.LOOKS["cnn"][0]: [[1.5e6, 22.0]], looks.LOOKS["vit"][0]: [[1e6, 30.0]]}
    (segment,) = axes.containers[0][2][0].get_segments()
    np.testing.assert_allclose(segment, [[1.5e6, 22 - 8**0.5], [1.5e6, 22 + 8**0.5]])
    assert list(entries(drawing.figure)) == ["cnn", "vit", "Pareto front"]
    assert drawing.caption.endswith("better. 3 of 3 scored runs, 1 to 2 seeds a point.")
    assert not list(charts.cost(scope(costs(*rows[:2]))))  # one point is no comparison


def test_clocks_of_a_busy_machine_have_no_front():
    times = [("cnn", 30.0, 100.0), ("cnn", 33.0, 200.0), ("vit", 60.0, 90.0), ("vit", 60.0, 90.0)]
    rows = [
        {"backbone": who, "seed": i % 2, "psnr": 20.0, "train_seconds": seconds, "images_per_second_decode": speed}
        for i, (who, seconds, speed) in enumerate(times)
    ]
    table = costs(*rows)
    (drawing,) = charts.cost(scope(table))
    stepped = {
        axes.get_xlabel(): any(line.get_drawstyle() == "steps-post" for line in axes.get_lines())
        for axes in drawing.figure.axes
    }
    assert stepped == {"parameters ↓": True, "FLOPs ↓": True, "train s ↓": True, "decode images/s ↑": False}
    assert "No front in decode images/s: the machine was busy with other things" in drawing.caption
    assert "differs by a factor of 2.0 from seed to seed." in drawing.caption
    assert "train s" not in drawing.caption


def test_the_front_is_steps_from_the_cheapest_to_the_best():
    """A cost that spans a factor of three has a logarithmic axis."""
    points = {0.25: (4e6, 30.0), 0.5: (1e6, 20.0), 1.0: (2e6, 25.0), 2.0: (3e6, 22.0)}
    rows = [
        {"beta": beta, "params": params, "flops": params / 2, "psnr": psnr} for beta, (params, psnr) in points.items()
    ]
    rows = [row | {"train_seconds": 20.0 + row["beta"]} for row in rows]
    (drawing,) = charts.cost(scope(costs(*rows)))
    axes, _, seconds, _ = drawing.figure.axes
    (front,) = [line for line in axes.get_lines() if line.get_drawstyle() == "steps-post"]
    assert front.get_xydata().tolist() == [[1e6, 20.0], [2e6, 25.0], [4e6, 30.0]]
    assert axes.collections[-1].get_offsets().tolist() == front.get_xydata().tolist()
    assert (axes.get_xscale(), seconds.get_xscale()) == ("log", "linear")
    assert [text.get_text() for text in axes.texts] == ["0.5", "1", "0.25"]


def curve(store: Store, config, losses=(), status="finished", **more) -> None:
    """A run with a history of these losses, a step each."""
    run = fabricate(store, config) if status == "finished" else fabricate_failed(store, config, status)
    rows = [{"step": 1 + i, "reconstruction": loss, "perplexity": 3.0} | more for i, loss in enumerate(losses)]
    (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curves_stand_in_a_row_per_quantity_and_a_column_per_backbone(tmp_path):
    """Losses on logarithmic axes, perplexity on a plain one; each curve in its own column and in its value's colour."""
    store, heights = Store(tmp_path), {("cnn", 0.25): 1.0, ("cnn", 1.0): 2.0, ("vit", 0.25): 3.0, ("vit", 1.0): 4.0}
    for (who, beta), height in heights.items():
        curve(store, make_config(who, "smoke", beta=beta), (height, height))
    (drawing,) = galleries.learning_curves(scope(frame(store.runs())))
    upper_left, upper_right, lower_left, lower_right = drawing.figure.axes
    assert [axes.get_title() for axes in drawing.figure.axes] == ["cnn", "vit", "", ""]
    assert [axes.get_yscale() for axes in drawing.figure.axes] == ["log", "log", "linear", "linear"]
    assert [axes.get_xlabel() for axes in drawing.figure.axes] == ["", "", "step", "step"]
    assert (upper_left.get_ylabel(), lower_left.get_ylabel()) == ("reconstruction loss ↓", "perplexity ↑")
    assert upper_right.get_ylabel() == lower_right.get_ylabel() == ""
    assert {line.get_ydata()[0] for line in upper_left.get_lines()} == {1, 2}
    assert {line.get_ydata()[0] for line in upper_right.get_lines()} == {3, 4}
    colours = {label: colour for label, (colour, _) in entries(drawing.figure).items()}
    assert list(colours) == ["0.25", "1"]
    assert drawing.figure.legends[0].get_title().get_text() == "β"
    assert drawing.title == "Learning curves by β"
    for axes, low in ((upper_left, 1), (upper_right, 3)):
        shown = {line.get_ydata()[0]: line.get_color() for line in axes.get_lines()}
        assert shown == {low: colours["0.25"], low + 1: colours["1"]}


def test_curves_of_backbones_alone_have_their_colours(tmp_path):
    store = Store(tmp_path)
    for who, height in (("vit", 1.0), ("cnn", 2.0)):
        curve(store, make_config(who, "smoke"), (height, height))
    (drawing,) = galleries.learning_curves(scope(frame(store.runs())))
    shown = {line.get_ydata()[0]: line.get_color() for line in drawing.figure.axes[0].get_lines()}
    assert shown == {1: looks.LOOKS["vit"][0], 2: looks.LOOKS["cnn"][0]}
    assert {label: look[0] for label, look in entries(drawing.figure).items()} == {
        who: looks.LOOKS[who][0] for who in ("cnn", "vit")
    }
    assert [axes.get_xlabel() for axes in drawing.figure.axes] == ["step", "step"]


def test_of_many_values_and_seeds_few_curves_are_drawn_and_the_caption_says_so(tmp_path):
    store = Store(tmp_path)
    for number in range(galleries.HUES + 1):
        curve(store, make_config("cnn", "smoke", beta=1.0 + number), (1.0, 2.0))
    for seed in range(1, galleries.CURVE_SEEDS + 2):
        curve(store, make_config("cnn", "smoke", beta=1.0, seed=seed), (1.0, 2.0))
    curve(store, make_config("cnn", "smoke", beta=2.0, seed=1), (1.0,), "interrupted")
    (drawing,) = galleries.learning_curves(scope(frame(store.runs())))
    assert len(entries(drawing.figure)) == galleries.HUES
    assert drawing.caption.startswith("Thin: 12 of 15 runs, at most 5 seeds of a setting, averaged to 60 points;")
    assert drawing.caption.endswith("Not all values of β are shown.")


def test_a_point_of_a_curve_is_the_mean_of_its_window(tmp_path):
    run = fabricate_failed(Store(tmp_path), make_config("cnn", "smoke"))
    rows = [{"step": step, "reconstruction": float(step)} for step in range(2 * galleries.CURVE_POINTS)]
    (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = galleries._history(str(run.folder))
    assert list(shown.reconstruction) == list(shown.step) == [2 * i + 0.5 for i in range(galleries.CURVE_POINTS)]


def test_a_bar_of_importance_has_the_colour_of_its_backbone():
    shares = pd.DataFrame([("vit", "beta", 0.7), ("cnn", "beta", 0.2)], columns=["backbone", "parameter", "importance"])
    figure = charts.importance(shares).figure
    bars = {matplotlib.colors.to_hex(bar.get_facecolor()): bar.get_width() for bar in figure.axes[0].patches}
    assert bars == {looks.LOOKS["cnn"][0]: 0.2, looks.LOOKS["vit"][0]: 0.7}
    assert list(entries(figure)) == ["cnn", "vit"]
    assert figure.axes[0].get_xlabel() == "importance (share within a backbone)"


def test_a_swept_gallery_is_of_the_best_backbone_and_names_the_values(tmp_path):
    """At most eight values, with both ends, and eight images of each."""
    store = Store(tmp_path)
    for who, quality in (("cnn", 0.0), ("vit", 0.1), ("mamba", 0.05)):
        for number in range(galleries.HUES + 1):
            run = fabricate(store, make_config(who, "smoke", beta=1.0 + number), quality)
            x = np.zeros((galleries.PICTURES + 1, 128, 2, 3), dtype=np.uint8)
            np.savez(run.folder / "samples.npz", x=x, x_hat=x + number)
    _, drawing = galleries.reconstructions(scope(frame(store.runs())))
    assert (drawing.name, drawing.title) == ("reconstructions_beta", "Reconstructions by β, vit")
    (axes,) = drawing.figure.axes
    labels = [label.get_text().split("\n") for label in axes.get_yticklabels()]
    assert [label[0] for label in labels] == ["original", *(f"β = {beta}" for beta in (1, 2, 3, 4, 6, 7, 8, 9))]
    table = frame(store.runs())
    first = table[(table.backbone == "vit") & (table.beta == 1)].iloc[0]
    assert labels[1][1:] == [f"LPIPS vgg {first.lpips_vgg:.3f}", f"PSNR dB {first.psnr:.2f}"]
    assert axes.images[0].get_array().shape[1] == galleries.PICTURES * 4 - 2
    assert "differ" not in drawing.caption


def test_no_backbone_is_missing_among_the_runs_that_stand_for_all():
    """Where one lacks the usual setting, each is shown at its best, of the bits that most runs have."""
    rows = [{"backbone": who, "beta": beta} for who, beta in (("cnn", 0.25), ("vit", 0.25), ("mamba", 2.0))]
    rows = [row | {"codebook_size": 64, "psnr": 20.0, "seed": seed} for row in rows for seed in (0, 1)]
    rows[1]["psnr"], rows[4]["psnr"] = 21.0, 22.0
    rows.append({"beta": 2.0, "psnr": 19.0})
    few = [{"backbone": who, "codebook_size": 16, "psnr": 30.0} for who in ("cnn", "vit")]
    chosen, words = slices.representative(made(*few, *rows))
    shown = {row.backbone: (row.codebook_size, row.psnr) for row in chosen.itertuples()}
    assert shown == {"cnn": (64, 21.0), "vit": (64, 20.0), "mamba": (64, 22.0)}
    assert len(chosen) == 3
    assert words == ", each backbone's best by PSNR dB (β differ)"
    chosen, words = slices.representative(made(*few, *rows[:4]))
    assert (set(chosen.codebook_size), len(chosen), words) == ({64}, 4, ", at K = 64")
    chosen, words = slices.representative(made({"codebook_size": 16}, {"codebook_size": 64}).assign(role=None))
    assert (len(chosen), words) == (1, ", each backbone's best by PSNR dB")  # of a search without two of equal bits


def test_winners_of_a_search_stand_for_it_and_are_pictured_beside_the_defaults(tmp_path):
    store, roles = Store(tmp_path), {}
    for who, role, beta in (("cnn", "winner", 2.0), ("cnn", "default", 0.25), ("vit", "winner, default", 0.25)):
        run = fabricate(store, make_config(who, "smoke", beta=beta))
        roles[run.folder.name] = role
    for who, beta, quality in (("cnn", 0.25, 0.0), ("cnn", 2.0, 0.1), ("vit", 0.25, 0.1), ("vit", 2.0, 0.0)):
        fabricate(store, make_config(who, "smoke", beta=beta, split="val"), quality, scored_on="val")
    table = frame(store.runs())
    table["role"] = table.run_id.map(roles)
    test, val = table[table.split == "test"], table[table.split == "val"]
    best = {("cnn", 2.0), ("vit", 0.25)}
    for rows, words in ((test, ", the winner of each backbone's search"), (val, ", each backbone's best by LPIPS vgg")):
        field, chosen, said = slices.first_sweep(rows)
        assert (field, {*zip(chosen.backbone, chosen.beta, strict=True)}) == (None, best)
        assert said.startswith(words)
    (drawing,) = galleries.reconstructions(scope(test))
    labels = [label.get_text().split("\n")[0] for label in drawing.figure.axes[0].get_yticklabels()]
    assert labels == ["original", "cnn, default", "cnn, winner", "vit, winner, default"]
    assert "the search's winners and the presets' defaults" in drawing.caption
    fabricate(store, make_config("cnn", "smoke", beta=0.25, codebook_size=64, split="val"), scored_on="val")
    trials = frame(run for run in store.runs() if run.config()["split"] == "val").assign(role=None)
    (drawing,) = charts.rate_distortion(scope(trials))
    assert "All 5 scored runs" in drawing.caption


def test_a_search_whose_trials_differ_in_nothing_but_bits_has_a_chart():
    """Nor in bits, where formats stand beside one trial."""
    trials = made({"codebook_size": 16, "seed": 0}, {"codebook_size": 64, "seed": 0}).assign(role=None)
    (drawing,) = charts.rate_distortion(scope(trials))
    assert drawing.caption.startswith("All 2 scored runs; steps")


def test_failures_are_counted_with_those_on_the_same_images():
    table = made({}, {"seed": 1, "status": "crashed"}, {"seed": 2, "status": "crashed", "image_size": 64})
    table = pd.concat([table, made({"seed": 3, "status": "crashed", "data": "cifar10"})], ignore_index=True)
    (wide,) = slices.protocol_scopes(table)
    assert list(wide.unscored.seed) == [1]
    (test,) = slices.protocol_scopes(made({"split": "test"}, {"seed": 1, "status": "crashed", "split": "val"}))
    assert test.unscored.empty
    assert wide.note == "photos, 64 test images of 32×32."


def test_titles_name_the_fields_that_tell_protocols_apart():
    """As few as do, here two together; none where there is one protocol."""
    groups = [("photos", 32), ("photos", 64), ("faces", 32)]
    rows = [
        {"data": d, "protocol_data": d, "image_size": s, "protocol_image_size": s, "seed": i}
        for i, (d, s) in enumerate(groups)
    ]
    rows = [row | {"protocol_fingerprint": str(i)} for i, row in enumerate(rows)]
    scopes = slices.protocol_scopes(made(*rows))
    assert [scope.title for scope in scopes] == [f"data {data}, image_size {size}" for data, size in groups]
    assert [scope.title for scope in slices.protocol_scopes(made(rows[0]))] == [""]
    assert [scope.suffix for scope in slices.protocol_scopes(made(rows[0]))] == [""]


def test_runs_on_validation_have_charts_of_their_own_that_say_so():
    """Also where a reader would be told of nothing else."""
    rows = [{"seed": i, "protocol_scored_on": split} for i, split in enumerate(("test", "val"))]
    rows = [row | {"protocol_count": i, "protocol_fingerprint": str(i)} for i, row in enumerate(rows)]
    scopes = slices.protocol_scopes(made(*rows))
    assert [scope.title for scope in scopes] == ["scored_on test", "scored_on val"]
    assert [scope.note.split()[2] for scope in scopes] == ["test", "validation"]


def test_blocks_come_in_the_order_of_their_bits_and_share_the_room_with_other_protocols():
    """Bits are no axis within a block, though grid and K may differ there."""
    rows = [{"codebook_size": k, "seed": seed} for k, count in ((16, 1), (64, 3), (32, 2)) for seed in range(count)]
    (wide,) = slices.protocol_scopes(made(*rows))
    assert [scope.suffix for scope in slices.block_scopes(wide, 1)] == ["_64bits", "_80bits", "_96bits"]
    assert [scope.title for scope in slices.block_scopes(wide, 3)] == ["80 bits per image", "96 bits per image"]
    equal = made(
        {"grid_size": 4, "codebook_size": 256},
        {"grid_size": 8, "codebook_size": 4},
        {"beta": 9.0, "codebook_size": 256},
    )
    (wide,) = slices.protocol_scopes(equal)
    (block,) = slices.block_scopes(wide, 1)
    assert (wide.fields, block.fields) == (["codebook_size", "grid_size"], ["beta"])


def test_samples_are_of_the_usual_settings(tmp_path):
    np.savez(tmp_path / "samples.npz", x=np.zeros((2, 8, 8, 3), dtype=np.uint8))
    rows = [{"folder": str(tmp_path), "steps": steps, "seed": seed} for steps, seed in ((9, 0), (1, 1), (1, 2))]
    drawings = {drawing.name: drawing for drawing in charts._drawings(made(), None, made_priors(*rows))}
    assert drawings["samples"].caption.startswith("One prior per row, of seed 1,")
    assert drawings["generation"].caption.startswith(
        "2 of 3 priors, those with equal settings, at steps = 1, means over"
    )


def test_blocks_of_several_protocols_have_names_and_titles_of_their_own():
    """Else the charts of one would be written over those of another."""
    rows = [
        {"data": data, "protocol_data": data, "protocol_fingerprint": data, "codebook_size": k, "backbone": backbone}
        for data in ("photos", "cifar10")
        for k in (16, 64)
        for backbone in ("cnn", "vit")
    ]
    wide = slices.protocol_scopes(made(*rows))
    blocks = [block for scope in wide for block in slices.block_scopes(scope, len(wide))]
    places = [(number, bits) for number in (1, 2) for bits in (64, 96)]
    assert [block.suffix for block in blocks] == [f"_protocol{number}_{bits}bits" for number, bits in places]
    titles = [f"data {data}, {bits} bits per image" for data in ("photos", "cifar10") for bits in (64, 96)]
    assert [block.title for block in blocks] == titles


# -- small print ------------------------------------------------------------------------------------------------------


def test_a_setting_swept_in_one_backbone_alone_has_no_heat_map():
    assert not list(charts.heatmaps(scope(made({"beta": 1.0}, {"beta": 2.0}), "beta")))


def test_a_heat_map_is_named_for_its_setting_and_warns_of_other_bits():
    cells = itertools.product(("cnn", "vit"), (16, 64), (1.0, 2.0))
    rows = [{"backbone": who, "codebook_size": k, "beta": beta} for who, k, beta in cells]
    of_bits, of_beta = charts.heatmaps(scope(made(*rows), "codebook_size", "beta"))
    assert (of_bits.name, of_bits.title) == ("heatmap_backbone_codebook_size", "PSNR dB by backbone and K")
    assert of_bits.caption.endswith("The bits of an image differ between columns.")
    assert "bits" not in of_beta.caption
    assert of_bits.figure.axes[0].get_xlabel() == "K"


def test_one_grid_has_one_line_over_the_means_of_its_seeds():
    (drawing,) = charts.rate_distortion(scope(made({"codebook_size": 64}, {"codebook_size": 256})))
    assert drawing.caption.startswith("Lines join means over seeds; bands")


def test_generation_is_drawn_in_the_first_two_distances_that_all_priors_have():
    both = {"gfid": 10.0, "gfid_real": 5.0, "gkid_vgg16": 0.3}
    for rows, expected in (
        ((both, both | {"seed": 1}), ["gFID ↓", "gFID vgg16 ↓"]),
        ((both, both | {"seed": 1, "gfid": math.nan}), ["gFID vgg16 ↓", "gKID vgg16 ↓"]),
    ):
        (drawing,) = charts.generation(made_priors(*rows), 2)
        assert [axes.get_ylabel() for axes in drawing.figure.axes] == expected


def test_priors_over_codebooks_of_two_sizes_are_two_points():
    rows = [{"codebook_size": k, "coded_bits_per_pixel": k / 1000, "gfid_vgg16": 80.0 - k / 10} for k in (64, 128)]
    (drawing,) = charts.generation(made_priors(*rows), 2)
    marker = looks.PRIOR_MARKERS["rnn"]
    (line,) = [line for line in drawing.figure.axes[0].get_lines() if line.get_marker() == marker]
    np.testing.assert_allclose(line.get_xydata(), [[0.064, 73.6], [0.128, 67.2]])


@pytest.mark.parametrize(("split", "said"), [("test", "test"), ("val", "validation")])
def test_generation_says_against_which_images_samples_are_measured(split, said):
    row = {"samples": 100, "temperature": 0.9, "protocol_count": 50, "data": "folder:/a/faces", "image_size": 64}
    (drawing,) = charts.generation(made_priors(row | {"protocol_scored_on": split}), 1)
    assert drawing.caption.startswith(
        f"1 priors, means over seeds; 100 samples each, at temperature 0.9, against all 50 {said} images of faces "
        "at 64×64. Lines join grid sizes."
    )


def test_many_points_are_one_image_of_a_chart_and_few_are_not():
    for count, image in ((200, False), (201, True)):
        rows = [{"beta": 1.0 + seed % 2, "seed": seed} for seed in range(count)]
        (drawing,) = charts.sweeps(scope(made(*rows), "beta"))
        assert drawing.figure.axes[0].collections[0].get_rasterized() == image


def test_no_importance_is_no_chart():
    none = pd.DataFrame(columns=["backbone", "parameter", "importance"])
    assert not list(charts._drawings(made(), none, None))


def test_a_title_is_folded_before_it_leaves_the_page(tmp_path):
    figure = looks.new_figure(1.0)
    title = " ".join(["word"] * 30)
    charts._saved(looks.Drawing("dot", title, "", figure), tmp_path)
    told = figure.get_suptitle().split("\n")
    assert " ".join(told) == title
    assert max(map(len, told)) <= 80
    assert len(told) == 2


def test_eight_kinds_of_prior_at_most_have_samples_side_by_side(tmp_path):
    np.savez(tmp_path / "samples.npz", x=np.zeros((2, 8, 8, 3), dtype=np.uint8))
    names = [f"prior{i}" for i in range(galleries.HUES + 1)]
    rows = [
        {"prior": name, "folder": str(tmp_path), "coded_bits_per_pixel": 1.0 - i / 10} for i, name in enumerate(names)
    ]
    (drawing,) = galleries.samples(made_priors(*rows))
    shown = [label.get_text().split("\n")[0] for label in drawing.figure.axes[0].get_yticklabels()]
    assert shown == names[:0:-1]  # those of the lowest rates


def test_pictures_that_cannot_be_read_are_none(tmp_path):
    """Whether an array is missing, of another shape or kind, or the file is damaged; without a file nothing is said."""
    path, rows = tmp_path / "samples.npz", pd.DataFrame({"folder": [str(tmp_path)]})
    x = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    damaged = []
    assert list(galleries.pictures_of(rows, damaged, "x")) == damaged == []
    for arrays in ({"x": x}, {"x": x, "x_hat": x[0]}, {"x": x, "x_hat": x.astype(int)}):
        np.savez(path, **arrays)
        assert list(galleries.pictures_of(rows, damaged, "x", "x_hat")) == []
    path.write_bytes(path.read_bytes()[:-9])
    assert list(galleries.pictures_of(rows, damaged, "x")) == []
    assert [str(path) in sentence for sentence in damaged] == [True] * 4
    assert damaged[0].startswith(f"{path} is damaged: it has no images x_hat; move it away")


def test_a_gallery_names_the_damaged_files_that_it_leaves_out(tmp_path):
    """The scores of the run stay in; of another seed the picture is shown instead. Also where no picture is left."""
    store = Store(tmp_path)
    runs = [fabricate(store, make_config(name, "smoke", seed=seed)) for name in ("cnn", "vit") for seed in (0, 1)]
    paths = [run.folder / "samples.npz" for run in runs]
    paths[0].write_bytes(b"PK torn")
    (drawing,) = galleries.reconstructions(scope(frame(runs)))
    labels = [label.get_text().split("\n")[0] for label in drawing.figure.axes[0].get_yticklabels()]
    assert labels == ["original", "cnn", "vit"]
    assert f"Left out: {paths[0]} is damaged: " in drawing.caption
    for path in paths:
        path.write_bytes(b"")
    (drawing,) = galleries.reconstructions(scope(frame(runs)))
    assert all(str(path) in drawing.caption for path in paths)
    prior = {"prior": "rnn", "grid_size": 4, "seed": 0, "coded_bits_per_pixel": 0.1, "coded_bits_per_token": 1.0}
    rows = [prior | {"folder": str(run.folder), "backbone": name} for run, name in zip(runs[::2], "ab", strict=True)]
    (drawing,) = galleries.samples(made_priors(*rows))
    assert all(str(path) in drawing.caption for path in paths[::2])
    np.savez(paths[0], x=np.zeros((2, 8, 8, 3), dtype=np.uint8))
    (drawing,) = galleries.samples(made_priors(*rows))
    assert (str(paths[0]) in drawing.caption, str(paths[2]) in drawing.caption) == (False, True)


def test_a_damaged_line_of_a_history_is_left_out_and_one_without_any_is_empty(tmp_path):
    run = fabricate(Store(tmp_path), make_config("cnn", "smoke"))
    (run.folder / "history.jsonl").write_text('{"step": 1, "rec\n{"step": 2}\n')
    assert list(galleries._history(str(run.folder)).step) == [2]
    (run.folder / "history.jsonl").unlink()
    assert galleries._history(str(run.folder)).empty


def test_of_equally_common_settings_without_a_default_the_smallest_stands():
    rows = [{"beta": beta, "lr": lr} for beta in (4.0, 2.0, 3.0) for lr in (0.1, 0.2)]
    shown, fixed = controlled(made(*rows), ["lr"])
    assert fixed == {"beta": 2.0}
    assert set(shown.beta) == {2.0}


def test_bits_that_were_not_swept_are_no_axis():
    for changed, fields in (({"beta": 9.0}, []), ({"grid_size": 8}, ["grid_size"])):
        (wide,) = slices.protocol_scopes(made({}, changed))
        assert wide.fields == fields


def test_a_finished_run_without_its_main_score_is_in_no_chart():
    (wide,) = slices.protocol_scopes(made({"lpips_vgg": 0.3}, {"lpips_vgg": 0.4, "seed": 1}, {"seed": 2}))
    assert list(wide.rows.seed) == [0, 1]


def test_protocols_that_differ_in_small_print_are_told_apart_by_one_field_of_it():
    rows = [{"seed": i, "protocol_split": letter, "protocol_version": letter} for i, letter in enumerate("ab")]
    assert [scope.title for scope in slices.protocol_scopes(made(*rows))] == ["split a", "split b"]


def test_what_is_no_longer_registered_is_dark_grey():
    assert looks.look_of("gone") == {"color": "0.25", "marker": "p"}
    (drawing,) = charts.generation(made_priors({"prior": "gone"}), 1)
    assert entries(drawing.figure)["gone"] == ("0.35", "p")


def test_a_legend_has_at_most_six_columns():
    for count, columns in ((2, 2), (9, 6)):
        figure = looks.new_figure(1.0)
        looks.add_legend(figure, [], {str(i): {"color": "0.5"} for i in range(count)}, title="values")
        (legend,) = figure.legends
        assert legend._ncols == columns
        assert legend.get_title().get_text() == "values"


def test_panels_stand_two_a_row_and_one_alone_is_as_wide_as_the_page():
    for count, (rows, columns) in ((1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (5, (3, 2))):
        figure, panels = looks.new_panels(count)
        assert len(panels) == len(figure.axes) == count
        assert panels[0].get_gridspec().get_geometry() == (rows, columns)
        assert figure.get_figheight() == pytest.approx(0.8 + 2.1 * rows)
        assert figure.get_figwidth() == looks.WIDTH


def test_small_pictures_are_enlarged_and_labels_stand_beside_their_rows():
    rows = [np.full((3, 32, 16, 3), shade, dtype=np.uint8) for shade in (10, 20)]
    (axes,) = looks.picture_rows(rows, ["first", "second"]).axes
    picture = np.asarray(axes.images[0].get_array())
    assert picture.shape == ((2 * 32 + 2) * 4, (3 * 16 + 2 * 2) * 4, 3)
    shown = {
        label.get_text(): int(picture[int(at), 0, 0])
        for at, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    assert shown == {"first": 10, "second": 20}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_backbone_of_a_swept_gallery_is_so_on_average(tmp_path, seed):
    """Not the one with the single best run."""
    store = Store(tmp_path)
    for beta in (1.0, 2.0):
        for who, quality in (("cnn", 0.05), ("vit", 0.2 if beta - 1 == seed else -0.3)):
            fabricate(store, make_config(who, "smoke", beta=beta), quality)
    _, drawing = galleries.reconstructions(scope(frame(store.runs())))
    assert drawing.title == "Reconstructions by β, cnn"


# -- before and while a codebook is learned ---------------------------------------------------------------------------


def codebook_store(path, curves: dict[str, list[list[float]]]) -> Store:
    """Runs of each backbone, a seed per curve, whose codebook loss it is at steps 10, 20, …"""
    store = Store(path)
    for name, seeds in curves.items():
        for seed, losses in enumerate(seeds):
            run = fabricate(store, make_config(name, "smoke", seed=seed), codebook_roughness=0.1 * (1 + seed))
            rows = [{"step": 10 * (i + 1), "quantizer": loss, "perplexity": 3.0} for i, loss in enumerate(losses)]
            (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return store


def test_codebook_losses_of_all_backbones_share_an_axes(tmp_path):
    """A line per backbone, the geometric mean of its seeds, in a band from lowest to highest; beside it its roughness,
    mean ± standard deviation."""
    store = codebook_store(tmp_path, {"cnn": [[1.0, 0.1, 0.01], [4.0, 0.9, 0.01]], "vit": [[3.0, 2.0, 1.0]]})
    (drawing,) = galleries.codebook_loss(scope(frame(store.runs())))
    (axes,) = drawing.figure.axes
    assert axes.get_yscale() == "log"
    drawn = {line.get_color(): line for line in axes.get_lines()}
    np.testing.assert_allclose(drawn[looks.LOOKS["cnn"][0]].get_ydata(), [2.0, 0.3, 0.01])
    np.testing.assert_allclose(drawn[looks.LOOKS["vit"][0]].get_ydata(), [3, 2, 1])
    assert list(drawn[looks.LOOKS["cnn"][0]].get_xdata()) == [10, 20, 30]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(10, 1), (10, 4), (20, 0.1), (20, 0.9)} <= {(x, y) for x, y in band.tolist()}
    assert list(entries(drawing.figure)) == ["cnn 0.150 ± 0.071", "vit 0.100"]
    assert "geometric mean over 1 to 2 seeds of a backbone" in drawing.caption


def test_a_backbone_without_a_codebook_loss_has_no_line(tmp_path):
    """Fixed codes have none, or one of 0; a single backbone is no comparison."""
    losses = {"cnn": [[0.0, 0.0]], "vit": [[1.0, 0.5]], "mamba": [[1.0, 0.0, 0.5]]}
    table = frame(codebook_store(tmp_path, losses).runs())
    (drawing,) = galleries.codebook_loss(scope(table))
    assert [name.split()[0] for name in entries(drawing.figure)] == ["mamba", "vit"]
    assert list(drawing.figure.axes[0].get_lines()[0].get_xdata()) == [10, 30]
    assert not list(galleries.codebook_loss(scope(table[table.backbone != "mamba"])))


def test_before_training_shows_each_backbones_own_pictures_stretched(tmp_path):
    """Beside the same originals, with the grid that was measured; each row has a contrast of its own."""
    store = Store(tmp_path)
    for name, high in (("cnn", 110), ("vit", 150)):
        run = fabricate(store, make_config(name, "smoke"), grid_energy_init=high / 10)
        pixels = np.full((2, 128, 2, 3), 100, dtype=np.uint8)
        pixels[:, 64:] = high
        np.savez(run.folder / "samples.npz", x=np.full_like(pixels, 7), x_hat=pixels)
        np.savez(run.folder / "untrained.npz", untrained=pixels)
    (drawing,) = galleries.untrained(scope(frame(store.runs())))
    (axes,) = drawing.figure.axes
    labels = [label.get_text().split("\n") for label in axes.get_yticklabels()]
    assert labels[0] == ["original"]
    assert labels[1] == ["cnn", "grid energy dB 11.0", "grid edges dB 3.0", "contrast ×25.5"]
    assert labels[2] == ["vit", "grid energy dB 15.0", "grid edges dB 3.0", "contrast ×5.1"]
    picture = np.asarray(axes.images[0].get_array())[:, :2]
    assert set(picture[:128].ravel()) == {7}
    for top in (130, 260):
        assert set(picture[top : top + 64].ravel()) == {0}
        assert set(picture[top + 64 : top + 128].ravel()) == {255}
    assert "percentiles 1 and 99" in drawing.caption


def test_contrast_is_one_for_all_images_and_colours_of_a_row():
    """Their order stays; two in a hundred pixels may be lost; an even grey is left in peace."""
    images = np.random.default_rng(0).integers(90, 130, (3, 8, 8, 3), dtype=np.uint8)
    contrast, found = galleries.stretched(images)
    low, high = np.percentile(images, (1, 99))
    assert contrast == pytest.approx(255 / (high - low))
    inside = (images > low) & (images < high)
    np.testing.assert_allclose(found[inside], (images[inside] - low) * contrast, atol=0.5)
    assert (found[images <= low] == 0).all()
    assert (found[images >= high] == 255).all()
    assert galleries.stretched(np.full((1, 2, 2, 3), 9, dtype=np.uint8))[0] == 255


def test_older_runs_that_kept_no_untrained_pictures_have_no_such_gallery(tmp_path):
    store = Store(tmp_path)
    run = fabricate(store, make_config("cnn", "smoke"))
    (run.folder / "untrained.npz").unlink()
    assert not list(galleries.untrained(scope(frame(store.runs()))))
    (run.folder / "untrained.npz").write_bytes(b"no")
    (drawing,) = galleries.untrained(scope(frame(store.runs())))
    assert "untrained.npz is damaged" in drawing.caption


def test_wrong_codes_are_drawn_by_backbone_and_kind_where_two_were_looked_at(tmp_path):
    """Means over seeds with their deviation at every share; solid for random codes, dashed for near ones."""
    store, names = Store(tmp_path), [name for name in INSTRUMENTS["robustness"].metrics if "_random_" in name]
    for (backbone, seed), value in {("cnn", 0): 10.0, ("cnn", 1): 14.0, ("vit", 0): 20.0, ("vit", 1): 20.0}.items():
        run = fabricate(store, make_config(backbone, "smoke", seed=seed))
        metrics = dict.fromkeys(INSTRUMENTS["robustness"].metrics, 7.0)
        metrics |= {name: value - i for i, name in enumerate(names)}
        reading = {"version": INSTRUMENTS["robustness"].version, "seconds": 1.0, "weights": "w", "metrics": metrics}
        run.seal("instruments.json", {"instruments": {"robustness": reading}})
    fabricate(store, make_config("mamba", "smoke"))  # which none has looked at
    table = frame(store.runs())
    (drawing,) = galleries.wrong_codes(scope(table))
    axes = drawing.figure.axes[0]
    lines = {(one[0].get_color(), one[0].get_linestyle()): one for one in axes.containers}
    assert {*lines} == {(looks.LOOKS[name][0], style) for name in ("cnn", "vit") for style in ("-", "--")}
    solid = lines[looks.LOOKS["cnn"][0], "-"]
    assert list(solid[0].get_xdata()) == [0, 1, 5, 10, 20]
    assert list(solid[0].get_ydata()) == [12, 11, 10, 9, 8]
    (bar,) = solid[2]
    np.testing.assert_allclose(bar.get_segments()[0], [[0, 12 - 8**0.5], [0, 12 + 8**0.5]])
    assert set(lines[looks.LOOKS["vit"][0], "--"][0].get_ydata()) == {7}
    assert "over 2 seeds of a backbone" in drawing.caption
    assert not list(galleries.wrong_codes(scope(table[table.backbone != "vit"])))


def test_rate_and_distortion_of_a_random_search_are_all_its_runs_and_the_front_of_each_backbone(tmp_path):
    """No two runs of other bits are alike in the rest: none is left out, and steps go from best to better."""
    store = Store(tmp_path)
    tried = [(64, 0.1, 18.0), (128, 0.2, 20.0), (256, 0.3, 19.0), (512, 0.4, 21.0)]
    for codes, beta, psnr in tried:
        fabricate(store, make_config("cnn", "smoke", codebook_size=codes, beta=beta), psnr=psnr)
    (drawing,) = charts.rate_distortion(scope(frame(store.runs())))
    axes = next(one for one in drawing.figure.axes if one.get_ylabel().startswith("PSNR"))
    points = [offset for collection in axes.collections for offset in collection.get_offsets().tolist()]
    assert sorted(y for _, y in points) == [18, 19, 20, 21]
    (front,) = [line for line in axes.get_lines() if line.get_drawstyle() == "steps-post"]
    assert list(front.get_ydata()) == [18, 20, 20, 21]
    assert front.get_color() == looks.LOOKS["cnn"][0]
    assert "All 4 scored runs, whatever their β" in drawing.caption
