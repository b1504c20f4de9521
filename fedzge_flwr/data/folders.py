"""Data sets that come as folders of image files, at 64×64 pixels: Food-101 and Tiny ImageNet."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from fedzge_flwr.common.errors import DataError, MissingDataError
from fedzge_flwr.common.file_kinds import unreadable
from fedzge_flwr.common.reading import parse_json, read_file
from fedzge_flwr.common.text import printable
from fedzge_flwr.data.by_class import class_folders, images_below
from fedzge_flwr.data.decode import decode_files
from fedzge_flwr.data.fetching import fetching
from fedzge_flwr.images.image_set import ImageSet, Split
from fedzge_flwr.images.spec import DATASETS

_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_MOST_LIST_BYTES = 100_000_000
_JPEG = (".jpeg",)


def load_food101(folder: Path, download: bool, split: Split) -> ImageSet:
    """Load Food-101 in its own layout, ``food-101/images`` and ``food-101/meta``.

    Classes are numbered in the order of their names (Bossard et al., ECCV 2014).
    """
    base = folder / "food-101"
    listed = base / "meta" / f"{split}.json"
    if download and not listed.exists():
        import torchvision.datasets as tv

        fetching("food101", folder, lambda: tv.Food101(str(folder), download=True))
    try:
        names: dict[str, list[str]] = parse_json(read_file(listed, _MOST_LIST_BYTES))
        classes = sorted(names)
        listing = [f"{name}.jpg" for title in classes for name in names[title]]
    except FileNotFoundError as error:
        raise _missing("food101", base, "food-101/meta and food-101/images") from error
    except Exception as error:  # what a list of others holds can go wrong in any way
        wanted = "Food-101's list of images"
        raise unreadable(listed, wanted, error, "fetch it again") from error
    files = _below(base / "images", listing, listed)
    labels = [number for number, title in enumerate(classes) for _ in names[title]]
    return _image_set("food101", folder, split, files, labels)


def load_tiny_imagenet(folder: Path, download: bool, split: Split) -> ImageSet:
    """Load Tiny ImageNet in its own layout; its labelled validation folder is the test set.

    Classes are numbered in the order of their WordNet ids.
    """
    base = folder / "tiny-imagenet-200"
    listed = base / "val" / "val_annotations.txt"
    if download and not listed.exists():
        from torchvision.datasets.utils import download_and_extract_archive

        fetching(
            "tinyimagenet",
            folder,
            lambda: download_and_extract_archive(_TINY_URL, str(folder), md5=_TINY_MD5),
        )
    if not (base / "train").exists():
        raise _missing("tinyimagenet", base, "tiny-imagenet-200")
    # Beside its images each class has a list, which nobody misses.
    passed_over = Counter[str]()
    titles = [n for n in class_folders(base / "train", (), passed_over) if n.startswith("n")]
    numbers = {title: number for number, title in enumerate(titles)}
    if split == "train":
        found = [images_below(base / "train" / title, passed_over, _JPEG) for title in titles]
        files = [file for of_class in found for file in of_class]
        labels = [number for number, of_class in enumerate(found) for _ in of_class]
    else:
        try:
            lines = read_file(listed, _MOST_LIST_BYTES).decode("utf-8").splitlines()
            rows = [line.split("\t") for line in lines]
            labels = [numbers[row[1]] for row in rows]
        except FileNotFoundError as error:
            raise _missing("tinyimagenet", base, "tiny-imagenet-200") from error
        except Exception as error:
            raise unreadable(
                listed, f"a list of classes of {base / 'train'}", error, "fetch both"
            ) from error
        files = _below(base / "val" / "images", [row[0] for row in rows], listed)
    if not files:
        raise _missing("tinyimagenet", base, "tiny-imagenet-200")
    return _image_set("tinyimagenet", folder, split, files, labels)


def _image_set(
    name: str, folder: Path, split: Split, files: list[Path], labels: list[int]
) -> ImageSet:
    images = decode_files(files, DATASETS[name].image_shape, f"{name}-{split}", folder)
    return ImageSet(images, np.asarray(labels, dtype=np.int64))


def _below(folder: Path, names: list[str], listed: Path) -> list[Path]:
    """Return the files that a list of others names, each of them once and in the folder."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise DataError(f"{listed}: names '{printable(name)}', which is not in {folder}")
    if len(set(names)) < len(names):
        raise DataError(f"{listed}: names a file twice; fetch it again")
    return [folder / name for name in names]


def _missing(name: str, base: Path, what: str) -> MissingDataError:
    return MissingDataError(
        f"{name}: no {what} in {base.parent}; put it there, name its folder with 'data-dir', or "
        "set 'download' = true"
    )
