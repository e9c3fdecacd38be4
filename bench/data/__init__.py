"""Images: decoded once to uint8 arrays on disk, served as batches that are a pure function of (seed, step)."""

from .batches import AUGMENTATIONS, batch, batch_indices, eval_batches, to_float
from .decoding import Data, load
from .pictures import to_pixels, to_rgb
from .sources import DATASETS, photographs
