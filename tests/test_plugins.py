"""What another package offers runs, lists and reports as our own does, and its version is in a run's identity."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from backbones import plugins
from bench.core.environment import environment
from bench.priors.config import PriorConfig
from bench.tokenizers.config import make_config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tests/plugin"


@pytest.fixture
def installed(monkeypatch):
    """Makes the packages in a folder known."""

    def install(folder):
        monkeypatch.syspath_prepend(folder)
        plugins._offered.cache_clear()

    monkeypatch.setattr(plugins, "_OURS", dict(plugins._OURS))
    plugins._offered.cache_clear()
    yield install
    plugins._offered.cache_clear()


def other_version(tmp_path):
    """The same package, of another version."""
    folder = tmp_path / "vqbench_example-0.2.dist-info"
    shutil.copytree(PACKAGE / "vqbench_example-0.1.dist-info", folder)
    metadata = folder / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.1", "0.2"))
    return tmp_path


@pytest.mark.parametrize("changes", [{"quantizer": "slow_ema"}, {"data": "stripes"}, {"backbone": "plain"}])
def test_the_version_of_a_package_is_in_the_identity_of_what_uses_it(installed, tmp_path, changes):
    """And in no other's."""
    ours = make_config("cnn", "smoke", device="cpu", precision="fp32")
    theirs = replace(ours, **changes, entropy_weight=0.0)
    bare = ours.run_id(), theirs.run_id()
    installed(PACKAGE)
    first = ours.run_id(), theirs.run_id()
    installed(other_version(tmp_path))
    second = ours.run_id(), theirs.run_id()
    assert bare[0] == first[0] == second[0]
    assert len({bare[1], first[1], second[1]}) == 3


def test_a_prior_is_known_by_its_package_too(installed):
    config = PriorConfig(tokenizer="cnn-ema-0", prior="small", device="cpu", precision="fp32")
    bare = config.run_id()
    installed(PACKAGE)
    assert config.run_id() != bare


def test_a_run_says_which_packages_were_there(installed):
    assert "vqbench-example" not in environment()["versions"]
    installed(PACKAGE)
    assert environment()["versions"]["vqbench-example"] == "0.1"
    assert plugins.packages(["metrics"]) == {"vqbench-example": "0.1"}


def test_what_cannot_be_loaded_is_left_out_and_ours_keep_their_names(installed):
    installed(PACKAGE)
    with pytest.warns(UserWarning, match="left out") as told:
        found = plugins.plugged("backbones", {"cnn": 1})
    assert list(found) == ["plain"]
    assert sorted(str(one.message).split("'")[1] for one in told) == ["broken", "cnn"]


SCRIPT = """
import sys
import warnings

warnings.simplefilter("ignore")
from bench import prior, report, run
from bench.core.store import Store

place = ["--results", sys.argv[1], "--device", "cpu"]
words = ["--backbone", "plain", "--quantizer", "slow_ema", "--data", "stripes", "--preset", "smoke", "--steps", "2"]
assert run.main([*words, "--instruments", "none", *place]) == 0
(made,) = Store(sys.argv[1]).runs()
metrics = made.metrics()
assert metrics["brightness"] > 0 and "brightness_kmeans" in metrics, metrics
assert "brightness" in made.per_image()
assert prior.main([str(made.folder), "--prior", "small", "--steps", "2", "--samples", "4", *place]) == 0
assert report.main(["--columns", "brightness", "psnr", *place[:2]]) == 0
assert run.main(["--list", "--backbone", "plain", "--preset", "smoke"]) == 0
"""


@pytest.mark.slow
def test_the_parts_of_a_package_run_list_and_report_as_ours(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, PACKAGE))), "COLUMNS": "200"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "brightness off" in done.stdout
    for name in ("plain", "slow_ema", "stripes", "small"):
        assert f"  {name} " in done.stdout.partition("--backbone")[2], name
    assert "vqbench-example 0.1" in done.stdout
