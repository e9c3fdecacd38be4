"""Frames: what each metric's better direction is, what may be compared with what, and what a summary averages."""

import itertools
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.analysis.frames import (
    BUDGETS,
    CLOCKED,
    CONFIG,
    METRICS,
    PRIOR,
    PRIOR_METRICS,
    best_first,
    blocks,
    differing,
    frame,
    main_metric,
    protocols,
    read,
    settings,
    summary,
    uneven,
    unmatched,
    with_rates,
)
from bench.core.errors import Damaged
from bench.core.store import Store
from bench.priors.config import PriorConfig
from bench.tokenizers.config import Config, make_config
from tests.fabricate import fabricate, fabricate_prior

PROTOCOL = {
    **{"version": 1, "data": "photos", "fingerprint": "f" * 64, "split": "a / b", "count": 64, "skipped": 0},
    "scored_on": "test",
    **{"image_size": 32, "resizer": "none", "rounding": "uint8", "precision": "fp32", "extractor_vgg16": "v"},
    **{"extractor_alex": "a", "extractor_inception": None, "device": "cpu"},
}
MACHINE = {"commit": "abc", "processor": "x", "threads": 2}


@dataclass
class Known:
    """A run as a frame reads it, without a folder."""

    asked: Config | PriorConfig
    status: str = "finished"
    scores: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=lambda: dict(PROTOCOL))
    over: Config | None = None
    reason: str = ""
    elsewhere = False

    @property
    def folder(self) -> Path:
        return Path(self.asked.run_id())

    def snapshot(self) -> "Known":
        return self

    def ending(self) -> tuple[str, str]:
        return self.status, self.reason

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    def settings(self, kind: type, part: str = "config") -> Config | PriorConfig:
        return kind(**(self.config() if part == "config" else self.tokenizer()))

    def config(self) -> dict[str, Any]:
        return asdict(self.asked)

    def tokenizer(self) -> dict[str, Any]:
        return asdict(self.over)

    def environment(self) -> dict[str, Any]:
        return MACHINE

    def metrics(self) -> dict[str, Any]:
        return self.scores

    def protocol(self) -> dict[str, Any]:
        return dict(self.measured)

    def instruments(self) -> dict[str, Any]:
        return {}


def smoke(backbone="cnn", **changes) -> Config:
    return make_config(backbone, "smoke", device="cpu", precision="fp32", **changes)


def scored(config: Config, psnr: float = 20.0, **changes) -> Known:
    """A finished run of ``config``; ``changes`` are metrics or protocol fields."""
    scores = {"psnr": psnr, "params": 1e6, "flops": 1e8, "train_seconds": 30.0}
    scores |= {name: value for name, value in changes.items() if name in METRICS}
    return Known(config, "finished", scores, PROTOCOL | {n: v for n, v in changes.items() if n not in METRICS})


# -- directions -------------------------------------------------------------------------------------------------------

# Written down from what the metrics mean, not from the table under test.
BETTER = {
    "lower": "fid fid_vgg16 kid_vgg16 lpips_alex lpips_vgg grid_energy grid_edges dead_codes bits_per_image"
    " bits_per_pixel params params_encoder params_decoder flops flops_encode flops_decode peak_memory_mb train_seconds"
    " codebook_roughness fd_dinov2",
    "higher": "psnr ssim perplexity usage images_per_second_encode images_per_second_decode",
    "": "sharpness steps_to_perplexity steps_to_loss grid_energy_init grid_edges_init tokens images_seen score_seconds",
}
CURVES = [f"{kind}_{share}" for kind in ("random", "near") for share in (0, 1, 5, 10, 20)]
CURVES += [f"size_{percent}" for percent in (100, 150, 200)]
INSTRUMENTS_BETTER = {
    "lower": "loss_random loss_near equivariance_cell equivariance_half equivariance_flip equivariance_zoom "
    + " ".join(f"lpips_{name}" for name in CURVES),
    "higher": "codes_kept_cell alone_psnr purity code_label_bits probe_linear_codes probe_linear_vectors"
    " probe_knn_codes probe_knn_vectors " + " ".join(f"psnr_{name}" for name in CURVES),
    "": "codes_kept_flip probe_chance",
}
PRIOR_BETTER = {
    "lower": "coded_bits_per_token coded_bits_per_image coded_bits_per_pixel gfid gfid_vgg16 gkid_vgg16 params_prior"
    " flops_prior peak_memory_mb train_seconds gfd_dinov2",
    "higher": "precision_vgg16 recall_vgg16 images_per_second_sample",
    "": "coded_bits_per_token_train coded_bits_per_token_independent nearest_train_psnr nearest_val_psnr copy_rate"
    " sampling_speedup grids_seen",
}


TOKENIZER_BETTER = {direction: f"{BETTER[direction]} {INSTRUMENTS_BETTER[direction]}" for direction in BETTER}


@pytest.mark.parametrize(
    ("metrics", "better"), [(METRICS, TOKENIZER_BETTER), (PRIOR_METRICS, PRIOR_BETTER)], ids=["", "prior"]
)
def test_every_metric_is_better_in_the_direction_that_its_meaning_gives(metrics, better):
    known = {name: direction for direction, names in better.items() for name in names.split()}
    assert {name: metric.better for name, metric in metrics.items()} == known
    arrows = {"lower": "↓", "higher": "↑", "": ""}
    assert all(metrics[name].arrow == arrows[direction] for name, direction in known.items())


def test_metrics_are_clocked_that_a_faster_machine_changes():
    """Training time and every throughput; the time that scoring takes is not compared at all."""
    times = {name for name in {*METRICS, *PRIOR_METRICS} if "second" in name or "speedup" in name}
    assert set(CLOCKED) == times - {"score_seconds"}


# -- one row per run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "grid", "codes"), [(32, 4, 128), (64, 8, 512), (64, 1, 3), (32, 16, 1000)])
def test_bits_follow_from_grid_and_codebook_also_without_scores(size, grid, codes):
    """log2 K bits for each of grid² codes, spread over size² pixels."""
    (row,) = frame([Known(smoke(image_size=size, grid_size=grid, codebook_size=codes), "diverged")]).to_dict("records")
    assert row["tokens"] == grid * grid
    assert 2 ** (row["bits_per_image"] / (grid * grid)) == pytest.approx(codes)
    assert row["bits_per_pixel"] * size * size == pytest.approx(row["bits_per_image"])


def test_a_row_is_the_run_and_nothing_is_made_up():
    config = smoke("vit", beta=0.5, seed=3)
    failed = Known(smoke(seed=4), "crashed", {"psnr": 99.0}, reason="a signal")
    table = frame([scored(config, 21.5, count=99, lpips_vgg_kmeans=0.4), failed])
    first, second = table.to_dict("records")
    assert {name: first[name] for name in asdict(config)} == asdict(config)
    assert (first["run_id"], first["status"], first["psnr"]) == (config.run_id(), "finished", 21.5)
    assert {name: first[name] for name in MACHINE} == MACHINE
    assert {n.removeprefix("protocol_"): v for n, v in first.items() if n.startswith("protocol_")}.items() >= {
        ("count", 99),
        ("data", "photos"),
    }
    assert (second["status"], second["reason"]) == ("crashed", "a signal")
    assert math.isnan(second["psnr"])  # scores of a run that did not finish are nobody's
    assert pd.isna(second["protocol_count"])
    assert table[list(METRICS)].dtypes.eq(float).all()
    assert set(METRICS) < set(frame([]).columns)  # also of no runs


def test_a_setting_that_an_older_run_lacks_is_the_default():
    class Older(Known):
        def config(self):
            return {name: value for name, value in super().config().items() if name != "revive_after"}

    table = frame([Older(smoke(), "crashed"), Known(smoke(revive_after=7), "crashed")])
    assert list(table.revive_after) == [50, 7]


# -- what may be compared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOL)
def test_each_field_of_the_protocol_alone_separates(name):
    """(bug 17)"""
    other = {"extractor_inception": "i"}.get(name, "other" if isinstance(PROTOCOL[name], str) else 7)
    twins = frame([scored(smoke()), scored(smoke(seed=1))])
    assert [len(group) for group in protocols(twins)] == [len(group) for group in blocks(twins)] == [2]
    apart = frame([scored(smoke()), scored(smoke(seed=1), **{name: other})])
    assert [len(group) for group in protocols(apart)] == [len(group) for group in blocks(apart)] == [1, 1]
    one, two = protocols(apart)
    assert differing(one, two) == {name: (one[f"protocol_{name}"].iloc[0], two[f"protocol_{name}"].iloc[0])}
    assert differing(twins[:1], twins[1:]) == {}


def test_blocks_hold_equal_bits_however_they_are_spent():
    """(bug 17) 4×4 codes of K = 256 and 8×8 of K = 4 are both 128 bits; few bits come first, and nothing is lost."""
    sizes = [(8, 64), (4, 256), (8, 4), (4, 16)]
    table = frame(
        scored(smoke(grid_size=grid, codebook_size=codes, seed=seed)) for grid, codes in sizes for seed in (0, 1)
    )
    found = [sorted({*zip(part.grid_size, part.codebook_size, strict=True)}) for part in blocks(table)]
    assert found == [[(4, 16)], [(4, 256), (8, 4)], [(8, 64)]]
    assert sum(map(len, blocks(table))) == len(table)
    few, some, _ = blocks(table)
    assert differing(few, some) == {"bits_per_image": (64, 128)}


def test_blocks_hold_finished_runs_alone_and_the_largest_protocol_comes_first():
    runs = [scored(smoke(seed=seed), count=99) for seed in range(2)]
    runs += [scored(smoke(seed=seed)) for seed in range(2, 5)]
    table = frame([*runs, *(Known(smoke(seed=seed), "diverged") for seed in (5, 6, 7, 8))])
    assert [list(group.seed) for group in protocols(table)] == [[2, 3, 4], [0, 1]]
    assert [list(part.seed) for part in blocks(table)] == [[2, 3, 4], [0, 1]]
    assert protocols(table[table.status != "finished"]) == []


def test_settings_vary_within_a_backbone_and_uneven_ones_between():
    """The seed and what says who ran are neither; a value that is missing is a value."""
    cells = itertools.product(("cnn", "vit"), (0.25, 1.0), (0, 1))
    table = frame(scored(smoke(name, beta=beta, seed=seed)) for name, beta, seed in cells)
    assert settings(table) == ["beta"]
    assert uneven(table) == ["width", "depth"]
    assert settings(table[table.beta == 1.0]) == []
    other = table.assign(device=["cpu", "cuda"] * 4, precision=["fp32", "bf16"] * 4, image_size=[32, 64] * 4)
    assert settings(other) == ["beta"]
    gappy = table.assign(entropy_weight=[None, 0.1] * 4)
    assert settings(gappy) == ["beta", "entropy_weight"]
    alone = table[(table.backbone == "vit") | (table.beta == 0.25)]  # swept in one backbone is swept
    assert settings(alone) == ["beta"]
    assert settings(frame([])) == []


# -- averages ---------------------------------------------------------------------------------------------------------


def test_a_summary_is_mean_and_sample_deviation_per_backbone_and_setting():
    generator = np.random.default_rng(0)
    cells = list(itertools.product(("cnn", "vit"), (0.25, 1.0), (0, 1, 2)))
    values = dict(zip(cells, generator.normal(20, 1, len(cells)), strict=True))
    table = frame(scored(smoke(name, beta=beta, seed=seed), psnr) for (name, beta, seed), psnr in values.items())
    found = summary(table.drop(index=0)).set_index(["backbone", "beta"])
    assert list(found.index) == list(itertools.product(("cnn", "vit"), (0.25, 1.0)))
    for name, beta in found.index:
        own = [value for key, value in values.items() if key[:2] == (name, beta) and key != cells[0]]
        mean = sum(own) / len(own)
        assert found.n[name, beta] == len(own)
        assert found.psnr[name, beta] == pytest.approx(mean)
        spread = math.sqrt(sum((value - mean) ** 2 for value in own) / (len(own) - 1))
        assert found.psnr_std[name, beta] == pytest.approx(spread)
    alone = summary(table[table.seed == 0])
    assert alone.psnr_std.isna().all()
    assert (alone.n == 1).all()
    assert "fid" not in found  # nobody has it


def test_a_setting_that_is_missing_has_a_row_of_its_own():
    table = frame(scored(smoke(seed=seed), float(seed)) for seed in range(4))
    found = summary(table.assign(entropy_weight=[None, 0.1, None, 0.1]))
    assert sorted(zip(found.entropy_weight.fillna(-1), found.n, found.psnr, strict=True)) == [(-1, 2, 1), (0.1, 2, 2)]


def test_failures_are_counted_that_would_have_been_in_the_block():
    """Those of the same data, image size and bits, whether their setting was ever scored or not; no others."""
    block = frame(scored(smoke(seed=seed)) for seed in (0, 1))
    failed = [smoke(seed=2), smoke("vit"), smoke("vit", seed=1)]
    others = [smoke(codebook_size=64), smoke(grid_size=8), smoke(data="cifar10"), smoke(image_size=64)]
    unscored = frame(Known(config, "diverged") for config in (*failed, *others))
    found = summary(block, unscored).set_index("backbone")
    assert found.failed.to_dict() == {"cnn": 1, "vit": 2}
    assert found.n.to_dict() == {"cnn": 2, "vit": 0}
    assert math.isnan(found.psnr["vit"])
    assert list(summary(block).failed) == [0]
    equal_bits = frame([Known(smoke("vit", grid_size=8, codebook_size=4), "crashed")])
    assert summary(frame([scored(smoke(codebook_size=256))]), equal_bits).failed.sum() == 1
    assert summary(block, frame([Known(smoke(seed=2, split="val"), "diverged")])).failed.sum() == 0


def test_what_was_scored_is_no_setting_that_was_swept():
    assert settings(frame([scored(smoke()), scored(smoke(split="val"))])) == []


def test_only_who_is_off_in_every_budget_is_unmatched():
    """2 % of parameters, 2 % of FLOPs, 5 % of training time, off the median of the backbones' means."""
    assert BUDGETS == {"params": 0.02, "flops": 0.02, "train_seconds": 0.05}
    usual = {"params": 1e6, "flops": 1e8, "train_seconds": 30.0}

    def marked(**factors) -> bool:
        costs = {name: usual[name] * factors.get(name, 1.0) for name in usual}
        runs = [scored(smoke(name, seed=seed), **usual) for name in ("cnn", "vit") for seed in (0, 1, 2)]
        table = frame([*runs, scored(smoke("mamba"), **costs)])
        found = unmatched(table)
        assert not found[table.backbone != "mamba"].any()
        return bool(found[table.backbone == "mamba"].all())

    over = {"params": 1.03, "flops": 1.03, "train_seconds": 1.06}
    under = {"params": 0.97, "flops": 0.97, "train_seconds": 0.94}
    assert marked(**over)
    assert marked(**under)
    for name, close in {"params": 1.019, "flops": 0.981, "train_seconds": 1.049}.items():
        assert not marked(**{**over, name: close})
    assert not marked()
    alone = frame(scored(smoke(seed=seed), params=1e6 * (1 + seed), flops=1e8, train_seconds=30.0) for seed in range(2))
    assert not unmatched(alone).any()


def test_many_runs_of_one_backbone_do_not_move_the_median_of_all():
    """Three backbones of one run each agree with each other; ten runs of a fourth are what is off."""
    runs = [scored(smoke(name), params=1e6, flops=1e8, train_seconds=30) for name in ("cnn", "vit", "mamba")]
    runs += [scored(smoke("convnext", seed=s), params=2e6, flops=2e8, train_seconds=60) for s in range(10)]
    table = frame(runs)
    assert list(unmatched(table)) == list(table.backbone == "convnext")


# -- priors -----------------------------------------------------------------------------------------------------------


def prior_over(config: Config, prior: str, bits: float, **changes) -> Known:
    asked = PriorConfig(config.run_id(), prior, **changes)
    scores = {"coded_bits_per_image": bits, "coded_bits_per_pixel": bits / config.image_size**2, "gfid_vgg16": 90.0}
    return Known(asked, "finished", scores, {**PROTOCOL, "tokenizer": config.run_id()[-8:]}, config)


def test_the_rate_of_codes_is_that_of_the_best_prior_over_them():
    """The least of all priors, each over its own tokenizer; missing where there is none."""
    configs = [smoke(), smoke(seed=1), smoke("vit")]
    rates = [(configs[0], "rnn", 90.0), (configs[0], "mamba", 80.0), (configs[0], "independent", 100.0)]
    rates += [(configs[2], "independent", 70.0)]
    priors = frame((prior_over(*one) for one in rates), PRIOR)
    table = with_rates(frame(scored(config) for config in configs), priors)
    assert list(table.run_id) == [config.run_id() for config in configs]
    assert table.coded_bits_per_image.fillna(-1).tolist() == [80.0, -1, 70.0]
    assert table.coded_bits_per_pixel.fillna(-1).tolist() == [80.0 / 1024, -1, 70.0 / 1024]


def test_a_priors_row_tells_its_settings_from_its_tokenizers():
    over = smoke("vit", steps=77, lr=0.5, seed=4, beta=0.5)
    run = prior_over(over, "rnn", 80.0, steps=11, seed=1, top_k=3)
    (row,) = frame([run], PRIOR).to_dict("records")
    assert {name: row[name] for name in asdict(run.asked)} == asdict(run.asked)
    assert (row["tokenizer_steps"], row["tokenizer_lr"], row["tokenizer_seed"]) == (77, 0.5, 4)
    assert (row["backbone"], row["beta"], row["coded_bits_per_image"]) == ("vit", 0.5, 80.0)
    assert row["tokenizer_digest"] == over.run_id()[-8:]
    assert "protocol_tokenizer" not in row  # else no two tokenizers' priors would share a table
    assert row["protocol_data"] == "photos"
    unfinished = frame([Known(run.asked, "diverged", {"gfid_vgg16": 1.0}, {}, over)], PRIOR)
    assert unfinished.gfid_vgg16.isna().all()


def test_settings_of_priors_are_theirs_and_their_tokenizers_but_no_seed():
    def swept(*runs):
        return settings(frame(runs, PRIOR), PRIOR)

    one, two = smoke(), smoke(seed=1)
    assert swept(prior_over(one, "rnn", 1.0), prior_over(two, "rnn", 2.0, seed=1)) == []
    assert swept(prior_over(one, "rnn", 1.0), prior_over(one, "mamba", 1.0, steps=9)) == []  # of different kinds
    assert swept(prior_over(one, "rnn", 1.0), prior_over(smoke(beta=1.0), "rnn", 1.0)) == ["beta"]
    longer = smoke(steps=999)
    assert swept(prior_over(one, "rnn", 1.0), prior_over(longer, "rnn", 1.0, top_k=5)) == ["top_k", "tokenizer_steps"]
    assert settings(frame([], PRIOR), PRIOR) == []


# -- gaps -------------------------------------------------------------------------------------------------------------


def test_columns_of_numbers_are_numbers_also_where_none_was_measured():
    """Of runs and priors alike, k-means' and the bounds of a prior included."""
    table = frame([scored(smoke(), psnr_kmeans=None), Known(smoke(seed=1), "crashed")])
    assert all(table[name].dtype == float for name in METRICS)
    bounds = {"gfid_vgg16_real": None, "gfid_vgg16_shuffled": None}
    run = prior_over(smoke(), "rnn", 80.0)
    run.scores |= bounds
    priors = frame([run], PRIOR)
    assert all(priors[name].dtype == float for name in (*PRIOR_METRICS, *bounds))
    with_kmeans = scored(smoke())
    with_kmeans.scores["psnr_kmeans"] = None
    assert frame([with_kmeans]).psnr_kmeans.dtype == float


def test_a_run_without_scores_has_its_tokens_and_its_machine():
    (row,) = frame([Known(smoke(grid_size=8), "crashed")]).to_dict("records")
    assert row["tokens"] == 64
    assert {name: row[name] for name in MACHINE} == MACHINE
    (prior,) = frame([Known(PriorConfig("t", "rnn"), "crashed", over=smoke())], PRIOR).to_dict("records")
    assert (prior["processor"], prior["threads"], prior["folder"]) == ("x", 2, prior["run_id"])


def test_what_neither_block_has_does_not_differ_and_what_one_has_does():
    with_fid = frame([scored(smoke(), extractor_inception="i")])
    assert differing(frame([scored(smoke())]), frame([scored(smoke(seed=1))])) == {}
    missing = with_fid.assign(protocol_extractor_inception=math.nan)
    assert differing(missing, missing) == differing(missing, frame([scored(smoke())])) == {}
    assert differing(frame([scored(smoke())]), with_fid) == {"extractor_inception": (None, "i")}
    assert list(differing(with_fid, with_fid.assign(protocol_count=9, protocol_extractor_inception=None))) == [
        "count",
        "extractor_inception",
    ]


def test_a_setting_that_one_backbone_lacks_is_uneven_and_a_metric_that_one_has_is_averaged():
    table = frame([scored(smoke()), scored(smoke("vit"), ssim=0.5)])
    assert "entropy_weight" in uneven(table.assign(entropy_weight=[0.1, None]))
    found = summary(table).set_index("backbone")
    assert found.ssim["vit"] == 0.5
    assert math.isnan(found.ssim["cnn"])
    assert list(found.columns[:2]) == ["n", "failed"]


def test_what_ranks_is_decided_by_finished_runs_and_by_any_that_was_trained_on_it():
    """A failed run flatters nothing; one finished run among many does."""

    def run(net: str, status: str = "finished") -> dict:
        scores = {"lpips_alex": 0.3, "lpips_vgg": 0.4} if status == "finished" else {}
        return {"status": status, "lpips_weight": 1.0, "lpips_net": net, **scores}

    def main(*rows: dict) -> str:
        return main_metric(pd.DataFrame(rows, columns=frame([]).columns))

    assert main(run("vgg"), run("alex", "diverged")) == "lpips_alex"
    assert main(run("vgg"), run("alex")) == "lpips_vgg"


def test_protocols_of_equally_many_runs_come_in_the_order_of_their_runs():
    table = frame([scored(smoke(seed=0), count=99), scored(smoke(seed=1)), scored(smoke(seed=2), count=80)])
    assert [list(group.seed) for group in protocols(table)] == [[0], [1], [2]]


def test_blocks_of_a_protocol_ascend_in_bits():
    table = frame([scored(smoke(codebook_size=k)) for k in (64, 256, 16)])
    assert [part.codebook_size.iloc[0] for part in blocks(table)] == [16, 64, 256]


def test_swept_settings_are_listed_in_the_order_of_their_fields():
    table = frame([scored(smoke()), scored(smoke(lr=1.0, beta=9.0, codebook_size=64, width=1))])
    assert settings(table) == sorted(settings(table), key=CONFIG.index) != sorted(settings(table))


def test_rows_are_ordered_by_the_better_and_equal_ones_stay_as_they_stand():
    table = frame([scored(smoke(seed=seed), psnr) for seed, psnr in enumerate([20.0, 21.0, 20.0, 22.0, 20.0])])
    assert list(best_first(table, "psnr").seed) == [3, 1, 0, 2, 4]
    assert list(best_first(table.assign(fid=table.psnr), "fid").seed) == [0, 2, 4, 1, 3]


def test_a_digest_of_the_tokenizer_is_a_column_and_no_part_of_the_protocol():
    measured = {"version": 1, "tokenizer": "abcd", "scored_on": "test", "count": 64, "data": "photos"}
    over = smoke()
    table = frame([Known(PriorConfig(over.run_id(), "rnn").resolved(), scores={}, measured=measured, over=over)], PRIOR)
    assert table.tokenizer_digest.tolist() == ["abcd"]
    assert [name for name in table if name.startswith("protocol_")] == [
        f"protocol_{name}" for name in ("count", "data", "scored_on", "version")
    ]
    assert table.tokenizer.tolist() == [over.run_id()]


def test_a_column_that_begins_late_is_missing_before():
    """And one that only earlier runs have is missing after."""
    configs = [make_config("cnn", "smoke", seed=seed, device="cpu") for seed in range(3)]
    extra = [{"old": 1.0}, {}, {"new": 2.0, "word": 3.0}]
    table = frame(Known(config, scores=scores) for config, scores in zip(configs, extra, strict=True))
    assert list(table.old.fillna(-1)) == [1.0, -1, -1]
    assert list(table.new.fillna(-1)) == list(table.word.fillna(-1) - [0, 0, 1]) == [-1, -1, 2.0]
    assert list(table.seed) == [0, 1, 2]


def test_of_runs_that_cannot_be_read_each_is_told_and_the_others_have_their_rows():
    class Broken(Known):
        def settings(self, kind):
            raise Damaged("config.json", "it is empty") if self.status == "finished" else FileNotFoundError("gone")

    runs = [Broken(smoke(seed=1)), scored(smoke(seed=2)), Broken(smoke(seed=3), "crashed")]
    table, damaged = read(runs)
    assert table.seed.tolist() == [2]
    assert damaged == [str(Damaged("config.json", "it is empty")), "gone"]
    assert frame(runs).seed.tolist() == [2]


def test_a_protocol_without_what_reports_tell_is_damage():
    """Of tokenizers the data and how many images, of priors how many."""
    lacking = Known(smoke(), measured={name: value for name, value in PROTOCOL.items() if name != "count"})
    table = frame([Known(smoke(seed=1)), lacking])
    assert list(table.status) == ["finished", "damaged"]
    assert "metrics.json is damaged: its protocol has no count; move it away" in table.reason[1]


@pytest.mark.parametrize("tokenizer", [{}, {"backbone": "cnn", "grid_size": "4"}, {"codebook_size": 4}])
def test_a_finished_prior_that_does_not_tell_its_tokenizer_is_named(tmp_path, tokenizer):
    """Its bits would be nobody's; one that failed before it read it has a row."""
    store, config = Store(tmp_path), smoke()
    fabricate(store, config)
    runs = [
        fabricate_prior(store, PriorConfig(config.run_id(), "rnn", seed=seed, device="cpu"), 6.0, 90.0)
        for seed in (0, 1)
    ]
    path = runs[1].folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": tokenizer}))
    table, damaged = read(runs, PRIOR)
    assert list(table.seed) == [0]
    assert [sentence.partition(":")[0] for sentence in damaged] == [f"{path} is damaged"]
    if not tokenizer:
        (runs[1].folder / "metrics.json").unlink()
        assert list(read(runs, PRIOR)[0].status) == ["finished", "unfinished"]


def test_a_priors_tokenizer_of_an_older_version_has_the_defaults_of_this_one(tmp_path):
    store, config = Store(tmp_path), smoke()
    fabricate(store, config)
    run = fabricate_prior(store, PriorConfig(config.run_id(), "rnn", device="cpu"), 6.0, 90.0)
    stored = json.loads((run.folder / "config.json").read_text())
    del stored["tokenizer"]["gan_ramp"]
    run.write("config.json", stored)
    assert list(frame([run], PRIOR).gan_ramp) == [config.gan_ramp]


def test_what_other_versions_call_their_settings_and_scores_replaces_no_column(tmp_path):
    """A score that is called as a run's status, and a setting that is called as a score."""
    config = make_config("cnn", "smoke", device="cpu")
    table = frame([Known(config, scores={"status": 3.0, "folder": 4.0, "seed": 5.0, "psnr": 20.0})])
    assert (table.status[0], table.seed[0], table.psnr[0]) == ("finished", config.seed, 20.0)

    later = Store(tmp_path).named("later")
    later.folder.mkdir(parents=True)
    later.write("config.json", {"config": {**asdict(config), "psnr": "often"}, "environment": MACHINE})
    table = frame([later, Known(config, scores={"psnr": 20.0})])
    assert list(table.psnr.fillna(-1)) == [-1, 20.0]
