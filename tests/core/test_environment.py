"""What a number may depend on beside its config."""

import os
import platform
import subprocess

import torch

from bench.core import environment


def test_the_environment_says_what_a_number_may_depend_on():
    found = environment.environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"].keys() >= {"torch", "torchvision", "lpips", "torch-fidelity", "torchmetrics", "numpy"}
    assert found["threads"] == torch.get_num_threads()
    assert "PyTorch" in found["scan"] or "triton" in found["scan"].lower()


def test_a_commit_with_changed_files_carries_a_plus_sign(tmp_path, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True)

    monkeypatch.setattr(environment, "__file__", str(tmp_path / "trial.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", os.fspath(tmp_path.parent))
    assert environment._commit() is None
    (tmp_path / "trial.py").write_text("1")
    git("init"), git("add", "."), git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD").stdout.strip()
    (tmp_path / "results.txt").write_text("untracked files change no number")
    assert environment._commit() == commit
    (tmp_path / "trial.py").write_text("2")
    assert environment._commit() == commit + "+"


def test_the_processor_is_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.environment()["processor"] == platform.processor()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(environment, "scan_backend", lambda: "PyTorch")
    assert environment.environment()["processor"] == "a GPU"
