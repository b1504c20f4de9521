"""Image files as arrays; for those of a large data set, decoded once and kept beside them."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

LOGGER = logging.getLogger("flwr.fedzge")

CACHE_FOLDER = "fedzge-decoded"
_NOTICE_S = 5.0
_CHUNK = 256


def read_image(file: Path, image_shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Return an image file as (C, H, W), grey or RGB, resized without keeping its proportions.

    Raises
    ------
    DataError
        If it is no readable image of 8 bits a channel.
    """
    # Takes a while, and most clients have no image files.
    from PIL import Image, ImageOps

    channels, height, width = image_shape
    size = (width, height)
    try:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened)
            deep = upright.mode == "F" or upright.mode.startswith("I")
            shown = upright.convert("L" if channels == 1 else "RGB")
            image: Image.Image = (
                shown if shown.size == size else shown.resize(size, Image.Resampling.BILINEAR)
            )
            pixels = np.asarray(image, dtype=np.uint8)
    except Exception as error:  # Pillow's plug-ins raise whatever their formats suggest
        raise DataError(
            f"{file}: not a readable image ({first_line(error)}); mend or remove it"
        ) from error
    if deep:
        # Pillow would clip, not scale, more than 8 bits.
        raise DataError(f"{file}: more than 8 bits a channel; save it with 8")
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def decode_files(
    files: Sequence[Path], image_shape: tuple[int, int, int], name: str, folder: Path
) -> npt.NDArray[np.uint8]:
    """Return many image files as (N, C, H, W).

    They are decoded once, into a file of ``folder``'s subfolder `CACHE_FOLDER`, from which all
    processes map them; if that cannot be written, each process decodes them for itself.

    Parameters
    ----------
    files : Sequence[Path]
        The files, below ``folder``.
    image_shape : tuple of int
        (C, H, W) of an image.
    name : str
        What they are, for the log and the file's name, e.g. ``"food101-train"``.
    folder : Path
        The data set's folder.

    Raises
    ------
    DataError
        As in `read_image`.
    """
    listing = "\n".join(file.relative_to(folder).as_posix() for file in files)
    digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
    shape = (len(files), *image_shape)
    kept = folder / CACHE_FOLDER / f"{name}-{'x'.join(map(str, image_shape))}-{digest}.npy"
    found = _mapped(kept, shape)
    if found is not None:
        return found
    try:
        kept.parent.mkdir(exist_ok=True)
        with atomic_path(kept) as temporary:
            images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            _decode(files, images, name)
            images.flush()
        found = _mapped(kept, shape)
    except OSError as error:
        LOGGER.warning("%s cannot be kept in %s (%s)", name, kept.parent, error.strerror)
    if found is None:
        found = np.empty(shape, dtype=np.uint8)
        _decode(files, found, name)
    return found


def _mapped(kept: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
    try:
        images: npt.NDArray[np.uint8] = np.load(kept, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _decode(files: Sequence[Path], images_NCHW: npt.NDArray[np.uint8], name: str) -> None:
    def read(at: int) -> None:
        images_NCHW[at] = read_image(files[at], (channels, height, width))

    _, channels, height, width = images_NCHW.shape
    notice = time.monotonic() + _NOTICE_S
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), _CHUNK):
            list(pool.map(read, range(start, min(start + _CHUNK, len(files)))))
            if time.monotonic() > notice:
                LOGGER.info("%s: %d of %d images read", name, start + _CHUNK, len(files))
                notice = time.monotonic() + _NOTICE_S
