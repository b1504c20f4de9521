"""Tiny data sets in each one's own on-disk format."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedzge_flwr.images.spec import DATASETS


def labels_for(num_images: int, num_classes: int) -> npt.NDArray[np.int64]:
    return np.arange(num_images) % num_classes


def images_for(labels: npt.NDArray[np.int64], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    noise = np.random.default_rng(len(labels)).integers(0, 40, (len(labels), *shape))
    return (noise + (labels * 2).reshape(-1, *(1,) * len(shape))).astype(np.uint8)


def write_idx(path: Path, values: npt.NDArray[np.uint8]) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    data = header + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def make_idx(
    folder: Path, prefixes: tuple[str, str], num_classes: int, first: int, gz: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in zip(prefixes, (60, 30), strict=True):
        labels = labels_for(count, num_classes)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{gz}", images_for(labels, (28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{gz}", (labels + first).astype(np.uint8))


def make_cifar(folder: Path, num_classes: int) -> None:
    hundred = num_classes == 100
    base = folder / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    base.mkdir(parents=True)
    key = "fine_labels" if hundred else "labels"
    names = [("train", 200), ("test", 100)] if hundred else [
        *((f"data_batch_{number}", 20) for number in range(1, 6)),
        ("test_batch", 20),
    ]  # fmt: skip
    for name, count in names:
        labels = labels_for(count, num_classes)
        content = {"data": images_for(labels, (3072,)), key: labels.tolist()}
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {"fine_label_names" if hundred else "label_names": [str(n) for n in range(num_classes)]}
    (base / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))


def make_svhn(folder: Path) -> None:
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 60), ("test", 30)):
        labels = labels_for(count, 10)
        images = images_for(labels, (3, 32, 32)).transpose(2, 3, 1, 0)
        # SVHN writes the digit 0 as class 10.
        classes = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(folder / f"{split}_32x32.mat", {"X": images, "y": classes})


def write_images(files: list[Path], images: npt.NDArray[np.uint8]) -> None:
    from PIL import Image

    for file, image in zip(files, images, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        # Lossless, whatever the name says: what is read can be compared.
        Image.fromarray(image.transpose(1, 2, 0)).save(file, format="png")


def make_food101(folder: Path, classes: int) -> None:
    base = folder / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, count in (("train", 202), ("test", 101)):
        labels = labels_for(count, classes)
        # Names in the order of the classes, listed in another one.
        names = [f"dish-{label:03}/{split}-{at:04}" for at, label in enumerate(labels)]
        files = [base / "images" / f"{name}.jpg" for name in names]
        write_images(files, images_for(labels, (3, 64, 64)))
        listed = {f"dish-{n:03}": names[n::classes] for n in reversed(range(classes))}
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))


def make_tiny_imagenet(folder: Path, classes: int) -> None:
    base = folder / "tiny-imagenet-200"
    titles = [f"n{10 * number:08}" for number in range(classes)]
    labels = labels_for(2 * classes, classes)
    write_images(
        [base / "train" / titles[n] / "images" / f"{at:04}.JPEG" for at, n in enumerate(labels)],
        images_for(labels, (3, 64, 64)),
    )
    labels = labels_for(classes, classes)
    names = [f"val_{at}.JPEG" for at in range(classes)]
    write_images([base / "val" / "images" / n for n in names], images_for(labels, (3, 64, 64)))
    rows = [f"{name}\t{titles[n]}\t0\t0\t9\t9\n" for name, n in zip(names, labels, strict=True)]
    (base / "val" / "val_annotations.txt").write_text("".join(rows))


def make_dataset(name: str, folder: Path) -> None:
    """Write a tiny copy of a data set, in the layout that torchvision downloads to."""
    classes = DATASETS[name].num_classes
    if name in ("mnist", "fashionmnist"):
        raw = folder / {"mnist": "MNIST", "fashionmnist": "FashionMNIST"}[name] / "raw"
        make_idx(raw, ("train", "t10k"), classes, 0, "")
    elif name == "emnist":
        prefixes = ("emnist-letters-train", "emnist-letters-test")
        make_idx(folder / "EMNIST" / "raw", prefixes, classes, 1, "")
    elif name in ("cifar10", "cifar100"):
        make_cifar(folder, classes)
    elif name == "svhn":
        make_svhn(folder)
    elif name == "food101":
        make_food101(folder, classes)
    elif name == "tinyimagenet":
        make_tiny_imagenet(folder, classes)
