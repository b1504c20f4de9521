"""A Pillow picture as pixels: upright, on white, grey or RGB, of one size."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

TRANSPARENT = "transparent ones put on white"
CMYK = "of CMYK without their colour profile"

_TOP = int(np.iinfo(np.uint8).max)


class Picture(NamedTuple):
    """A picture's pixels, uint8 (C, H, W), and what was done to it that it does not say.

    `remark` is empty where nothing was.
    """

    pixels_CHW: npt.NDArray[np.uint8]
    remark: str


def as_picture(image: Image, image_shape: tuple[int, int, int]) -> Picture:
    """Return a picture, upright, grey or RGB, resized without keeping its proportions.

    What is transparent lies on white then. Colours are converted without their profiles, CMYK too.

    Parameters
    ----------
    image : PIL.Image.Image
        Of 8 bits a channel.
    image_shape : tuple of int
        (C, H, W); C is 1 for grey, else RGB.
    """
    # Takes a while, and most clients have no pictures.
    from PIL import Image, ImageOps

    channels, height, width = image_shape
    size = (width, height)
    upright = ImageOps.exif_transpose(image)
    shown, remark = _on_white(upright)
    shown = shown.convert("L" if channels == 1 else "RGB")
    sized = shown if shown.size == size else shown.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(sized, dtype=np.uint8)
    return Picture(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), remark)


def _on_white(image: Image) -> tuple[Image, str]:
    """Return a picture without transparency, and what was done to it."""
    from PIL import Image as Images

    if not image.has_transparency_data:
        return image, CMYK if image.mode == "CMYK" else ""
    # Of premultiplied ones there is no direct way from grey.
    clear = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    lowest, _ = clear.getchannel("A").getextrema()
    if lowest == _TOP:
        return image, ""
    white = Images.new("RGBA", clear.size, "white")
    return Images.alpha_composite(white, clear), TRANSPARENT
