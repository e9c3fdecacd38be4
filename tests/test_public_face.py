"""``import bench``: what it offers, and that neither it nor a command line's --help imports what takes seconds."""

import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd
import pytest

import bench
from bench.analysis.frames import METRICS, REFERENCES
from bench.core.errors import UserError
from bench.core.store import Store
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate, fabricate_failed

ROOT = Path(__file__).parent.parent
OFFERED = ["Config", "make_config", "run_trial", "Tokenizer", "PriorConfig", "run_prior", "Prior"]
OFFERED += ["load_data", "load_runs", "score"]
SLOW = {
    *("torchvision", "timm", "torchmetrics", "lpips", "torch_fidelity", "skimage", "pandas", "matplotlib", "seaborn"),
    *("optuna", "scipy", "sklearn", "transformers", "torch._dynamo", "triton"),
}


def imported(code: str) -> set[str]:
    """What a fresh process has imported after ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_a_command_line_is_parsed_before_anything_slow_is_imported():
    help_page = "import bench.run\ntry: bench.run.main(['--help'])\nexcept SystemExit: pass"
    found = imported(help_page)
    assert "bench.tokenizers.config" in found
    assert not found & SLOW


def test_the_face_imports_nothing_before_use():
    found = imported("import bench\nassert set(bench.__all__) <= set(dir(bench))")
    assert not [name for name in found if name.startswith(("bench.", "backbones", "torch", "numpy"))]


def test_the_face_offers_these_names_and_says_so_of_others():
    assert bench.__all__ == OFFERED
    for name in OFFERED:
        assert getattr(bench, name).__doc__
    with pytest.raises(AttributeError, match="module 'bench' has no attribute 'tokeniser'"):
        _ = bench.tokeniser


def test_a_run_by_the_face_alone(tiny, trial_data, tmp_path):
    """Trained, read back, scored again to the same numbers, and a row of the table."""
    config = bench.make_config(**{**asdict(tiny), "steps": 2})
    assert isinstance(config, bench.Config)
    run = bench.run_trial(config, Store(tmp_path))
    tokenizer = bench.Tokenizer.from_run(run.folder)
    metrics, per_image = bench.score(tokenizer, config.codebook_size, trial_data.test)
    assert metrics["psnr"] == pytest.approx(run.metrics()["psnr"], abs=1e-3)
    assert per_image["psnr"].shape == (len(trial_data.test),)
    table = bench.load_runs(tmp_path)
    assert isinstance(table, pd.DataFrame)
    assert table.psnr.tolist() == [run.metrics()["psnr"]]


def test_data_and_runs_of_a_folder(image_folder, images, tmp_path, monkeypatch):
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    data = bench.load_data(f"folder:{image_folder}", 32)
    assert (data.test == images.test).all()
    fabricate(Store(tmp_path), make_config("vit", "smoke", device="cpu"))
    assert bench.load_runs(str(tmp_path)).backbone.tolist() == ["vit"]
    assert bench.load_runs(tmp_path / "none").empty


def test_every_column_of_the_table_is_of_a_group_that_load_runs_tells(tmp_path):
    """By its name and its type, also where a run has no scores."""
    fabricate(Store(tmp_path), make_config("cnn", "smoke", device="cpu"))
    fabricate_failed(Store(tmp_path), make_config("vit", "smoke", device="cpu"))
    table = bench.load_runs(tmp_path)
    settings = {field.name for field in fields(bench.Config)}
    texts = {"run_id", "status", "reason", "commit", "processor", "folder", "backbone", "quantizer"}
    for name in table:
        if name in settings | texts | {"threads"} or name.startswith("protocol_"):
            assert name not in texts or pd.api.types.is_string_dtype(table[name])
        else:
            assert name in METRICS or name.endswith(REFERENCES), name
            assert table[name].dtype == "float64"
    assert settings <= {*table}
    for group in ("protocol_*", "*_kmeans", "*_webp", "*_avif", "*_jpeg", "loss_near", "threads", "reason"):
        assert group in bench.load_runs.__doc__


def test_what_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        bench.Tokenizer.from_run(tmp_path)


@pytest.mark.slow
def test_the_examples_from_python_run_as_they_stand(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["codes"].shape == (16, 4, 4)
    assert names["images"].shape == (16, 3, 32, 32)
    assert names["bits"].shape == names["codes"].shape
    assert names["metrics"]["psnr"] == pytest.approx(names["table"].psnr[0], abs=1e-3)
