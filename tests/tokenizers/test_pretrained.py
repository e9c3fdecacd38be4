"""A tokenizer outside of its run: the same to the last bit, where there is torch alone; of a stranger, checked."""

import http.server
import json
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from backbones import BACKBONES
from bench import Tokenizer
from bench.core.errors import UserError
from bench.core.files import read_signed, sha256_file, sha256_json
from bench.core.runs import Run
from bench.core.store import Store
from bench.quantizers import QUANTIZERS
from bench.tokenizers import pretrained
from bench.tokenizers.config import Config, make_config
from tests.fabricate import fabricate, seal

ROOT = Path(__file__).parent.parent.parent
SMALL = {"width": 8, "depth": 2, "codebook_size": 16, "code_dim": 4, "device": "cpu"}
OPTIONS = {"cnn": {"attention": 1}, "convnext": {"rms_norm": True}, "vit": {"rotary": True}}


def trained(root: Path, backbone: str = "cnn", **settings) -> Run:
    """A run whose weights are drawn by its seed, and whose codes are those of an encoder that has seen images."""
    config = make_config(backbone, "smoke", **{**SMALL, **settings})
    run = fabricate(Store(root), config)
    torch.manual_seed(0)
    tokenizer = Tokenizer(config)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        tokenizer.quantizer.initialise(tokenizer.encoder(torch.rand(16, 3, 32, 32) * 2 - 1))
    safetensors.torch.save_model(tokenizer, run.folder / "tokenizer.safetensors")
    seal(run)
    return run


def exported(root: Path, run: Run) -> Path:
    folder = root / "export"
    pretrained.write(run, run.folder / "tokenizer.safetensors", folder)
    return folder


@pytest.fixture
def export(tmp_path) -> Path:
    """An exported tokenizer."""
    return exported(tmp_path, trained(tmp_path))


def through(tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and images that ``tokenizer`` makes of a few images."""
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(x)
    return codes, tokenizer.decode(codes)


LEAN = """
import sys
from importlib.machinery import PathFinder

class Finder:
    '''Knows torch, safetensors, NumPy, what torch itself imports, and vqbench.'''
    known = {"torch", "torchgen", "functorch", "safetensors", "numpy", "bench", "backbones", *sys.stdlib_module_names}

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in self.known and not any(map(self.by_torch, self.frames())):
            raise ImportError(f"{name} is not installed", name=name)

    def frames(self):
        frame = sys._getframe(2)
        while frame:
            yield frame
            frame = frame.f_back

    def by_torch(self, frame):
        return frame.f_globals.get("__name__", "").partition(".")[0] == "torch"

sys.meta_path.insert(0, Finder())
import torch
from bench import Tokenizer

for folder in sys.argv[1:]:
    tokenizer = Tokenizer.from_pretrained(folder)
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(x)
    torch.save((codes, tokenizer.decode(codes)), f"{folder}.pt")
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_where_there_is_torch_alone_codes_and_images_are_those_of_the_run_to_the_last_bit(tmp_path):
    """Every backbone, with the layers that need most, and every kind of codebook, in one process that can import torch,
    safetensors, NumPy and vqbench, and nothing else; which leaves nothing in a cache either."""
    kinds = [(name, {"quantizer": "ema", **OPTIONS.get(name, {})}) for name in BACKBONES]
    kinds += [("cnn", {"quantizer": name}) for name in ("standard", "l2", "ema_l2", "product", "bsq", "none", "kl")]
    expected = {}
    for number, (backbone, settings) in enumerate(kinds):
        run = trained(tmp_path / str(number), backbone, **settings)
        folder = exported(tmp_path / str(number), run)
        expected[folder] = through(Tokenizer.from_run(run.folder))
    home = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LEAN, *map(str, expected)], env=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"timm", "rich", "PIL", "tyro", "pandas", "optuna", "platformdirs"} & {*done.stdout.split()}
    for folder, (codes, images) in expected.items():
        found = torch.load(f"{folder}.pt", weights_only=True)
        assert torch.equal(found[0], codes)
        assert torch.equal(found[1], images)
        assert codes.unique().numel() > 1
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name not in ("ema",)])
def test_every_quantizer_comes_back_with_its_settings(tmp_path, quantizer):
    run = trained(tmp_path, quantizer=quantizer, codebook_size=64)
    tokenizer = Tokenizer.from_pretrained(exported(tmp_path, run))
    assert tokenizer.config == Tokenizer.from_run(run.folder).config
    assert not tokenizer.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    for found, known in zip(through(tokenizer), through(Tokenizer.from_run(run.folder)), strict=True):
        assert torch.equal(found, known)


def test_an_export_tells_of_its_run_and_not_where_images_lie(tmp_path):
    run = trained(tmp_path, data=f"folder:{tmp_path}/mine")
    scored = json.loads((run.folder / "metrics.json").read_text())
    scored["protocol"]["data"] = f"folder:{tmp_path}/mine"
    run.seal("metrics.json", {name: scored[name] for name in ("metrics", "protocol", "files")})
    folder = exported(tmp_path, run)
    assert str(tmp_path) not in (folder / "config.json").read_text()
    stored = pretrained.content(folder)
    assert (stored["run"], stored["protocol"]["data"], stored["config"]["data"]) == (
        run.folder.name,
        "folder:mine",
        "folder:mine",
    )
    assert Tokenizer.from_pretrained(str(folder)).config == replace(run.settings(Config), data="folder:mine")


# ------------------------------------------------------------------------------------------------- what strangers write


def change(folder: Path, weights: dict | None = None, **changes) -> None:
    """Has the export in ``folder`` other settings, or ``weights``, and the digests that belong to them."""
    if weights is not None:
        safetensors.torch.save_file(weights, folder / "model.safetensors")
    stored = read_signed(folder / "config.json")
    stored["config"] |= changes
    stored["files"] = {"model.safetensors": sha256_file(folder / "model.safetensors")}
    (folder / "config.json").write_text(json.dumps({**stored, "sha256": sha256_json(stored)}))


def state(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def put(folder: Path, weights: bytes) -> None:
    (folder / "model.safetensors").write_bytes(weights)
    change(folder)


def nan(tensors: dict) -> dict:
    tensors["quantizer.codebook"][3, 1] = float("nan")
    return tensors


class Program:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return print, ("a stranger's program ran",)


HOSTILE = {
    "another K": (lambda f: change(f, codebook_size=32), r"quantizer\.\w+ is \(16,.*\) and should be \(32,"),
    "another width": (lambda f: change(f, width=16), r"is \(.*\) and should be \("),
    "a huge width": (lambda f: change(f, width=16384, depth=900), "take less width"),
    "a width beyond all use": (lambda f: change(f, width=10**9), "width is 1000000000; it must be at most 16384"),
    "a huge K": (lambda f: change(f, codebook_size=2**24), r"and should be \(16777216"),
    "no width": (lambda f: change(f, width=None), "width is None; it must be a whole number"),
    "another backbone": (lambda f: change(f, backbone="vit"), "there is no place for|is missing"),
    "an unknown backbone": (lambda f: change(f, backbone="os"), "unknown backbone 'os'"),
    "a later setting": (
        lambda f: change(f, colour="blue"),
        "the setting 'colour', which this version does not know",
    ),
    "too little": (lambda f: change(f, dict(list(state(f).items())[1:])), " is missing"),
    "too much": (lambda f: change(f, {**state(f), "more": torch.ones(1)}), "there is no place for more"),
    "other shapes": (lambda f: change(f, {n: t[None] for n, t in state(f).items()}), r"is \(1, .*\) and should be"),
    "NaN": (lambda f: change(f, nan(state(f))), "quantizer.codebook has numbers that are not finite"),
    "a pickle": (lambda f: put(f, pickle.dumps(Program())), "does not hold the weights"),
    "a cut": (lambda f: put(f, b"\x08"), "does not hold the weights"),
    "other weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"x"),
        "holds other weights than its config.json was written for",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no settings": (lambda f: (f / "config.json").unlink(), r"holds no exported tokenizer \(no config.json\)"),
    "settings that are none": (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged"),
    "a flipped setting": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"raster"', '"hilbert"')),
        "its digest is that of other content",
    ),
    "another program's": (lambda f: (f / "config.json").write_text('{"_class_name": "VQModel"}'), "not of a tokenizer"),
    "another format": (
        lambda f: (f / "config.json").write_text('{"library_name": "vqbench", "format": 2}'),
        "is of format 2, and this version of vqbench reads 1",
    ),
    "half of it": (
        lambda f: (f / "config.json").write_text('{"library_name": "vqbench", "format": 1}'),
        "has no config and files",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_tokenizer_is_one_sentence_and_runs_nothing(export, what, capfd):
    spoil, sentence = HOSTILE[what]
    spoil(export)
    with pytest.raises(UserError, match=sentence) as error:
        Tokenizer.from_pretrained(export)
    assert "\n" not in str(error.value)
    assert str(export) in str(error.value) or "huge" in what or "unknown" in what
    assert capfd.readouterr().out == ""


def test_weights_that_do_not_fit_take_no_memory(export, monkeypatch):
    """They are found out by the head of their file, of a model without memory."""
    built = []
    make = Tokenizer.__init__
    monkeypatch.setattr(Tokenizer, "__init__", lambda self, config: make(self, config) or built.append(self))
    change(export, width=64)
    with pytest.raises(UserError):
        Tokenizer.from_pretrained(export)
    assert {parameter.device.type for tokenizer in built for parameter in tokenizer.parameters()} == {"meta"}


# -------------------------------------------------------------------------------------------------------------- the Hub

FETCH = "import sys; from bench import Tokenizer; print(Tokenizer.from_pretrained(sys.argv[1]).config.width)"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for: the files of one repository."""

    folder: Path
    asked: list[tuple[str, str | None]]
    commit = "0" * 40

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.asked.append((self.path.partition("?")[0], self.headers.get("Authorization")))
        files = sorted(path.name for path in self.folder.iterdir())
        name = self.path.rpartition("/")[2]
        there = name in files and self.path.startswith("/me/mine/resolve/")
        body = (self.folder / name).read_bytes() if there else b""
        self.send_response(200 if body else 404)
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Says nothing."""


@pytest.mark.slow
def test_a_name_on_the_hub_is_fetched_with_the_user_s_token_and_nothing_but_what_is_read(export, tmp_path):
    """From a stand-in on this machine, by the Hub's own client."""
    (export / "evil.py").write_text("raise SystemExit")
    handler = type("Handler", (Hub,), {"folder": export, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub")}
        place |= {"HF_TOKEN": "hf_mine", "PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_DISABLE_TELEMETRY": "1"}
        fetched, missing = (
            subprocess.run([sys.executable, "-c", FETCH, name], env=place, cwd=tmp_path, capture_output=True, text=True)
            for name in ("me/mine", "me/other")
        )
        server.shutdown()
    assert fetched.stdout.strip() == "8", fetched.stderr
    names = {path.rpartition("/")[2] for path, _ in handler.asked if "/resolve/" in path}
    assert names == {"config.json", "model.safetensors"}
    assert {token for _, token in handler.asked} == {"Bearer hf_mine"}
    assert "there is no folder me/other, and the Hub does not give it" in missing.stderr


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/b/c", "../x"])
def test_what_is_neither_a_folder_nor_a_name_asks_nobody(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "the_hub", None)
    with pytest.raises(UserError, match="there is no folder"):
        Tokenizer.from_pretrained(name)


def test_without_its_package_the_hub_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match=r"no folder me/mine, and to look .* takes a package; pip install 'vqbench\[hub\]'"
    ):
        Tokenizer.from_pretrained("me/mine")
