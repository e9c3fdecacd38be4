"""A tokenizer into a folder of its own: what is in that, what it replaces, as ONNX, and onto the Hub."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from bench import Tokenizer, export
from bench.core.errors import UserError
from bench.tokenizers import onnx
from tests.tokenizers.test_pretrained import trained


@pytest.fixture
def run(tmp_path):
    return trained(tmp_path / "results", quantizer="standard")


@pytest.fixture
def command(run, tmp_path, capsys):
    """Exports ``run`` to tmp_path/out; the exit code, what was printed, and what was said."""

    def call(*words: str) -> tuple[int, str, str]:
        code = export.main(
            [run.folder.name, "--to", str(tmp_path / "out"), "--results", str(run.folder.parent.parent), *words]
        )
        return code, *capsys.readouterr()

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WHOLE = ["README.md", "config.json", "model.safetensors", "reconstructions.png"]


def test_a_folder_of_the_hub_s_layout_that_gives_the_tokenizer_back(command, run, tmp_path):
    code, out, _ = command()
    assert (code, out) == (0, f"Exported: {tmp_path / 'out'}\n")
    assert names(tmp_path / "out") == WHOLE
    assert names(tmp_path) == ["out", "results"]
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    tokenizer, known = Tokenizer.from_pretrained(tmp_path / "out"), Tokenizer.from_run(run.folder)
    assert torch.equal(tokenizer.encode(x), known.encode(x))
    for name in WHOLE:
        assert (tmp_path / "out" / name).stat().st_mode & 0o077 == Path(
            run.folder / "metrics.json"
        ).stat().st_mode & 0o077


def test_the_card_has_a_head_the_scores_and_how_they_were_measured(command, run, tmp_path):
    command()
    _, head, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "vqbench",
        "license": "unknown",
        "tags": ["image-tokenizer", "vector-quantization", "cnn", "standard"],
    }
    metrics = run.metrics()
    assert f"| PSNR dB ↑ | {metrics['psnr']:.2f} | {metrics['psnr_kmeans']:.2f} |" in text.replace("\u00a0", " ")
    for name, value in run.protocol().items():
        assert value is None or f"- {name.replace('_', ' ')}: {value}" in text
    assert "(reconstructions.png)" in text
    assert "## Licence" in text
    assert "onnx" not in text
    code = text.partition("```python\n")[2].partition("```")[0]
    place: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "out")
        exec(code, place)
    assert place["codes"].shape == (1, 4, 4)
    assert place["x_hat"].shape == (1, 3, 32, 32)


def test_an_export_is_replaced_and_nothing_else_is(command, tmp_path, capsys):
    """Nor what lies beside an export in its folder, nor a model that is called alike."""
    out = tmp_path / "out"
    for made in (lambda: out.mkdir(), lambda: None):
        made()
        assert command()[0] == 0
    before = (out / "config.json").read_bytes()
    (out / "notes.txt").touch()
    assert command() == (2, "", f"error: {out} holds notes.txt, which is of no export; name a new folder: --to DIR\n")
    (out / "notes.txt").unlink()
    (out / "config.json").write_text('{"_class_name": "VQModel"}')
    assert command()[2] == f"error: {out} is no export that could be replaced; name a new folder: --to DIR\n"
    (out / "config.json").write_bytes(before)
    assert names(tmp_path) == ["out", "results"]
    assert names(out) == WHOLE


def test_what_cannot_be_finished_leaves_what_was_there(command, tmp_path, monkeypatch):
    command()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_) -> str:
        raise UserError("no card")

    monkeypatch.setattr(export, "card", fail)
    assert command()[2] == "error: no card\n"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert names(tmp_path) == ["out", "results"]


# -------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch):
    """In place of huggingface_hub: what it was asked for."""
    asked: list = []

    class Api:
        def create_repo(self, name: str, **options) -> str:
            asked.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options) -> None:
            asked.append((repo_id, names(folder_path), options))

    stand_in = SimpleNamespace(HfApi=Api, get_token=lambda: "mine", asked=asked)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return stand_in


def test_what_is_pushed_is_the_folder_and_private(command, hub):
    code, out, _ = command("--push", "me/mine")
    assert code == 0
    assert out.splitlines()[1] == "Pushed: https://hub/me/mine"
    made, uploaded = hub.asked
    assert made == ("me/mine", {"private": True, "exist_ok": True})
    assert uploaded == ("me/mine", WHOLE, {"delete_patterns": sorted(export.OURS)})


def test_without_a_token_or_the_package_nothing_is_written(command, hub, tmp_path, monkeypatch):
    hub.get_token = lambda: None
    assert "--push takes your own token of the Hub, and there is none" in command("--push", "me/mine")[2]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert command("--push", "me/mine") == (2, "", "error: --push takes a package; pip install 'vqbench[hub]'\n")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert command("--onnx")[2] == "error: --onnx needs the package onnxscript; pip install 'vqbench[onnx]'\n"
    assert not hub.asked
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_leaves_the_folder_and_says_so(command, hub, tmp_path):
    def refuse(*_, **__) -> None:
        raise ConnectionError("nobody is there")

    hub.HfApi.create_repo = refuse
    code, out, said = command("--push", "me/mine")
    assert (code, out) == (2, f"Exported: {tmp_path / 'out'}\n")
    told = f"{tmp_path / 'out'} is complete, and was not pushed to me/mine (nobody is there)"
    assert said == f"error: {told}; the same command tries again\n"


# ----------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.slow
def test_onnx_gives_the_same_codes_and_images_for_any_number_of_them(command, run, tmp_path):
    """And tells of no path of this machine."""
    code, out, _ = command("--onnx")
    assert code == 0
    assert out.splitlines()[0].startswith(
        "ONNX and PyTorch on 4 images: 80 of 80 codes are the same; images are within "
    )
    folder, tokenizer = tmp_path / "out", Tokenizer.from_run(run.folder)
    assert names(folder) == sorted([*WHOLE, "encoder.onnx", "decoder.onnx"])
    x = torch.rand(7, 3, 32, 32) * 2 - 1
    codes = onnx.run(folder / "encoder.onnx", x)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, tokenizer.encode(x))
    images = onnx.run(folder / "decoder.onnx", codes)
    torch.testing.assert_close(images, tokenizer.decode(codes), rtol=0, atol=1e-5)
    assert str(Path(export.__file__).parent.parent).encode() not in (folder / "encoder.onnx").read_bytes()
    assert "encoder.onnx" in (folder / "README.md").read_text()


def checked(run, monkeypatch, encode, decode) -> onnx.Agreement:
    """``compare`` of a run's tokenizer with graphs that give these functions of it instead."""
    tokenizer = Tokenizer.from_run(run.folder)
    work = {"encoder.onnx": encode, "decoder.onnx": decode}
    monkeypatch.setattr(onnx, "run", lambda path, x: work[path.name](tokenizer, x))
    return onnx.compare(tokenizer, export.examples(run, 32), Path())


def test_other_codes_and_other_images_are_noticed(run, monkeypatch):
    def other(tokenizer: Tokenizer, x: torch.Tensor) -> torch.Tensor:
        codes = tokenizer.encode(x)
        codes[0, 0, 0] = (codes[0, 0, 0] + 1) % 16
        return codes

    found = checked(run, monkeypatch, Tokenizer.encode, lambda t, x: t.decode(x) + 1e-5)
    assert found[:3] == (4, 80, 0)
    assert found.error == pytest.approx(1e-5, rel=0.1)
    for wrong in (2e-4, float("nan")):
        with pytest.raises(UserError, match="ONNX and PyTorch differ by"):
            checked(run, monkeypatch, Tokenizer.encode, lambda t, x, wrong=wrong: t.decode(x) + wrong)
    with pytest.raises(UserError, match=r"1 of 64 codes of encoder.onnx are not those of PyTorch"):
        checked(run, monkeypatch, other, Tokenizer.decode)


def test_a_code_that_ties_is_told_from_one_that_does_not(run):
    """Two codes as far from a latent as each other, up to rounding; and a third that is further."""
    tokenizer = Tokenizer.from_run(run.folder)
    first, second, third = 8 * torch.eye(4)[:3]
    with torch.no_grad():
        tokenizer.quantizer.codebook.fill_(100.0)
        tokenizer.quantizer.codebook[:3] = torch.stack([first, second, third])
    between = (first + second) / 2 + 1e-6 * (first - second)
    asked = onnx.near_tie(tokenizer, torch.stack([between, between, first]), torch.tensor([1, 2, 1]))
    assert asked.tolist() == [True, False, False]


def test_what_onnx_has_no_word_for_is_one_sentence(run, tmp_path, monkeypatch):
    def refuse(*_, **__) -> None:
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    tokenizer = Tokenizer.from_run(run.folder)
    with pytest.raises(UserError) as error:
        onnx.export(tokenizer, export.examples(run, 32), tmp_path / "graphs")
    told = "backbone cnn with quantizer standard cannot be written as encoder.onnx (no such operator); leave out --onnx"
    assert str(error.value) == told
    assert not names(tmp_path / "graphs")

    def one_size(*_) -> torch.Tensor:
        raise RuntimeError("Got: 1 Expected: 3")

    with pytest.raises(UserError, match=r"run for any number of images by encoder.onnx \(Got: 1 Expected: 3\)"):
        checked(run, monkeypatch, one_size, Tokenizer.decode)
