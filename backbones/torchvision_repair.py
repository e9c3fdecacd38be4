"""Import torchvision even where its compiled operators do not fit the installed torch.

Its Linux wheel is a CUDA build. Next to a CPU-only torch its shared library does not load, and ``import torchvision``
dies with ``RuntimeError: operator torchvision::nms does not exist``, as do timm, lpips and torch-fidelity. None of them
calls that operator here; it only has to *exist*, and defining it (and its quantised twin) first cures the import.
"""

import functools
import importlib
import sys

import torch

_LIBRARIES: list[torch.library.Library] = []  # operators vanish when their Library object is collected


@functools.cache
def repair() -> bool:
    """Imports torchvision, and says whether that needed the repair. To be called right before anything that imports
    torchvision is first imported. Acts after that very error only, so it is inert on a healthy installation."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return False
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left half-initialised
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
    importlib.import_module("torchvision")
    return True
