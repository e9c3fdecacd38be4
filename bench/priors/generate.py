"""Generate images through a tokenizer from a prior, and score them: rate, distance to real images, copying, speed."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.errors import Damaged
from bench.core.files import cache_dir, cached, seal, unseal_numbers
from bench.core.progress import Bar
from bench.data import Data, eval_batches
from bench.metrics import EXTRACTORS, ImageSet, Metric, digests, full_precision, to_uint8
from bench.tokenizers import costs
from bench.tokenizers.sizes import parameter_count
from bench.tokenizers.tokenizer import Tokenizer

from .codes import Codes
from .config import PRIOR_VERSION, PriorConfig
from .models import Prior
from .models.independent import PSEUDOCOUNT, Independent
from .pixels import Pixels

BATCH = 64  # grids to score or decode at a time
LOGITS = 1 << 25  # numbers to hold of them at once
SAMPLE_BATCH = 256  # grids to sample at a time: one step is little work for each
POSITIONS = 1 << 20  # of those together, at most: a transformer remembers all of them
NEAREST_SIDE = 32  # pixels of the images among which neighbours are looked for
NEAREST_IMAGES = 50_000  # of the training set, evenly spaced, at most
SHOWN = 64  # samples in the picture
TRIED = 16  # grids to measure by how much sampling step by step is faster

METRICS: dict[str, Metric] = {
    "coded_bits_per_token": Metric("bits per token", ".3f", "lower"),
    "coded_bits_per_image": Metric("coded bits per image", ".0f", "lower"),
    "coded_bits_per_pixel": Metric("coded bits per pixel", ".4f", "lower"),
    "coded_bits_per_token_train": Metric("bits per token, training", ".3f", ""),
    "coded_bits_per_token_independent": Metric("bits per token, independent", ".3f", ""),
    "gfid": Metric("gFID", ".1f", "lower"),
    "gfid_vgg16": Metric("gFID vgg16", ".1f", "lower"),
    "gfd_dinov2": Metric("gFD DINOv2", ".1f", "lower"),
    "gkid_vgg16": Metric("gKID vgg16", ".3f", "lower"),
    "precision_vgg16": Metric("precision vgg16", ".2f", "higher"),
    "recall_vgg16": Metric("recall vgg16", ".2f", "higher"),
    "nearest_train_psnr": Metric("nearest training image dB", ".1f", ""),
    "nearest_val_psnr": Metric("the same of held-out images dB", ".1f", ""),
    "copy_rate": Metric("copies", ".2f", ""),
    "images_per_second_sample": Metric("samples/s", ".0f", "higher"),
    "sampling_speedup": Metric("times faster than whole passes", ".1f", ""),
    "params_prior": Metric("parameters", ",.0f", "lower"),
    "flops_prior": Metric("FLOPs", ",.0f", "lower"),
    "grids_seen": Metric("grids seen", ",.0f", ""),
    **{name: costs.METRICS[name] for name in ("peak_memory_mb", "train_seconds")},
}


class Generated(NamedTuple):
    """What a prior gave: metrics by name; codes (n, h, w) int64, and the first SHOWN of them as images (n, H, W, 3)
    uint8; neighbours: the training image nearest to each of those; classes: what those were drawn as, of a conditional
    prior."""

    metrics: dict[str, float]
    codes: np.ndarray
    images: np.ndarray
    neighbours: np.ndarray
    classes: list[str] | None = None


def score_prior(
    prior: Prior,
    tokenizer: Tokenizer | Pixels,
    codes: Codes,
    data: Data,
    config: PriorConfig,
    known: dict[str, float],
    fid_weights: Path | None,
) -> Generated:
    """All that is measured of a prior, in float32, on held-out images and samples. ``known``: from ``references``.

    ``coded_bits_*``: the rate at which an entropy coder with this prior would send held-out codes, the class included
    where the prior is conditioned on it; ``*_train`` of as many training codes. ``g*``, ``precision_vgg16`` and
    ``recall_vgg16`` compare the samples with all held-out images. ``nearest_train_psnr``: median PSNR of a sample to
    its nearest training image. ``copy_rate``: share of samples nearer to a training image than 95 % of reconstructed
    held-out images, which cannot be copies, are; so 0.05 is innocent.
    """
    device, pixels = torch.device(config.device), tokenizer.config.image_size**2
    tokens, evenly = prior.tokens, np.linspace(0, len(codes.train) - 1, len(codes.held_out), dtype=int)
    labels = codes.train_labels if prior.classes else None
    own = None if labels is None else labels[evenly]
    with full_precision(device):
        bits = rate(prior, codes.held_out, codes.held_out_labels, labels)
        metrics = {
            "coded_bits_per_token": bits,
            "coded_bits_per_image": tokens * bits,
            "coded_bits_per_pixel": tokens * bits / pixels,
            "coded_bits_per_token_train": rate(prior, codes.train[evenly], own, labels),
            "params_prior": parameter_count(prior),
            "flops_prior": whole_grid_flops(prior),
            "sampling_speedup": speedup(prior, config),
        }
        began = time.monotonic()
        grids = draw(prior, config, labels)
        samples = decode(tokenizer, grids, config.device)
        metrics["images_per_second_sample"] = config.samples / (time.monotonic() - began)
    real = real_features(data, tokenizer.config.split, config.device, fid_weights)
    metrics |= ImageSet.of(_bar(samples, "scoring samples"), device, fid_weights).distances(real)
    psnr, rows = nearest(samples, data.train, config.device)
    metrics["nearest_train_psnr"] = float(psnr.median())
    metrics["copy_rate"] = float((psnr > known["nearest_val_psnr_95"]).float().mean())
    shown = samples[:SHOWN].permute(0, 2, 3, 1).numpy()
    classes = None if labels is None else [codes.classes[place] for place in labels_to_draw(config, labels)[:SHOWN]]
    return Generated(metrics, grids.numpy(), shown, data.train[rows[:SHOWN].numpy()], classes)


@torch.inference_mode()
def rate(prior: Prior, codes: np.ndarray, labels: np.ndarray | None, train_labels: np.ndarray | None) -> float:
    """Mean −log₂ p of ``codes`` (N, h, w): bits per token. Where the prior is conditioned on their ``labels`` (N,),
    these are coded too, with the frequencies of ``train_labels``."""
    device = next(iter(prior.state_dict().values())).device
    count = max(1, min(BATCH, LOGITS // (codes[0].size * prior.codebook_size)))
    total = 0.0
    with Bar("rating grids", len(codes)) as bar:
        for start in range(0, len(codes), count):
            grids = torch.from_numpy(codes[start : start + count].astype(np.int64)).to(device)
            given = torch.from_numpy(labels[start : start + count]).to(device) if prior.classes else None
            total += float(prior.nll(grids, given).double().sum())
            bar.advance(len(grids))
    if prior.classes:
        weights = np.bincount(train_labels, minlength=prior.classes) + PSEUDOCOUNT
        total -= float(np.log(weights / weights.sum())[labels].sum())
    return total / codes.size / math.log(2)


def draw(prior: Prior, config: PriorConfig, train_labels: np.ndarray | None) -> Tensor:
    """``config.samples`` grids (n, h, w) int64 on the CPU; their labels, if any, are drawn as training has them."""
    generator = torch.Generator(config.device).manual_seed(config.seed)
    labels = None
    if train_labels is not None:
        labels = torch.from_numpy(labels_to_draw(config, train_labels)).to(config.device)
    drawn, batch = [], min(SAMPLE_BATCH, max(1, POSITIONS // prior.tokens))
    how, own = (config.temperature, config.top_k), {"guidance": config.guidance}
    if config.prior == "masked":  # has the logits of whole grids, of guidance twice
        own["passes"], numbers = config.passes, prior.tokens * prior.codebook_size * (1 + (config.guidance != 1))
        batch = min(batch, max(1, LOGITS // numbers))
    with Bar("sampling codes", config.samples * prior.tokens) as bar:
        for start in range(0, config.samples, batch):
            count = min(batch, config.samples - start)
            given = None if labels is None else labels[start : start + count]
            drawn.append(prior.sample(count, generator, *how, given, **own, progress=bar.advance).cpu())
    return torch.cat(drawn)


def labels_to_draw(config: PriorConfig, train_labels: np.ndarray) -> np.ndarray:
    """Those of ``config.samples`` samples, (n,): as often as they are among the labels of the training images (N,)."""
    return train_labels[np.random.default_rng(config.seed).integers(0, len(train_labels), config.samples)]


def whole_grid_flops(prior: Prior) -> int:
    """FLOPs (see ``costs.flops``) of the logits of one whole grid, as training and scoring compute them."""
    codes = torch.zeros(1, *prior.grid, dtype=torch.int64)
    return costs.flops(prior, codes, *([torch.zeros(1, dtype=torch.int64)] if prior.classes else []))


@torch.inference_mode()
def speedup(prior: Prior, config: PriorConfig) -> float:
    """How many times faster ``sample`` is than a forward pass over the whole grid for each of its positions."""
    generator = torch.Generator(config.device).manual_seed(config.seed)
    labels = torch.zeros(TRIED, dtype=torch.int64, device=config.device) if prior.classes else None
    passes = {"passes": config.passes} if config.prior == "masked" else {}
    for _ in range(2):  # the first warms up
        began = time.monotonic()
        codes = prior.sample(TRIED, generator, labels=labels, **passes)
        codes.cpu()  # waits for the device
        middle = time.monotonic()
        prior.logits(codes, labels).sum().cpu()
        steps, whole = middle - began, time.monotonic() - middle
    return codes[0].numel() * whole / steps


@torch.inference_mode()
def decode(tokenizer: Tokenizer | Pixels, grids: Tensor, device: str) -> Tensor:
    """Images of ``grids`` (n, h, w) int64: (n, 3, H, W) uint8 on the CPU, decoded in float32."""
    with full_precision(torch.device(device)):
        return torch.cat([to_uint8(tokenizer.decode(part.to(device))).cpu() for part in grids.split(BATCH)])


def real_features(data: Data, split: str, device: str, fid_weights: Path | None) -> ImageSet:
    """Features of the images of ``split``: computed once for a data set, then cached."""
    key = f"{data.fingerprint[:16]}-{split}-{digests(fid_weights)}-{device.partition(':')[0]}"

    def make(path: Path) -> None:
        real = ImageSet.of(_bar(data.images(split), f"features of {split} images"), device, fid_weights)
        np.savez(path, **{EXTRACTORS[name].weights: x.numpy() for name, x in real.features.items()})

    def read(path: Path) -> ImageSet:
        with np.load(path) as stored:  # whose archive has checksums
            features = {name: torch.from_numpy(stored[used.weights]) for name, used in EXTRACTORS.items()}
        if not all(x.isfinite().all() for x in features.values()):
            raise Damaged(path, "its features are not finite")
        return ImageSet(features)

    return cached(cache_dir() / "references" / f"features-{key}.npz", make, read)


def references(
    tokenizer: Tokenizer | Pixels,
    codes: Codes,
    data: Data,
    config: PriorConfig,
    folder: Path,
    fid_weights: Path | None,
) -> dict[str, float]:
    """What every prior over these codes is read against, computed once and kept in ``folder``.

    ``coded_bits_per_token_independent``: the rate with the histogram of each position, the floor. ``*_real``: scores of
    real training codes, decoded, which a perfect prior would reach; ``*_shuffled``: the same with the codes of each
    grid in random order. As many as samples, or as there are. ``nearest_val_psnr``: median PSNR of reconstructed
    held-out images to the nearest training image; ``nearest_val_psnr_95``: what 5 % of them exceed.
    """
    key = f"v{PRIOR_VERSION}-{config.samples}-{digests(fid_weights)}-{config.device.partition(':')[0]}"

    def make(path: Path) -> None:
        path.write_text(seal(_references(tokenizer, codes, data, config, fid_weights)))

    used = ("nearest_val_psnr", "nearest_val_psnr_95")
    return cached(folder / f"references-{key}.json", make, lambda path: unseal_numbers(path, *used))


def _references(
    tokenizer: Tokenizer | Pixels, codes: Codes, data: Data, config: PriorConfig, fid_weights: Path | None
) -> dict[str, float]:
    count = min(config.samples, len(data.train))  # one image twice would fool precision and recall
    grids = codes.train[np.linspace(0, len(data.train) - 1, count, dtype=int)].astype(np.int64)
    shuffled = np.random.default_rng(0).permuted(grids.reshape(count, -1), axis=1).reshape(grids.shape)
    real, found = real_features(data, tokenizer.config.split, config.device, fid_weights), {}
    for name, chosen in {"real": grids, "shuffled": shuffled}.items():
        images = decode(tokenizer, torch.from_numpy(chosen), config.device)
        scores = ImageSet.of(_bar(images, f"scoring {name} codes"), config.device, fid_weights).distances(real)
        scores["nearest_train_psnr"] = float(nearest(images, data.train, config.device)[0].median())
        found |= {f"{metric}_{name}": value for metric, value in scores.items()}
    floor = Independent(codes.codebook_size, codes.grid).to(config.device)
    floor.fit(codes.train)
    found["coded_bits_per_token_independent"] = rate(floor.eval(), codes.held_out, None, None)
    images = decode(tokenizer, torch.from_numpy(codes.held_out.astype(np.int64)), config.device)
    psnr = nearest(images, data.train, config.device)[0]
    return found | {"nearest_val_psnr": float(psnr.median()), "nearest_val_psnr_95": float(psnr.quantile(0.95))}


@torch.inference_mode()
def nearest(images: Tensor, train: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """PSNR (n,) in dB of uint8 ``images`` (n, 3, H, W) to their nearest training images, and the rows (n,) of those.
    Nearest, and scored, at 32×32 pixels (box-filtered) where images are larger; mirror images count too."""
    pool = np.linspace(0, len(train) - 1, min(len(train), NEAREST_IMAGES), dtype=int)

    def shrink(x: Tensor) -> Tensor:
        x = x.to(device).float()
        return F.interpolate(x, size=NEAREST_SIDE, mode="area") if x.shape[-1] > NEAREST_SIDE else x

    queries = torch.cat([shrink(part) for part in images.split(BATCH)]).flatten(1)
    least = torch.full((len(queries),), torch.inf, device=queries.device)
    rows = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(pool), 1024):
        part = pool[start : start + 1024]
        x = shrink(torch.from_numpy(train[part]).permute(0, 3, 1, 2))
        for candidates in (x, x.flip(-1)):
            distance, row = torch.cdist(queries, candidates.flatten(1)).min(1)
            closer = distance < least
            least = torch.where(closer, distance, least)
            rows = torch.where(closer, torch.from_numpy(part).to(rows.device)[row], rows)
    error = least.square() / queries.shape[1]
    return (20 * math.log10(255) - 10 * error.clamp_min(1e-3).log10()).cpu(), rows.cpu()


def _bar(images: Tensor | np.ndarray, label: str) -> Iterator[Tensor]:
    """Batches of images with a progress bar; (N, H, W, 3) arrays or (N, 3, H, W) tensors."""
    batches = images.split(BATCH) if isinstance(images, Tensor) else eval_batches(images, BATCH)
    with Bar(label, len(images)) as bar:
        for x in batches:
            yield x
            bar.advance(len(x))
