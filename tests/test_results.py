"""What is published follows from the runs that are kept beside it, to the digit."""

import re

import pandas as pd
import pytest

from bench.analysis.frames import frame
from bench.core.store import Store
from bench.tokenizers.config import PROTOCOL_VERSION
from tests.published import PAGES, ROOT, output, printed

KEPT = Store(ROOT / "results" / "kept")
LABELS = {
    **{"M par.": "params", "FID-VGG16": "fid_vgg16", "steps to 95 % of perplexity": "steps_to_perplexity"},
    **{"LPIPS alex": "lpips_alex", "LPIPS vgg": "lpips_vgg", "PSNR dB": "psnr", "SSIM": "ssim"},
    **{"perplexity": "perplexity", "grid edges dB": "grid_edges"},
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return frame(KEPT.runs())


def study(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return table[table.run_id.isin(KEPT.study(name)["runs"])]


def rows(page: str, section: str, nth: int = 0) -> list[dict[str, str]]:
    """The rows of the ``nth`` table after the heading or words ``section``: its columns without arrows, by name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = text[text.index(section) :]
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[nth].splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found]
    head = [re.sub(r" [↑↓]$", "", cell) or "name" for cell in cells[0]]
    return [dict(zip(head, line, strict=True)) for line in cells[2:]]


def same(text: str, values: pd.Series) -> None:
    """That ``text``, a number or "mean ± standard deviation", is what ``values`` round to."""
    mean, _, spread = text.replace("−", "-").partition(" ± ")
    for said, value in ((mean, values.mean()), (spread, values.std())):
        if said:
            digits = len(said.partition(".")[2])
            assert f"{value:.{digits}f}" == said


def holds(row: dict[str, str], runs: pd.DataFrame, suffix: str = "") -> int:
    """Compares each number of ``row`` that is a metric with ``runs``; how many there were."""
    compared = 0
    for label, text in row.items():
        name = LABELS.get(label, "") + suffix
        if name in runs and text not in ("–", ""):
            same(text, runs[name] / (1e6 if name == "params" else 1))
            compared += 1
    return compared


@pytest.mark.parametrize(("page", "arguments", "text"), [(page, *one) for page in PAGES for one in printed(page)])
def test_a_table_is_what_the_command_above_it_prints(page, arguments, text):
    assert text
    assert text == output(arguments)


def test_commands_of_reports_are_all_tried():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len([*printed(page)]) == text.count("--results results/kept --columns")


def test_the_answer_s_numbers_are_those_of_its_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    answer = text[text.index("**The answer so far") : text.index("![Originals")]
    said = re.findall(r"\d\d\.\d\d", answer)
    known = {row["PSNR dB"].strip("*").partition(" ± ")[0] for row in rows("README.md", "| backbone | seeds |")}
    assert len(said) == 7  # of six backbones and k-means
    assert {*said} <= known


def test_options_of_backbones_are_as_published(table):
    runs = study(table, "variants-smoke-match=params_275200")
    backbone, plain = "", {"token_order": "raster", "attention": 0}
    flags = ("patch_overlap", "final_conv", "two_streams", "vision_mixer", "rotary", "rms_norm", "full_resolution")
    plain |= dict.fromkeys(flags, False)
    compared = 0
    for row in rows("results/REPORT.md", "## Options one at a time"):
        words = row["name"].strip("`").split()
        backbone = backbone if words[0].startswith("--") else words[0]
        flag = words[0][2:].replace("-", "_") if words[0].startswith("--") else None
        value = {flag: (type(plain[flag])(words[1]) if len(words) > 1 else True)} if flag else {}
        own = runs[(runs.backbone == backbone) & (runs[list(plain)] == pd.Series({**plain, **value})).all(axis=1)]
        if backbone not in {*runs.backbone}:
            continue  # not kept
        assert sorted(own.seed) == [0, 1, 2]
        assert holds(row, own) == 5
        compared += 1
        assert row["width × depth"] == f"{own.width.iloc[0]} × {own.depth.iloc[0]}"
    assert compared * 3 == len(runs) - 3  # `cross` of this hybrid is left out


def test_what_is_kept_is_of_this_protocol_and_finished(table):
    assert {*table.status} == {"finished"}
    assert {*table.protocol_version} == {PROTOCOL_VERSION}
    assert len(table) == len(KEPT.runs())
    assert not [
        name for name in table.drop(columns="folder") if table[name].astype(str).str.contains("/tmp|/root|/work").any()
    ]


def test_pages_name_no_folder_of_the_machine_that_made_them():
    for path in (ROOT / "results" / "comparison").rglob("*.*"):
        text = path.read_bytes() if path.suffix in (".html", ".md", ".csv") else b""
        assert not re.search(rb"/(tmp|root|work|home)/", text), path


def test_kept_runs_are_small():
    assert sum(path.stat().st_size for path in KEPT.root.rglob("*")) < 60e6
    assert {path.suffix for path in KEPT.root.rglob("*") if path.is_file()} <= {".json", ".jsonl", ".npz"}
