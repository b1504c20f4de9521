"""Labelled images as arrays. NumPy only: a client of any library has them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.notices import warn_once
from fedzge_flwr.images.pixels import PIXEL_RANGE, from_levels, to_levels
from fedzge_flwr.images.rows import Table, images_of

Split: TypeAlias = Literal["train", "test"]

_AXES = 4

_SLACK = 1e-3
"""What rounding may put an image beyond the pixel range."""


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
        for found, name, wanted in (
            (images, "images", "uint8 (N, C, H, W)"),
            (labels, "labels", "integers (N,)"),
        ):
            if not isinstance(found, np.ndarray):
                kind = type(found).__name__
                raise DataError(f"{name} are a {kind}; give {wanted} as a NumPy array")
        if images.dtype != np.uint8 or not _is_NCHW(images):
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

    @staticmethod
    def from_inputs(images_NCHW: npt.ArrayLike, labels_N: npt.ArrayLike) -> ImageSet:
        """Return labelled images from what a model is given, rounded to 256 levels.

        Parameters
        ----------
        images_NCHW : array_like of float
            (N, C, H, W) in the shared pixel range [−1, 1]; tensors on the CPU too. A warning is
            logged of such as look as if they were in [0, 1].
        labels_N : array_like of int
            (N,), classes 0 … K-1.

        Raises
        ------
        DataError
            If images are beyond that range, as after another normalisation, do not fit the labels,
            or are no such arrays.
        """
        images = _array(images_NCHW, "images", "(N, C, H, W), all of one size", np.float32)
        if not _is_NCHW(images):
            raise DataError(f"images are of shape {images.shape}; give (N, C, H, W)")
        low, high = PIXEL_RANGE.low, PIXEL_RANGE.high
        if images.size and not low - _SLACK <= images.min() <= images.max() <= high + _SLACK:
            raise DataError(
                f"images go from {images.min():g} to {images.max():g}: give them in [{low:g}, "
                f"{high:g}], before any other normalisation"
            )
        if len(images) > 1 and images.min() >= (low + high) / 2 < images.max():
            warn_once(
                "images in half of the range",
                f"ImageSet.from_inputs: the images go from {images.min():.2f} to "
                f"{images.max():.2f}, and [{low:g}, {high:g}] is wanted: of images in [0, 1] give "
                "2 * images - 1",
            )
        return ImageSet(to_levels(images), _array(labels_N, "labels", "integers (N,)"))

    @staticmethod
    def from_dataset(
        dataset: Any,
        image: str = "image",
        label: str = "label",
        *,
        size: tuple[int, int, int] | None = None,
    ) -> ImageSet:
        """Return the images of a data set of Hugging Face or flwr-datasets.

        They are read as they are stored: transforms that the data set was given, which normalise,
        are left out. A process reads them once: its clients are made for each message.

        Parameters
        ----------
        dataset : datasets.Dataset
            A partition or a split.
        image, label : str
            Its columns: pictures, and classes 0 … K-1.
        size : tuple of int, optional
            (C, H, W) that all are brought to, C 1 for grey or 3 for RGB; by default the first
            picture's, which all must have. Of a table without rows it must be given.

        Raises
        ------
        DataError
            If it has no such columns, they hold other things, a picture cannot be read, or
            pictures differ in size.
        """
        return ImageSet(*images_of(Table(dataset, image, label, size)))

    def __len__(self) -> int:
        return len(self.labels_N)

    def check(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Check that these are images (C, H, W) of K classes.

        Raises
        ------
        DataError
            If they are not.
        """
        if len(self) and self.images_NCHW.shape[1:] != tuple(image_shape):
            raise DataError(
                f"images are of shape {self.images_NCHW.shape[1:]}, the model's {image_shape}"
            )
        if len(self) and not 0 <= self.labels_N.min() <= self.labels_N.max() < num_classes:
            raise DataError(
                f"labels go from {self.labels_N.min()} to {self.labels_N.max()}; {num_classes} "
                f"classes are numbered from 0 to {num_classes - 1}"
            )

    def digest(self) -> str:
        """Return 32 hexadecimal digits that other images or labels do not have.

        The same for the same images in another order.
        """
        each = sorted(
            hashlib.blake2b(
                image.tobytes() + int(label).to_bytes(8, "little", signed=True)
            ).digest()
            for image, label in zip(self.images_NCHW, self.labels_N, strict=True)
        )
        whole = hashlib.blake2b(repr(self.images_NCHW.shape).encode(), digest_size=16)
        for digest in each:
            whole.update(digest)
        return whole.hexdigest()

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


def _is_NCHW(images: npt.NDArray[Any]) -> bool:
    """Say whether these are images (N, C, H, W), each of at least a pixel."""
    return images.ndim == _AXES and (len(images) == 0 or images.size > 0)


def _array(
    given: npt.ArrayLike, name: str, wanted: str, dtype: type[np.float32] | None = None
) -> npt.NDArray[Any]:
    """Return what was given as an array."""
    try:
        return np.asarray(given, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, words, on a GPU
        raise DataError(f"{name} are no array of numbers: give {wanted}; on the CPU") from error
