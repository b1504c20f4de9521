"""Labelled images as arrays. NumPy only: a client of any library has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedzge_flwr.arrays import ByteArray, FloatArray
from fedzge_flwr.errors import DataError
from fedzge_flwr.question import from_levels

Split: TypeAlias = Literal["train", "test"]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, read-only.

    Parameters
    ----------
    images_NCHW : ndarray of uint8
        (N, C, H, W), 0 black and 255 saturated.
    labels_N : ndarray of int
        Classes 0 … K-1, kept as int64.

    Raises
    ------
    DataError
        If they have another type, or do not fit one another.

    Examples
    --------
    >>> images = ImageSet(np.zeros((2, 1, 8, 8), np.uint8), np.array([3, 0]))
    >>> len(images), images.inputs_NCHW.min()
    (2, np.float32(-1.0))
    """

    images_NCHW: ByteArray
    labels_N: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        images, labels = self.images_NCHW, self.labels_N
        if images.dtype != np.uint8 or images.ndim != 4:
            raise DataError(
                f"images are {images.dtype} of shape {images.shape}; give uint8 (N, C, H, W)"
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise DataError(
                f"labels are {labels.dtype} of shape {labels.shape} for {len(images)} images; give "
                "integers (N,)"
            )
        # Views: the arrays given stay as writable as they were.
        numbers = labels.astype(np.int64, copy=False)
        for name, array in (("images_NCHW", images), ("labels_N", numbers)):
            view = array.view()
            view.setflags(write=False)
            object.__setattr__(self, name, view)

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def inputs_NCHW(self) -> FloatArray:
        """The images as queries have them: float32 in the shared pixel range."""
        return from_levels(self.images_NCHW)

    def take(self, indices: npt.NDArray[np.int64]) -> ImageSet:
        """Return the images at ``indices``, in that order."""
        # Images may be mapped from a file: those that are taken are in memory.
        return ImageSet(np.asarray(self.images_NCHW[indices]), self.labels_N[indices])


Loader: TypeAlias = Callable[[Path, bool, Split], ImageSet]
"""``(data_dir, download, split) -> images``."""
