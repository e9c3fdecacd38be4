"""The codes of a data set: every image encoded once by a tokenizer, in files beside it.

``RUN/codes/`` holds train.npy and held_out.npy, the split that the tokenizer was scored on: (N, h, w) in the smallest
unsigned integers that hold K codes; and meta.json, written last, with the digest of the tokenizer's weights. Where
training mirrors images, train.npy has all mirror images after all images.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock

from bench.core.errors import Damaged, UserError
from bench.core.files import (
    UNREADABLE,
    atomic_path,
    cached,
    remove_parts,
    seal,
    sha256_arrays,
    sha256_file,
    told,
    unseal,
)
from bench.core.progress import Bar
from bench.core.runs import UNDEFINED, Changed, Run, check_finished
from bench.data import Data, eval_batches, load
from bench.metrics import from_uint8, full_precision
from bench.tokenizers.tokenizer import Tokenizer
from bench.training.weights import check_weights

ENCODE_BATCH = 64


class Codes(NamedTuple):
    """A data set of codes: train and held_out are (N, h, w) unsigned integers in [0, K), memory-mapped, labels are
    places in ``classes``, None where the data has none; tokenizer is the digest of the weights that made them, or of
    the images, if the codes are their pixels."""

    train: np.ndarray
    held_out: np.ndarray
    codebook_size: int
    tokenizer: str
    classes: tuple[str, ...]
    train_labels: np.ndarray | None
    held_out_labels: np.ndarray | None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid, (h, w)."""
        return self.train.shape[1:]


def digest(folder: Path) -> str:
    """Identity of the tokenizer of a run folder: of its weights. Raises UserError where there is no finished one,
    where they are not those that it was scored with, and where its latents are no codes."""
    check_finished(Run(folder))
    if (quantizer := str(Run(folder).config().get("quantizer"))) in UNDEFINED:
        words = f"quantizer {quantizer!r} of {folder} makes no codes to encode or to train a prior on"
        raise UserError(f"{words}; train a tokenizer with another, such as ema")
    check_weights(Run(folder), "tokenizer.safetensors")
    return sha256_file(folder / "tokenizer.safetensors")[:16]


def load_data(folder: Path, tokenizer: Tokenizer) -> Data:
    """The images that the run was trained and scored on. Raises Changed when they are others now."""
    config = tokenizer.config
    data = load(config.data, config.image_size).with_train(config.train_images)
    if data.fingerprint != Run(folder).protocol().get("fingerprint"):
        raise Changed(f"{config.data} has other images now than when {folder} was trained; train it again")
    return data


def encode(folder: Path, tokenizer: Tokenizer, data: Data) -> Codes:
    """The codes of ``data`` by ``tokenizer``, of the finished run in ``folder``: made by the first call, read by later
    ones, of other processes too. Raises UserError when the codes that are there are of another tokenizer."""
    place, identity = folder / "codes", digest(folder)
    place.mkdir(exist_ok=True)
    with FileLock(place / ".lock"):
        for stem in ("meta", "train", "held_out"):
            remove_parts(place, stem)
        meta, train, held_out = cached(
            place / "meta.json", lambda path: _encode(path, tokenizer, data, identity), _read
        )
    if meta["tokenizer"] != identity:
        other = f"another tokenizer ({meta['tokenizer']}, not {identity})"
        raise UserError(f"{place} has codes of {other}; delete that folder to encode again")
    train_labels, labels = data.labels_of("train"), data.labels_of(tokenizer.config.split)
    if train_labels is not None and meta["mirrored"]:
        train_labels = np.concatenate([train_labels, train_labels])
    return Codes(train, held_out, meta["codebook_size"], identity, data.classes, train_labels, labels)


def _read(path: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """What the file ``path`` tells of the codes beside it, and both splits, mapped. Raises Damaged or ValueError where
    that is not what was written."""
    meta = unseal(path, "tokenizer", "mirrored", "codebook_size")
    splits = [path.with_name(f"{split}.npy") for split in ("train", "held_out")]
    if missing := [split.name for split in splits if not split.is_file()]:  # reading a pipe would wait for ever
        raise Damaged(path.parent, f"it has no file {missing[0]}")
    try:
        train, held_out = (np.load(split, mmap_mode="r") for split in splits)
    except UNREADABLE as error:
        raise Damaged(path.parent, f"its codes cannot be read ({told(error)})") from error
    if {train.dtype, held_out.dtype} != {
        np.min_scalar_type(meta["codebook_size"] - 1)
    }:  # of which a digest knows nothing
        raise Damaged(path.parent, "its codes are of another type")
    if {train.ndim, held_out.ndim} != {3} or len({*train.shape[1:], *held_out.shape[1:]}) != 1:
        raise Damaged(path.parent, "its codes are of another shape")
    if meta.get("digest", found := sha256_arrays(train, held_out)) != found:  # older versions wrote none
        raise Damaged(path.parent, "its codes are not those that were written")
    if "digest" not in meta and max(train.max(), held_out.max()) >= meta["codebook_size"]:
        raise Damaged(path.parent, "its codes are beyond its codebook")
    return meta, train, held_out


@torch.inference_mode()
def _encode(meta: Path, tokenizer: Tokenizer, data: Data, identity: str) -> None:
    """Writes both splits, and then the file ``meta`` beside them."""
    splits = []
    config, device = tokenizer.config, next(tokenizer.parameters()).device
    mirrored = config.augment != "none"
    kind = np.min_scalar_type(config.codebook_size - 1)
    held_out = data.images(config.split)
    label = "encoding images" + ", those to train on mirrored, too" * mirrored
    with Bar(label, len(held_out) + len(data.train) * (1 + mirrored)) as bar:
        for split, images, mirror in (("train", data.train, mirrored), ("held_out", held_out, False)):
            passes = []
            for flip in (False, True)[: 1 + mirror]:
                for x in eval_batches(images, ENCODE_BATCH):
                    x = from_uint8(x.to(device))
                    with full_precision(device):
                        codes = tokenizer.encode(x.flip(-1) if flip else x)
                    passes.append(codes.cpu().numpy().astype(kind))
                    bar.advance(len(x))
            splits.append(np.concatenate(passes))
            with atomic_path(meta.with_name(f"{split}.npy")) as path:
                np.save(path, splits[-1])
    about = {"tokenizer": identity, "codebook_size": config.codebook_size, "mirrored": mirrored, "data": data.name}
    meta.write_text(seal({**about, "fingerprint": data.fingerprint, "digest": sha256_arrays(*splits)}))
