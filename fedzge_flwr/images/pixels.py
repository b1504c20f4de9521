"""The one range of pixel values, and the one map between it and bytes.

Real images enter as bytes and are mapped onto the range; the generator's last layer is scaled to
it; clients are told nothing else. (The released code drew generated images in [-1, 1] and real ones
in [0, 1].) A byte is a *level*: 256 of them span the range. What is asked about, sent, kept and
distilled is held as levels; both sides of the wire then have the very same float32 values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.arrays import ByteArray, FloatArray

if TYPE_CHECKING:
    from torch import Tensor

_TOP = 255.0


@dataclass(frozen=True)
class PixelRange:
    """A closed range of pixel values.

    Parameters
    ----------
    low, high : float
        Value of a black and of a saturated pixel.
    """

    low: float
    high: float

    @property
    def step(self) -> float:
        """Between two levels."""
        return (self.high - self.low) / _TOP

    def from_uint8(self, images_u8: Tensor) -> Tensor:
        """Map levels of any shape to ``float32`` in this range (0 → low, 255 → high)."""
        return images_u8.float().mul_(self.step).add_(self.low)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Map images in this range to the nearest levels; values outside are clipped."""
        scaled = (images - self.low) * (_TOP / (self.high - self.low))
        return scaled.round().clamp(0, 255).byte()

    def from_unit(self, images: Tensor) -> Tensor:
        """Map images in [-1, 1] (a tanh's range) onto this range."""
        return images.add(1.0).mul((self.high - self.low) / 2.0).add(self.low)


PIXEL_RANGE = PixelRange(low=-1.0, high=1.0)


def from_levels(levels_NCHW: ByteArray) -> FloatArray:
    """Map levels onto the shared pixel range, bit for bit as `PixelRange.from_uint8` does."""
    step, low = np.float32(PIXEL_RANGE.step), np.float32(PIXEL_RANGE.low)
    images: FloatArray = levels_NCHW.astype(np.float32) * step + low
    return images


def to_levels(images_NCHW: npt.NDArray[np.floating]) -> ByteArray:
    """Map images in the shared pixel range to the nearest levels; values outside are clipped."""
    levels = np.rint(
        (images_NCHW - PIXEL_RANGE.low) * (_TOP / (PIXEL_RANGE.high - PIXEL_RANGE.low))
    )
    nearest: ByteArray = levels.clip(0, 255).astype(np.uint8)
    return nearest


def shown(images_NCHW: ByteArray) -> ByteArray:
    """Return images as people can be shown them: grey or RGB.

    Those of one or three channels are what they were; of others, as of satellites' sensors, it is
    the mean over the channels.
    """
    if images_NCHW.shape[1] in (1, 3):
        return images_NCHW
    mean: ByteArray = np.rint(images_NCHW.mean(axis=1, keepdims=True)).astype(np.uint8)
    return mean


def pixel_values(images_NCHW: ByteArray | FloatArray) -> FloatArray:
    """Return images in the shared pixel range, held as levels or as such values."""
    held: Any = images_NCHW
    return from_levels(held) if held.dtype == np.uint8 else held
