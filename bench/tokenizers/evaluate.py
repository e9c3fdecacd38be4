"""Score a tokenizer on a whole split, and the reference that it has to beat at the same bits."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.plugins import packages
from bench.core import group
from bench.core.files import cache_dir, cached, seal, unseal_numbers
from bench.core.progress import Bar
from bench.data import Data, batch_indices, eval_batches
from bench.metrics import (
    EVALUATORS,
    EXTRACTORS,
    Artefacts,
    Batch,
    Codec,
    Setup,
    digests,
    from_uint8,
    full_precision,
    to_uint8,
    weights,
)
from bench.quantizers import nearest

from .config import PROTOCOL_VERSION, Config
from .tokenizer import Tokenizer, started, to_device

EVAL_BATCH = 32  # VGG16 is fastest on CPUs with so many
UNTRAINED_IMAGES = 64  # scored before training
PICTURES = 12  # images that a run keeps its reconstructions of
KMEANS_PATCHES, KMEANS_ITERATIONS = 131072, 25
REFERENCE_VERSION = 2  # of the cached scores of k-means; raise it when score() gives more


@torch.no_grad()
def score(
    codec: Codec,
    codebook_size: int | None,
    images: np.ndarray,
    device: str = "cpu",
    fid_weights: Path | None = None,
    label: str = "scoring",
    together: bool = False,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics of ``decode(encode(x))`` over ``images`` (N, H, W, 3) uint8, and the per-image scores behind the means.
    Both run in float32; reconstructions are clamped and rounded to uint8 before anything is measured. Where
    ``codebook_size`` is None there are no codes, and no metrics of them; bits are those that ``codec`` measures.

    ``together``: several processes share the images, in whole batches, and all but the first get nothing back."""
    setup = Setup(codebook_size, torch.device(device), fid_weights)
    evaluators = [evaluator(setup) for evaluator in EVALUATORS]
    if together:
        own = group.share(-(-len(images) // EVAL_BATCH))
        images = images[own.start * EVAL_BATCH : own.stop * EVAL_BATCH]
    with Bar(label, len(images)) as bar:
        for x in eval_batches(images, EVAL_BATCH):
            x = x.to(device)
            with full_precision(x.device):
                codes, bits = _encode(codec, from_uint8(x))
                x_hat = to_uint8(codec.decode(codes))
            for evaluator in evaluators:
                evaluator.update(Batch(x, x_hat, codes, bits))
            bar.advance(len(x))
    for evaluator in evaluators if together else ():
        for seen in group.gathered(evaluator.seen())[1:]:
            evaluator.join(seen)
    if together and not group.first():
        return {}, {}
    metrics = {name: value for evaluator in evaluators for name, value in evaluator.result().items()}
    return metrics, {name: values for evaluator in evaluators for name, values in evaluator.per_image.items()}


def _encode(codec: Codec, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return codec.encode_with_bits(x) if hasattr(codec, "encode_with_bits") else (codec.encode(x), None)


@torch.no_grad()
def score_untrained(config: Config, images: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """The grid that ``config`` starts with, before any training: ``grid_energy_init`` and ``grid_edges_init`` over 64
    evenly spaced ``images`` (N, H, W, 3) uint8, and what it makes of PICTURES of them, uint8 alike.

    The quantizer is left out: a codebook that has seen nothing says nothing about the backbone. Leaves the random
    generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # as train() does: the weights that the run starts from
        tokenizer = to_device(started(Tokenizer(config)), config.device).eval()

    def reconstructed(chosen: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        for x in eval_batches(chosen, EVAL_BATCH):
            x = x.to(config.device)
            yield x, to_uint8(tokenizer.decoder(tokenizer.encoder(from_uint8(x))))

    artefacts = Artefacts()
    for x, x_hat in reconstructed(evenly_spaced(images, UNTRAINED_IMAGES)):
        artefacts.update(x, x_hat)
    scores = {f"{name}_init": artefacts.result(config.grid_size)[name] for name in ("grid_energy", "grid_edges")}
    pictures = torch.cat([x_hat for _, x_hat in reconstructed(evenly_spaced(images, PICTURES))])
    return scores, pictures.permute(0, 2, 3, 1).cpu().numpy()


def evenly_spaced(images: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of ``images`` (N, H, W, 3), from the first to the last."""
    return np.ascontiguousarray(images[np.linspace(0, len(images) - 1, min(count, len(images)), dtype=int)])


def protocol(data: Data, split: str, device: str, fid_weights: Path | None) -> dict[str, Any]:
    """Everything that must be equal for two scores to be comparable, besides the bits spent; of scores on ``split``."""
    return {
        "version": PROTOCOL_VERSION,
        "data": data.name,
        "fingerprint": data.fingerprint,
        "split": data.split,
        "scored_on": split,
        "count": len(data.images(split)),
        "skipped": len(data.skipped),
        "image_size": data.val.shape[1],
        "resizer": "none: one decoded array is reconstructed and compared",
        "rounding": "clamped to [-1, 1], rounded to uint8",
        "precision": "fp32",
        "extractor_alex": weights.weights_digest("alex"),  # of LPIPS alone
        **{f"extractor_{name}": extractor.identity(fid_weights) for name, extractor in EXTRACTORS.items()},
        "device": device.partition(":")[0],
    }


class PatchKMeans:
    """k-means on raw patches, what the same bits buy without any network: the code of a grid cell is the nearest of
    ``codebook_size`` centroids (Lloyd's algorithm, from random patches, empty clusters restarted)."""

    def __init__(self, images: np.ndarray, grid_size: int, codebook_size: int, device: str):
        self.grid_size = grid_size
        generator = torch.Generator().manual_seed(0)
        count = min(len(images), -(-max(KMEANS_PATCHES, codebook_size) // grid_size**2))
        rows = np.sort(batch_indices(0, 0, count, len(images)))
        patches = self._patches(from_uint8(torch.from_numpy(images[rows]).to(device).permute(0, 3, 1, 2)))
        pick = torch.randperm(len(patches), generator=generator)[:KMEANS_PATCHES]
        patches = patches[pick.to(patches.device)]
        repeats = -(-codebook_size // len(patches))
        self.centroids = patches.repeat(repeats, 1)[:codebook_size].clone()
        with Bar(f"k-means reference, K {codebook_size}", KMEANS_ITERATIONS) as bar:
            for _ in range(KMEANS_ITERATIONS):
                codes = nearest(patches, self.centroids)
                hits = torch.bincount(codes, minlength=codebook_size)
                sums = torch.zeros_like(self.centroids).index_add_(0, codes, patches)
                restart = patches[torch.randint(len(patches), (codebook_size,), generator=generator).to(device)]
                self.centroids = torch.where(hits[:, None] > 0, sums / hits.clamp(min=1)[:, None], restart)
                bar.advance()

    def _patches(self, x: Tensor) -> Tensor:
        b, c, height, _ = x.shape
        side = height // self.grid_size
        grid = x.reshape(b, c, self.grid_size, side, self.grid_size, side)
        return grid.permute(0, 2, 4, 1, 3, 5).reshape(b * self.grid_size**2, c * side * side)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, grid_size, grid_size) int64."""
        return nearest(self._patches(x), self.centroids).view(len(x), self.grid_size, self.grid_size)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, grid_size, grid_size) int64 → (B, 3, H, W) in [-1, 1]."""
        side = math.isqrt(self.centroids.shape[1] // 3)
        grid = self.centroids[codes].unflatten(-1, (3, side, side)).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(len(codes), 3, self.grid_size * side, self.grid_size * side)


def kmeans_reference(config: Config, data: Data, fid_weights: Path | None) -> dict[str, float]:
    """Scores of PatchKMeans on ``data`` with the images, the grid and K of ``config``, named as any scores. Computed
    once, then cached."""
    grid_size, codebook_size, device = config.grid_size, config.codebook_size, config.device
    version, extractors = f"v{PROTOCOL_VERSION}.{REFERENCE_VERSION}", digests(fid_weights)
    version += "".join(f"-{name}-{number}" for name, number in packages(["metrics"]).items())  # of others' metrics
    images = f"{data.fingerprint[:16]}-{config.split}-n{len(data.train)}"
    key = f"{images}-g{grid_size}-k{codebook_size}-{version}-{extractors}-{device.partition(':')[0]}"

    def make(path: Path) -> None:
        codec = PatchKMeans(data.train, grid_size, codebook_size, device)
        metrics, _ = score(codec, codebook_size, data.images(config.split), device, fid_weights, "scoring k-means")
        path.write_text(seal(metrics))

    return cached(cache_dir() / "references" / f"{key}.json", make, lambda path: unseal_numbers(path, "psnr"))
