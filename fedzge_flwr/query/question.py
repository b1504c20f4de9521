"""What a round asks the clients: images, and along which directions some of them are perturbed.

Server and clients make the perturbed copies from the same question by the same arithmetic, so that
they need not travel. NumPy only: a client of any library can answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.images.pixels import pixel_values
from fedzge_flwr.query.copies import Differences, num_copies, num_queries
from fedzge_flwr.query.directions import Directions

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """Base images, the first of which are asked about in perturbed copies too.

    Parameters
    ----------
    base : ndarray of uint8 or of float
        Images (N, C, H, W), each asked about once: as levels (`fedzge_flwr.images.pixels`), or as
        values of the shared pixel range where rounding them is not wanted.
    directions : Directions
        q ≥ 0 for each of the first G ≤ N images.
    eps : float
        Step ε > 0 along a direction, in units of the shared pixel range.
    differences : {"forward", "central"}
        Whether x + εu alone is asked about, or x − εu beside it.
    """

    base: ByteArray | FloatArray
    directions: Directions
    eps: float = 1.0
    differences: Differences = "forward"

    @staticmethod
    def unperturbed(base: ByteArray | FloatArray) -> Question:
        """Return the question about images alone."""
        channels, height, width = base.shape[1:]
        return Question(base, Directions.none((channels, height, width)))

    def about(self, base: ByteArray | FloatArray) -> Question:
        """Return the same directions for the first of these images."""
        return replace(self, base=base)

    @cached_property
    def base_NCHW(self) -> FloatArray:
        """The base images in the shared pixel range."""
        return pixel_values(self.base)

    @cached_property
    def directions_QNCHW(self) -> FloatArray:
        """The directions of the G perturbed images, as clients decode them.

        Raises
        ------
        ValueError
            If they cannot be decoded.
        """
        return self.directions.decoded()

    @property
    def num_directions(self) -> int:
        """Directions q of each perturbed image."""
        return len(self.directions.payload_QGP)

    @property
    def num_perturbed(self) -> int:
        """Number G of images that are perturbed."""
        return int(self.directions.payload_QGP.shape[1])

    @property
    def copies(self) -> int:
        """Copies of each of them that are asked about, the unperturbed one included."""
        return num_copies(self.num_directions, self.differences)

    @property
    def num_images(self) -> int:
        """Number B of images asked about, perturbed ones included: the queries."""
        return num_queries(len(self.base), self.num_perturbed, self.copies)

    @property
    def base_rows_N(self) -> npt.NDArray[np.int64]:
        """Where among `images_BCHW` the unperturbed images are, in order."""
        perturbed, copies = self.num_perturbed, self.copies
        others = np.arange(len(self.base) - perturbed) + copies * perturbed
        return np.concatenate((np.arange(perturbed), others))

    @property
    def images_BCHW(self) -> FloatArray:
        """All images: the perturbed ones' bases, x + εu₁ …, x − εu₁ …, then the other images.

        Raises
        ------
        ValueError
            If the directions cannot be decoded.
        """
        if self.num_perturbed == 0:
            # However many directions there are of no image: each would cost an empty array.
            return self.base_NCHW
        base, others = np.split(self.base_NCHW, [self.num_perturbed])
        steps = np.float32(self.eps) * self.directions_QNCHW
        parts = [base, *(base + step for step in steps)]
        if self.differences == "central":
            parts += [base - step for step in steps]
        return np.concatenate((*parts, others))

    def of_perturbed(self, answers_BK: FloatArray) -> FloatArray:
        """Return the answers on the copies of the perturbed images, as (copies, G, K)."""
        shape = (self.copies, self.num_perturbed, answers_BK.shape[1])
        return answers_BK[: shape[0] * shape[1]].reshape(shape)

    def slopes(self, values_B: T) -> T:
        """Return the derivative along each direction of what was evaluated on all copies.

        Parameters
        ----------
        values_B : array or Tensor
            (B, …): at x, then at x + εuⱼ, then, for central differences, at x − εuⱼ; float64, since
            the differences are small.

        Returns
        -------
        array or Tensor
            (q, …).
        """
        values: Any = values_B
        ahead = values[1 : 1 + self.num_directions]
        found: T
        if self.differences == "central":
            found = (ahead - values[1 + self.num_directions :]) / (2 * self.eps)
        else:
            found = (ahead - values[0]) / self.eps
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the base images: what answers to them may be referred to by."""
        return image_digest(self.base)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that is asked: what an answer must be to."""
        payload = self.directions.payload_QGP
        asked = (
            f"{self.digest} {payload.shape} {self.directions.seed} {self.eps!r} {self.differences} "
        )
        return hashlib.sha256(asked.encode() + payload.tobytes()).hexdigest()


Queries = Question
"""The name by which estimators from outside the package know a question."""


def image_digest(images_NCHW: ByteArray | FloatArray) -> str:
    """Return the SHA-256 of images, of their shape, and of whether they are levels."""
    kind = "u1" if images_NCHW.dtype == np.uint8 else "<f4"
    images = np.ascontiguousarray(images_NCHW, dtype=kind)
    return hashlib.sha256(f"{kind} {images.shape}".encode() + images.tobytes()).hexdigest()
