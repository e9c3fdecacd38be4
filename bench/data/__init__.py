"""Images: decoded once to uint8 arrays on disk, served as batches that are a pure function of (seed, step)."""

from .batches import AUGMENTATIONS, batch, batch_indices, eval_batches, from_uint8
from .datasets import ABOUT, DATASETS
from .decoding import Data, check_name, load
from .photos import photographs
from .sources import SPLITS, find_images, to_pixels, to_rgb
