"""CIFAR-10 and CIFAR-100 in the layout that torchvision downloads to (Krizhevsky, 2009).

Files that are not the published ones, by checksum, are used with a warning: one's own data in this
format are welcome. They are pickles, and nothing of them is run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.file_kinds import PICKLE, unreadable
from fedzge_flwr.common.reading import most_content, open_file
from fedzge_flwr.data.fetching import fetch, missing
from fedzge_flwr.data.plain_pickle import read_plain_pickle
from fedzge_flwr.images.image_set import ImageSet, Split

LOGGER = logging.getLogger("flwr.fedzge")

_SHAPE = (3, 32, 32)
_TOP_LEVEL = np.iinfo(np.uint8).max


@dataclass(frozen=True)
class CifarSet:
    """One of the two; called as a loader.

    Parameters
    ----------
    name : str
        Its class in torchvision.
    folder : str
        Its folder in ``data-dir``.
    files : Mapping[Split, Mapping[str, str]]
        The MD5 of each published file, by split and name.
    labels : str
        The key of the labels.
    """

    name: str
    folder: str
    files: Mapping[Split, Mapping[str, str]]
    labels: str

    def __call__(self, folder: Path, download: bool, split: Split) -> ImageSet:
        """Load a split."""
        files = {folder / self.folder / name: md5 for name, md5 in self.files[split].items()}
        absent = [path for path in files if not path.is_file()]
        if absent and download:
            fetch(self.name, folder, train=split == "train")
        elif absent:
            raise missing(self.name, absent[0], folder)
        parts, published = [], True
        for path, md5 in files.items():
            images, labels, found = self._read(path)
            parts.append((images, labels))
            published = published and found == md5
        if not published:
            LOGGER.warning(
                "%s in %s is not the published one (checksums differ); it is used as it is",
                self.name,
                folder,
            )
        images_NCHW, labels_N = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ImageSet(np.ascontiguousarray(images_NCHW, dtype=np.uint8), labels_N)

    def _read(self, path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], str]:
        """Return a file's images, their labels, and its MD5."""
        try:
            with open_file(path) as file:
                most = most_content(file)
                data = file.read(most)
            content = read_plain_pickle(data, most)
            if not isinstance(content, dict):
                raise ValueError("it holds no dictionary")
            images, labels = _images(content.get("data")), _labels(content.get(self.labels))
            if len(images) != len(labels):
                raise ValueError(f"it has {len(images)} images and {len(labels)} labels")
        except FileNotFoundError as error:
            raise missing(self.name, path, path.parent.parent) from error
        except Exception as error:  # what a file is made of can go wrong in any way
            raise unreadable(
                path,
                f"a file of {self.name}",
                error,
                "fetch it again, or save a dictionary with 'data' (N, 3072) and "
                f"'{self.labels}' by pickle protocol 2 or above",
                expected=[PICKLE],
            ) from error
        return images, labels, hashlib.md5(data, usedforsecurity=False).hexdigest()


CIFAR10 = CifarSet(
    "CIFAR10",
    "cifar-10-batches-py",
    {
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
    },
    "labels",
)

CIFAR100 = CifarSet(
    "CIFAR100",
    "cifar-100-python",
    {
        "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
        "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    },
    "fine_labels",
)


def _images(value: object) -> npt.NDArray[Any]:
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        raise ValueError("it has no array of images")
    if value.size != len(value) * int(np.prod(_SHAPE)):
        raise ValueError(f"its images have shape {value.shape}, not (N, 3072)")
    if value.size and not 0 <= int(value.min()) <= int(value.max()) <= _TOP_LEVEL:
        raise ValueError(f"its images go from {value.min()} to {value.max()}")
    return value.reshape(len(value), *_SHAPE)


def _labels(value: object) -> npt.NDArray[np.int64]:
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.astype(np.int64)
    if not isinstance(value, list) or not all(type(label) is int for label in value):
        raise ValueError("it has no list of labels")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError as error:
        raise ValueError("its labels are no classes") from error
