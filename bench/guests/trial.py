"""One guest in, one finished run folder out: the scores, references and pictures of a run, without its training."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.core.errors import UserError
from bench.core.files import atomic_path
from bench.core.runs import Run, check_whole
from bench.core.store import Store
from bench.data import Data
from bench.tokenizers.codecs import KEPT, format_references
from bench.tokenizers.costs import flops, throughput
from bench.tokenizers.evaluate import PICTURES, evenly_spaced, kmeans_reference, protocol, score
from bench.tokenizers.measure import look, subject
from bench.tokenizers.sizes import parameter_count
from bench.tokenizers.trial import sample_reconstructions, show
from bench.training.trial import begun, complete

from .config import GuestConfig
from .guest import Guest

RESIZED = "bicubic and antialiased, to {0}×{0} for the tokenizer and back"


def score_guest(
    guest: Guest,
    data: Data,
    store: Store,
    split: str = "test",
    fid_weights: Path | None = None,
    instruments: Sequence[str] = (),
    train_images: int = 0,
) -> Run:
    """Scores ``guest`` on a split of ``data`` by the protocol of our own runs, or returns at once when ``store`` has
    that; k-means, for which ``train_images`` of them are taken (0: all), and image formats at the same bits as well.
    Then ``instruments`` look at it. A run of ours that was scored under the same protocol is returned as it is.

    Raises UserError where the guest cannot take such images, or gives codes that it cannot have."""
    conditions = _conditions(guest, data, split, fid_weights)
    if guest.folder is not None and Run(guest.folder).protocol() == conditions:
        return Run(guest.folder)
    config = _config(guest, data, split, train_images)
    run = store.run(config)
    check_whole(run)
    if run.finished and run.protocol() != conditions:
        raise UserError(f"{run.folder} was scored by other weights or on other images of {data.name}; move that folder")
    if not run.finished:
        with begun(run, {"config": asdict(config), "about": guest.about, "trained_on": data.fingerprint}):
            try:
                _finish(run, guest, config, data.with_train(train_images), conditions, fid_weights)
            except UserError as error:
                run.fail("refused", str(error))
                raise
    look(
        run,
        lambda: subject(guest.codec, guest.lookup, config, data),
        lambda: run.digests()["per_image.npz"],
        instruments,
    )
    return run


def _conditions(guest: Guest, data: Data, split: str, fid_weights: Path | None) -> dict[str, Any]:
    """How it is measured: as our own runs are, but for images that are resized for it."""
    conditions = protocol(data, split, guest.device, fid_weights)
    return conditions | ({"resizer": RESIZED.format(guest.resize_to)} if guest.resize_to else {})


def _config(guest: Guest, data: Data, split: str, train_images: int) -> GuestConfig:
    image_size, discrete = data.test.shape[1], guest.codebook_size is not None
    shape = guest.latent(image_size).shape if guest.made is None else ()  # which has the images of the split alone
    rated = discrete or hasattr(guest.codec, "encode_with_bits")
    return GuestConfig(
        backbone=guest.name,
        digest=guest.digest,
        data=data.name,
        image_size=image_size,
        split=split,
        device=guest.device,
        train_images=train_images,
        codebook_size=guest.codebook_size or 0,
        grid_size=shape[-1] if discrete and shape[-1] == shape[-2] else 0,
        resize_to=guest.resize_to,
        quantizer="own" if rated else "none",
    )


def _finish(
    run: Run, guest: Guest, config: GuestConfig, data: Data, conditions: dict[str, Any], fid_weights: Path | None
) -> None:
    """Scores, and everything that a finished run holds, metrics.json last."""
    began, images = time.monotonic(), data.images(config.split)
    try:
        metrics, per_image = score(
            guest.codec, guest.codebook_size, images, guest.device, fid_weights, f"scoring {guest.name}"
        )
    except ValueError as error:
        raise UserError(f"{guest.name}: {error}; its codebook_size is {guest.codebook_size}") from error
    if guest.pixels:
        metrics = {name: value for name, value in metrics.items() if name in (*KEPT, "sharpness")}
    if wrong := sorted(name for name, value in metrics.items() if not np.isfinite(value)):
        raise UserError(f"{guest.name}: {wrong[0]} is {metrics[wrong[0]]}; it makes images that are none")
    references: dict[str, float] = {}
    whole = config.grid_size and config.image_size % config.grid_size == 0
    if whole and len(data.train) > 1:
        found = kmeans_reference(config, data, fid_weights)
        references = {f"{name}_kmeans": value for name, value in found.items()}
    if guest.codebook_size is not None:
        references |= format_references(config, data, metrics["bits_per_image"], fid_weights)
    with atomic_path(run.folder / "per_image.npz") as temporary:
        np.savez_compressed(temporary, **per_image)
    if guest.made is None:
        shown = sample_reconstructions(guest.codec, images, guest.device)
    else:
        shown = evenly_spaced(images, PICTURES), evenly_spaced(guest.made, PICTURES)
    show(run, *shown, f"{guest.name}: {metrics['psnr']:.1f} dB")
    costs = _costs(guest, config)
    costs["score_seconds"] = max(0.0, time.monotonic() - began)
    complete(run, {**metrics, **costs, **references}, conditions)


@torch.no_grad()
def _costs(guest: Guest, config: GuestConfig) -> dict[str, float]:
    """Parameters and operations of either side where they are known, and how fast both are; nothing of formats."""
    if guest.pixels:
        return {}
    costs: dict[str, float] = {}
    if guest.sides is not None:
        side = config.resize_to or config.image_size
        x = torch.zeros(1, 3, side, side, device=guest.device)
        z = guest.sides.encoder(x)
        costs = {
            "params_encoder": parameter_count(guest.sides.encoder),
            "params_decoder": parameter_count(guest.sides.decoder),
            "flops_encode": flops(guest.sides.encoder, x),
            "flops_decode": flops(guest.sides.decoder, z),
        }
    return {**costs, **throughput(guest.codec, config.image_size, guest.device)}
