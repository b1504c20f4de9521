"""Data sets by name.

A registry entry is called as ``(data_dir, download, split)`` and returns an `ImageSet`. Add a data
set with ``DATASETS["name"] = DatasetSpec(…)`` and ``LOADERS["name"] = load``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.errors import DataError, FedZGEError, MissingDataError
from fedzge_flwr.common.randomness import Purpose, numpy_stream
from fedzge_flwr.common.reading import place
from fedzge_flwr.common.registry import Registry, lookup
from fedzge_flwr.config.sections import DataSettings
from fedzge_flwr.data.cifar import CIFAR10, CIFAR100
from fedzge_flwr.data.fetching import fetch
from fedzge_flwr.data.folders import load_food101, load_tiny_imagenet
from fedzge_flwr.data.idx import find_idx, read_idx
from fedzge_flwr.data.recall import Arrays, recall
from fedzge_flwr.data.svhn import load_svhn
from fedzge_flwr.images.image_set import ImageSet, Loader, Split
from fedzge_flwr.images.spec import DATASETS, OWN, WITHOUT_FILES


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
    # Nobody without a home need name a folder for what is in none.
    folder = Path(data_dir) if dataset in WITHOUT_FILES else place(data_dir, "data-dir")
    if dataset == OWN:
        raise DataError(
            "'dataset' = 'own' has no images in common: name those of each node with 'data-path' "
            "in its node config, and set 'server-evaluation' = 'off' and 'client-evaluation' = "
            "'held-out' or 'off'"
        )
    load = lookup(LOADERS, dataset, "loader (`LOADERS`) of a data set")
    try:
        images = load(folder, download, split)
    except FedZGEError:
        raise
    except FileNotFoundError as error:
        raise MissingDataError(f"{dataset}: no {split} images in {folder} ({error})") from error
    except Exception as error:  # a loader of one's own, and what it reads with, may raise anything
        raise DataError(
            f"{dataset}: {split} images in {folder} cannot be loaded "
            f"({type(error).__name__}: {error}); mend the files, or its loader"
        ) from error
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
            train = split == "train"
            fetch(self.torchvision_name, folder, train=train, **dict(self.torchvision_options))
            paths = self._find([raw], split)
        if paths is None:
            name = f"{self.prefix[split]}-images-idx3-ubyte"
            raise MissingDataError(
                f"no {name}[.gz] with its labels in {raw} or {folder}; put the idx files there, "
                "name their folder with 'data-dir', or set 'download' = true"
            )
        images, labels = (
            read_idx(path, num_dims) for path, num_dims in zip(paths, (3, 1), strict=True)
        )
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


LOADERS: Registry[Loader] = Registry(
    {
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
        "cifar10": CIFAR10,
        "cifar100": CIFAR100,
        "svhn": load_svhn,
        "food101": load_food101,
        "tinyimagenet": load_tiny_imagenet,
    }
)
"""Loaders by data set: ``(data_dir, download, split)`` to images."""
