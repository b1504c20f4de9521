"""Files and folders that public reports of neighbouring projects tell of, tried here.

Each row names its source. What is right is an exact value, or one line that names file and fix.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from fedzge_flwr.common.errors import DataError, FedZGEError
from fedzge_flwr.config.sections import DataSettings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.own import load_own
from fedzge_flwr.images.pixels import shown
from fedzge_flwr.images.spec import DatasetSpec
from fedzge_flwr.report.runs import load_run
from fedzge_flwr.server.checkpoints import Checkpoint, CheckpointFolder
from tests.helpers.fabricate import images_for, labels_for, make_cifar, make_idx, make_svhn
from tests.helpers.hostile.case import Place

GREY, RGB = DatasetSpec(2, (1, 8, 8)), DatasetSpec(2, (3, 8, 8))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head></html>"


class Report(NamedTuple):
    """A public report: where, what is given, what looks at it, and what is right."""

    source: str
    make: Callable[[Path], Any]
    look: Callable[[Any], Any]
    right: Any


def own(spec: DatasetSpec = GREY) -> Callable[[Path], list[int]]:
    return lambda path: np.bincount(load_own(str(path), spec).labels_N).tolist()


def split(dataset: str) -> Callable[[Path], int]:
    return lambda folder: len(
        load_split(DataSettings(dataset=dataset, data_dir=str(folder)), "test")
    )


def written(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def mnist(name: str, data: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        make_idx(folder, ("train", "t10k"), 10, 0, "")
        images = folder / "t10k-images-idx3-ubyte"
        (folder / name).write_bytes(data(images.read_bytes()))
        if name != images.name:
            images.unlink()
        return folder

    return make


def cifar(content: Callable[[dict[str, Any]], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        make_cifar(folder, 10)
        labels = labels_for(20, 10)
        whole = {"data": images_for(labels, (3072,)), "labels": labels.tolist()}
        (folder / "cifar-10-batches-py" / "test_batch").write_bytes(content(whole))
        return folder

    return make


def svhn(data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        make_svhn(folder)
        (folder / "test_32x32.mat").write_bytes(data)
        return folder

    return make


def pictures(*more: tuple[str, bytes]) -> Callable[[Path], Path]:
    """A class folder of two pictures each, and what is beside them."""

    def make(folder: Path) -> Path:
        for name in ("0/a.png", "0/b.png", "1/a.png", "1/b.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.new("L", (8, 8), 100).save(folder / name)
        for name, data in more:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder

    return make


def encoded(image: Image.Image, form: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def turned() -> bytes:
    image, exif = Image.new("L", (8, 8), 0), Image.Exif()
    image.paste(200, (0, 0, 4, 8))
    exif[0x0112] = 3
    return encoded(image, "PNG", exif=exif)


def checkpoints(data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        saved = CheckpointFolder(folder / "checkpoints")
        saved.save(Checkpoint(1, {}, {}, {}, {}))
        (folder / "checkpoints" / "round-000002.checkpoint").write_bytes(data)
        return folder / "checkpoints"

    return make


def half_a_row(folder: Path) -> Path:
    run = Place(folder, folder, folder).run()
    rows = run / "rounds.jsonl"
    rows.write_text(rows.read_text()[:-20])
    return run


REPORTS = (
    Report(
        "ajbrock/Neural-Photo-Editor#15",
        written("own.npz", POINTER),
        own(),
        "own.npz: not a readable .npz: it is a Git LFS pointer; fetch .*git lfs pull",
    ),
    Report(
        "git-lfs/git-lfs#4366",
        cifar(lambda _: POINTER),
        split("cifar10"),
        "test_batch: not a file of CIFAR10: it is a Git LFS pointer; fetch",
    ),
    Report(
        "MedMNIST/MedMNIST#39",
        written("own.npz", npz(images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))[:-30]),
        own(),
        r"own.npz: not a readable .npz \(File is not a zip file\); save it anew",
    ),
    Report(
        "Trusted-AI/adversarial-robustness-toolbox#2242",
        written("own.npz", PAGE),
        own(),
        "own.npz: not a readable .npz: it is an HTML page; fetch the file again",
    ),
    Report(
        "carlini/nn_robust_attacks#51",
        mnist("t10k-images-idx3-ubyte.gz", lambda _: PAGE),
        split("mnist"),
        "ubyte.gz: not an idx file .*: it is an HTML page; fetch the file again",
    ),
    Report(
        "tensorflow/tensorflow#170",
        mnist("t10k-images-idx3-ubyte.gz", lambda data: data),
        split("mnist"),
        30,
    ),
    Report(
        "tensorflow/tensorflow#15668",
        mnist("t10k-images-idx3-ubyte.gz", lambda data: gzip.compress(data)[:727]),
        split("mnist"),
        "ubyte.gz: cannot be read .*; fetch the file again",
    ),
    Report(
        "sorki/python-mnist#19",
        mnist("t10k-images.idx3-ubyte", lambda data: data),
        split("mnist"),
        30,
    ),
    Report(
        "wenxinxu/resnet-in-tensorflow#22",
        cifar(lambda whole: pickle.dumps({key.encode(): v for key, v in whole.items()})),
        split("cifar10"),
        "test_batch: not a file of CIFAR10 .*a bytes where a str belongs.*'data'",
    ),
    Report(
        "littlecangbaby/pythonConvertCifar-10#4",
        cifar(lambda whole: pickle.dumps({"labels": whole["labels"]})),
        split("cifar10"),
        r"test_batch: not a file of CIFAR10 \(it has no array of images\); fetch it again",
    ),
    Report(
        "gskielian/PNG-2-CIFAR10#4",
        cifar(lambda whole: bytes([1]) + whole["data"].tobytes()),
        split("cifar10"),
        "test_batch: not a file of CIFAR10 .*; fetch it again, or save",
    ),
    Report(
        "scipy/scipy#17509",
        svhn(b"MATLAB 7.3".ljust(124) + struct.pack("<H", 0x200) + b"IM" + bytes(400)),
        split("svhn"),
        "test_32x32.mat: not a file of SVHN: it is a MATLAB file of version 7.3; save it with -v7",
    ),
    Report(
        "python-pillow/Pillow#4807",
        pictures(("0/._a.png", b"\0\5\x16\7"), ("__MACOSX/0/._a.png", b"\0\5\x16\7")),
        own(),
        [2, 2],
    ),
    Report(
        "d8ahazard/sd_dreambooth_extension#44",
        pictures(("0/.DS_Store", b"\0\0\0\1Bud1")),
        own(),
        [2, 2],
    ),
    Report(
        "AUTOMATIC1111/stable-diffusion-webui#2201",
        pictures(("1/Thumbs.db", b"\xd0\xcf\x11\xe0")),
        own(),
        [2, 2],
    ),
    Report(
        "SenteraLLC/py-radiometric-corrections#51",
        pictures(("2/a.raw", b"x")),
        own(DatasetSpec(3, (1, 8, 8))),
        r"2: 1 files and no image among them \(1 .raw\); save images as",
    ),
    Report(
        "pytorch/vision#864",
        pictures(("1/c.jpg", encoded(Image.new("L", (64, 64), 9), "JPEG")[:200])),
        own(),
        r"1/c.jpg: not a readable image .*; mend or remove it",
    ),
    Report(
        "kohya-ss/sd-scripts#1269",
        pictures(("0/a.png", encoded(Image.new("RGBA", (8, 8), (250, 0, 90, 0)), "PNG"))),
        lambda folder: load_own(str(folder), RGB).images_NCHW[0, :, 0, 0].tolist(),
        [255, 255, 255],
    ),
    Report(
        "kohya-ss/sd-scripts#1316",
        pictures(("0/a.png", turned())),
        lambda folder: load_own(str(folder), GREY).images_NCHW[0, 0, 0].tolist(),
        [0] * 4 + [200] * 4,
    ),
    Report(
        "python-pillow/Pillow#1099",
        pictures(("0/a.tif", encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "TIFF"))),
        own(),
        "0/a.tif: more than 8 bits a channel; save it with 8",
    ),
    Report(
        "napari/napari#3745",
        pictures(
            (
                "0/a.gif",
                encoded(
                    Image.new("L", (8, 8), 0),
                    "GIF",
                    save_all=True,
                    append_images=[Image.new("L", (8, 8), 200)],
                ),
            )
        ),
        own(),
        "0/a.gif: 2 pictures in one file; save each",
    ),
    Report(
        "jabberjabberjabber/ImageIndexer#58",
        pictures(("0/a.jpg", b"\0\0\0\x18ftypheic" + bytes(40))),
        own(),
        "0/a.jpg: not a readable image: it is a HEIC picture; save it as PNG or JPEG",
    ),
    Report(
        "strukturag/libheif#675",
        pictures(("0/c.png", encoded(Image.new("L", (8, 8), 9), "JPEG"))),
        own(),
        [3, 2],
    ),
    Report(
        "CellProfiler/CellProfiler#2783",
        lambda _: np.arange(5, dtype=np.uint8).reshape(1, 5, 1, 1),
        lambda images: shown(images).tolist(),
        [[[[2]]]],
    ),
    Report(
        "r9y9/deepvoice3_pytorch#67",
        checkpoints(b""),
        lambda folder: CheckpointFolder(folder).newest().round,
        1,
    ),
    Report(
        "facebookresearch/SlowFast#129",
        checkpoints(b"fedzge-checkpoint 3 0.1.0 " + b"0" * 64 + b"\nPK\3\4"),
        lambda folder: CheckpointFolder(folder).newest().round,
        1,
    ),
    Report(
        "JuliaLogging/TensorBoardLogger.jl#88", half_a_row, lambda run: len(load_run(run).rows), 2
    ),
    Report(
        "scipy/scipy#10282",
        written(
            "own.npz",
            npz(images=np.zeros((4, 8, 8)), labels=np.arange(4)).replace(b"NUMPY", b"NUMPZ"),
        ),
        own(),
        r"own.npz: .*; save",
    ),
    Report(
        "snap-stanford/ogb#97",
        written("own.npz", bytes(4096)),
        own(),
        "own.npz: not a readable .npz: it is a file of zeros; fetch the file again",
    ),
)


@pytest.mark.parametrize("report", REPORTS, ids=[report.source for report in REPORTS])
def test_a_public_report(report: Report, tmp_path: Path) -> None:
    given = report.make(tmp_path)
    if not isinstance(report.right, str):
        assert report.look(given) == report.right
        return
    with pytest.raises(FedZGEError, match=report.right) as caught:
        report.look(given)
    assert isinstance(caught.value, DataError)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_archive_is_read_or_named(tmp_path: Path) -> None:
    """Of each of 200 damages, none is anything but an array or one line (scipy/scipy#10282)."""
    data = io.BytesIO()
    np.savez_compressed(data, images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) % 2)
    whole, rng = data.getvalue(), np.random.default_rng(0)
    assert zipfile.is_zipfile(data)
    for number in range(200):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path = tmp_path / f"{number}.npz"
        path.write_bytes(changed)
        try:
            assert len(load_own(str(path), GREY)) == 4
        except DataError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
