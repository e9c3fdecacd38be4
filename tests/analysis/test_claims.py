"""Claims about runs whose truth is known are answered by it, and by nothing where there is too little to say."""

import re

import numpy as np
import pytest

from bench.analysis.claims import NO, OPEN, YES, Claim, answers, read_claims
from bench.analysis.frames import frame
from bench.analysis.report import contents, markdown, select
from bench.core.errors import Damaged
from bench.core.store import Store
from bench.sweeps.definition import parse_study
from bench.sweeps.search import make_plan
from bench.tokenizers.config import make_config
from studies import blog_claims, celeba_sweep
from tests.fabricate import fabricate

SEEDS = range(4)


@pytest.fixture
def table(tmp_path):
    """vit is a dB above cnn, and K 256 half a dB above K 128; mamba is as cnn, up to noise."""
    store, rng = Store(tmp_path), np.random.default_rng(0)
    runs = []
    for backbone, gain in {"cnn": 0.0, "vit": 1.0, "mamba": 0.0}.items():
        for codes, more in {128: 0.0, 256: 0.5}.items():
            for seed in SEEDS:
                config = make_config(backbone, "smoke", codebook_size=codes, seed=seed, device="cpu")
                psnr = 20 + gain + more + seed + 0.02 * rng.standard_normal()  # seeds differ more than backbones
                runs.append(fabricate(store, config, psnr=psnr))
    return frame(runs)


def claim(more: dict, less: dict, margin: float = 0.0) -> Claim:
    return Claim("it was said", "psnr", more, less, margin)


VIT, CNN, MAMBA = ({"backbone": name} for name in ("vit", "cnn", "mamba"))


def test_what_is_true_is_yes_and_its_opposite_no(table):
    codes = {"codebook_size": 256}, {"codebook_size": 128}
    found = answers(table, [claim(VIT, CNN), claim(CNN, VIT), claim(*codes), claim(*codes[::-1]), claim(MAMBA, CNN)])
    assert [one.answer for one in found] == [YES, NO, YES, NO, OPEN]
    assert "vit against cnn: +0.98 PSNR dB [" in found[0].evidence
    assert "4 paired seeds" in found[0].evidence
    assert found[2].evidence.endswith("; at 128 bits an image against 112")
    assert "bits" not in found[0].evidence


def test_likeness_takes_an_interval_within_the_margin(table):
    pairs = [(MAMBA, CNN, 0.2), (MAMBA, CNN, 1e-6), (VIT, CNN, 0.2)]
    found = answers(table, [claim(more, less, margin) for more, less, margin in pairs])
    assert [one.answer for one in found] == [YES, OPEN, NO]


def test_few_seeds_or_none_answer_nothing(table):
    few = answers(table[table.seed < 2], [claim(VIT, CNN)])[0]
    assert few.answer == OPEN
    assert "on 2 of the 3 seeds" in few.evidence
    none = answers(table[table.backbone != "vit"], [claim(VIT, CNN)])[0]
    assert none == (none.claim, OPEN, "vit against cnn: no runs that share a seed")


def test_a_seed_is_averaged_over_the_settings_that_every_seed_has(table):
    """vit gains 1 dB at K 128 and 5 at 256, which its seed 3 has lost."""
    table = table.assign(psnr=table.psnr + 4 * ((table.backbone == "vit") & (table.codebook_size == 256)))
    lost = table[~((table.seed == 3) & (table.codebook_size == 256))]
    full, part = (answers(rows, [claim(VIT, CNN)])[0] for rows in (table, lost))
    assert (full.answer, part.answer) == (YES, YES)
    assert "vit against cnn: +2.98 PSNR dB" in full.evidence
    assert re.search(r"vit against cnn: \+(0\.9|1\.0)\d PSNR dB .*4 paired seeds", part.evidence)


def test_claims_on_one_metric_are_corrected_together(table):
    noisy = table.assign(psnr=table.psnr + 0.5 * (table.backbone == "vit") * np.where(table.seed % 2, 1, -1))
    alone = answers(noisy, [claim(VIT, CNN)])[0]
    among = answers(noisy, [claim(VIT, CNN), *[claim(MAMBA, CNN)] * 30])[0]
    assert (alone.answer, among.answer) == (YES, OPEN)


@pytest.mark.parametrize("study", [blog_claims.STUDY, celeba_sweep.STUDY], ids=lambda study: study.name)
def test_a_study_plans_runs_on_both_sides_of_every_claim(study, tmp_path):
    words = ["--results", str(tmp_path), "--data", "photos", "--device", "cpu"]
    plan = make_plan(study, parse_study(study, "", words))
    stored = plan.header()["claims"]
    assert read_claims(stored) == list(study.claims)
    configs = [vars(cell.configs[0]) for cells in plan.cells.values() for cell in cells]
    for one in study.claims:
        for side in (one.more, one.less):
            assert any(side.items() <= config.items() for config in configs), (one.words, side)


def test_a_report_answers_the_claims_of_its_study(tmp_path):
    store = Store(tmp_path)
    runs = {}
    for backbone, gain in {"cnn": 0.0, "vit": 1.0}.items():
        for seed in SEEDS:
            config = make_config(backbone, "smoke", seed=seed, device="cpu")
            runs[fabricate(store, config, psnr=20 + gain + seed).folder.name] = {"backbone": backbone, "seed": seed}
    header = {"kind": "ablation", "sweep": [], "metrics": ["psnr"], "claims": [claim(VIT, CNN)._asdict()]}
    store.extend_study("said", header, runs)
    selection = select(["said"], tmp_path)
    page = markdown(contents(selection, frame(selection.runs), frame([])))
    assert "| it was said | yes | vit against cnn: +1.00" in page


@pytest.mark.parametrize(
    "stored",
    [
        *([{"words": "x"}], [1], 7, [{**claim(VIT, CNN)._asdict(), "more": {"backbone": ["vit"]}}]),
        *(
            [{**claim(VIT, CNN)._asdict(), name: value}]
            for name, value in (("metric", "x"), ("less", {}), ("margin", "1"))
        ),
        [{**claim(VIT, CNN)._asdict(), "more": {"no_field": 1}}],
    ],
)
def test_what_is_no_claim_is_told_as_damage(tmp_path, stored):
    store = Store(tmp_path)
    run = fabricate(store, make_config("vit", "smoke", device="cpu"))
    header = {"kind": "ablation", "sweep": [], "metrics": ["psnr"], "claims": stored}
    store.extend_study("said", header, {run.folder.name: {}})
    selection = select(["said"], tmp_path)
    with pytest.raises(Damaged, match=r"said\.json"):
        contents(selection, frame([run]), frame([]))
