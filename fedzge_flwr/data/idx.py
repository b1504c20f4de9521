"""The idx format of MNIST and its kin, gzipped or not (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.file_kinds import GZIP, unreadable
from fedzge_flwr.common.reading import most_content, open_file

_UNSIGNED_BYTE = 0x08
_GZIP = b"\x1f\x8b"
_AGAIN = "fetch the file again"


def find_idx(folders: list[Path], name: str) -> Path | None:
    """Return the first of ``folder/name`` and ``folder/name.gz`` that is a file.

    Some unpackers, and mirrors that used them, write ``images.idx3`` for ``images-idx3``.
    """
    for folder in folders:
        for found in (name, name.replace("-idx", ".idx")):
            for path in (folder / found, folder / f"{found}.gz"):
                if path.is_file():
                    return path
    return None


def read_idx(path: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes.

    Parameters
    ----------
    path : Path
        The file, gzipped or not, whatever its name says.
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
    wanted = f"an idx file of unsigned bytes in {num_dims} dimensions"
    try:
        with open_file(path) as file:
            most = most_content(file)
            packed = file.read(len(_GZIP)) == _GZIP
            file.seek(0)
            with gzip.open(file) if packed else file as stream:
                head = stream.read(4)
                if head != bytes((0, 0, _UNSIGNED_BYTE, num_dims)):
                    raise ValueError(f"it begins with {head.hex() or 'nothing'}")
                sizes = stream.read(4 * num_dims)
                shape = tuple(int(n) for n in np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4"))
                declared = math.prod(shape)
                believed = declared <= most
                raw = stream.read(declared + 1) if believed else b""
    except ValueError as error:
        raise unreadable(path, wanted, error, _AGAIN, expected=[GZIP]) from error
    except Exception as error:  # gzip and zlib have errors of their own
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); {_AGAIN}") from error
    if len(shape) != num_dims or len(raw) != declared:
        held = f"{len(raw)} bytes" if len(raw) < declared else "more"
        held = held if believed else "less, to judge by its size"
        raise DataError(f"{path}: declares shape {shape} but holds {held}; {_AGAIN}")
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape)
