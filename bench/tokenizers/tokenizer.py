"""The thing that is compared: encoder → quantizer → decoder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.core.errors import UserError
from bench.core.runs import Run, check_finished
from bench.quantizers import QUANTIZERS, Quantized
from bench.training.parts import in_parts
from bench.training.weights import check_layout, check_weights, load_weights

from . import pretrained
from .config import Config
from .sizes import check_size, sides
from .source import FROZEN

FILE = "tokenizer.safetensors"  # of a run


class Tokenizer(nn.Module):
    """Images to codes and back; the decoder sees nothing but the codes' vectors. Parts that the config freezes have no
    gradient, and are in training as they are when they are scored. Raises UserError when the backbone cannot be built,
    such as a timm model for images of this size, and where nothing of a part could be frozen."""

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
        for name in FROZEN[config.freeze]:
            part = getattr(self, name).requires_grad_(False)
            if not part.state_dict():
                which = f"{name} {getattr(config, name)!r}"
                raise UserError(f"freeze is {config.freeze}, and {which} has nothing that could learn; leave it out")

    def train(self, mode: bool = True) -> "Tokenizer":
        """As any module's, but for frozen parts: whose statistics move, or who drops or draws, does so no more."""
        super().train(mode)
        for name in FROZEN[self.config.freeze]:
            getattr(self, name).eval()
        return self

    def forward(self, x: Tensor, parts: int = 1) -> tuple[Tensor, Quantized]:
        """One training pass: x (B, 3, H, W) in [-1, 1] → reconstruction of the same shape, unbounded, and Quantized.
        Encoder and decoder see the batch in so many ``parts``, the quantizer at once."""
        quantized = self.quantizer(in_parts(self.encoder, parts, x))
        return in_parts(self.decoder, parts, quantized.z_q), quantized

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] → codes (B, h, w) int64, or where the quantizer has none latents (B, d, h, w)
        float32. Call in eval mode: training mode moves the codebook. Raises UserError on what are no such images."""
        self._check_images(x)
        return self.quantizer(self.encoder(x)).codes

    def encode_with_bits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``encode``, and of latents with a rate of their own the bits of each image, (B,)."""
        self._check_images(x)
        quantized = self.quantizer(self.encoder(x))
        return quantized.codes, quantized.rate

    def decode(self, codes: Tensor) -> Tensor:
        """What ``encode`` gives, codes (B, h, w) int64 in [0, K) or latents → images (B, 3, H, W) in [-1, 1]. Raises
        UserError on what are none of its codes."""
        self._check_codes(codes)
        return self.decoder(self.quantizer.lookup(codes)).clamp(-1, 1)

    def _check_images(self, x: Any) -> None:
        made = "make it of uint8 images (B, H, W, 3) by torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1"
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise UserError(f"encode takes floats (B, 3, H, W) in [-1, 1] and was given {_kind(x)}; {made}")
        cell = self.config.image_size // self.config.grid_size
        if x.shape[2] % cell or x.shape[3] % cell or 0 in x.shape[2:]:
            size = f"{x.shape[2]}×{x.shape[3]} pixels, and a code stands for {cell}×{cell}"
            raise UserError(f"encode was given images of {size}; resize them to {self.config.image_size} a side")

    def _check_codes(self, codes: Any) -> None:
        if not self.config.discrete:
            if not isinstance(codes, Tensor) or codes.ndim != 4 or codes.shape[1] != self.config.code_dim:
                raise UserError(f"decode takes latents (B, {self.config.code_dim}, h, w) and was given {_kind(codes)}")
            return
        whole = isinstance(codes, Tensor) and codes.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        if not whole or codes.ndim != 3:
            raise UserError(f"decode takes codes (B, h, w) int64 and was given {_kind(codes)}; encode makes some")
        size = self.config.codebook_size
        low, high = map(int, codes.aminmax()) if codes.numel() else (0, 0)
        if low < 0 or high >= size:
            raise UserError(f"decode was given the code {low if low < 0 else high}; codes are from 0 to {size - 1}")

    @classmethod
    def from_run(cls, folder: str | Path, device: str = "cpu") -> "Tokenizer":
        """The scored tokenizer of a finished run folder, in eval mode on ``device``. Raises UserError without one."""
        run = Run(Path(folder))
        check_finished(run)
        check_weights(run, FILE)
        return cls._restored(run.settings(Config), run.folder / FILE, device)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str = "cpu") -> "Tokenizer":
        """The tokenizer that ``python -m bench.export`` put into the folder ``source``, or pushed to the Hugging Face
        Hub under that name, in eval mode on ``device``. Raises UserError without one, and where a file of it is not
        what was put there. Needs torch, safetensors and NumPy; from the Hub, huggingface_hub too."""
        folder = pretrained.located(source)
        return cls._restored(*pretrained.read(folder), device)

    @classmethod
    def _restored(cls, config: Config, weights: Path, device: str) -> "Tokenizer":
        """The tokenizer of ``config`` with the ``weights`` in that file; no memory is taken before they are found to be
        its own."""
        # Its weights follow, and what it started from or was aligned with is no part of it.
        names = ("init_from", "freeze", *(name for name in vars(config) if name.startswith("alignment")))
        none = {name: getattr(Config, name) for name in names}
        plain = replace(config, pretrained=False, **none, device=device)
        plain.check()
        check_size(plain, device)
        try:
            with torch.device("meta"):
                check_layout(weights, cls(plain))
            tokenizer = cls(plain)
            load_weights(weights, tokenizer)
        except ValueError as error:
            told = f"{weights} does not hold the weights of this tokenizer ({error})"
            raise UserError(f"{told}; move that folder") from error
        tokenizer.config = config
        return tokenizer.to(device).eval().requires_grad_(False)


def started(tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer``, on the CPU, with the weights that its config starts from, codes and their statistics included, if
    it names any. Raises UserError where these are not whole, not finite, or of images of another size."""
    config = tokenizer.config
    if not config.init_from:
        return tokenizer
    source = Tokenizer.from_run(config.init_from)
    weights = source.state_dict()
    for name, value in tokenizer.state_dict().items():
        if value.shape != weights[name].shape:
            told = f"{config.init_from} was trained on {source.config.image_size}, to which {name} belongs"
            raise UserError(f"image_size is {config.image_size}, and {told}; leave it out")
    tokenizer.load_state_dict(weights)
    return tokenizer


def _kind(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"{type(value).__module__}.{type(value).__name__}"


def to_device(module: nn.Module, device: str) -> nn.Module:
    """Moves ``module`` to ``device`` in channels-last layout, which convolutions on CPUs and GPUs are fastest in."""
    return module.to(device=torch.device(device), memory_format=torch.channels_last)
