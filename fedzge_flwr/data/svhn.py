"""SVHN in the format that it is published in: MATLAB's, version 5 (Netzer et al., 2011)."""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedzge_flwr.common.file_kinds import MATLAB, unreadable
from fedzge_flwr.common.reading import most_content, open_file
from fedzge_flwr.data.fetching import fetch, missing
from fedzge_flwr.images.image_set import ImageSet, Split

LOGGER = logging.getLogger("flwr.fedzge")

_MD5: Mapping[Split, str] = {
    "train": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test": "eb5a983be6a315427106f1b164d9cef3",
}
_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_MOST_VARIABLES = 10
_NUMBERS = frozenset({"uint8", "int8", "uint16", "int16", "uint32", "int32", "double", "single"})


def load_svhn(folder: Path, download: bool, split: Split) -> ImageSet:
    """Load SVHN's cropped digits, ``train_32x32.mat`` and ``test_32x32.mat``.

    Files that are not the published ones, by checksum, are used with a warning.
    """
    path = folder / f"{split}_32x32.mat"
    if not path.is_file():
        if not download:
            raise missing("SVHN", path, folder)
        fetch("SVHN", folder, split=split)
    try:
        with open_file(path) as file:
            most = most_content(file)
            data = file.read(most)
        found = _read(data, most)
        images = np.ascontiguousarray(found["X"].transpose(3, 2, 0, 1))
        # It writes the digit 0 as class 10.
        labels = found["y"].astype(np.int64).reshape(-1)
        labels[labels == 10] = 0
        images_and_labels = ImageSet(images, labels)
    except FileNotFoundError as error:
        raise missing("SVHN", path, folder) from error
    except Exception as error:  # SciPy raises whatever its parts suggest
        raise unreadable(
            path, "a file of SVHN", error, "fetch it again", expected=[MATLAB]
        ) from error
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != _MD5[split]:
        LOGGER.warning(
            "SVHN in %s is not the published one (checksums differ); it is used as it is", folder
        )
    return images_and_labels


def _read(data: bytes, most: int) -> dict[str, Any]:
    """Return X and y, which are arrays of numbers: SciPy is shown nothing else.

    Of cells and structs one within the other it would fill its stack.
    """
    from scipy.io import loadmat, whosmat

    plain = _inflated(data, most)
    variables = whosmat(io.BytesIO(plain))
    there = {name: (shape, kind) for name, shape, kind in variables}
    if len(there) < len(variables):
        raise ValueError("it has two variables of one name")
    shape, kind = there.get("X", ((), ""))
    if kind != "uint8" or len(shape) != 4 or shape[:3] != (32, 32, 3):
        raise ValueError(f"its X is {kind or 'not there'} of shape {shape}, not uint8 32×32×3×N")
    if there.get("y", ((), ""))[1] not in _NUMBERS:
        raise ValueError("it has no y of numbers")
    with warnings.catch_warnings():
        # What cannot be read is a text instead of an array, and seen thereby.
        warnings.simplefilter("ignore")
        found: dict[str, Any] = loadmat(io.BytesIO(plain), variable_names=["X", "y"])
    return found


def _inflated(data: bytes, most: int) -> bytes:
    """Return the file with its variables decompressed, each only once."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None or len(data) < _HEADER:
        raise ValueError("it is no MATLAB file of version 5")
    parts, at, left = [data[:_HEADER]], _HEADER, most
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        end = at + 8 + size
        if kind not in (_MATRIX, _COMPRESSED) or end > len(data) or len(parts) > _MOST_VARIABLES:
            raise ValueError("it is cut short, or more than a few variables")
        if kind == _MATRIX:
            parts.append(data[at:end])
        else:
            inflate = zlib.decompressobj()
            # One byte more than is allowed; without end for 0.
            parts.append(inflate.decompress(data[at + 8 : end], left + 1))
            if len(parts[-1]) > left:
                raise ValueError("it holds more than a file of its size is believed to hold")
            if parts[-1][:8] != struct.pack(f"{order}II", _MATRIX, len(parts[-1]) - 8):
                raise ValueError("it is damaged")
        left -= len(parts[-1])
        at = end
    return b"".join(parts)
