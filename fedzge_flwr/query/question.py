"""What a round asks the clients: images, and along which directions some of them are perturbed.

Server and clients make the perturbed copies from the same question by the same arithmetic, so that
they need not travel. NumPy only: a client of any library can answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.query.directions import Directions

Differences: TypeAlias = Literal["forward", "central"]
"""How a slope is measured: (f(x+εu) − f(x))/ε, or (f(x+εu) − f(x−εu))/2ε for twice the queries."""

COPIES: dict[str, Callable[[int, bool], int]] = {"surrogate": lambda q, two_sided: 1}
"""Copies of a generated image that an estimator asks about, of q and of ``differences`` being
"central", where they are not those of `num_copies`. Clients limit questions by it and build no
estimator, so one from outside the package that asks otherwise is named here on both sides."""


@dataclass(frozen=True)
class Question:
    """Base images, the first of which are asked about in perturbed copies too.

    Parameters
    ----------
    base_NCHW : ndarray of float32
        Images in the shared pixel range, each asked about once.
    directions : Directions
        q ≥ 0 for each of the first G ≤ N images.
    eps : float
        Step ε > 0 along a direction, in units of the shared pixel range.
    two_sided : bool
        Whether x − εu is asked about beside x + εu.
    """

    base_NCHW: FloatArray
    directions: Directions
    eps: float
    two_sided: bool

    @property
    def num_perturbed(self) -> int:
        """Number G of images that are perturbed."""
        return int(self.directions.payload_QGP.shape[1])

    @property
    def copies(self) -> int:
        """Copies of each of them that are asked about, the unperturbed one included."""
        return num_copies(len(self.directions.payload_QGP), two_sided=self.two_sided)

    @property
    def num_images(self) -> int:
        """Number B of images asked about, perturbed ones included: the queries."""
        return num_queries(len(self.base_NCHW), self.num_perturbed, self.copies)

    @property
    def base_rows_N(self) -> npt.NDArray[np.int64]:
        """Where among `images_BCHW` the unperturbed images are, in order."""
        perturbed, copies = self.num_perturbed, self.copies
        others = np.arange(len(self.base_NCHW) - perturbed) + copies * perturbed
        return np.concatenate((np.arange(perturbed), others))

    @property
    def images_BCHW(self) -> FloatArray:
        """All images: the perturbed ones' bases, x + εu₁ …, x − εu₁ …, then the other images.

        Raises
        ------
        ValueError
            If the directions cannot be decoded.
        """
        base, others = np.split(self.base_NCHW, [self.num_perturbed])
        steps = np.float32(self.eps) * self.directions.decoded()
        parts = [base, *(base + step for step in steps)]
        if self.two_sided:
            parts += [base - step for step in steps]
        return np.concatenate((*parts, others))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the base images: what answers to them may be referred to by."""
        return image_digest(self.base_NCHW)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that is asked: what an answer must be to."""
        payload = self.directions.payload_QGP
        sides = "two" if self.two_sided else "one"
        asked = f"{self.digest} {payload.shape} {self.directions.seed} {self.eps!r} {sides} "
        return hashlib.sha256(asked.encode() + payload.tobytes()).hexdigest()


def image_digest(images_NCHW: FloatArray) -> str:
    """Return the SHA-256 of images and of their shape."""
    images = np.ascontiguousarray(images_NCHW, dtype="<f4")
    return hashlib.sha256(repr(images.shape).encode() + images.tobytes()).hexdigest()


def num_copies(num_directions: int, *, two_sided: bool) -> int:
    """Return the copies of an image along q directions: 1 + q, or 1 + 2q on both sides."""
    return 1 + num_directions * (2 if two_sided else 1)


def num_queries(num_base: int, num_perturbed: int, copies: int) -> int:
    """Return the images asked about when some of the base images are asked about in copies."""
    return num_base + (copies - 1) * num_perturbed


def to_levels(images_NCHW: FloatArray) -> ByteArray:
    """Return images that are on the 256 levels of the shared pixel range as bytes.

    Raises
    ------
    ValueError
        If one is not: bytes would change it.
    """
    scale = np.float32((PIXEL_RANGE.high - PIXEL_RANGE.low) / 255.0)
    levels = np.rint((images_NCHW - np.float32(PIXEL_RANGE.low)) / scale)
    bytes_NCHW: ByteArray = levels.clip(0, 255).astype(np.uint8)
    if not np.array_equal(from_levels(bytes_NCHW), images_NCHW):
        raise ValueError("images are not on the 256 levels of the pixel range")
    return bytes_NCHW


def from_levels(images_u8_NCHW: ByteArray) -> FloatArray:
    """Map bytes onto the shared pixel range, bit for bit as `PixelRange.from_uint8` does."""
    scale = np.float32((PIXEL_RANGE.high - PIXEL_RANGE.low) / 255.0)
    images: FloatArray = images_u8_NCHW.astype(np.float32) * scale + np.float32(PIXEL_RANGE.low)
    return images
