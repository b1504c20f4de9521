"""Directions in the form in which they travel, decoded alike by server and clients.

Random signs travel as their seed, chosen directions as ternary digits (1.6 bits a pixel), any other
as float32. Whoever chooses directions goes on with the decoded ones, so that no rounding stands
between what was asked and what the answers are taken for. NumPy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.arrays import ByteArray, FloatArray

_POWERS = np.array([1, 3, 9, 27, 81], dtype=np.uint8)
_DIGITS = len(_POWERS)
_FLOAT_BYTES = 4

SEEDS = 2**62
"""Seeds are below this: it fits a message's integers."""


@dataclass(frozen=True)
class Directions:
    """q directions for each of G images.

    Parameters
    ----------
    payload_QGP : ndarray of uint8
        P bytes a direction of d = C·H·W pixels: P = 0 for signs from the seed (`from_seed`),
        ⌈d/5⌉ for ternary digits (`ternary`), 4·d for little-endian float32 (`written_out`).
    image_shape : tuple[int, int, int]
        (C, H, W).
    seed : int
        Where signs come from, 0 ≤ seed < `SEEDS`; not used otherwise.
    """

    payload_QGP: ByteArray
    image_shape: tuple[int, int, int]
    seed: int = 0

    @staticmethod
    def none(image_shape: tuple[int, int, int], num_images: int = 0) -> Directions:
        """Return no direction for each of some images."""
        return Directions(np.zeros((0, num_images, 0), dtype=np.uint8), image_shape)

    @staticmethod
    def from_seed(
        num_directions: int, num_images: int, image_shape: tuple[int, int, int], seed: int
    ) -> Directions:
        """Return directions (q, G, C, H, W) with entries ±1/√d from random bits.

        Parameters
        ----------
        num_directions, num_images : int
            q and G.
        image_shape : tuple of int
            (C, H, W).
        seed : int
            0 ≤ seed < `SEEDS`.
        """
        payload = np.zeros((num_directions, num_images, 0), dtype=np.uint8)
        return Directions(payload, image_shape, seed)

    @staticmethod
    def written_out(directions_QGCHW: npt.ArrayLike) -> Directions:
        """Return these directions, as they are.

        Parameters
        ----------
        directions_QGCHW : array_like of float
            (q, G, C, H, W), finite, of any length; tensors on the CPU too.
        """
        directions_QGCHW = np.asarray(directions_QGCHW, dtype=np.float32)
        num_directions, num_images, *shape = directions_QGCHW.shape
        channels, height, width = shape
        payload = np.ascontiguousarray(directions_QGCHW, dtype="<f4").view(np.uint8)
        payload = payload.reshape(num_directions, num_images, _FLOAT_BYTES * math.prod(shape))
        return Directions(payload, (channels, height, width))

    @staticmethod
    def ternary(directions_QGCHW: npt.ArrayLike) -> Directions:
        """Return the nearest directions with entries −1, 0 and 1 but for their length.

        That with the largest cosine to u keeps the signs of the k largest |uᵢ|, where the sum of
        these, divided by √k, is greatest. The cosine is about 0.9 for normal entries, where signs
        alone have √(2/π) ≈ 0.8; the more a direction is made of few pixels, the more zeros gain.

        Parameters
        ----------
        directions_QGCHW : array_like of float
            (q, G, C, H, W), of any length but 0; tensors on the CPU too.

        Raises
        ------
        ValueError
            If one is all zeros or not finite.
        """
        directions_QGCHW = np.asarray(directions_QGCHW, dtype=np.float32)
        num_directions, num_images, channels, height, width = directions_QGCHW.shape
        num_pixels = channels * height * width
        rows_RD = directions_QGCHW.reshape(-1, num_pixels)
        if not (np.isfinite(rows_RD).all() and rows_RD.any(axis=1).all()):
            raise ValueError("a direction that is all zeros or not finite")
        num_bytes = -(-num_pixels // _DIGITS)
        digits_RD = np.ones((len(rows_RD), num_bytes * _DIGITS), dtype=np.uint8)
        # Row by row: sorted copies of all of them would be several times the images.
        for row_D, digits_D in zip(rows_RD, digits_RD, strict=True):
            sizes = np.abs(row_D)
            falling = np.sort(sizes)[::-1]
            gains = np.cumsum(falling, dtype=np.float64) / np.sqrt(np.arange(1, num_pixels + 1))
            kept = sizes >= falling[gains.argmax()]
            digits_D[:num_pixels] += (kept * np.sign(row_D)).astype(np.int8).view(np.uint8)
        digits = digits_RD.reshape(num_directions, num_images, num_bytes, _DIGITS)
        payload = (digits * _POWERS).sum(axis=3, dtype=np.uint8)
        return Directions(payload, (channels, height, width))

    def decoded(self) -> FloatArray:
        """Return the directions (q, G, C, H, W), all but written out ones of unit length.

        Raises
        ------
        ValueError
            If the payload is none of such directions.
        """
        num_directions, num_images, num_bytes = self.payload_QGP.shape
        shape = (num_directions, num_images, *self.image_shape)
        num_pixels = math.prod(self.image_shape)
        if math.prod(shape) == 0:
            return np.zeros(shape, dtype=np.float32)
        if num_bytes == 0:
            return _signs(self.seed, math.prod(shape), num_pixels).reshape(shape)
        if num_bytes == -(-num_pixels // _DIGITS):
            return _from_digits(self.payload_QGP, num_pixels).reshape(shape)
        if num_bytes == _FLOAT_BYTES * num_pixels:
            values = np.ascontiguousarray(self.payload_QGP).view("<f4").astype(np.float32)
            if not np.isfinite(values).all():
                raise ValueError("values that are not finite")
            return values.reshape(shape)
        raise ValueError(f"{num_bytes} bytes a direction of {self.image_shape}")


def _signs(seed: int, count: int, num_pixels: int) -> FloatArray:
    """Return ±1/√d by the bits of Philox, whose stream NumPy keeps for good.

    Philox is Salmon et al.'s (2011, doi:10.1145/2063384.2063405); no logarithm or cosine of a
    normal draw is in it, so that every machine has the same to the last bit.
    """
    words = np.random.Philox(key=seed).random_raw(-(-count // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count, bitorder="little")
    length = np.float32(1 / math.sqrt(num_pixels))
    return np.where(bits, length, -length)


def _from_digits(payload_QGP: ByteArray, num_pixels: int) -> FloatArray:
    """Return the rows of ternary digits, five a byte, each scaled to unit length."""
    if payload_QGP.max() >= 3**_DIGITS:
        raise ValueError("bytes that are no five ternary digits")
    rows_RP = payload_QGP.reshape(-1, payload_QGP.shape[2])
    digits_RD = (rows_RP[:, :, None] // _POWERS % 3).reshape(len(rows_RP), -1)
    if (digits_RD[:, num_pixels:] != 1).any():
        raise ValueError("ternary digits beyond the last pixel")
    values_RD = digits_RD[:, :num_pixels].astype(np.float32)
    values_RD -= 1
    counts_R = np.count_nonzero(values_RD, axis=1)
    if (counts_R == 0).any():
        raise ValueError("a direction of zeros")
    values_RD *= (1 / np.sqrt(counts_R)).astype(np.float32)[:, None]
    return values_RD
