"""Writing files so that none is ever half there, also when the machine loses power.

A file is on disk once it is synced, and its name once the folder that has it is. A rename or a new
folder that is not synced may be gone after a crash although the file's content is there.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ABANDONED_S = 3600.0
# As `tempfile.mkstemp` makes them of the names that `atomic_path` gives it.
_TEMPORARY = re.compile(r"\..+-[a-z0-9_]{8}(\.\w+)?")
# Of file systems that cannot sync a folder, and of folders that may be written and not read.
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EACCES})


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes its place when the block succeeds.

    Parameters
    ----------
    path : Path
        The file to make or replace; its folder must exist.
    durable : bool
        Whether it must be on disk, should the machine lose power, before it takes the place, and
        the exchange before this returns.

    Raises
    ------
    OSError
        If it cannot be written; ``path`` is then as it was.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # A temporary file is made readable by its owner alone; a result is as readable as others.
        temporary.chmod(0o666 & ~_umask())
        if durable:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on disk, where the file system can do that.

    Raises
    ------
    OSError
        If the folder is gone, or its disk fails.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def make_folder(
    path: Path, *, mode: int = 0o777, parents: bool = True, exist_ok: bool = True
) -> None:
    """Make a folder as `Path.mkdir` does, and wait until it and its new parents are on disk.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode=mode, parents=parents, exist_ok=exist_ok)
    for folder in new:
        sync_folder(folder.parent)


def append_line(path: Path, line: str, *, durable: bool = True) -> None:
    """Append a line to a UTF-8 text file, which is made if need be.

    Whoever reads meanwhile, or after a crash, may see a part of the line; its end is the sign that
    it is whole.

    Parameters
    ----------
    path : Path
        The file.
    line : str
        Without its end.
    durable : bool
        Whether it must be on disk, should the machine lose power, before this returns.

    Raises
    ------
    OSError
        If it cannot be written; the file is then as it was, unless the disk fails.
    """
    new = not path.exists()
    # Unbuffered: nothing is tried a second time when the file is closed.
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        rest = memoryview(f"{line}\n".encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise
        if durable:
            os.fsync(file.fileno())
    if new and durable:
        sync_folder(path.parent)


def cut_half_line(path: Path) -> None:
    """Cut what a text file, if it is there, has after the end of its last whole line.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    with suppress(FileNotFoundError), path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def remove_remains(folder: Path) -> None:
    """Remove what writers that were killed an hour ago or more have left of `atomic_path`."""
    for path in folder.glob(".*"):
        with suppress(OSError):
            if (
                _TEMPORARY.fullmatch(path.name)
                and path.is_file()
                and time.time() - path.stat().st_mtime > _ABANDONED_S
            ):
                path.unlink()


def atomic_write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a UTF-8 text file through `atomic_path`."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
