"""Fetching published data sets through torchvision, which checks what it has fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedzge_flwr.common.errors import DataError, MissingDataError
from fedzge_flwr.common.file_kinds import reason_of


def fetch(class_name: str, folder: Path, **options: Any) -> None:
    """Fetch a data set into a folder; files of other checksums there are replaced.

    Parameters
    ----------
    class_name : str
        Its class in torchvision.
    folder : Path
        The data set's folder.
    **options
        More for that class, such as its split.

    Raises
    ------
    DataError
        If it cannot be fetched.
    """
    # Takes a second, and most runs fetch nothing.
    import torchvision.datasets as tv

    # What it reads thereby it has checked before.
    data_set = getattr(tv, class_name)
    fetching(class_name, folder, lambda: data_set(str(folder), download=True, **options))


def fetching(name: str, folder: Path, do: Callable[[], object]) -> None:
    """Fetch something into a folder.

    Raises
    ------
    DataError
        If that fails in whatever way: networks, archives and disks have errors of their own.
    """
    try:
        do()
    except Exception as error:
        raise DataError(
            f"{name}: download to {folder} failed ({reason_of(error)}); try again, or "
            "put the files there"
        ) from error


def missing(class_name: str, file: Path, folder: Path) -> MissingDataError:
    """Return the error that a file of a data set is not there."""
    return MissingDataError(
        f"{class_name}: no data set in torchvision's layout in {folder} (it has no {file.name}); "
        "put it there, name its folder with 'data-dir', or set 'download' = true"
    )
