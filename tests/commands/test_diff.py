"""python -m bench.diff: what it names, what it refuses to rank, and how it tells mistakes."""

import io
import json
import re
import shutil

import numpy as np
import pytest

from bench.analysis import frames, tables
from bench.analysis.frames import METRICS
from bench.core.errors import UserError
from bench.core.progress import SafeConsole, stdout
from bench.core.runs import Run
from bench.core.store import Store
from bench.diff import main
from bench.priors.config import PriorConfig
from bench.tokenizers.config import make_config
from tests.fabricate import MACHINE, fabricate, fabricate_failed, fabricate_prior


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def diff(store, capsys, monkeypatch):
    """Runs the command line on two runs or their names; gives the exit code, its output and its errors."""
    monkeypatch.setattr(stdout, "width", 120)

    def diff(*names: Run | str) -> tuple[int, str, str]:
        words = [str(name.folder) if isinstance(name, Run) else name for name in names]
        code = main([*words, "--results", str(store.root)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return diff


def smoke(backbone="cnn", **settings):
    return make_config(backbone, "smoke", **settings)


def line(out: str, start: str) -> list[str]:
    """Cells of the table row whose first cell is ``start``."""
    (row,) = [row for row in out.splitlines() if row.strip().startswith(f"{start} ")]
    return re.split(r"\s{2,}", row.strip())


def words_on_b(out: str) -> dict[str, str]:
    """Metric → the word on B."""
    labels = {f"{metric.label} {metric.arrow}".strip(): name for name, metric in METRICS.items()}
    rows = [re.split(r"\s{2,}", row.strip()) for row in out.splitlines()]
    return {labels[row[0]]: row[-1] for row in rows if row[0] in labels and len(row) == 6}


def changed_environment(run: Run, **changes) -> Run:
    run.write("config.json", {"config": run.config(), "environment": {**MACHINE, **changes}})
    return run


def test_names_the_settings_that_differ_and_no_others(store, diff):
    code, out, _ = diff(fabricate(store, smoke()), fabricate(store, smoke(beta=0.5, codebook_size=256)))
    assert code == 0
    assert line(out, "beta") == ["beta", "0.25", "0.5"]
    assert line(out, "codebook_size") == ["codebook_size", "128", "256"]
    for same in ("quantizer", "grid_size", "seed"):
        assert not re.search(rf"^\s+{same} ", out, re.MULTILINE)
    assert "The same environment." in out


def test_metrics_with_difference_change_and_direction(store, diff):
    a, b = (
        fabricate(store, smoke(), quality=0.0, psnr=20.0, fid_vgg16=50.0),
        fabricate(store, smoke("vit"), quality=0.05, psnr=25.0, fid_vgg16=60.0),
    )
    _, out, _ = diff(a, b)
    assert line(out, "PSNR dB ↑")[1:] == ["20.00", "25.00", "+5.00", "+25.0 %", "better"]
    assert line(out, "FID vgg16 ↓")[1:] == ["50.0", "60.0", "+10.0", "+20.0 %", "worse"]
    (equal,) = [line for line in out.splitlines() if line.startswith("Equal in both: ")]
    assert {"tokens 16", "bits per image 112"} <= {*equal.removeprefix("Equal in both: ")[:-1].split("; ")}
    assert not re.search(r"^\s+(tokens|bits per image)", out, re.M)
    assert words_on_b(out)["lpips_alex"] == "better"
    assert "kmeans" not in out
    turned = words_on_b(diff(b, a)[1])
    opposite = {"better": "worse", "worse": "better"}
    assert {name: opposite.get(word, word) for name, word in words_on_b(out).items()} == turned


def test_scores_that_are_shown_alike_are_called_equal(store, diff):
    """A word that the two numbers beside it do not bear out would be read as a mistake, or as a result."""
    a, b = (fabricate(store, smoke(name), psnr=psnr) for name, psnr in (("cnn", 20.001), ("vit", 20.004)))
    for pair in ((a, b), (b, a)):
        assert "; PSNR dB 20.00; " in diff(*pair)[1]
    b = fabricate(store, smoke("vit"), psnr=20.006)
    assert line(diff(a, b)[1], "PSNR dB ↑")[-1] == "better"


def test_the_share_of_images_is_counted(store, diff):
    base = np.linspace(0.2, 0.4, 64)
    a = fabricate(store, smoke(), lpips_alex=0.3, psnr=0.3)
    b = fabricate(store, smoke("vit"), lpips_alex=0.275, psnr=1.3)
    np.savez(a.folder / "per_image.npz", lpips_alex=base, psnr=base)
    np.savez(b.folder / "per_image.npz", lpips_alex=base - 0.1 * (np.arange(64) < 16), psnr=base + 1)
    _, out, _ = diff(a, b)
    assert "B better on 25 % of 64 images by LPIPS alex, 100 % of 64 images by PSNR dB." in out
    (b.folder / "per_image.npz").unlink()
    assert "B better on" not in diff(a, b)[1]


def test_another_seed_is_called_noise(store, diff):
    _, out, _ = diff(fabricate(store, smoke()), fabricate(store, smoke(seed=1)))
    assert "The same configuration with another seed: the differences are seed noise." in out
    assert "seed noise" not in diff(fabricate(store, smoke()), fabricate(store, smoke(seed=1, beta=0.5)))[1]


def test_the_same_run_differs_in_nothing(store, diff):
    run = fabricate(store, smoke())
    _, out, _ = diff(run, run)
    assert "The same configuration." in out
    assert words_on_b(out) == {}
    assert "Equal in both: " in out


def test_environment_differences(store, diff):
    a = changed_environment(fabricate(store, smoke()), versions={"torch": "2.5.0", "numpy": "2.0"})
    b = changed_environment(
        fabricate(store, smoke("vit")), versions={"torch": "2.6.0", "numpy": "2.0"}, python="3.12.1"
    )
    _, out, _ = diff(a, b)
    assert line(out, "versions.torch") == ["versions.torch", "2.5.0", "2.6.0"]
    assert line(out, "python") == ["python", "–", "3.12.1"]
    assert "versions.numpy" not in out
    assert words_on_b(out)["train_seconds"] == "–"


def test_another_commit_is_no_other_machine(store, diff):
    a, b = (
        changed_environment(fabricate(store, smoke()), commit="abc"),
        fabricate(store, smoke("vit"), train_seconds=9.0),
    )
    assert words_on_b(diff(a, changed_environment(b, commit="def"))[1])["train_seconds"] == "better"


@pytest.mark.parametrize("changes", [{"seed": 1}, {"beta": 0.5, "lr": 1e-3}])
def test_one_machine_that_was_busy_is_told_by_its_clocks(store, diff, changes):
    """Of the same work, by the factor that reports have; what is clocked so is then not ranked."""
    quick = fabricate(store, smoke(), train_seconds=120.0)
    near = fabricate(store, smoke(**changes), 0.1, train_seconds=137.0)
    assert words_on_b(diff(quick, near)[1])["train_seconds"] == "worse"
    slow = fabricate(store, smoke(**changes), 0.1, train_seconds=139.0, images_per_second_encode=100.0)
    for pair in ((quick, slow), (slow, quick)):
        _, out, _ = diff(*pair)
        assert "the machine was busy: encode images/s (×" in out
        assert "train s (×1.2)." in out
        words = words_on_b(out)
        assert words["train_seconds"] == words["images_per_second_encode"] == "–"
        assert words["psnr"] in ("better", "worse")


def test_other_work_has_other_clocks_until_equal_work_beside_it_has_them_too(store, diff):
    """Further seeds tell that the machine was busy, where they were run on it; runs that are no equal work do not."""
    a, b = fabricate(store, smoke(), train_seconds=120.0), fabricate(store, smoke("vit"), train_seconds=480.0)
    fabricate(store, smoke("vit", codebook_size=64), train_seconds=999.0)
    changed_environment(fabricate(store, smoke("vit", seed=1), train_seconds=999.0), threads=64)
    assert words_on_b(diff(a, b)[1])["train_seconds"] == "worse"
    fabricate(store, smoke("vit", seed=2), train_seconds=700.0)
    _, out, _ = diff(a, b)
    assert "Not ranked, as equal work differs from run to run, so that the machine was busy: train s (×1.5)." in out
    assert words_on_b(out)["train_seconds"] == "–"


def test_it_ends_with_what_one_run_each_does_not_tell(store, diff):
    a, b, again = (fabricate(store, config) for config in (smoke(), smoke("vit"), smoke(seed=1)))
    assert "One run each says nothing about chance: train more seeds of both, and " in diff(a, b)[1]
    for run in (a, b):
        (run.folder / "config.toml").touch()
    last = diff(a, b)[1].splitlines()[-1]
    for run in (a, b):
        assert f"-m bench.run --config {run.folder}/config.toml --seeds 0 1 2 --results {store.root}" in last
    assert "chance" not in diff(a, again)[1]


def test_clocks_of_two_machines_are_not_ranked(store, diff):
    a, b = fabricate(store, smoke()), changed_environment(fabricate(store, smoke("vit")), threads=64)
    words = words_on_b(diff(a, b)[1])
    assert words["train_seconds"] == words["images_per_second_encode"] == "–"
    assert words["psnr"] in ("better", "worse")


@pytest.mark.parametrize(
    ("settings", "changes", "field"),
    [({}, {"fingerprint": "e" * 64}, "fingerprint"), ({"grid_size": 8}, {}, "bits_per_image")],
)
def test_what_was_measured_otherwise_is_not_ranked(store, diff, settings, changes, field):
    _, out, _ = diff(fabricate(store, smoke()), fabricate(store, smoke("vit", **settings), **changes))
    assert f"must not be ranked against each other: they differ in {field}." in out
    assert re.search(rf"^\s+{field} ", out, re.MULTILINE)
    assert set(words_on_b(out).values()) == {"–"}
    assert "PSNR dB" in out
    assert "B better on" not in out


def test_equal_protocol_and_bits_may_be_ranked(store, diff):
    _, out, _ = diff(fabricate(store, smoke()), fabricate(store, smoke("vit")))
    assert "the two may be ranked" in out
    assert "must not" not in out


def test_runs_without_scores_tell_why(store, diff):
    good, bad = fabricate(store, smoke()), fabricate_failed(store, smoke("vit"))
    code, out, _ = diff(good, bad)
    assert code == 0
    assert "(diverged: it diverged)" in out
    assert line(out, "backbone") == ["backbone", "cnn", "vit"]
    assert "No metrics to compare" in out
    assert "PSNR" not in out
    (bad.folder / "failure.json").unlink()
    assert "(unfinished: no scores yet)" in diff(bad, good)[1]


def test_runs_are_found_by_id_and_by_its_beginning(store, diff):
    a, b = fabricate(store, smoke()), fabricate(store, smoke("vit"))
    assert diff(a, b)[1] == diff(a.folder.name, "vit")[1]
    longer = store.root / "runs" / f"{a.folder.name}0"
    shutil.copytree(a.folder, longer)
    assert Store(store.root).find(a.folder.name) == a  # the whole id of one run, though another's begins with it


@pytest.mark.parametrize("first", ["cnn", "missing", "empty", "folder"])
def test_mistakes_are_one_sentence_and_code_2(store, diff, tmp_path, first):
    """Several runs begin with the name; none does; a folder of runs/ and one elsewhere that hold no run."""
    a, b = fabricate(store, smoke()), fabricate(store, smoke(seed=1))
    (store.root / "runs" / "empty").mkdir()
    name = str(tmp_path) if first == "folder" else first
    code, out, err = diff(name, b)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert name in err
    wanted = {"cnn": [a.folder.name, b.folder.name, "give more of it"], "missing": [a.folder.name, "unknown run"]}
    for word in wanted.get(first, ["no config.json"]):
        assert word in err


def test_an_empty_store_is_told(tmp_path):
    with pytest.raises(UserError, match="none"):
        Store(tmp_path).find("cnn")


def test_older_runs_may_lack_a_setting(store, diff):
    a, b = fabricate(store, smoke()), fabricate(store, smoke("vit"))
    content = json.loads((a.folder / "config.json").read_text())
    del content["config"]["revive_after"]
    a.write("config.json", content)
    assert line(diff(a, b)[1], "revive_after") == ["revive_after", "–", "50"]


def test_values_are_shown_short_and_missing_ones_as_such(store, diff):
    a = fabricate(store, smoke(lr=0.000123456789))
    b = changed_environment(fabricate(store, smoke("vit")), processor="")
    _, out, _ = diff(a, b)
    assert line(out, "lr")[1] == "0.000123457"
    assert line(out, "processor") == ["processor", "x", "–"]


def test_what_differs_beyond_the_digits_that_are_shown_is_shown_whole(store, diff):
    a, b = (fabricate(store, smoke(beta=beta)) for beta in (0.12345678, 0.12345679))
    assert line(diff(a, b)[1], "beta") == ["beta", "0.12345678", "0.12345679"]


def test_of_instruments_what_reports_show_is_compared(store, diff, monkeypatch):
    found = {"cnn": 1.0, "vit": 2.0}
    read = {"loss_random": 1.0, "psnr_random_5": 15.0}
    monkeypatch.setattr(
        frames, "readings", lambda run: {name: found[run.config()["backbone"]] * read[name] for name in read}
    )
    _, out, _ = diff(*(fabricate(store, smoke(name)) for name in found))
    assert words_on_b(out)["loss_random"] == "worse"
    assert "psnr_random_5" not in words_on_b(out)
    assert "All that instruments found is in instruments.json of either run." in out


def test_what_is_ranked_stands_before_what_is_not(store, diff):
    _, out, _ = diff(*(fabricate(store, smoke(name), sharpness=value) for name, value in (("cnn", 0.1), ("vit", 0.2))))
    words = list(words_on_b(out).values())
    assert words == sorted(words, key=lambda word: word == "–")
    assert words[-1] == "–"


def test_the_word_on_b_has_room_on_a_terminal(store, diff, monkeypatch):
    monkeypatch.setattr(tables, "stdout", SafeConsole(file=io.StringIO(), force_terminal=True, width=77, no_color=True))
    monkeypatch.setattr(frames, "readings", lambda run: {"probe_linear_codes": run.metrics()["psnr"] / 100})
    diff(*(fabricate(store, smoke(name), quality) for name, quality in (("cnn", 0.0), ("vit", 0.1))))
    text = re.sub("\x1b\\[[0-9;]*m", "", tables.stdout.file.getvalue())
    assert re.search(r"PSNR dB ↑ .* better\s*$", text, re.M)
    assert max(map(len, text.splitlines())) <= 77


def test_zero_and_false_are_values_and_not_missing(store, diff):
    a = fabricate(store, smoke(beta=0.0, revive_after=0, gan_adaptive=False))
    _, out, _ = diff(a, fabricate(store, smoke()))
    assert line(out, "beta") == ["beta", "0", "0.25"]
    assert line(out, "revive_after") == ["revive_after", "0", "50"]
    assert line(out, "gan_adaptive") == ["gan_adaptive", "False", "True"]


def test_a_metric_that_one_run_lacks_is_left_out_and_a_negative_one_has_its_change(store, diff):
    a = fabricate(store, smoke(), grid_energy=-4.0, sharpness=0.0)
    b = fabricate(store, smoke("vit"), grid_energy=-5.0, ssim=None)
    _, out, _ = diff(a, b)
    assert "SSIM ↑" not in out
    assert line(out, "grid energy dB ↓")[1:] == ["-4.0", "-5.0", "-1.0", "-25.0 %", "better"]
    assert line(out, "sharpness")[1:] == ["0.00", "0.70", "+0.70", "–", "–"]


def test_dots_stand_for_runs_that_are_not_named(store):
    for seed in range(9):
        fabricate(store, smoke(seed=seed))
        with pytest.raises(UserError) as error:
            store.find("missing")
        assert str(error.value).count("cnn-ema") == min(8, seed + 1)
        assert str(error.value).endswith(", ...") == (seed == 8)


def test_long_values_are_folded_and_not_cut(store, diff):
    a, b = (fabricate(store, smoke(data=f"folder:/{letter * 150}")) for letter in "ab")
    _, out, _ = diff(a, b)
    assert out.count("a") >= 150 < out.count("b")
    assert "…" not in out


def test_what_the_page_of_two_runs_calls_better_has_the_sign_of_its_change(store, diff):
    a, b = (fabricate(store, smoke(seed=seed), quality) for seed, quality in ((0, 0.0), (1, 0.02)))
    for first, second, word, sign in ((a, b, "better", "-"), (b, a, "worse", "+")):
        _, out, _ = diff(first, second)
        (line,) = [line for line in out.splitlines() if "LPIPS vgg ↓" in line]
        assert line.split()[-1] == word
        assert line.split()[-3].startswith(sign)
        assert f"{9 if word == 'worse' else 91} % of 64 images by LPIPS vgg" in out


def test_scores_of_other_images_are_no_wins(store, diff):
    """Nor is anything said of images where one run has no scores of them."""
    a, b = (fabricate(store, smoke(seed=seed)) for seed in (0, 1))
    (b.folder / "per_image.npz").unlink()
    code, out, _ = diff(a, b)
    assert (code, "images by" in out) == (0, False)
    assert "LPIPS vgg" in out


@pytest.mark.parametrize("content", ["{", '{"instruments": {}, "run": "another"}'])
def test_what_instruments_found_is_left_out_where_it_is_damaged(store, diff, content):
    """Or another run's; everything else is compared."""
    a, b = (fabricate(store, smoke(seed=seed)) for seed in (0, 1))
    path = b.folder / "instruments.json"
    path.write_text(content)
    code, out, told = diff(a, b)
    assert (code, "LPIPS vgg" in out) == (0, True)
    assert told.startswith(f"left out: {path} is damaged: ")


def test_scores_of_each_image_that_are_missing_or_damaged_are_named(store, diff):
    """Each file of them; and where the two are not ranked anyway, nothing is said."""
    a, b = (fabricate(store, smoke(seed=seed)) for seed in (0, 1))
    paths = [run.folder / "per_image.npz" for run in (a, b)]
    paths[1].write_bytes(paths[1].read_bytes()[:-40])
    told = "On how many images B is better is not known: "
    assert f"{told}{paths[1]} missing or damaged." in diff(a, b)[1]
    np.savez(paths[0], psnr=np.zeros(63, dtype=np.float32))  # of another set
    assert f"{told}{paths[0]} and {paths[1]} missing or damaged." in diff(a, b)[1]
    other = fabricate(store, smoke(seed=2), count=65)
    assert told not in diff(a, other)[1]


def test_a_prior_is_no_tokenizer(tmp_path, capsys):
    store = Store(tmp_path)
    tokenizer = fabricate(store, make_config("cnn", "smoke"))
    prior = fabricate_prior(store, PriorConfig(tokenizer.folder.name, "rnn"), 5.0, 100.0)
    for pair in ((tokenizer, prior), (prior, tokenizer)):
        assert main([*(str(run.folder) for run in pair), "--results", str(tmp_path)]) == 2
        told = capsys.readouterr()
        assert told.err == f"error: {prior.folder} is the run of a prior; name two tokenizers\n"
        assert told.out == ""
