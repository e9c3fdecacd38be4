"""Images: decoded once to uint8 arrays on disk, served as batches that are a pure function of (seed, step).

What is named here is imported when it is first asked for: settings have to know of augmentations, and a tokenizer that
is loaded somewhere needs nothing that reads images.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    **dict.fromkeys(("AUGMENTATIONS", "batch", "batch_indices", "eval_batches", "from_uint8"), "batches"),
    **dict.fromkeys(("ABOUT", "DATASETS", "FORMATS"), "datasets"),
    **dict.fromkeys(("Data", "check_name", "load"), "decoding"),
    **dict.fromkeys(("photographs",), "photos"),
    **dict.fromkeys(("Shards",), "shards"),
    **dict.fromkeys(("SPLITS", "find_images", "to_pixels", "to_rgb"), "sources"),
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
