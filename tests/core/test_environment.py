"""What a number may depend on beside its config."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from bench.core import environment
from bench.core.environment import peak_memory


class Kernel(NamedTuple):
    """What /proc/self holds, and what was done before it was asked."""

    folder: Path
    happened: list[str]


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


@pytest.fixture
def kernel(monkeypatch, tmp_path) -> Kernel:
    """Files of /proc/self are looked for in ``folder``."""
    made = Kernel(tmp_path / "proc", [])
    made.folder.mkdir()
    monkeypatch.setattr(environment, "Path", lambda path: made.folder / Path(path).relative_to("/proc/self"))
    monkeypatch.setattr(environment.gc, "collect", lambda: made.happened.append("collected"))
    libc = SimpleNamespace(malloc_trim=lambda pad: made.happened.append("trimmed"))
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: libc)
    return made


def test_the_peak_is_the_one_that_the_kernel_has_counted(kernel):
    """Of the resident set, in MB of 1024 kB, since it was told to count anew; what was freed is given back before."""
    with peak_memory("cpu") as peak:
        assert kernel.happened == ["collected", "trimmed"]
        assert (kernel.folder / "clear_refs").read_text() == "5"
        for kilobytes, megabytes in ((3584, 3.5), (12_345_856, 12056.5)):
            lines = ("Name:\tpython", "VmPeak:\t 99999 kB", f"VmHWM:\t  {kilobytes} kB", "VmRSS:\t  1024 kB", "")
            (kernel.folder / "status").write_text("\n".join(lines))
            assert peak() == megabytes


def test_without_a_peak_to_start_anew_there_is_none(kernel, monkeypatch):
    """Where the file cannot be written, or the C library cannot give back what is free."""
    kernel.folder.rmdir()
    with peak_memory("cpu") as peak:
        assert peak() is None
    kernel.folder.mkdir()
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: SimpleNamespace())
    with peak_memory("cpu") as peak:
        assert peak() is None


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    def version(package: str) -> str:
        if package == "lpips":
            raise metadata.PackageNotFoundError(package)
        return f"{package} 1"

    monkeypatch.setattr(environment.metadata, "version", version)
    found = environment.environment()
    assert found["versions"].pop("lpips") is None
    assert all(value == f"{package} 1" for package, value in found["versions"].items())
    assert "timm" in found["versions"]
    assert (found["python"], found["platform"]) == (platform.python_version(), platform.platform())


def test_where_git_knows_nothing_or_is_missing_there_is_no_commit_and_no_complaint(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "trial.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", os.fspath(tmp_path.parent))
    assert environment._commit() is None
    monkeypatch.setenv("PATH", "")
    assert environment._commit() is None
    assert capfd.readouterr() == ("", "")
