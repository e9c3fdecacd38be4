"""The thing that is compared: encoder → quantizer → decoder."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.core.errors import UserError
from bench.core.runs import Run, check_finished
from bench.quantizers import QUANTIZERS, Quantized
from bench.training.trial import read_weights

from .config import Config
from .sizes import check_size, sides


class Tokenizer(nn.Module):
    """Images to codes and back; the decoder sees nothing but the codes' vectors. Raises UserError when the backbone
    cannot be built, such as a timm model for images of this size."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        encoder, decoder = sides(config)
        quantizer = QUANTIZERS[config.quantizer]
        settings = {name: getattr(config.resolved(), name) for name in quantizer.settings}
        try:
            self.encoder = encoder()
        except ValueError as error:
            raise UserError(str(error)) from error
        self.quantizer = quantizer(config.codebook_size, config.code_dim, **settings)
        self.decoder = decoder()

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """One training pass: x (B, 3, H, W) in [-1, 1] → reconstruction of the same shape, unbounded, and Quantized."""
        quantized = self.quantizer(self.encoder(x))
        return self.decoder(quantized.z_q), quantized

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] → codes (B, h, w) int64, or where the quantizer has none latents (B, d, h, w)
        float32. Call in eval mode: training mode moves the codebook."""
        return self.quantizer(self.encoder(x)).codes

    def encode_with_bits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``encode``, and of latents with a rate of their own the bits of each image, (B,)."""
        quantized = self.quantizer(self.encoder(x))
        return quantized.codes, quantized.rate

    def decode(self, codes: Tensor) -> Tensor:
        """What ``encode`` gives, codes (B, h, w) int64 in [0, K) or latents → images (B, 3, H, W) in [-1, 1]."""
        return self.decoder(self.quantizer.lookup(codes)).clamp(-1, 1)

    @classmethod
    def from_run(cls, folder: str | Path, device: str = "cpu") -> "Tokenizer":
        """The scored tokenizer of a finished run folder, in eval mode on ``device``. Raises UserError without one."""
        run = Run(Path(folder))
        check_finished(run)
        config = run.settings(Config)
        # The run's own weights follow, and what it was aligned with is no part of it.
        none = {name: getattr(Config, name) for name in vars(config) if name.startswith("alignment")}
        plain = replace(config, pretrained=False, **none, device=device)
        plain.check()
        check_size(plain, device)
        tokenizer = cls(plain)
        tokenizer.config = config
        read_weights(run, "tokenizer.safetensors", tokenizer)
        return tokenizer.to(device).eval().requires_grad_(False)


def to_device(module: nn.Module, device: str) -> nn.Module:
    """Moves ``module`` to ``device`` in channels-last layout, which convolutions on CPUs and GPUs are fastest in."""
    return module.to(device=torch.device(device), memory_format=torch.channels_last)
