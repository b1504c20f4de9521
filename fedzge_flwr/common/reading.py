"""Reading files of others: regular ones alone, no more of them than is meant, and no links.

A folder or a preset may come from someone who means harm. What is opened here is never a pipe or a
device, on which a reader would wait or act; what it holds is bounded before it is in memory.
Everything that is wrong is an ``OSError`` whose ``strerror`` says so in words.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.text import printable, same_name

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_FREE_BYTES = 1 << 28
_MOST_RATIO = 100
_BLOCK = 512
_MOST_DEPTH = 20
_MOST_NUMBER = 1e300


def place(path: str | Path, key: str = "") -> Path:
    """Return the absolute path of what a setting or an argument names; ``~`` is the home folder.

    Where there is nothing of that name and one that only Unicode writes otherwise (``é`` as one
    character or as two), that one is meant: keyboards and other systems differ in it.

    Parameters
    ----------
    path : str or Path
        What is named.
    key : str
        The setting or option that names it, for the error.

    Raises
    ------
    ConfigError
        If it begins with a home folder that there is not here, be it for want of ``HOME``; if it is
        relative to a folder that is gone; if nobody may look there, or nothing can be called so.
    """
    # Of an empty one Python makes the root.
    homeless = str(path).partition("/")[0] == "~" and os.environ.get("HOME") == ""
    named = f"'{key}' = '{path}'" if key else f"'{path}'"
    try:
        whole = None if homeless else Path(path).expanduser().absolute()
    except RuntimeError:
        whole = None
    except OSError as error:
        raise ConfigError(
            f"{named}: the folder that this was started in is gone; go to another, or give an "
            "absolute path"
        ) from error
    if whole is None:
        raise ConfigError(
            f"{named}: there is no such home folder here; give an absolute path, or set HOME"
        )
    if (reason := _hidden(whole)) is not None:
        raise ConfigError(f"{named}: cannot be looked at ({reason}); give another path")
    return whole if str(whole).isascii() or os.path.lexists(whole) else _as_written_there(whole)


def _hidden(path: Path) -> str | None:
    """Return why it cannot be said what there is, if it cannot; Python's `Path.exists` raises."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        return printable(error.strerror or str(error))
    closed = stat.S_ISDIR(found.st_mode) and not os.access(path, os.X_OK)
    return os.strerror(errno.EACCES) if closed else None


def _as_written_there(path: Path) -> Path:
    """Return the path with its parts written as on disk, where they are there in another form."""
    found = Path(path.anchor)
    for part in path.parts[1:]:
        written = part
        if not os.path.lexists(found / part):
            with suppress(OSError, ValueError):
                names = (entry.name for entry in found.iterdir())
                alike = (name for name in names if same_name(name) == same_name(part))
                written = next(alike, part)
        found /= written
    return found


def open_file(path: Path) -> BinaryIO:
    """Open a regular file, links followed.

    Raises
    ------
    OSError
        If there is none; a folder, a pipe or a device is not opened at all.
    """
    # Opening a device can be an act by itself; what takes its place afterwards is seen below.
    if not stat.S_ISREG(path.stat().st_mode):
        _refuse("is no regular file", path)
    return _regular(os.open(path, _FLAGS), path)


def read_file(path: Path, most: int) -> bytes:
    """Return what a regular file of at most ``most`` bytes holds, links followed.

    Raises
    ------
    OSError
        As in `open_file`, or if it is larger.
    """
    with open_file(path) as file:
        return _read(file, most, path)


def read_within(folder: Path, name: str, most: int) -> bytes:
    """Return what a file of a folder holds; on the way from the folder to it no link is followed.

    Parameters
    ----------
    folder : Path
        Links in its own path are followed: whoever names it has seen it.
    name : str
        The file's path in it.
    most : int
        Bytes that the file may have.

    Raises
    ------
    OSError
        If there is no such file, it is larger, or a link is in the way.
    """
    with open_within(folder, name) as file:
        return _read(file, most, folder / name)


def open_within(folder: Path, name: str) -> BinaryIO:
    """Open a file of a folder as `read_within` does.

    Raises
    ------
    OSError
        If there is no such file, or a link is in the way.
    """
    path = folder / name
    *parents, last = PurePosixPath(name).parts
    descriptor = os.open(folder, _FLAGS | os.O_DIRECTORY)
    try:
        for at, part in enumerate(parents):
            _refuse_link(part, descriptor, folder.joinpath(*parents[: at + 1]))
            inner = os.open(part, _FLAGS | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        _refuse_link(last, descriptor, path)
        found = os.stat(last, dir_fd=descriptor, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            _refuse("is no regular file", path)
        opened = os.open(last, _FLAGS | os.O_NOFOLLOW, dir_fd=descriptor)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)
    return _regular(opened, path)


def most_content(file: BinaryIO) -> int:
    """Return how many bytes a file may be said to hold, compressed or with holes, to be believed.

    A hundred times what it takes on disk, and 256 MiB at least. Images are seldom compressed to a
    tenth; a file of kilobytes that stands for terabytes is made to fill the memory.
    """
    found = os.fstat(file.fileno())
    # Of holes there is nothing on disk.
    return max(_FREE_BYTES, _MOST_RATIO * min(found.st_size, found.st_blocks * _BLOCK))


def parse_json(text: str | bytes, most: float = _MOST_NUMBER) -> Any:
    """Return a JSON value that is nested at most 20 deep, with numbers of at most ``most`` alone.

    Raises
    ------
    ValueError
        If it is none. Not a number and infinity, which JSON does not have, are refused.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep") from None
    _check_plain(value, _MOST_DEPTH, most)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_plain(value: Any, depth: int, most: float) -> None:
    if depth == 0:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_plain(item, depth - 1, most)
    elif isinstance(value, (int, float)) and abs(value) > most:
        raise ValueError(f"a number is beyond {most:g}")


def _regular(descriptor: int, path: Path) -> BinaryIO:
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        _refuse("is no regular file", path)
    return file


def _read(file: BinaryIO, most: int, path: Path) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > most:
        _refuse(f"has {size / 1e6:,.1f} MB, {most / 1e6:,.1f} at most are read", path)
    # Of a file that grows: what it had when it was opened.
    return file.read(size)


def _refuse_link(name: str, descriptor: int, path: Path) -> None:
    if stat.S_ISLNK(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
        _refuse("is a link, which is not followed", path)


def _refuse(why: str, path: Path) -> NoReturn:
    raise OSError(errno.EINVAL, why, str(path))
