"""Fréchet distance on DINOv2: the authors' network on torch-fidelity's images, with their weights or not at all."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from torch import Tensor

from bench.core.errors import UserError
from bench.core.files import sha256_file
from bench.metrics import EXTRACTORS, Batch, DinoV2Scores, ImageSet, Setup, digests, dinov2, weights
from tests.metrics.test_weights import Malice

CPU = torch.device("cpu")
FILE = "dinov2_vitl14_pretrain.pth"
WIDTH, HEADS, DEPTH, GRID = 24, 3, 2, 37  # of patches: the authors trained at 518 pixels


def authors_state() -> dict[str, Tensor]:
    """Random weights of a small network, by the names of the published file."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, GRID**2 + 1, WIDTH), "mask_token": (1, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 14, 14), "patch_embed.proj.bias": (WIDTH,)}
    for k in range(DEPTH):
        layers = {"norm1": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "norm2": (WIDTH,)}
        layers |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        for name, shape in layers.items():
            shapes |= {f"blocks.{k}.{name}.weight": shape, f"blocks.{k}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{k}.ls{i}.gamma": (WIDTH,) for i in (1, 2)}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def cubic(t: np.ndarray) -> np.ndarray:
    """The kernel of Keys 1981 with a = −0.75, on [−2, 2]."""
    t, a = np.abs(t), -0.75
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def resampling(n: int, side: int) -> Tensor:
    """(side, n) weights of bicubic resampling from n to side at the authors' scale (side + 0.1) / n."""
    matrix = np.zeros((side, n))
    for i in range(side):
        at = (i + 0.5) * n / (side + 0.1) - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            matrix[i, min(max(j, 0), n - 1)] += cubic(np.array(at - j))
    return torch.tensor(matrix, dtype=torch.float32)


def authors(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The class token of normalised images (B, 3, 224, 224): the transformer written out."""

    def linear(name: str, tokens: Tensor) -> Tensor:
        return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, tokens: Tensor) -> Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * state[f"{name}.weight"] + state[f"{name}.bias"]

    patches = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    first, grid = state["pos_embed"][0, :1], state["pos_embed"][0, 1:].view(GRID, GRID, WIDTH)
    by = resampling(GRID, 16)
    places = torch.cat([first, torch.einsum("in,jm,nmd->ijd", by, by, grid).reshape(-1, WIDTH)])
    tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), patches.flatten(2).mT], 1) + places
    for k in range(DEPTH):
        block = f"blocks.{k}"
        q, key, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens)).chunk(3, -1)
        q, key, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, key, v))
        mixed = (q @ key.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        attended = linear(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        tokens = tokens + state[f"{block}.ls1.gamma"] * attended
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", tokens)))
        tokens = tokens + state[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", hidden)
    return norm("norm", tokens)[:, 0]


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """A file of weights of a small network, accepted as the published one, and no other on this machine."""
    monkeypatch.setattr(dinov2, "SHAPE", {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS})
    monkeypatch.setitem(EXTRACTORS, "dinov2", EXTRACTORS["dinov2"]._replace(dimension=WIDTH))
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = tmp_path / "given" / FILE
    path.parent.mkdir()
    torch.save(authors_state(), path)
    monkeypatch.setitem(weights.DIGESTS, "dinov2", sha256_file(path))
    return path


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# -- the network


def test_the_network_is_the_authors(small):
    network = weights.dinov2(small).network
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(network(x), authors(authors_state(), x), atol=2e-5, rtol=1e-4)


def test_images_are_brought_to_the_network_as_torch_fidelity_does(small, monkeypatch):
    """Features and distance equal those of its own extractor around the same network."""
    network = weights.dinov2(small)
    monkeypatch.setattr(torch.hub, "load", lambda repository, name: {"dinov2_vitl14": network.network}[name])
    extractor = torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY["dinov2-vit-l-14"]("dinov2-vit-l-14", ["dinov2"])
    x, x_hat = pictures(8), pictures(8, 1)
    torch.testing.assert_close(network(x), extractor(x)[0])
    scores = DinoV2Scores(Setup(4, CPU, small))
    for part in (slice(0, 5), slice(5, 8)):
        scores.update(Batch(x[part], x_hat[part], None))
    names = {"feature_extractor": "dinov2-vit-l-14", "cuda": False, "save_cpu_ram": True, "cache": False}
    sets = {"input1": torch.utils.data.Subset(x_hat, range(8)), "input2": torch.utils.data.Subset(x, range(8))}
    found = torch_fidelity.calculate_metrics(**sets, **names, verbose=False, fid=True)
    assert scores.result() == {"fd_dinov2": pytest.approx(found["frechet_inception_distance"], rel=1e-4)}


def test_the_network_is_frozen_and_draws_no_random_numbers(small):
    before = torch.get_rng_state()
    network = weights.dinov2(small)
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network is weights.dinov2(small)
    assert network(pictures(3)).dtype == torch.float32


def test_the_published_network_is_large_and_sees_sixteen_patches_a_side():
    assert dinov2.SHAPE == {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    assert EXTRACTORS["dinov2"].dimension == 1024
    assert dinov2.positions(torch.zeros(1, 37**2 + 1, 8), dinov2.SIDE // dinov2.PATCH).shape == (1, 257, 8)


# -- its weights


@pytest.mark.parametrize("place", ["given", "cache/weights", "torch/hub/checkpoints"])
def test_weights_are_those_given_or_those_that_are_there(small, tmp_path, place):
    """Of a file or of the folder that it lies in; none is fetched."""
    assert weights.dinov2() is None
    assert weights.dinov2_digest(None) is None
    assert EXTRACTORS["dinov2"].identity(None) is None
    assert FILE in weights.dinov2_missing()
    path = tmp_path / place / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(small.read_bytes())
    for given in [path, path.parent] if place == "given" else [None]:
        assert weights.dinov2(given)(pictures(2)).shape == (2, WIDTH)
        assert weights.dinov2_digest(given) == sha256_file(small)[:12]
        assert sha256_file(small)[:12] in EXTRACTORS["dinov2"].identity(given)
        assert sha256_file(small)[:12] in digests(given)
    if place != "given":
        assert weights.dinov2_missing() == ""


def test_other_weights_are_refused(small, tmp_path):
    """Another file of that name, none, and one that would run something."""
    known = sha256_file(small)[:12]
    with pytest.raises(UserError, match=r"there is no file .* with DINOv2's weights; give --fid-weights "):
        weights.dinov2(tmp_path / FILE)
    (tmp_path / FILE).write_bytes(b"other weights")
    for given in (tmp_path / FILE, tmp_path):
        with pytest.raises(UserError, match=f"does not hold DINOv2's weights: .*, expected {known}; take {FILE}"):
            weights.dinov2(given)


def test_weights_that_hold_more_than_tensors_are_refused(small, tmp_path, monkeypatch):
    torch.save(Malice(tmp_path / "ran"), small)
    monkeypatch.setitem(weights.DIGESTS, "dinov2", sha256_file(small))
    with pytest.raises(UserError, match="more than tensors"):
        weights.dinov2(small)
    assert not (tmp_path / "ran").exists()


def test_a_file_is_of_the_network_that_its_name_tells_and_else_inceptions(tmp_path):
    inception, own = tmp_path / "weights-inception-2015-12-05-6726825d.pth", tmp_path / FILE
    assert (weights.given("inception", inception), weights.given("dinov2", inception)) == (inception, None)
    assert (weights.given("inception", own), weights.given("dinov2", own)) == (None, own)
    other = tmp_path / "any.pth"
    assert (weights.given("inception", other), weights.given("dinov2", other)) == (other, None)
    assert weights.given("inception", None) is None
    with pytest.raises(UserError, match="has none of the files weights-inception"):
        weights.given("dinov2", tmp_path)
    own.touch()
    assert (weights.given("inception", tmp_path), weights.given("dinov2", tmp_path)) == (None, own)
    inception.touch()
    assert (weights.given("inception", tmp_path), weights.given("dinov2", tmp_path)) == (inception, own)


# -- what it gives


def test_without_weights_nothing_goes_by_that_name(monkeypatch):
    monkeypatch.setattr(weights, "dinov2", lambda path: None)
    scores = DinoV2Scores(Setup(4, CPU))
    scores.update(Batch(pictures(4), pictures(4, 1), None))
    assert scores.result() == {}


def test_samples_are_compared_under_a_name_of_their_own(small, monkeypatch):
    """gfd_dinov2 between generated and real images, beside what VGG16 says."""
    toy = EXTRACTORS["vgg16"]._replace(load=lambda *_: lambda x: x[:, :, 0, 0].float(), dimension=3)
    monkeypatch.setitem(EXTRACTORS, "vgg16", toy)
    monkeypatch.setattr(weights, "inception", lambda path: None)
    made, real = (ImageSet.of(pictures(9, seed).split(4), "cpu", small) for seed in (0, 1))
    assert made.features["dinov2"].shape == (9, WIDTH)
    scores = DinoV2Scores(Setup(4, CPU, small))
    scores.update(Batch(pictures(9, 1), pictures(9, 0), None))
    assert made.distances(real)["gfd_dinov2"] == pytest.approx(scores.result()["fd_dinov2"], rel=1e-5)
    assert "gfid" not in made.distances(real)
