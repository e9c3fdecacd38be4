"""A data set."""

import numpy as np

from bench.data.sources import Source, Split

COUNTS = {"train": 24, "val": 8, "test": 8}


def stripes(image_size: int) -> Source:
    """Stripes of random colours, as many in all of one width."""

    def read(name: str) -> np.ndarray:
        rng = np.random.default_rng([*name.encode()])
        colours = rng.integers(0, 256, (8, 3), dtype=np.uint8)
        return np.broadcast_to(colours[np.arange(image_size) * 8 // image_size], (image_size, image_size, 3)).copy()

    splits = [Split([f"{split}{i}" for i in range(count)], read, lambda name: "") for split, count in COUNTS.items()]
    return Source(("stripes", image_size), lambda: (*splits, "stripes of random colours"))
