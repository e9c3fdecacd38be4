"""Pictures of runs show what they say: which pixels lie where, and which column is which line."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bench.core import plots


@pytest.fixture
def figures(monkeypatch):
    """Figures that would have been saved."""
    made = []
    monkeypatch.setattr(plots, "save", lambda figure, path: made.append(figure))
    return made


@pytest.fixture
def pictures(monkeypatch):
    """Rows of images, and the words beside them, that would have been drawn."""
    made = []
    monkeypatch.setattr(plots, "picture", lambda path, rows, words, *rest, **_: made.append((rows, words)))
    return made


def shades(count: int) -> np.ndarray:
    """(count, 4, 4, 3) uint8; image k is of grey k."""
    return np.arange(count, dtype=np.uint8).repeat(48).reshape(count, 4, 4, 3)


@pytest.mark.parametrize("scale", [1, 3])
def test_tiles_lie_in_rows_with_white_between_them(scale):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 255, (3, 4, 5, 3), dtype=np.uint8) for _ in range(2)]
    sheet = np.asarray(plots.tile(rows, scale))
    assert sheet.shape == ((2 * 4 + plots.GAP) * scale, (3 * 5 + 2 * plots.GAP) * scale, 3)
    np.testing.assert_array_equal(sheet[::scale, ::scale].repeat(scale, 0).repeat(scale, 1), sheet)
    small = sheet[::scale, ::scale].copy()
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            place = small[r * (4 + plots.GAP) :, c * (5 + plots.GAP) :][:4, :5]
            np.testing.assert_array_equal(place, image)
            place[:] = 255
    assert (small == 255).all()


def test_differences_are_absolute_and_do_not_wrap_around(pictures):
    x, x_hat = np.zeros((2, 3, 4, 4, 3), dtype=np.uint8)
    x[0], x_hat[0] = 255, 3
    x[1], x_hat[1] = 10, 14
    plots.reconstructions(None, x, x_hat, "")
    (((first, second, difference), words),) = pictures
    assert first is x
    assert second is x_hat
    assert difference.dtype == np.uint8
    assert difference[:, 0, 0, 0].tolist() == [252, 4, 0]
    assert words == ["original", "reconstruction", "|difference|"]


def test_samples_are_a_square_of_the_first_ones(pictures):
    plots.samples(None, shades(11), "")
    rows, _ = pictures[0]
    assert [row[:, 0, 0, 0].tolist() for row in rows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_samples_of_classes_have_a_row_for_each_of_the_most_frequent(pictures):
    """In the order of their names, filled up with white."""
    plots.samples(None, shades(11), "", [*"bababab", *"cccc"])
    rows, words = pictures[0]
    assert words == ["a", "b", "c"]
    assert [row[:, 0, 0, 0].tolist() for row in rows] == [[1, 3, 5], [0, 2, 4], [7, 8, 9]]
    plots.samples(None, shades(4), "", [*"dcba"])
    rows, words = pictures[1]
    assert words == ["c", "d"]  # no more rows than samples a side
    assert [row[:, 0, 0, 0].tolist() for row in rows] == [[1, 255], [0, 255]]


def test_each_sample_stands_above_its_nearest_training_image(pictures):
    plots.neighbours(None, shades(40), shades(80)[40:], "")
    (samples, nearest), words = pictures[0]
    assert samples[:, 0, 0, 0].tolist() == list(range(plots.PAIRS))
    assert nearest[:, 0, 0, 0].tolist() == list(range(40, 40 + plots.PAIRS))
    assert words[0] == "sample"


@pytest.mark.parametrize("count", [1, 5, 9, 10])
def test_a_codebook_is_shown_whole_and_in_order(pictures, count):
    plots.codebook(None, shades(count), "")
    rows, _ = pictures[0]
    assert len({len(row) for row in rows}) == 1
    assert 0 <= len(rows[0]) - len(rows) <= 1
    shown = np.concatenate(rows)[:, 0, 0, 0]
    assert shown.tolist() == [*range(count), *[255] * (len(shown) - count)]


def lines(axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_curves_are_the_columns_of_the_history(figures):
    history = [
        {"step": k, "reconstruction": 8 / k, "quantizer": 4 / k, "perplexity": 10 + k, "codes_used": 20 + k}
        for k in (2, 4, 8)
    ]
    plots.curves(None, history, 64, "")
    left, right = figures[0].axes
    assert lines(left) == {"reconstruction": [4, 2, 1], "quantizer": [2, 1, 0.5]}  # LPIPS was no loss
    assert lines(right) == {"perplexity": [12, 14, 18], "codes in use": [22, 24, 28], "K = 64": [64, 64]}
    assert all(list(line.get_xdata()) == [2, 4, 8] for line in (*left.lines, *right.lines[:2]))
    assert left.get_yscale() == "log"
    assert right.get_ylim()[0] == 0
    plots.curves(None, [row | {"lpips": 0.5} for row in history], 64, "")
    assert lines(figures[1].axes[0])["lpips"] == [0.5] * 3


def test_steps_are_whole_and_no_legend_lies_on_a_curve(figures):
    """Also of a run of three steps."""
    history = [
        {"step": k, "reconstruction": 8 / k, "quantizer": 4 / k, "lpips": 1 / k, "perplexity": 9 + k, "codes_used": 9}
        | {"bits_per_token": 9 - k}
        for k in (1, 2, 3)
    ]
    plots.curves(None, history, 64, "")
    plots.prior_curve(None, history, {"coded_bits_per_token": 6.5, "coded_bits_per_token_independent": 8.25}, "")
    for figure in figures:
        figure.draw_without_rendering()
        for axes in figure.axes:
            assert all(tick == round(tick) for tick in axes.get_xticks())
            assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
            assert axes.get_legend().get_window_extent().y0 >= 0


def test_curves_end_with_their_last_whole_window(figures):
    history = [{"step": k, "reconstruction": 1.0, "perplexity": k, "codes_used": 20} for k in (6, 12, 18, 22)]
    plots.curves(None, history, 64, "")
    assert all(list(line.get_xdata()) == [6, 12, 18] for line in figures[0].axes[0].lines)
    assert plots.whole_windows(history[:3]) == history[:3]
    assert plots.whole_windows(history[:1]) == history[:1]
    assert plots.whole_windows([]) == []


def test_a_loss_that_is_zero_has_no_line_where_the_axis_is_logarithmic(figures):
    """FSQ's quantizer has none, and an entry in the legend without a line would look like a mistake."""
    history = [
        {"step": k, "reconstruction": 8 / k, "quantizer": 0.0, "lpips": k - 1, "perplexity": 9, "codes_used": 9}
        for k in (1, 2)
    ]
    plots.curves(None, history, 64, "")
    left, _ = figures[0].axes
    assert lines(left) == {"reconstruction": [8, 4]}
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["reconstruction"]


def test_a_priors_curve_has_the_floor_and_the_held_out_rate(figures):
    history = [{"step": k, "bits_per_token": 9 - k} for k in (1, 2)]
    metrics = {"coded_bits_per_token": 6.5, "coded_bits_per_token_independent": 8.25}
    plots.prior_curve(None, history, metrics, "")
    found = lines(figures[0].axes[0])
    assert found["training, with dropout"] == [8, 7]
    assert found["independent, held out: 8.25"] == [8.25, 8.25]
    assert found["held out: 6.50"] == [6.5, 6.5]


def test_a_picture_is_named_from_top_to_bottom(figures):
    rows = [shades(3)] * 2
    plots.picture(None, rows, ["upper", "lower"], "a title", width=5)
    (axes,) = figures[0].axes
    sheet = axes.images[0].get_array()
    assert sheet.shape == ((2 * 4 + plots.GAP) * 32, (3 * 4 + 2 * plots.GAP) * 32, 3)  # small images are enlarged
    ticks = {label.get_text(): place for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
    assert 0 < ticks["upper"] < sheet.shape[0] / 2 < ticks["lower"] < sheet.shape[0]
    assert axes.get_title(loc="left") == "a title"
    assert axes.yaxis_inverted()


def test_every_picture_has_its_title(figures, pictures, monkeypatch):
    history = [
        {"step": k, "reconstruction": 1.0, "perplexity": 9, "codes_used": 9, "bits_per_token": 4} for k in (2, 6)
    ]
    rates = {"coded_bits_per_token": 6.5, "coded_bits_per_token_independent": 8.25}
    plots.curves(None, history, 64, "of a run")
    plots.prior_curve(None, history, rates, "of a prior")
    assert [figure.axes[0].get_title() for figure in figures] == ["of a run", "of a prior"]
    titles = []
    monkeypatch.setattr(plots, "picture", lambda path, rows, words, title, width: titles.append(title))
    plots.reconstructions(None, shades(2), shades(2), "a")
    plots.samples(None, shades(4), "b")
    plots.neighbours(None, shades(2), shades(2), "c")
    plots.codebook(None, shades(4), "d")
    assert titles == ["a", "b", "c", "d"]


def test_axes_of_curves_are_named_and_hold_what_is_drawn(figures):
    """The line of K lies within its axis; a prior's curve stands at its steps."""
    history = [
        {"step": k, "reconstruction": 1.0, "perplexity": 9, "codes_used": 9, "bits_per_token": 4} for k in (2, 6)
    ]
    plots.curves(None, history, 64, "")
    plots.prior_curve(None, history, {"coded_bits_per_token": 1, "coded_bits_per_token_independent": 2}, "")
    (left, right), (only,) = (figure.axes for figure in figures)
    assert right.get_ylim()[1] > 64
    assert [axes.get_xlabel() for axes in (left, right, only)] == ["step"] * 3
    assert (left.get_ylabel(), only.get_ylabel()) == ("training loss, unweighted", "bits per token")
    assert list(only.lines[0].get_xdata()) == [2, 6]


def test_large_images_are_shown_as_they_are_on_a_figure_of_their_shape(figures):
    plots.picture(None, [np.zeros((2, 200, 200, 3), dtype=np.uint8)], [], "", width=8)
    (figure,) = figures
    assert figure.axes[0].images[0].get_array().shape[:2] == (200, 400 + plots.GAP)
    width, height = figure.get_size_inches()
    assert (width, height) == (8, pytest.approx(0.95 * 8 * 200 / 402 + 0.4))


def test_a_picture_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """The one of an earlier run stays until then; its file says nothing of the program, so equal runs are equal."""
    path = tmp_path / "new" / "curve.png"
    plots.save(Figure(figsize=(4, 2)), path)
    with Image.open(path) as picture:
        assert picture.size == (440, 220)
        assert "Software" not in picture.info
    before = path.read_bytes()

    def fail(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save(Figure(), path)
    assert [*path.parent.iterdir()] == [path]
    assert path.read_bytes() == before


def test_pictures_have_no_marks_and_lines_are_told_apart(figures, monkeypatch):
    """No ticks below a picture, no grid across it; K is dotted, the held-out rate dashed; sizes by what is shown."""
    plots.picture(None, [shades(3)], ["only"], "", width=5)
    axes = figures[0].axes[0]
    assert list(axes.get_xticks()) == []
    assert not any(line.get_visible() for line in axes.get_ygridlines())
    assert not any(tick.tick1line.get_markersize() for tick in axes.yaxis.get_major_ticks())
    history = [
        {"step": k, "reconstruction": 1.0, "perplexity": 9, "codes_used": 9, "bits_per_token": 4} for k in (2, 6)
    ]
    plots.curves(None, history, 64, "")
    plots.prior_curve(None, history, {"coded_bits_per_token": 1, "coded_bits_per_token_independent": 2}, "")
    right, only = figures[1].axes[1], figures[2].axes[0]
    assert right.get_ylabel() == "codes, over one logging window"
    assert [line.get_linestyle() for line in right.lines] == ["-", "-", ":"]
    assert [line.get_linestyle() for line in only.lines] == ["-", ":", "--"]
    widths = []
    monkeypatch.setattr(plots, "picture", lambda *rest, width: widths.append(width))
    plots.reconstructions(None, shades(2), shades(2), "")
    plots.samples(None, shades(4), "")
    plots.neighbours(None, shades(2), shades(2), "")
    plots.codebook(None, shades(4), "")
    assert widths == [12, 8, 12, 10]
