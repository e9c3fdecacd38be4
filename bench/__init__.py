"""The harness: configuration, quantizers, losses, data, metrics, training, run store, command line."""

import backbones.torchvision_repair  # noqa: F401  (before anything that imports torchvision)
