"""Import torchvision even where its compiled operators do not fit the installed torch.

The Linux wheel of torchvision is a CUDA build. Next to a CPU-only torch its shared library does not load, and
``import torchvision`` dies with ``RuntimeError: operator torchvision::nms does not exist``, which takes timm, lpips and
torch-fidelity down with it. None of them calls that operator here; it only has to *exist* for torchvision to register
its shape function. Defining it (and its quantised twin) first cures the import.

The repair runs after that very error only, so it is inert on a healthy installation. Importing this module is enough.
``REPAIRED`` says whether it was needed.
"""

from __future__ import annotations

import importlib
import sys

import torch

REPAIRED: bool = False
_LIBRARY: torch.library.Library | None = None  # operators vanish when their Library object is collected

try:
    importlib.import_module("torchvision")
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left half-initialised
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    REPAIRED = True
