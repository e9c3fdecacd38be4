"""Pictures of any kind to pixels of one kind."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB: turned as its EXIF says, transparency over white, 16-bit grey scaled to 8 bits.

    Raises ValueError for floating-point pixels, whose white is undefined, and what Pillow raises for broken files.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.mode.startswith("I"):  # I;16 and its relatives; convert() would clip them at 255
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:  # hidden colours may be anything
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, image_size: int) -> np.ndarray:
    """The central square of a picture, resized to (image_size, image_size, 3) uint8 by Pillow's antialiased Lanczos."""
    image = to_rgb(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box))
