"""Labelled images as arrays: uint8 images (N, C, H, W) and int64 labels (N,)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Split: TypeAlias = Literal["train", "test"]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, read-only.

    Parameters
    ----------
    images_NCHW : ndarray of uint8
        Images, 0 black and 255 saturated.
    labels_N : ndarray of int64
        Classes 0 … K-1.
    """

    images_NCHW: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        self.images_NCHW.setflags(write=False)
        self.labels_N.setflags(write=False)

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, indices: npt.NDArray[np.int64]) -> ImageSet:
        """Return the images at ``indices``, in that order."""
        # Images may be mapped from a file: those that are taken are in memory.
        return ImageSet(np.asarray(self.images_NCHW[indices]), self.labels_N[indices])


Loader: TypeAlias = Callable[[Path, bool, Split], ImageSet]
"""``(data_dir, download, split) -> images``."""
