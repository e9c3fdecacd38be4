"""What a score of a guest is known by: the guest, the images and how they were put before it."""

import re
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

from bench.core.files import sha256_json
from bench.core.settings import at_least, at_most
from bench.tokenizers.config import PROTOCOL_VERSION

Size = Annotated[int, at_least(0), at_most(2**24)]


@dataclass(frozen=True)
class GuestConfig:
    """The identity of a scored guest. Where a field is called like one of ``Config`` it means the same."""

    SHELF: ClassVar[str] = "runs"

    backbone: str
    """what the guest was called by, such as diffusers:PATH: its row in tables"""
    digest: str
    """SHA-256 of what its results depend on: weights, settings, version of a format's library"""
    data: str
    image_size: Size
    split: Literal["val", "test"]
    device: str
    train_images: Size = 0
    codebook_size: Size = 0
    """K, or 0 where there are no codes"""
    grid_size: Size = 0
    """side of the grid of codes, or 0 where that is no square"""
    resize_to: Size = 0
    """side that images are resized to for it, and back from afterwards; 0: as they are"""
    quantizer: Literal["own", "none"] = "own"
    """own: it has codes or a rate; none: neither, so that it is a reference"""
    seed: int = 0
    precision: str = "fp32"
    trained: Literal["elsewhere"] = "elsewhere"
    """what tells its run from those of ours"""

    def run_id(self) -> str:
        """A name that begins like the guest's, and a digest of everything above and of the protocol's version."""
        words = re.sub(r"[^a-z0-9]+", "-", self.backbone.lower()).strip("-")[-40:].strip("-")
        return f"{words}-{sha256_json({**asdict(self), 'protocol': PROTOCOL_VERSION})[:12]}"
