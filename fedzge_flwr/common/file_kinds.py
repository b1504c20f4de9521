"""What a file is, whatever it is called: by its first bytes, for whoever is told what is wrong.

A file that cannot be read is seldom damaged. Mostly it is another one: a page that a server sent in
its place, a pointer of Git LFS, or an archive that nobody has unpacked.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.reading import open_file

_HEAD = 512
_AGAIN = "fetch the file again"
_AS_PNG = "save it as PNG or JPEG"


class FileKind(NamedTuple):
    """What a file is, and what to do about it where something else is wanted, if that is known."""

    name: str
    fix: str = ""


ZIP, GZIP = FileKind("a zip archive", "unpack it"), FileKind("a gzip file", "unpack it")
PICKLE, MATLAB = FileKind("a pickle"), FileKind("a MATLAB file of version 5")
PICTURES = tuple(FileKind(f"a {name} picture") for name in ("PNG", "JPEG", "GIF", "TIFF", "WebP"))
_PNG, _JPEG, _GIF, _TIFF, _WEBP = PICTURES
_PAGE = FileKind("an HTML page", f"{_AGAIN}: a server has sent this page in its place")

_BEGINNINGS: tuple[tuple[bytes, FileKind], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        FileKind("a Git LFS pointer", "fetch the file that it stands for (git lfs pull)"),
    ),
    (b"<?xml", FileKind("an XML text", f"{_AGAIN}: a server may have sent this in its place")),
    (b"<svg", FileKind("an SVG drawing", _AS_PNG)),
    (b'{"', FileKind("a JSON text", f"{_AGAIN}: a server may have sent this in its place")),
    (b"PK\x03\x04", ZIP),
    (b"PK\x05\x06", ZIP),
    (b"\x1f\x8b", GZIP),
    (b"BZh", FileKind("a bzip2 file", "unpack it")),
    (b"\xfd7zXZ\0", FileKind("an xz file", "unpack it")),
    (b"\x28\xb5\x2f\xfd", FileKind("a zstd file", "unpack it")),
    (b"7z\xbc\xaf\x27\x1c", FileKind("a 7z archive", "unpack it")),
    (b"Rar!\x1a\x07", FileKind("a RAR archive", "unpack it")),
    (b"\x93NUMPY", FileKind("a single NumPy array (.npy)")),
    (b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file")),
    (b"MATLAB 7.3", FileKind("a MATLAB file of version 7.3", "save it with -v7")),
    (b"MATLAB 5.0", MATLAB),
    (b"PAR1", FileKind("a Parquet file")),
    (b"\x89PNG\r\n", _PNG),
    (b"\xff\xd8\xff", _JPEG),
    (b"GIF8", _GIF),
    (b"II*\0", _TIFF),
    (b"MM\0*", _TIFF),
    (b"%PDF", FileKind("a PDF", _AS_PNG)),
    (b"%!PS", FileKind("a PostScript file", _AS_PNG)),
    (b"8BPS", FileKind("a Photoshop file", _AS_PNG)),
    (b"\0\0\0\x0cjP  ", FileKind("a JPEG 2000 picture", _AS_PNG)),
    *((bytes((0x80, protocol)), PICKLE) for protocol in range(2, 6)),
)
_WITHIN: tuple[tuple[int, bytes, FileKind], ...] = (
    (8, b"WEBP", _WEBP),
    (4, b"ftypavif", FileKind("an AVIF picture", _AS_PNG)),
    (4, b"ftyphei", FileKind("a HEIC picture", _AS_PNG)),
    (4, b"ftypmif1", FileKind("a HEIC picture", _AS_PNG)),
    (4, b"ftyp", FileKind("a film")),
    (128, b"DICM", FileKind("a DICOM file", _AS_PNG)),
    (257, b"ustar", FileKind("a tar archive", "unpack it")),
)


def kind_of(path: Path) -> FileKind | None:
    """Return what a file is by its first bytes; None if they say nothing or cannot be read."""
    try:
        with open_file(path) as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    if not head.strip(b"\0"):
        nothing = "an empty file" if not head else "a file of zeros"
        return FileKind(nothing, f"{_AGAIN}: it was not written to its end")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return _PAGE
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    return next((kind for at, mark, kind in _WITHIN if head.startswith(mark, at)), None)


def reason_of(error: Exception) -> str:
    """Return the first line of what an error says; with its type where that says nothing."""
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
    # The text of a key that is missing is the key.
    if isinstance(error, KeyError) or not reason:
        return f"{type(error).__name__} {reason}".rstrip()
    return str(reason)


def unreadable(
    path: Path, wanted: str, error: Exception, fix: str, *, expected: Collection[FileKind] = ()
) -> DataError:
    """Return the error that a file is not what it should be; it says what the file is instead.

    Parameters
    ----------
    path : Path
        The file.
    wanted : str
        What it should be, e.g. ``"an idx file"``.
    error : Exception
        What its reader says.
    fix : str
        What to do, if nothing better is known.
    expected : Collection[FileKind]
        What it may well be: of such a file only the reader can say what is wrong.
    """
    kind = kind_of(path)
    if kind is None or kind in expected:
        return DataError(f"{path}: not {wanted} ({reason_of(error)}); {fix}")
    return DataError(f"{path}: not {wanted}: it is {kind.name}; {kind.fix or fix}")
