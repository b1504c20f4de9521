"""Images of a table with a column of pictures, as Hugging Face's datasets and flwr-datasets are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.arrays import ByteArray
from fedzge_flwr.common.errors import DataError
from fedzge_flwr.images.pictures import as_picture

_TOP = int(np.iinfo(np.uint8).max)
_KEPT = 16
"""How many tables a process keeps the images of: it serves several clients."""


class Table:
    """What images are read from, the same if the data set is: messages come one by one.

    Parameters
    ----------
    dataset : datasets.Dataset
        Its transforms and formats are put aside: they are a model's own.
    image, label : str
        Its columns.
    size : tuple of int, optional
        (C, H, W); None: that of the first picture.
    """

    def __init__(
        self, dataset: Any, image: str, label: str, size: tuple[int, int, int] | None
    ) -> None:
        if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"a {type(dataset).__name__} is no table of pictures: give a datasets.Dataset, one "
                "partition or split, that is not streamed"
            )
        columns = list(dataset.column_names)
        for column in (image, label):
            if column not in columns:
                raise DataError(f"no column '{column}': this data set has {', '.join(columns)}")
        self.raw = dataset.with_format(None).select_columns([image, label])
        self._key = (dataset._fingerprint, image, label, size)
        self.image, self.label, self.size = image, label, size

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self._key == other._key


@lru_cache(maxsize=_KEPT)
def images_of(table: Table) -> tuple[ByteArray, npt.NDArray[np.int64]]:
    """Return a table's images, uint8 (N, C, H, W), and labels, int64 (N,); once in a process.

    Raises
    ------
    DataError
        If a column has other things, or pictures differ in size and none is given.
    """
    labels = table.raw[table.label]
    if any(type(label) is not int for label in labels):
        raise DataError(
            f"column '{table.label}' has labels that are no integers: number the classes from 0, "
            f"as dataset.class_encode_column('{table.label}') does"
        )
    size = table.size
    images: list[ByteArray] = []
    for number, row in enumerate(table.raw):
        found = _picture(row[table.image], table.image, number)
        size = size or (1 if found.mode in ("1", "L") else 3, found.height, found.width)
        if table.size is None and (found.height, found.width) != size[1:]:
            raise DataError(
                f"column '{table.image}': picture {number} is of {found.height}×{found.width} "
                f"pixels, the first of {size[1]}×{size[2]}: give size=(C, H, W)"
            )
        images.append(as_picture(found, size).pixels_CHW)
    shape = size or (1, 1, 1)
    stacked = np.stack(images) if images else np.zeros((0, *shape), np.uint8)
    return stacked, np.asarray(labels, dtype=np.int64)


def _picture(value: Any, column: str, number: int) -> Any:
    """Return what a cell holds as a Pillow picture of 8 bits."""
    from PIL import Image

    if isinstance(value, Image.Image):
        if value.mode == "F" or value.mode.startswith("I"):
            raise DataError(f"column '{column}': picture {number} has more than 8 bits a channel")
        return value
    pixels = np.asarray(value) if isinstance(value, (Sequence, np.ndarray)) else np.zeros(0)
    if pixels.dtype.kind in "iu" and pixels.size and 0 <= pixels.min() <= pixels.max() <= _TOP:
        grey = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        if grey.ndim == 2 or (grey.ndim == 3 and grey.shape[2] == 3):
            return Image.fromarray(grey.astype(np.uint8))
    raise DataError(
        f"column '{column}', row {number}: a {type(value).__name__} is no picture: give Pillow's, "
        "or levels from 0 to 255 of shape (H, W), (H, W, 1) or (H, W, 3)"
    )
