"""Tables of a report by the columns that are asked for: equal to those of the report, and nothing that is not there."""

import pytest

from bench import report as command
from bench.analysis.excerpts import excerpt
from bench.analysis.report import write_report
from bench.core.errors import UserError
from bench.core.store import Store
from bench.priors.config import PriorConfig
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate, fabricate_failed, fabricate_prior, sweep


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Two backbones, two β, three seeds; a run that diverged; and a prior."""
    store = Store(tmp_path_factory.mktemp("excerpts") / "results")
    runs = sweep(store, {"cnn": 0.0, "vit": 0.03})
    fabricate_prior(store, PriorConfig(runs[0].folder.name, "transformer"), 4.0, 80.0)
    return store


def lines(text: str) -> list[list[str]]:
    """The cells of every line of Markdown that is a table's."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_rows_are_those_of_the_report_with_the_columns_asked_for_in_their_order(store, tmp_path):
    write_report([], store.root, tmp_path)
    whole = lines((tmp_path / "tables.md").read_text(encoding="utf-8"))
    (head, *_), found = whole, lines(excerpt([], store.root, ["psnr", "lpips_vgg"]))
    assert found[0] == ["backbone", "beta", "seeds", "PSNR dB ↑", "LPIPS vgg ↓"]
    places = [head.index(cell) for cell in found[0]]
    assert len(found) >= 2 + 4 + 1  # head and line, four rows, k-means at least
    assert found == [[row[i] for i in places] for row in whole[: len(found)]]


def test_references_without_any_of_the_columns_are_left_out(store):
    assert any(row[0].startswith("k-means") for row in lines(excerpt([], store.root, ["params", "psnr"])))
    assert not any(row[0].startswith("k-means") for row in lines(excerpt([], store.root, ["params", "steps_to_loss"])))


def test_failed_runs_are_counted_where_there_are_any(store, tmp_path):
    assert "failed" not in excerpt([], store.root, ["psnr"])
    other = Store(tmp_path)
    for seed in (0, 1):
        fabricate(other, make_config("cnn", "smoke", seed=seed))
    fabricate_failed(other, make_config("cnn", "smoke", seed=2))
    head, _, row, *_ = lines(excerpt([], other.root, ["psnr"]))
    assert dict(zip(head, row, strict=True))["failed"] == "1"


def test_verdicts_are_those_of_backbones_and_then_of_settings(store):
    found = lines(excerpt([], store.root, verdicts=["psnr"]))
    assert [row[:3] for row in found if row[0] == "PSNR dB"] == [
        ["PSNR dB", "cnn", "vit"],
        ["PSNR dB", "beta=1", "beta=0.25"],
        ["PSNR dB", "beta=1", "beta=0.25"],
    ]
    assert found[2][-1] == "**vit better**"
    both = excerpt([], store.root, ["psnr"], ["psnr"])
    assert lines(both) == lines(excerpt([], store.root, ["psnr"])) + found


def test_columns_of_priors_give_the_priors_alone(store):
    text = excerpt([], store.root, ["coded_bits_per_token", "gfid_vgg16"])
    assert lines(text)[0] == ["backbone", "prior", "seeds", "bits per token ↓", "gFID vgg16 ↓"]
    assert "before coding" in text.splitlines()[0]
    assert lines(text)[2][-2:] == ["4.000", "80.0"]


@pytest.mark.parametrize(
    ("columns", "verdicts", "said"),
    [
        (["psnrr"], [], "none of these runs has all of psnrr; there are fid_vgg16"),
        (["backbone"], [], "none of these runs has all of backbone; there are"),
        (["psnr", "gfid_vgg16"], [], "none of these runs has all of psnr, gfid_vgg16"),  # never in one ranking
        ([], ["usage_"], "no verdicts are given on 'usage_'; there are some on fid, "),
        ([], ["tokens"], "no verdicts are given on 'tokens'"),  # which has no better
    ],
)
def test_what_is_not_there_is_told_with_what_is(store, columns, verdicts, said):
    with pytest.raises(UserError) as error:
        excerpt([], store.root, columns, verdicts)
    assert str(error.value).startswith(said)


def test_one_run_cannot_be_compared_and_one_without_scores_has_none(tmp_path):
    store = Store(tmp_path)
    fabricate_failed(store, make_config("vit", "smoke"))
    with pytest.raises(UserError, match="none of these runs has scores yet"):
        excerpt([], store.root, ["psnr"])
    fabricate(store, make_config("cnn", "smoke"))
    with pytest.raises(UserError, match="none of these runs can be compared"):
        excerpt([], store.root, verdicts=["psnr"])


def test_the_command_prints_them_and_writes_nothing(store, capsys):
    before = sorted(store.root.rglob("*"))
    assert command.main(["--results", str(store.root), "--columns", "psnr", "--verdicts", "psnr"]) == 0
    assert capsys.readouterr().out == excerpt([], store.root, ["psnr"], ["psnr"]) + "\n"
    assert sorted(store.root.rglob("*")) == before
