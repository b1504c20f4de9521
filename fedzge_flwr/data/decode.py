"""Image files as arrays; for those of a large data set, decoded once and kept beside them."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.file_kinds import PICTURES, unreadable
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.common.reading import open_file
from fedzge_flwr.data.by_class import HIDDEN
from fedzge_flwr.images.pictures import Picture, as_picture

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

LOGGER = logging.getLogger("flwr.fedzge")

CACHE_FOLDER = "fedzge-decoded"
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats of Pillow's that are read: none that starts a program, as EPS does, or fetches."""

_NOTICE_S = 5.0
_CHUNK = 256
_TOP = int(np.iinfo(np.uint8).max)
_MOST_TOLD = 20
_EXTRA_SAMPLES = 338
# As in Pillow's "RGB;16B"; of fewer bits a channel there are "L;4" and the like.
_DEEP = re.compile(r";(16|32|64)")


def read_image(file: Path, image_shape: tuple[int, int, int]) -> Picture:
    """Return an image file, upright, grey or RGB, resized without keeping its proportions.

    What is transparent lies on white then. Colours are converted without their profiles, CMYK too.

    Raises
    ------
    DataError
        If it is no readable image of 8 bits a channel in one of `FORMATS`, or it holds more than
        one picture of at most four channels; within `bombs_refused` also if it has so many pixels
        that Pillow takes it for made to fill the memory.
    """
    # Takes a while, and most clients have no image files.
    from PIL import Image

    picture: Picture | None = None
    try:
        with open_file(file) as raw, Image.open(raw, formats=FORMATS) as opened:
            lost = _would_lose(opened)
            if lost is None:
                picture = as_picture(opened, image_shape)
    except Exception as error:  # Pillow's plug-ins raise whatever their formats suggest
        raise unreadable(
            file, "a readable image", error, "mend or remove it", expected=PICTURES
        ) from error
    if picture is None:
        raise DataError(f"{file}: {lost}")
    return picture


def _would_lose(opened: ImageFile) -> str | None:
    """Return what Pillow would drop of a picture without a word, and what to do; None: nothing."""
    # How its bytes are laid out, by format: a text, or a tuple with it and other things.
    layout = [
        part
        for tile in opened.tile
        for part in (tile.args if isinstance(tile.args, tuple) else (tile.args,))
    ]
    texts = [part for part in layout if isinstance(part, str)]
    deep = opened.mode == "F" or opened.mode.startswith("I")
    # Of 16 bits a pixel, with 5 or 6 a channel, BMP says "BGR;16".
    deep |= any(_DEEP.search(text) and not text.startswith("BGR") for text in texts)
    deep |= opened.format == "PPM" and any(type(part) is int and part > _TOP for part in layout)
    if deep:
        # It would clip to 8, or drop what is beyond.
        return "more than 8 bits a channel; save it with 8"
    # Channels beyond grey or RGB that are not said to be transparency, infrared for example.
    extra = tuple(getattr(opened, "tag_v2", {}).get(_EXTRA_SAMPLES, ()))
    if len(extra) > 1 or 0 in extra:
        return "more channels than RGB and transparency; give an .npz file, or save it as RGB"
    # A photograph may have a preview or a second eye's picture behind it (MPO).
    frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
    if frames > 1:
        return f"{frames} pictures in one file; save each that is meant as a file of its own"
    return None


def log_images(
    what: str,
    labels_N: npt.NDArray[np.int64],
    passed_over: Counter[str],
    converted: Counter[str],
) -> None:
    """Say in one line of the log how many images of each class there are, and what was not taken.

    Parameters
    ----------
    what : str
        The images' folder or name.
    labels_N : ndarray of int64
        Their classes.
    passed_over : Counter[str]
        What else was there, by what it is.
    converted : Counter[str]
        Images by the remark of their `Picture`.
    """
    classes, counts = np.unique(labels_N, return_counts=True)
    told = [f"{number} of class {name}" for name, number in zip(classes, counts, strict=True)]
    if len(told) > _MOST_TOLD:
        told = [f"{counts.min()} to {counts.max()} of each of {len(classes)} classes"]
    notes = [("passed over", passed_over), ("converted", converted)]
    for title, numbers in notes:
        if named := [f"{number} {name}" for name, number in numbers.items() if name and number]:
            told[-1] += f"; {title}: {', '.join(named)}"
    # A system's own files are everywhere, and nobody's loss.
    usual = {HIDDEN, ""}
    odd = any(number for _, of in notes for name, number in of.items() if name not in usual)
    LOGGER.log(logging.WARNING if odd else logging.INFO, "%s: images: %s", what, ", ".join(told))


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


def decode_files(
    files: Sequence[Path], image_shape: tuple[int, int, int], name: str, folder: Path
) -> npt.NDArray[np.uint8]:
    """Return many image files as (N, C, H, W).

    They are decoded once, into a file of ``folder``'s subfolder `CACHE_FOLDER`, from which all
    processes map them; if that cannot be written, each process decodes them for itself. Files that
    were changed since are decoded anew.

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
    listing = "\n".join(_as_it_is(file, folder) for file in files)
    digest = hashlib.sha256(os.fsencode(listing)).hexdigest()[:16]
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
            _fill_holes(temporary)
            _decode(files, images, name)
            images.flush()
        found = _mapped(kept, shape)
    except OSError as error:
        LOGGER.warning("%s cannot be kept in %s (%s)", name, kept.parent, error.strerror)
    if found is None:
        found = np.empty(shape, dtype=np.uint8)
        _decode(files, found, name)
    return found


def _as_it_is(file: Path, folder: Path) -> str:
    """Return a file's name and what changes with its content; of one that is gone, its name."""
    name = file.relative_to(folder).as_posix()
    try:
        found = file.stat()
    except OSError:
        return name
    return f"{name} {found.st_size} {found.st_mtime_ns}"


def _fill_holes(path: Path) -> None:
    """Take the room of a file that is mapped: without it, to write there would end the process."""
    # The system's, which not every one has.
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def _mapped(kept: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
    try:
        # What is no regular file is not opened.
        open_file(kept).close()
        images: npt.NDArray[np.uint8] = np.load(kept, mmap_mode="r")
    except Exception:  # noqa: BLE001 - NumPy raises whatever a damaged header suggests
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _decode(files: Sequence[Path], images_NCHW: npt.NDArray[np.uint8], name: str) -> None:
    def read(at: int) -> str:
        images_NCHW[at], remark = read_image(files[at], (channels, height, width))
        return remark

    _, channels, height, width = images_NCHW.shape
    notice, converted = time.monotonic() + _NOTICE_S, Counter[str]()
    with bombs_refused(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), _CHUNK):
            converted.update(pool.map(read, range(start, min(start + _CHUNK, len(files)))))
            if time.monotonic() > notice:
                LOGGER.info("%s: %d of %d images read", name, start + _CHUNK, len(files))
                notice = time.monotonic() + _NOTICE_S
    if told := [f"{number} {remark}" for remark, number in converted.items() if remark]:
        LOGGER.warning("%s: images that were converted: %s", name, ", ".join(told))
