"""The idx format of MNIST and its kin, gzipped or not (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.reading import most_content, open_file

_UNSIGNED_BYTE = 0x08


def find_idx(folders: list[Path], name: str) -> Path | None:
    """Return the first of ``folder/name`` and ``folder/name.gz`` that is a file."""
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def read_idx(path: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes.

    Parameters
    ----------
    path : Path
        The file; a name that ends in ``.gz`` is decompressed.
    num_dims : int
        Number of dimensions that it must have.

    Returns
    -------
    ndarray of uint8
        Of the shape that the file declares.

    Raises
    ------
    DataError
        If the file is not such a file, is cut short, or declares more than is believed of a file of
        its size.
    """
    try:
        with open_file(path) as file:
            most = most_content(file)
            with gzip.open(file) if path.suffix == ".gz" else file as stream:
                head = stream.read(4)
                if head != bytes((0, 0, _UNSIGNED_BYTE, num_dims)):
                    raise DataError(
                        f"{path}: not an idx file of unsigned bytes in {num_dims} dimensions; "
                        "fetch the file again"
                    )
                sizes = stream.read(4 * num_dims)
                shape = tuple(int(n) for n in np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4"))
                declared = math.prod(shape)
                believed = declared <= most
                raw = stream.read(declared + 1) if believed else b""
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); fetch the file again") from error
    if len(shape) != num_dims or len(raw) != declared:
        held = f"{len(raw)} bytes" if len(raw) < declared else "more"
        held = held if believed else "less, to judge by its size"
        raise DataError(f"{path}: declares shape {shape} but holds {held}; fetch the file again")
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape)
