"""An epoch over many tiny synthetic images in shards: does memory stay flat, and how fast is it?

    python -m tests.epoch                        10^6 images of 8×8 pixels; 2 GB of disk
    python -m tests.epoch --images 10000

Writes shards, indexes them, and makes every batch of one epoch as training does. Every image says which it is by its
colour, so that each is seen to come once. Prints images/s and the memory of the process at every tenth.
"""

import io
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro
from PIL import Image
from webdataset import TarWriter

from bench.core.progress import Bar, stdout
from bench.data import batch, load

PER_SHARD = 10_000
HELD = 100  # images to validate, and as many to test with


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    images: int = 1_000_000
    """to train on"""
    batch_size: int = 500
    """has to divide them"""


def write(path: Path, numbers: range) -> None:
    """A shard of images whose three colours are the digits of a number to the base 256."""
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number in numbers:
            content = io.BytesIO()
            colour = (number >> 16 & 255, number >> 8 & 255, number & 255)
            Image.new("RGB", (8, 8), colour).save(content, "png", compress_level=1)
            tar.write({"__key__": f"{number:09}", "png": content.getvalue()})


def main(options: Options) -> int:
    """Writes, indexes and reads; the exit code is 1 where an image did not come exactly once."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VQBENCH_CACHE"] = f"{folder}/cache"
        parts = {"val": range(HELD), "test": range(HELD, 2 * HELD)}
        for first in range(0, options.images, PER_SHARD):
            parts[f"train-{first:09}"] = range(first, min(first + PER_SHARD, options.images))
        with Bar("writing", len(parts)) as bar:
            for name, numbers in parts.items():
                write(Path(folder, f"{name}.tar"), numbers)
                bar.advance()
        began = time.monotonic()
        data = load(f"shards:{folder}", 8)
        stdout.print(f"indexed {len(data.train)} images in {time.monotonic() - began:.0f} s")

        process, seen, steps = (
            psutil.Process(),
            np.zeros(options.images, np.uint8),
            options.images // options.batch_size,
        )
        began = time.monotonic()
        for step in range(steps):
            x = batch(data.train, 0, step, options.batch_size, "none", "cpu")
            red, green, blue = ((x[:, :, 0, 0] + 1) * 127.5).round().long().numpy().T
            np.add.at(seen, red << 16 | green << 8 | blue, 1)
            if (step + 1) % max(1, steps // 10) == 0:
                speed = (step + 1) * options.batch_size / (time.monotonic() - began)
                memory = process.memory_info().rss / 2**20
                stdout.print(f"{(step + 1) * options.batch_size} images, {speed:.0f} images/s, {memory:.0f} MB")
        [task.result() for task in data.train.begun[1]]  # the batch after the last, before its files go
    stdout.print(f"each image once: {(seen == 1).all()}")
    return int((seen != 1).any())


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
