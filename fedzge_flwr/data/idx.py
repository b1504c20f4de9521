"""The idx format of MNIST and its kin, gzipped or not (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.errors import DataError

_UNSIGNED_BYTE = 0x08


def find_idx(folders: list[Path], name: str) -> Path | None:
    """Return the first of ``folder/name`` and ``folder/name.gz`` that is a file."""
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes.

    Parameters
    ----------
    path : Path
        The file; a name that ends in ``.gz`` is decompressed.

    Returns
    -------
    ndarray of uint8
        As many dimensions as the file declares.

    Raises
    ------
    DataError
        If the file is not such a file, or is cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch the file again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path}: not an idx file of unsigned bytes; fetch the file again")
    num_dims = raw[3]
    header = 4 + 4 * num_dims
    shape = tuple(int(n) for n in np.frombuffer(raw[4:header], dtype=">u4"))
    if len(shape) != num_dims or len(raw) - header != int(np.prod(shape, dtype=np.int64)):
        raise DataError(
            f"{path}: declares shape {shape} but holds {max(len(raw) - header, 0)} bytes; "
            "fetch the file again"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)
