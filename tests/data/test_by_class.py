"""Folders of pictures: nothing of them is passed over, or lost, in silence."""

from __future__ import annotations

import logging
import os
import shutil
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.data.folders import load_tiny_imagenet
from fedzge_flwr.data.own import load_own
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.images.spec import DatasetSpec
from tests.helpers.fabricate import make_tiny_imagenet

GREY, RGB = DatasetSpec(2, (1, 8, 8)), DatasetSpec(2, (3, 8, 8))


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of four images."""
    for name in "ab":
        for number in range(4):
            draw(tmp_path / "own" / name / f"{number}.png")
    return tmp_path / "own"


def counts(folder: Path) -> list[int]:
    return np.bincount(load_own(str(folder), GREY).labels_N, minlength=2).tolist()


def thumbnails(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copytree(folder / "a", folder / "a" / name)


def linked(folder: Path) -> None:
    away = folder.with_name("away")
    shutil.move(folder / "b", away)
    (folder / "b").mkdir()
    (folder / "b" / "p1").symlink_to(away)
    (folder / "b" / "again").symlink_to(away)
    (away / "up").symlink_to(folder / "b")


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "notebook": (thumbnails(".ipynb_checkpoints"), "1 hidden"),
    "synology": (thumbnails("@eaDir"), "1 hidden"),
    "unpacked by macOS": (
        lambda folder: shutil.copytree(folder / "a", folder / "__MACOSX"),
        "1 hidden",
    ),
    "Windows": (lambda folder: (folder / "b" / "Thumbs.db").write_bytes(b"x"), "1 hidden"),
    "texts": (lambda folder: (folder / "b" / "notes.txt").write_text("x"), "1 that are no images"),
    "beside": (lambda folder: draw(folder / "stray.png"), "1 beside the class folders"),
    "links": (linked, "2 folders read already"),
    "jfif": (lambda folder: (folder / "b" / "0.png").rename(folder / "b" / "0.jfif"), ""),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_passed_over_is_counted_in_one_line(
    kind: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, told = ODD[kind]
    make(folder)
    logging.getLogger("flwr").propagate = True
    with caplog.at_level(logging.INFO):
        assert counts(folder) == [4, 4]
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith(str(folder))]
    assert line.startswith(f"{folder}: images: 4 of class 0, 4 of class 1")
    assert ("; passed over: " + told in line) if told else ("passed over" not in line)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "dangling": (
        lambda folder: (folder / "b" / "x.png").symlink_to("/nowhere/x.png"),
        r"b/x.png: a link that leads nowhere .*; mend or remove it",
    ),
    "dangling folder": (
        lambda folder: (folder / "b" / "p1").symlink_to("/nowhere"),
        "b/p1: a link that leads nowhere",
    ),
    "dangling class": (
        lambda folder: (folder / "c").symlink_to("/nowhere"),
        "own/c: a link that leads nowhere",
    ),
    "to itself": (
        lambda folder: (folder / "b" / "x").symlink_to("x"),
        "b/x: a link that leads nowhere",
    ),
    "no image": (
        lambda folder: [p.rename(p.with_suffix(".heic")) for p in [*(folder / "b").iterdir()]],
        r"own/b: 4 files and no image among them \(4 .heic\); save images as .bmp, ",
    ),
    "no suffix": (
        lambda folder: [p.rename(p.with_suffix("")) for p in [*(folder / "b").iterdir()]],
        r"own/b: 4 files and no image among them \(4 no suffix\)",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_refused(kind: str, folder: Path) -> None:
    make, message = BAD[kind]
    make(folder)
    with pytest.raises(DataError, match=message) as caught:
        counts(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_its_owner_alone_may_read(folder: Path) -> None:
    (folder / "b").chmod(0)
    message = f"{folder / 'b'}: cannot be read (Permission denied); let this process's user"
    if os.getuid():
        with pytest.raises(DataError) as caught:
            counts(folder)
        assert str(caught.value).startswith(message)
        return
    # Root may read all: without that right, in a process of its own.
    os.chown(folder / "b", 12345, 12345)
    code = (
        "from fedzge_flwr.data.own import load_own; from fedzge_flwr.images.spec import DatasetSpec"
        f"; load_own({str(folder)!r}, DatasetSpec(2, (1, 8, 8)))"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert message in done.stderr.splitlines()[-1]


def test_names_that_differ_in_their_form_of_unicode_alone(tmp_path: Path) -> None:
    """As macOS writes them; and classes are numbered alike everywhere."""
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    numbers = []
    for form in (composed, apart):
        folder = tmp_path / str(len(form))
        draw(folder / form / "x.png")
        draw(folder / "f" / "y.png")
        draw(folder / "f" / "z.png")
        numbers.append(counts(folder))
        (folder / "classes.txt").write_text(f"f\n{composed}\n", encoding="utf-8")
        load_own.cache_clear()
        assert counts(folder) == [2, 1]
    assert numbers[0] == numbers[1]


def test_a_class_of_tiny_imagenet_that_is_not_there_shifts_no_other(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path, 3)
    (tmp_path / "tiny-imagenet-200" / "train" / "n00000000a").symlink_to("/nowhere")
    with pytest.raises(DataError, match="n00000000a: a link that leads nowhere"):
        load_tiny_imagenet(tmp_path, False, "train")


# -- what a picture loses ---------------------------------------------------------------------


def loaded(
    folder: Path, name: str, image: Image.Image, spec: DatasetSpec, **how: object
) -> ImageSet:
    for number in "01":
        (folder / number).mkdir(parents=True, exist_ok=True)
        image.save(folder / number / name, **how)
    return load_own(str(folder), spec)


def clear_ink(mode: str) -> Image.Image:
    """A square of black ink; beside it nothing but black that is transparent."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    if mode != "P":
        return image.convert(mode)
    # One index of the palette is transparent.
    indexed = Image.new("P", (8, 8), 0)
    indexed.putpalette([0, 0, 0, 0, 0, 0])
    indexed.paste(1, (2, 2, 6, 6))
    return indexed


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("spec", [GREY, RGB], ids=["grey", "rgb"])
def test_what_is_transparent_lies_on_white(
    mode: str, spec: DatasetSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("flwr").propagate = True
    options = {"transparency": 0} if mode == "P" else {}
    pixels = loaded(tmp_path, "x.png", clear_ink(mode), spec, **options).images_NCHW[0]
    assert (pixels[:, 2:6, 2:6] == 0).all()
    assert pixels.sum() == 255 * spec.image_shape[0] * (64 - 16)
    assert "; converted: 2 transparent ones put on white" in caplog.text


def test_what_is_half_transparent_and_what_is_not_at_all(tmp_path: Path) -> None:
    half = Image.new("RGBA", (8, 8), (0, 100, 200, 128))
    found = loaded(tmp_path / "half", "x.png", half, RGB).images_NCHW[0, :, 0, 0].tolist()
    assert found == [127, 177, 227]
    solid = Image.new("RGBA", (8, 8), (1, 100, 200, 255))
    found = loaded(tmp_path / "solid", "x.png", solid, RGB).images_NCHW[0, :, 0, 0].tolist()
    assert found == [1, 100, 200]


def test_colours_of_cmyk_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = loaded(tmp_path, "x.tif", ink, RGB).images_NCHW
    assert pixels[0, :, 0, 0].tolist() == [255, 0, 0]
    assert "; converted: 2 of CMYK without their colour profile" in caplog.text


def deep_png(folder: Path) -> Path:
    """Write a PNG of 16 bits a channel, in colour, which Pillow reads as one of 8."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(48))) * 8)
    path = folder / "0" / "x.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return path


def deep_ppm(folder: Path) -> Path:
    path = folder / "0" / "x.ppm"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"P6 8 8 1000\n" + bytes(2 * 3 * 64))
    return path


def animated(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "0" / name
        path.parent.mkdir(parents=True)
        frames = [Image.new("L", (8, 8), grey) for grey in (0, 100, 200)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
        return path

    return make


def infrared(folder: Path) -> Path:
    path = folder / "0" / "x.tif"
    path.parent.mkdir(parents=True)
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(path)
    # The tag of extra samples: what was transparency is not said to be any more.
    said, unsaid = (struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 0))
    assert said in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(said, unsaid))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (deep_png, "more than 8 bits a channel; save it with 8"),
        (deep_ppm, "more than 8 bits a channel; save it with 8"),
        (animated("x.gif"), "3 pictures in one file; save each that is meant"),
        (animated("x.tif"), "3 pictures in one file; save each that is meant"),
        (animated("x.webp"), "3 pictures in one file; save each that is meant"),
        (animated("x.png"), "3 pictures in one file; save each that is meant"),
        (infrared, "more channels than RGB and transparency; give an .npz file"),
    ],
)
def test_what_would_be_dropped_is_refused(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        load_own(str(tmp_path), RGB)
    assert str(caught.value).startswith(f"{path}: {message}")
