"""The one range of pixel values that data, generator and clients share.

Real images enter as ``uint8`` and are mapped onto this range; the generator's last layer is scaled
to it; clients are told nothing else. (The released code drew generated images in [-1, 1] and real
ones in [0, 1].)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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

    def from_uint8(self, images_u8: Tensor) -> Tensor:
        """Map ``uint8`` images of any shape to ``float32`` in this range (0 → low, 255 → high)."""
        return images_u8.float().mul_((self.high - self.low) / 255.0).add_(self.low)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Map images in this range to the nearest ``uint8``; values outside are clipped."""
        scaled = (images - self.low) * (255.0 / (self.high - self.low))
        return scaled.round().clamp(0, 255).byte()

    def from_unit(self, images: Tensor) -> Tensor:
        """Map images in [-1, 1] (a tanh's range) onto this range."""
        return images.add(1.0).mul((self.high - self.low) / 2.0).add(self.low)


PIXEL_RANGE = PixelRange(low=-1.0, high=1.0)
