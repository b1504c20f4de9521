"""Data sets by name.

A registry entry is called as ``(data_dir, download, split)`` and returns an `ImageSet`. Add a data
set with ``DATASETS["name"] = DatasetSpec(…)`` and ``LOADERS["name"] = load``.
"""

from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.errors import DataError, MissingDataError
from fedzge_flwr.common.randomness import Purpose, numpy_stream
from fedzge_flwr.common.registry import lookup
from fedzge_flwr.config.sections import DataSettings
from fedzge_flwr.data.folders import load_food101, load_tiny_imagenet
from fedzge_flwr.data.idx import find_idx, read_idx
from fedzge_flwr.data.recall import Arrays, recall
from fedzge_flwr.images.image_set import ImageSet, Loader, Split
from fedzge_flwr.images.spec import DATASETS, OWN

LOGGER = logging.getLogger("flwr.fedzge")

_UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError)


def load_split(settings: DataSettings, split: Split) -> ImageSet:
    """Load one split of the data set that the settings name.

    Parameters
    ----------
    settings : DataSettings
        Data set, folder, and how many images to use. A subset is a fixed choice: the same images
        whatever the run's seed.
    split : {"train", "test"}
        Which split.

    Raises
    ------
    DataError
        If files are missing or malformed, or fewer images are there than asked for.
    """
    wanted = settings.num_train_images if split == "train" else settings.num_test_images
    images = _load_all(settings.dataset, settings.data_dir, settings.download, split)
    if wanted == 0 or wanted == len(images):
        return images
    if wanted > len(images):
        raise DataError(
            f"'num-{split}-images' = {wanted}, but {settings.dataset} has {len(images)}; "
            "ask for at most so many, or 0 for all"
        )
    order = numpy_stream(0, Purpose.SUBSET).permutation(len(images))
    return images.take(order[:wanted])


# The images never change, and a worker process that serves many clients must not read them anew for
# each: a memo of read-only arrays, not state.
@lru_cache(maxsize=4)
def _load_all(dataset: str, data_dir: str, download: bool, split: Split) -> ImageSet:
    folder = Path(data_dir).expanduser().absolute()
    if dataset == OWN:
        raise DataError(
            "'dataset' = 'own' has no images in common: name those of each node with 'data-path' "
            "in its node config, and set 'server-evaluation' = 'off' and 'client-evaluation' = "
            "'held-out' or 'off'"
        )
    load = lookup(LOADERS, dataset, "loader (`LOADERS`) of a data set")
    try:
        images = load(folder, download, split)
    except FileNotFoundError as error:
        raise MissingDataError(f"{dataset}: no {split} images in {folder} ({error})") from error
    except OSError as error:
        raise DataError(f"{dataset}: {split} images in {folder}: {error}") from error
    if not isinstance(images, ImageSet):
        raise DataError(
            f"{dataset}: its loader returned {type(images).__name__} for split '{split}': return "
            "an ImageSet"
        )
    spec = DATASETS[dataset]
    if len(images) == 0:
        raise DataError(f"{dataset}: the {split} files under {folder} hold no images")
    if images.images_NCHW.shape[1:] != spec.image_shape:
        raise DataError(
            f"{dataset}: images under {folder} have shape {images.images_NCHW.shape[1:]}, "
            f"expected {spec.image_shape}"
        )
    low, high = int(images.labels_N.min()), int(images.labels_N.max())
    if low < 0 or high >= spec.num_classes:
        raise DataError(
            f"{dataset}: labels under {folder} run from {low} to {high}, "
            f"expected 0 to {spec.num_classes - 1}"
        )
    return images


def _image_set(images: npt.ArrayLike, labels: npt.ArrayLike, shift: int = 0) -> ImageSet:
    return ImageSet(
        np.ascontiguousarray(images, dtype=np.uint8), np.asarray(labels, dtype=np.int64) - shift
    )


def _load_digits(_folder: Path, _download: bool, split: Split) -> ImageSet:
    """Load scikit-learn's 1,797 digits; a fifth, stratified and fixed, is the test set."""
    kept = recall("digits", _read_digits, library="scikit-learn")
    return _image_set(kept[f"{split}_images"], kept[f"{split}_labels"])


def _read_digits() -> Arrays:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target
    )
    parts = {"train": np.sort(train), "test": np.sort(test)}
    return {
        **{f"{name}_images": images[chosen] for name, chosen in parts.items()},
        **{f"{name}_labels": digits.target[chosen] for name, chosen in parts.items()},
    }


@dataclass(frozen=True)
class _IdxSet:
    """A data set of idx files, in torchvision's layout or straight in the data folder."""

    torchvision_name: str
    prefix: dict[Split, str]
    label_shift: int = 0
    torchvision_options: tuple[tuple[str, str], ...] = ()

    def __call__(self, folder: Path, download: bool, split: Split) -> ImageSet:
        raw = folder / self.torchvision_name / "raw"
        paths = self._find([raw, folder], split)
        if paths is None and download:
            _torchvision_set(
                self.torchvision_name, folder, split, True, **dict(self.torchvision_options)
            )
            paths = self._find([raw], split)
        if paths is None:
            name = f"{self.prefix[split]}-images-idx3-ubyte"
            raise MissingDataError(
                f"no {name}[.gz] with its labels in {raw} or {folder}; put the idx files there, "
                "name their folder with 'data-dir', or set 'download' = true"
            )
        images, labels = (read_idx(path) for path in paths)
        if len(images) != len(labels):
            raise DataError(
                f"{paths[0]}: {len(images)} images but {len(labels)} labels in {paths[1].name}; "
                "fetch the files again"
            )
        return _image_set(images[:, None], labels, self.label_shift)

    def _find(self, folders: list[Path], split: Split) -> tuple[Path, Path] | None:
        images = find_idx(folders, f"{self.prefix[split]}-images-idx3-ubyte")
        labels = find_idx(folders, f"{self.prefix[split]}-labels-idx1-ubyte")
        return (images, labels) if images and labels else None


def _torchvision_set(
    class_name: str, folder: Path, split: Split, download: bool, **options: str
) -> Any:
    """Open a data set through torchvision.

    Files that exist but are not the published ones (by checksum) are used, with a warning: one's
    own data in a data set's format is welcome.
    """
    import torchvision.datasets as tv

    base = getattr(tv, class_name)
    selector: dict[str, Any] = {"split": split} if class_name == "SVHN" else {}
    if class_name != "SVHN":
        selector["train"] = split == "train"
    try:
        return base(str(folder), download=download, **selector, **options)
    except (RuntimeError, OSError) as error:
        if download:
            raise DataError(f"{class_name}: download to {folder} failed ({error})") from error
        try:
            images = _without_checksums(base)(str(folder), download=False, **selector, **options)
        except _UNREADABLE as missing:
            raise MissingDataError(
                f"{class_name}: no data set in torchvision's layout in {folder} ({missing}); put "
                "it there, name its folder with 'data-dir', or set 'download' = true"
            ) from error
        LOGGER.warning(
            "%s in %s is not the published one (checksums differ); it is used as it is",
            class_name,
            folder,
        )
        return images


def _without_checksums(base: Any) -> Any:
    """Return torchvision's class with None for each checksum: files then need only exist."""
    if hasattr(base, "split_list"):
        lists = {key: [*entry[:2], None] for key, entry in base.split_list.items()}
        return type(base.__name__, (base,), {"split_list": lists})
    return type(
        base.__name__,
        (base,),
        {
            "train_list": [[name, None] for name, _ in base.train_list],
            "test_list": [[name, None] for name, _ in base.test_list],
            "meta": {**base.meta, "md5": None},
        },
    )


def _load_cifar(class_name: str, folder: Path, download: bool, split: Split) -> ImageSet:
    loaded = _torchvision_set(class_name, folder, split, download)
    return _image_set(loaded.data.transpose(0, 3, 1, 2), loaded.targets)


def _load_cifar10(folder: Path, download: bool, split: Split) -> ImageSet:
    return _load_cifar("CIFAR10", folder, download, split)


def _load_cifar100(folder: Path, download: bool, split: Split) -> ImageSet:
    return _load_cifar("CIFAR100", folder, download, split)


def _load_svhn(folder: Path, download: bool, split: Split) -> ImageSet:
    loaded = _torchvision_set("SVHN", folder, split, download)
    return _image_set(loaded.data, loaded.labels)


LOADERS: dict[str, Loader] = {
    "digits": _load_digits,
    "mnist": _IdxSet("MNIST", {"train": "train", "test": "t10k"}),
    "fashionmnist": _IdxSet("FashionMNIST", {"train": "train", "test": "t10k"}),
    # Labels run from 1 (a) to 26 (z).
    "emnist": _IdxSet(
        "EMNIST",
        {"train": "emnist-letters-train", "test": "emnist-letters-test"},
        label_shift=1,
        torchvision_options=(("split", "letters"),),
    ),
    "cifar10": _load_cifar10,
    "cifar100": _load_cifar100,
    "svhn": _load_svhn,
    "food101": load_food101,
    "tinyimagenet": load_tiny_imagenet,
}
"""Loaders by data set: ``(data_dir, download, split)`` to images."""
