"""Images of a table with a column of pictures, as Hugging Face's datasets and flwr-datasets are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.arrays import ByteArray
from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.file_kinds import reason_of
from fedzge_flwr.images.pictures import as_picture
from fedzge_flwr.images.spec import shape_of

_CHANNELS = (1, 3)
"""Of pictures, grey or RGB."""

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

    Raises
    ------
    DataError
        If it is no such table, has no such columns, or ``size`` is none of pictures.
    """

    def __init__(
        self, dataset: Any, image: str, label: str, size: tuple[int, int, int] | None
    ) -> None:
        if isinstance(dataset, Mapping) and dataset:
            raise DataError(
                f"a {type(dataset).__name__} is several tables, {', '.join(map(str, dataset))}: "
                f"give one split, as dataset[{next(iter(dataset))!r}]"
            )
        if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"a {type(dataset).__name__} is no table of pictures: give a datasets.Dataset, one "
                "partition or split, that is not streamed"
            )
        columns = list(dataset.column_names)
        for column in (image, label):
            if column not in columns:
                raise DataError(f"no column '{column}': this data set has {', '.join(columns)}")
        shape = shape_of(size)
        if size is not None and (shape is None or shape[0] not in _CHANNELS):
            raise DataError(
                f"size = {size!r}: give (C, H, W), C 1 for grey or 3 for RGB, H and W from 1"
            )
        self.raw = dataset.with_format(None).select_columns([image, label])
        self._key = (dataset._fingerprint, image, label, shape)
        self.image, self.label, self.size = image, label, shape

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
        If a column has other things, a picture cannot be read, or no size is given and pictures
        differ in theirs, or there are none.
    """
    labels = table.raw[table.label]
    if any(type(label) is not int for label in labels):
        raise DataError(
            f"column '{table.label}' has labels that are no integers: number the classes from 0, "
            f"as dataset.class_encode_column('{table.label}') does"
        )
    size = table.size
    images: list[ByteArray] = []
    for number, found in enumerate(_pictures(table)):
        size = size or (1 if found.mode in ("1", "L") else 3, found.height, found.width)
        if table.size is None and (found.height, found.width) != size[1:]:
            raise DataError(
                f"column '{table.image}': picture {number} is of {found.height}×{found.width} "
                f"pixels, the first of {size[1]}×{size[2]}: give size=(C, H, W)"
            )
        images.append(as_picture(found, size).pixels_CHW)
    if size is None:
        raise DataError(
            f"column '{table.image}': no rows, and so no first picture: give size=(C, H, W), the "
            "shape that other clients' images have"
        )
    stacked = np.stack(images) if images else np.zeros((0, *size), np.uint8)
    return stacked, np.asarray(labels, dtype=np.int64)


def _pictures(table: Table) -> Iterator[Any]:
    """Return the rows' pictures, as Pillow's of 8 bits."""
    rows = iter(table.raw)
    for number in range(len(table.raw)):
        try:
            # Files are opened and decoded here.
            cell = next(rows)[table.image]
        except Exception as error:  # Pillow raises whatever a damaged picture suggests
            raise DataError(
                f"column '{table.image}', row {number}: cannot be read as a picture "
                f"({_told(error)}): mend it, or leave the row out"
            ) from error
        yield _picture(cell, table.image, number)


def _told(error: Exception) -> str:
    """Return what is said of a picture that cannot be read, with the file's name if it has one."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "of no kind that Pillow knows"
    name = getattr(error, "filename", None)
    return f"{reason_of(error)}: {name}" if name else reason_of(error)


def _picture(value: Any, column: str, number: int) -> Any:
    """Return what a cell holds as a Pillow picture of 8 bits."""
    from PIL import Image

    if isinstance(value, Image.Image):
        if value.mode == "F" or value.mode.startswith("I"):
            raise DataError(f"column '{column}': picture {number} has more than 8 bits a channel")
        return value
    pixels: npt.NDArray[Any] = np.zeros(0)
    with suppress(ValueError):  # rows of different lengths
        pixels = np.asarray(value) if isinstance(value, (Sequence, np.ndarray)) else pixels
    if pixels.dtype.kind in "iu" and pixels.size and 0 <= pixels.min() <= pixels.max() <= _TOP:
        grey = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        if grey.ndim == 2 or (grey.ndim == 3 and grey.shape[2] == 3):
            return Image.fromarray(grey.astype(np.uint8))
    raise DataError(
        f"column '{column}', row {number}: a {type(value).__name__} is no picture: give Pillow's, "
        "or levels from 0 to 255 of shape (H, W), (H, W, 1) or (H, W, 3)"
    )
