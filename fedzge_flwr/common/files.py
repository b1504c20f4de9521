"""Writing files so that none is ever half there."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ABANDONED_S = 3600.0


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes its place when the block succeeds.

    Parameters
    ----------
    path : Path
        The file to make or replace; its folder must exist.
    durable : bool
        Whether it must be on disk, should the machine lose power, before it takes the place.

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
    finally:
        temporary.unlink(missing_ok=True)


def remove_remains(folder: Path) -> None:
    """Remove what writers that were killed an hour ago or more have left of `atomic_path`."""
    for path in folder.glob(".*"):
        with suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()


def atomic_write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a UTF-8 text file through `atomic_path`."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
