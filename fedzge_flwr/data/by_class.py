"""Folders of pictures with a subfolder for each class: which files are images, and what is not.

Nothing is left out in silence: what cannot be read is an error, and what is passed over is counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.text import printable, same_name

IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)

HIDDEN = "hidden or a system's own"
OTHER = "that are no images"
BESIDE = "beside the class folders"
AGAIN = "folders read already"

# Thumbnails, bins and notes that systems put beside pictures; names with a dot are hidden anyway.
_SYSTEMS_OWN = frozenset(
    {
        *("@eadir", "#recycle", "@recycle", "$recycle.bin", "__macosx", "lost+found"),
        *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    }
)
_MOST_NAMED = 5


def is_systems_own(name: str) -> bool:
    """Say whether a file or folder is hidden, or one that a system makes for itself."""
    return name.startswith(".") or name.lower() in _SYSTEMS_OWN


def class_folders(folder: Path, besides: Sequence[str], passed_over: Counter[str]) -> list[str]:
    """Return the names of a folder's subfolders, in their order.

    Parameters
    ----------
    folder : Path
        The folder.
    besides : Sequence[str]
        Names of files that belong beside them.
    passed_over : Counter[str]
        Counts what else is there.

    Raises
    ------
    DataError
        If the folder cannot be read, or holds a link that leads nowhere.
    """
    names = []
    try:
        for name in sorted((path.name for path in folder.iterdir()), key=_in_order):
            if is_systems_own(name):
                passed_over[HIDDEN] += 1
                continue
            _check_there(folder / name)
            if (folder / name).is_dir():
                names.append(name)
            elif name not in besides:
                passed_over[BESIDE] += 1
    except OSError as error:
        raise _unreadable(error) from error
    return names


def images_below(
    folder: Path, passed_over: Counter[str], suffixes: Sequence[str] = IMAGE_SUFFIXES
) -> list[Path]:
    """Return the images of a class, however deep, by path; links are followed, each folder once.

    Parameters
    ----------
    folder : Path
        The class's folder.
    passed_over : Counter[str]
        Counts what else is there.
    suffixes : Sequence[str]
        How names of images end, in small letters.

    Raises
    ------
    DataError
        If a folder cannot be read, a link leads nowhere, or there are files and no image.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()
    try:
        for path in _files_below(folder, passed_over):
            if path.suffix.lower() in suffixes:
                images.append(path)
            else:
                others[path.suffix.lower() or "no suffix"] += 1
    except OSError as error:
        raise _unreadable(error) from error
    if others and not images:
        raise DataError(
            f"{folder}: {others.total()} files and no image among them ({_counted(others)}); save "
            f"images as {', '.join(suffixes)}, or empty the folder"
        )
    passed_over[OTHER] += others.total()
    return sorted(images)


def _files_below(folder: Path, passed_over: Counter[str]) -> Iterator[Path]:
    """Yield all files, however deep, that are not a system's own; OSError if one is not there."""
    read: set[tuple[int, int]] = set()
    # Those that links lead to come last: where a folder is itself, it is read under its own name.
    roots = [folder]
    for root in roots:
        for here, names, files in os.walk(root, onerror=_raised):
            found = Path(here).stat()
            if (found.st_dev, found.st_ino) in read:
                passed_over[AGAIN] += 1
                names.clear()
                continue
            read.add((found.st_dev, found.st_ino))
            passed_over[HIDDEN] += sum(map(is_systems_own, (*names, *files)))
            names[:] = [name for name in names if not is_systems_own(name)]
            roots += [path for name in names if (path := Path(here, name)).is_symlink()]
            for path in (Path(here, name) for name in files if not is_systems_own(name)):
                _check_there(path)
                yield path


def _in_order(name: str) -> tuple[str, str]:
    return same_name(name), name


def _check_there(path: Path) -> None:
    """Refuse a link that leads nowhere; OSError if nothing can be said of the path."""
    try:
        path.stat()
    except OSError as error:
        if not path.is_symlink():
            raise
        raise DataError(
            f"{path}: a link that leads nowhere ({error.strerror}); mend or remove it"
        ) from error


def _raised(error: OSError) -> None:
    raise error


def _unreadable(error: OSError) -> DataError:
    return DataError(
        f"{error.filename}: cannot be read ({error.strerror}); let this process's user read it, or "
        "move it away"
    )


def _counted(numbers: Counter[str]) -> str:
    named = [f"{number} {printable(name, 20)}" for name, number in numbers.most_common(_MOST_NAMED)]
    return ", ".join([*named, *["…"] * (len(numbers) > _MOST_NAMED)])
