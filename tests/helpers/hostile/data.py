"""Data sets, arrays and pictures that mean harm."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.fabricate import make_food101, make_idx, make_svhn, make_tiny_imagenet
from tests.helpers.hostile.case import Case, Place, mutated

_IMAGES = "t10k-images-idx3-ubyte"
_EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    b"(/tmp/x) (w) file closefile\nshowpage\n%%EOF\n"
)


def _idx(name: str, content: Callable[[bytes], bytes]) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        folder = place.folder / "data"
        make_idx(folder, ("train", "t10k"), 10, 0, "")
        data = (folder / _IMAGES).read_bytes()
        (folder / _IMAGES).unlink()
        (folder / name).write_bytes(content(data))
        return place.data("mnist")

    return make


def _zeros_gz(size: int, head: bytes) -> bytes:
    """Return few bytes that gzip makes many of."""
    piece = gzip.compress(bytes(1 << 26))
    return gzip.compress(head) + piece * (size >> 26)


def idx() -> Iterator[Case]:
    """Yield idx files."""
    head = b"\0\0\x08\x03"
    contents: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
        "declares all memory": (_IMAGES, lambda _: head + b"\xff" * 12),
        "declares 255 dimensions": (_IMAGES, lambda _: b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"x"),
        "declares none": (_IMAGES, lambda _: b"\0\0\x08\0x"),
        "declares images of no size": (_IMAGES, lambda _: head + b"\xff\xff\xff\xff" + b"\0" * 8),
        "is a number short": (_IMAGES, lambda data: data[:-1]),
        "is a page": (_IMAGES, lambda _: b"<html>"),
        "is a gigabyte of zeros": (
            f"{_IMAGES}.gz",
            lambda _: _zeros_gz(1 << 30, head + struct.pack(">3I", (1 << 30) // 784, 28, 28)),
        ),
        "is more than it declares": (
            f"{_IMAGES}.gz",
            lambda _: _zeros_gz(1 << 30, head + struct.pack(">3I", 30, 28, 28)),
        ),
        "is half a gzip": (f"{_IMAGES}.gz", lambda data: gzip.compress(data)[:-20]),
    }
    for what, (name, content) in contents.items():
        yield Case(f"an idx file {what}", "doctor", _idx(name, content))
    # It is read for what it is.
    plain = _idx(f"{_IMAGES}.gz", lambda data: data)
    yield Case("an idx file that is no gzip by a gzip's name", "doctor", plain, "harmless")
    for seed in range(12):
        packed = seed % 2 == 0

        def content(data: bytes, seed: int = seed, packed: bool = packed) -> bytes:
            head = data[:2000]
            return mutated(gzip.compress(data), seed) if packed else mutated(head, seed)

        name = f"{_IMAGES}.gz" if packed else _IMAGES
        yield Case(f"an idx file with change {seed}", "doctor", _idx(name, content), "either")
    for what, put in {
        "a pipe": lambda path, place: os.mkfifo(path),
        "zeros without end": lambda path, place: path.symlink_to("/dev/zero"),
        "a secret": lambda path, place: path.symlink_to(place.outside / "text"),
        "a folder": lambda path, place: path.mkdir(),
        "a terabyte of nothing": lambda path, place: (path.touch(), os.truncate(path, 1 << 40)),
    }.items():

        def make(place: Place, put: Callable[[Path, Place], object] = put) -> Path:
            preset = _idx(_IMAGES, lambda data: data)(place)
            (place.folder / "data" / _IMAGES).unlink()
            put(place.folder / "data" / _IMAGES, place)
            return preset

        yield Case(f"an idx file is {what}", "doctor", make, leads_out=what == "a secret")


def _svhn(change: Callable[[Path], object]) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        make_svhn(place.folder / "data")
        change(place.folder / "data" / "test_32x32.mat")
        return place.data("svhn")

    return make


def _saved(**variables: Any) -> Callable[[Path], object]:
    from scipy.io import savemat

    return lambda path: savemat(path, variables)


def _nested(path: Path) -> None:
    """Write a cell in a cell in a cell, a hundred thousand times."""
    flags = struct.pack("<IIII", 6, 8, 1, 0)
    shape, name = struct.pack("<IIii", 5, 8, 1, 1), struct.pack("<II", 1, 0)
    depth, own = 100_000, len(flags + shape + name)
    parts = [
        struct.pack("<II", 14, (own + 8) * (depth - level)) + flags + shape + name
        for level in range(depth)
    ]
    whole = b"".join(parts) + struct.pack("<II", 14, 0)
    _matlab(path, [_tag(whole, "X")])


def _tag(matrix: bytes, name: str) -> bytes:
    """Give a variable whose name is empty a name of one letter."""
    head, rest = matrix[8:40], matrix[48:]
    body = head + struct.pack("<HH", 1, 1) + name.encode().ljust(4, b"\0") + rest
    return struct.pack("<II", 14, len(body)) + body


def _matlab(path: Path, elements: list[bytes]) -> None:
    path.write_bytes(
        b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x100) + b"IM" + b"".join(elements)
    )


def _bomb(path: Path) -> None:
    packed = zlib.compress(struct.pack("<II", 14, 300_000_000) + bytes(300_000_000), 9)
    _matlab(path, [struct.pack("<II", 15, len(packed)) + packed])


def svhn() -> Iterator[Case]:
    """Yield SVHN's files."""
    images, labels = np.zeros((32, 32, 3, 5), np.uint8), np.ones((5, 1), np.uint8)
    contents: dict[str, Callable[[Path], object]] = {
        "an array of objects": _saved(X=np.array([[1, "a"]], dtype=object), y=labels),
        "a struct": _saved(X={"a": {"b": 1}}, y=labels),
        "labels that are cells": _saved(X=images, y=np.array([[1, "a"]], dtype=object)),
        "labels that are text": _saved(X=images, y="abcde"),
        "images of another size": _saved(X=images[:16], y=labels),
        "floats": _saved(X=images / 2, y=labels),
        "no images": _saved(y=labels),
        "fewer labels": _saved(X=images, y=labels[:4]),
        "other labels": _saved(X=images, y=labels + 20),
        "cells in cells": _nested,
        "300 MB of zeros": _bomb,
        "a table of HDF5": lambda path: path.write_bytes(
            b"MATLAB 7.3".ljust(124) + struct.pack("<H", 0x200) + b"IM" + b"\x89HDF\r\n" * 100
        ),
        "version 4": lambda path: path.write_bytes(struct.pack("<5i", 0, 1 << 30, 1 << 30, 0, 2)),
        "nothing": lambda path: path.write_bytes(b""),
        "a header alone": lambda path: _matlab(path, []),
    }
    for what, content in contents.items():
        yield Case(f"a MATLAB file with {what}", "doctor", _svhn(content))
    for seed in range(12):

        def change(path: Path, seed: int = seed) -> None:
            from scipy.io import savemat

            savemat(path, {"X": images[..., :1], "y": labels[:1]}, do_compression=seed % 2 == 0)
            path.write_bytes(mutated(path.read_bytes(), seed))

        yield Case(f"a MATLAB file with change {seed}", "doctor", _svhn(change), "either")


def lists() -> Iterator[Case]:
    """Yield lists of pictures that lead out of their folder."""

    def food(change: Callable[[dict[str, list[str]], Place], object]) -> Callable[[Place], Path]:
        def make(place: Place) -> Path:
            make_food101(place.folder / "data", 3)
            listed = place.folder / "data" / "food-101" / "meta" / "train.json"
            changed = change(json.loads(listed.read_text()), place)
            listed.write_bytes(
                changed if isinstance(changed, bytes) else json.dumps(changed).encode()
            )
            return place.data("food101")

        return make

    def with_name(name: Callable[[Place], str]) -> Callable[[Place], Path]:
        return food(lambda names, place: {**names, "dish-000": [name(place)]})

    for what, name in {
        "an absolute path": lambda place: str(place.outside / "picture"),
        "a path upwards": lambda place: "../" * 20 + str(place.outside / "picture"),
        "a null": lambda place: "a\0b",
        "a file twice": lambda place: "dish-001/train-0001",
        "a file that is not there": lambda place: "dish-000/none",
    }.items():
        yield Case(f"Food-101 names {what}", "doctor", with_name(name))
    for what, content in {
        "deep": b"[" * 100_000,
        "of numbers": b'{"a": [1, 2]}',
        "of numbers of files": b'{"a": 100000000000}',
        "not UTF-8": b'{"a": ["\xff"]}',
    }.items():
        yield Case(f"Food-101's list is {what}", "doctor", food(lambda *_, c=content: c))  # type: ignore[misc]

    def pipe(place: Place) -> Path:
        make_food101(place.folder / "data", 3)
        picture = next((place.folder / "data" / "food-101" / "images").rglob("*.jpg"))
        picture.unlink()
        os.mkfifo(picture)
        return place.data("food101")

    yield Case("a picture of Food-101 is a pipe", "doctor", pipe)

    def tiny(place: Place) -> Path:
        make_tiny_imagenet(place.folder / "data", 3)
        base = place.folder / "data" / "tiny-imagenet-200"
        (base / "val" / "val_annotations.txt").write_text(
            f"{place.outside}/picture.png\tn00000000\n"
        )
        return place.data("tinyimagenet")

    yield Case("Tiny ImageNet names a file outside", "doctor", tiny)

    def cache(place: Place) -> Path:
        make_food101(place.folder / "data", 3)
        (place.folder / "data" / "fedzge-decoded").symlink_to(place.outside)
        return place.data("food101")

    yield Case("a cache leads outside", "doctor", cache, "either")


def _npz(entries: Callable[[], dict[str, bytes]], **how: int) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        path = place.folder / "own.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries().items():
                archive.writestr(name, data)
        return path

    return make


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def _header(text: str, version: int = 1) -> bytes:
    data = text.encode() + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(data))
    return b"\x93NUMPY" + bytes((version, 0)) + size + data


def arrays() -> Iterator[Case]:
    """Yield archives of a client's own images."""
    images, labels = _npy(np.zeros((4, 8, 8), np.uint8)), _npy(np.arange(4))
    headers = {
        "more than all memory": _header(
            "{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000, 8, 8)}"
        ),
        "a negative shape": _header(
            "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8)}"
        ),
        "objects": _header("{'descr': '|O', 'fortran_order': False, 'shape': (4,)}")
        + b"cos\nsystem\n",
        "code": _header("{'descr': __import__('os').system('id'), 'shape': (4,)}"),
        "brackets without end": _header("(" * 60_000),
        "a header without end": _header("{'descr': '|u1'" + " " * 2_000_000, 2),
        "no header": b"x" * 100,
        "half a header": _header("{'descr': ")[:14],
        "brackets that do not close": _header(
            "{'descr': '|u1', 'fortran_order': False, 'shape': ((("
        ),
    }
    for what, data in headers.items():
        entries = {"images.npy": data, "labels.npy": labels}
        yield Case(f"an archive with {what}", "own", _npz(lambda entries=entries: entries))  # type: ignore[misc]
    zeros = _header("{'descr': '|u1', 'fortran_order': False, 'shape': (4687500, 8, 8)}")
    yield Case(
        "an archive of 300 MB of zeros",
        "own",
        _npz(lambda: {"images.npy": zeros + bytes(300_000_000), "labels.npy": labels}),
    )
    whole = {"images.npy": images, "labels.npy": labels}

    def flagged(place: Place) -> Path:
        path = _npz(lambda: whole)(place)
        data = bytearray(path.read_bytes())
        # Encrypted, says the directory of the archive, and the entry too.
        for mark, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
            data[data.index(mark) + at] |= 1
        path.write_bytes(data)
        return path

    yield Case("an encrypted archive", "own", flagged)
    for seed in range(16):

        def change(place: Place, seed: int = seed) -> Path:
            path = _npz(lambda: whole)(place)
            path.write_bytes(mutated(path.read_bytes(), seed))
            return path

        yield Case(f"an archive with change {seed}", "own", change, "either")

    def pipe(place: Place) -> Path:
        os.mkfifo(place.folder / "own.npz")
        return place.folder / "own.npz"

    yield Case("an archive is a pipe", "own", pipe)


def _picture(data: bytes, name: str = "a.png") -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        (place.folder / "own" / "0").mkdir(parents=True)
        (place.folder / "own" / "0" / name).write_bytes(data)
        return place.folder / "own"

    return make


def _drawn(form: str, size: int = 8, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(size * size, dtype=np.uint8).reshape(size, size)).save(
        stream, form, **options
    )
    return stream.getvalue()


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
    )


def own_pictures() -> Iterator[Case]:
    """Yield pictures of a client's own folder."""
    for suffix in ("png", "jpg", "bmp", "tif", "webp", "ppm"):
        yield Case(f"PostScript as {suffix}", "own", _picture(_EPS, f"a.{suffix}"))
    contents: dict[str, bytes] = {
        "PostScript in a DOS header": (
            b"\xc5\xd0\xd3\xc6" + struct.pack("<2I", 30, len(_EPS)) + bytes(18) + _EPS
        ),
        "a PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n",
        "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "a Windows metafile": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "a FITS file": b"SIMPLE  =                    T".ljust(2880),
        "an icon": _drawn("ico", 16),
        "a bomb": _png(40_000, 40_000),
        "a bomb that Pillow only warns of": _png(9_999, 9_990),
        "a PNM bomb": b"P5 99999 99999 255\n" + bytes(1000),
        "a BMP bomb": (
            b"BM" + struct.pack("<IIIIiiHH", 99, 0, 54, 40, 60000, 60000, 1, 8) + bytes(60)
        ),
        "a page": b"<html>",
        "nothing": b"",
        "a script": b"#!/bin/sh\ntouch /tmp/x\n",
    }  # fmt: skip
    for what, data in contents.items():
        yield Case(f"a picture is {what}, of an owner", "own", _picture(data))
    for form in ("png", "jpeg", "gif", "tiff", "bmp", "webp", "ppm"):
        yield Case(f"a {form} called png", "own", _picture(_drawn(form)), "harmless")
        for seed in range(4):
            yield Case(
                f"a {form} with change {seed}",
                "own",
                _picture(mutated(_drawn(form), seed)),
                "either",
            )

    def pipe(place: Place) -> Path:
        folder = _picture(_drawn("png"))(place)
        os.mkfifo(folder / "0" / "b.png")
        os.mkfifo(folder / "classes.txt")
        return folder

    yield Case("a list of classes is a pipe", "own", pipe)

    def secret(place: Place) -> Path:
        folder = _picture(_drawn("png"))(place)
        (folder / "classes.txt").symlink_to(place.outside / "text")
        return folder

    yield Case("a list of classes is a secret", "own", secret, leads_out=True)
