"""Image files as arrays; for those of a large data set, decoded once and kept beside them."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.common.reading import open_file

if TYPE_CHECKING:
    from PIL.Image import Image

LOGGER = logging.getLogger("flwr.fedzge")

CACHE_FOLDER = "fedzge-decoded"
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats of Pillow's that are read: none that starts a program, as EPS does, or fetches."""

_NOTICE_S = 5.0
_CHUNK = 256


def read_image(file: Path, image_shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Return an image file as (C, H, W), grey or RGB, resized without keeping its proportions.

    Raises
    ------
    DataError
        If it is no readable image of 8 bits a channel in one of `FORMATS`; within `bombs_refused`
        also if it has so many pixels that Pillow takes it for made to fill the memory.
    """
    # Takes a while, and most clients have no image files.
    from PIL import Image, ImageOps

    channels, height, width = image_shape
    size = (width, height)
    try:
        with open_file(file) as raw, Image.open(raw, formats=FORMATS) as opened:
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


@contextmanager
def bombs_refused() -> Iterator[None]:
    """Have `read_image` refuse what Pillow only warns of, and say nothing of other warnings.

    For all threads, of which Python's filters know nothing: entered around them.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


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
        if kept.parent.is_symlink():
            # With the folder of someone else it would lead to wherever they want.
            raise OSError(errno.ELOOP, "it is a link")
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
        # What is no regular file is not opened.
        open_file(kept).close()
        images: npt.NDArray[np.uint8] = np.load(kept, mmap_mode="r")
    except Exception:  # noqa: BLE001 - NumPy raises whatever a damaged header suggests
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _decode(files: Sequence[Path], images_NCHW: npt.NDArray[np.uint8], name: str) -> None:
    def read(at: int) -> None:
        images_NCHW[at] = read_image(files[at], (channels, height, width))

    _, channels, height, width = images_NCHW.shape
    notice = time.monotonic() + _NOTICE_S
    with bombs_refused(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), _CHUNK):
            list(pool.map(read, range(start, min(start + _CHUNK, len(files)))))
            if time.monotonic() > notice:
                LOGGER.info("%s: %d of %d images read", name, start + _CHUNK, len(files))
                notice = time.monotonic() + _NOTICE_S
