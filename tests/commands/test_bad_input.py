"""What is wrong on a command line: exit code 2, one sentence, and nothing is left behind."""

import importlib
import shlex
import sys
from pathlib import Path

import pytest

from bench import diff, doctor, encode, export, prior, report, run, speed, study
from bench.core import group
from bench.core.store import Store
from bench.data import load
from bench.sweeps import workers
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate

score = importlib.import_module("bench.score")  # not the function of the public face
COMMANDS = {one.__name__.split(".")[1]: one for one in (run, prior, encode, export, report, diff, doctor, score, speed)}
BAD = [
    # bench.run
    "run --backbone resnet",
    "run --backbone",
    "run --backbone timm:nobody",
    "run --backbone timm:",
    "run --quantizer vq",
    "run --quantizer",
    "run --seeds",
    "run --seeds -1",
    "run --seeds 1.5",
    "run --seeds 99999999999",
    "run --preset huge",
    "run --steps 0",
    "run --steps many",
    "run --steps 1e3",
    "run --batch-size 0",
    "run --lr 0",
    "run --lr nan",
    "run --lr inf",
    "run --beta -1",
    "run --width 0",
    "run --width 99999",
    "run --depth 0",
    "run --codebook-size 0",
    "run --codebook-size 1 --list",
    "run --codebook-size 100 --quantizer lfq",
    "run --codebook-size 99999999999",
    "run --code-dim 0",
    "run --image-size 16",
    "run --image-size 100 --grid-size 8",
    "run --image-size 64 --grid-size 7",
    "run --grid-size 128",
    "run --grid-size 0",
    "run --ema-decay 1",
    "run --gan-start 2",
    "run --device gpu",
    "run --device cuda:99",
    "run --precision fp8",
    "run --split train",
    "run --data imagenet",
    "run --data folder:",
    "run --data folder:/nowhere",
    "run --train-images -1",
    "run --match 4M",
    "run --match params:0M",
    "run --match params:1M --width 8",
    "run --match params:1 --backbone cnn",
    "run --rotary --backbone cnn",
    "run --temperature 0.5 --quantizer ema",
    "run --alignment-file x",
    "run --instruments x-ray",
    "run --init-from",
    "run --init-from nobody",
    "run --init-from cnn",
    "run --init-from cnn --results store",
    "run --init-from store",
    "run --freeze encoder",
    "run --freeze everything",
    "run --track mlflow",
    "run --track",
    "run --fid-weights /nowhere/x.pth",
    "run --config /nowhere.toml",
    "run --stepz 3",
    "run stray",
    "run --results file",
    "run --results file/below",
    "run --list --backbone resnet",
    "run --profile --device gpu",
    # bench.prior
    "prior",
    "prior nobody",
    "prior cnn --prior gpt",
    "prior cnn --prior",
    "prior cnn --seeds",
    "prior cnn --steps 0",
    "prior cnn --samples 3",
    "prior cnn --temperature 0",
    "prior cnn --guidance 2",
    "prior cnn --image-size 32",
    "prior cnn --track mlflow",
    "prior cnn --top-k -1",
    "prior pixels --image-size 8",
    "prior pixels --data imagenet",
    # bench.encode, bench.export, bench.report, bench.diff, bench.doctor, bench.speed
    "encode",
    "encode nobody",
    "encode cnn --device gpu",
    "encode cnn",
    "export",
    "export nobody",
    "export cnn",
    "export cnn cnn --to out",
    "export cnn --to file",
    "export cnn --to store",
    "export cnn --to out --push nobody",
    "export cnn --to out --push a/b/c",
    "export cnn --to out --onxx",
    "export cnn --to out",
    "report nobody",
    "report --results nowhere",
    "report --results store --columns fidd",
    "report --results store --verdicts tokens",
    "report --results store --out file",
    "report --results store --out file/below",
    "diff cnn",
    "diff cnn nobody",
    "diff cnn cnn more",
    "doctor --result x",
    # bench.score
    "score",
    "score nothing",
    "score diffusers:",
    "score codec:webp",
    "score codec:webp@2304 --data folder:/nowhere",
    "score codec:webp@2304 --split train",
    "score codec:webp@2304 --image-size 0",
    "score codec:webp@2304 --resize-to 32",
    "score codec:webp@2304 --bits-per-image 3",
    "score codec:webp@2304 --originals /nowhere --reconstructions /nowhere",
    "score --originals /nowhere",
    "score --originals /nowhere --reconstructions /nowhere",
    "score --originals /nowhere --reconstructions /nowhere --bits-per-image 0",
    "score codec:webp@2304 --instruments x-ray",
    "score codec:webp@2304 --device gpu",
    "speed nothing",
    "speed --seconds 0",
    "speed --device gpu",
    # bench.study and studies
    "study",
    "study show",
    "study list more",
    "study rebuild --results nowhere",
    "study rebuild nobody --results store",
    "studies.beta --beta",
    "studies.beta --beta x",
    "studies.beta --beta -1",
    "studies.beta --backbone resnet",
    "studies.beta --backbone",
    "studies.beta --seeds",
    "studies.beta --workers 0",
    "studies.beta --workers 9999",
    "studies.beta --metric beauty",
    "studies.beta --trial-timeout 0",
    "studies.beta --storage nonsense --backbone cnn --seeds 0",
    "studies.beta --preset huge",
    "studies.beta --init-from nobody",
    "studies.beta --freeze decoder --backbone cnn --seeds 0",
    "studies.beta --track mlflow",
    "studies.beta --processes 0",
    "studies.beta --processes 3",
    "studies.beta --processes 2 --backbone timm:resnet18 --width 8 --depth 1",
    "studies.beta --processes 2 --match time:5s",
    "studies.beta --launcher slurm",
    "studies.beta --launcher pbs",
    "studies.beta --launcher slurm --match time:5s",
    "studies.beta --launcher slurm --sbatch mem",
    "studies.beta --launcher slurm --time 0",
    "studies.beta --launcher slurm --gpus-per-worker -1",
    "studies.beta --partition long",
    "studies.beta --sbatch mem=8G",
    "studies.priors --processes 2",
    "studies.priors --prior gpt",
    "studies.search --trials 0",
    "studies.search --confirm -1",
    "studies.search --bits-per-image 7",
    "studies.search --codebook-size 3",
]


def main_of(name: str):
    """The command of that name, or the study."""
    if name.startswith("studies."):
        module = importlib.import_module(name)
        return lambda words: workers.main(module.STUDY, module.__doc__, words)
    return study.run if name == "study" else COMMANDS[name].main


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The present folder: a store with one run that has no weights, and a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQBENCH_STORAGE", raising=False)
    fabricate(Store("store"), make_config("cnn", "smoke", device="cpu"))
    Path("file").write_text("no folder")
    return tmp_path


def there(place: Path) -> set[Path]:
    return set(place.rglob("*"))


@pytest.fixture(scope="module", autouse=True)
def decoded():
    """The photographs: a first decoding may take so long that it is told."""
    load("photos", 64)


@pytest.mark.parametrize("line", BAD)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(place, capsys, line):
    name, *words = shlex.split(line)
    if name in ("prior", "encode", "export", "diff"):
        words += ["--results", "store"]
    before = there(place)
    try:
        code = main_of(name)(words)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    assert code == 2, said
    assert said.out == ""
    (sentence,) = said.err.splitlines()
    assert sentence.startswith("error: ")
    assert "Traceback" not in sentence
    assert there(place) == before


def test_a_launcher_without_its_package_is_one_sentence_too(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    url = "postgresql+psycopg://user:secret@nowhere/x"
    assert main_of("studies.beta")(["--backbone", "cnn", "--launcher", "slurm", "--storage", url]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence == "error: --launcher slurm needs the package submitit; pip install 'vqbench[slurm]'"
    assert there(place) == {place / "file", *(place / "store").rglob("*"), place / "store"}


@pytest.mark.parametrize("name", ["run", "studies.beta"])
def test_no_rendezvous_is_one_sentence_too(place, capsys, monkeypatch, name):
    """Of what was started as one of several, without the others' address, or at all."""
    for variable in group.NEEDED:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main_of(name)(["--backbone", "cnn"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "WORLD_SIZE is 2" in sentence


def test_there_are_many_of_every_command():
    assert len(BAD) == len(set(BAD)) >= 60
    names = {line.split()[0] for line in BAD}
    assert {*COMMANDS, "study"} < names
