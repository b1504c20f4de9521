"""A client's own images: a folder with a subfolder for each class, or an ``.npz`` file."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.file_kinds import ZIP, reason_of, unreadable
from fedzge_flwr.common.reading import most_content, open_file, place, read_file
from fedzge_flwr.common.text import same_name
from fedzge_flwr.config.sections import DataSettings
from fedzge_flwr.data.by_class import IMAGE_SUFFIXES, class_folders, images_below
from fedzge_flwr.data.decode import bombs_refused, log_images, read_image
from fedzge_flwr.data.partition import ClientData, hold_out_some
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.images.spec import DatasetSpec

_MOST_CLASSES_BYTES = 10_000_000
CLASSES_FILE = "classes.txt"


def own_data(
    path: str, settings: DataSettings, seed: int, partition: int, *, hold_out: bool
) -> ClientData:
    """Return a client's own images, divided as those of a partition are.

    Parameters
    ----------
    path : str
        See `load_own`.
    settings : DataSettings
        Classes and image shape of its data set, and ``holdout-fraction``.
    seed, partition, hold_out
        As in `fedzge_flwr.data.partition.client_data`.

    Raises
    ------
    DataError
        As in `load_own`.
    """
    images = load_own(path, settings.spec)
    indices = np.arange(len(images), dtype=np.int64)
    return hold_out_some(images, indices, settings, seed, partition, hold_out=hold_out)


# As with a data set's files: every message to a client asks for the same images.
@lru_cache(maxsize=4)
def load_own(path: str, spec: DatasetSpec) -> ImageSet:
    """Load an owner's images.

    Parameters
    ----------
    path : str
        A folder or a file that ends in ``.npz``; ``~`` is the home folder.

        A folder's subfolders are the classes; files with `IMAGE_SUFFIXES` in them, however deep,
        are images, converted to grey or RGB and resized, without keeping their proportions
        (`fedzge_flwr.data.decode.read_image`). What is hidden or a system's own is passed over;
        the log counts that, other files, and images by class. If the folder has a file
        ``classes.txt``, its lines name classes 0 … K-1; else, if all subfolders are called by
        numbers, those are the classes' numbers; else there must be K subfolders, and classes are
        numbered in the order of their names. Only in the last case must each class be there.

        An ``.npz`` file holds ``images``, uint8 of shape (N, H, W) if C = 1, (N, C, H, W) or
        (N, H, W, C), and ``labels``, integers (N,). Nothing in it is unpickled.
    spec : DatasetSpec
        Number of classes K and shape (C, H, W) of the run's images.

    Returns
    -------
    ImageSet
        At least one image; those of a folder by class folder and path.

    Raises
    ------
    DataError
        If there is no such data there, a part of it cannot be read, or it does not fit the run; the
        line names file or folder.
    """
    where = place(path, "data-path")
    if where.is_dir():
        if spec.image_shape[0] not in (1, 3):
            raise DataError(
                f"{where}: pictures are grey or RGB, the run's images have {spec.image_shape[0]} "
                "channels; give an .npz file"
            )
        return _load_folder(where, spec)
    if not where.exists():
        raise DataError(f"{where}: no such folder or file; correct 'data-path'")
    if where.suffix != ".npz":
        raise DataError(f"{where}: neither a folder nor an .npz file; correct 'data-path'")
    return _load_npz(where, spec)


def _load_folder(folder: Path, spec: DatasetSpec) -> ImageSet:
    passed_over, converted = Counter[str](), Counter[str]()
    names = class_folders(folder, [CLASSES_FILE], passed_over)
    numbers = _class_numbers(folder, names, spec.num_classes)
    files = [
        (file, numbers[name]) for name in names for file in images_below(folder / name, passed_over)
    ]
    if not files:
        raise DataError(f"{folder}: no images in its subfolders ({', '.join(IMAGE_SUFFIXES)})")
    images_NCHW = np.empty((len(files), *spec.image_shape), dtype=np.uint8)
    with bombs_refused():
        for row, (file, _) in enumerate(files):
            images_NCHW[row], remark = read_image(file, spec.image_shape)
            converted[remark] += 1
    images = ImageSet(images_NCHW, np.array([number for _, number in files], dtype=np.int64))
    log_images(f"{folder}", images.labels_N, passed_over, converted)
    return images


def _class_numbers(folder: Path, names: list[str], num_classes: int) -> dict[str, int]:
    """Return the class number of each subfolder."""
    if not names:
        raise DataError(f"{folder}: has no subfolders; put the images of each class into its own")
    listed = folder / CLASSES_FILE
    if listed.exists():
        known = _read_classes(listed, num_classes)
        for name in names:
            if same_name(name) not in known:
                raise DataError(f"{folder / name}: {CLASSES_FILE} names no class '{name}'; add it")
        return {name: known[same_name(name)] for name in names}
    if all(name.isascii() and name.isdigit() for name in names):
        for name in names:
            if int(name) >= num_classes:
                raise DataError(
                    f"{folder / name}: no such class, they are 0 to {num_classes - 1}; rename it"
                )
        return {name: int(name) for name in names}
    if len(names) != num_classes:
        raise DataError(
            f"{folder}: {len(names)} subfolders for {num_classes} classes; name all classes in "
            f"{CLASSES_FILE}, a line each, or call subfolders by the numbers of their classes"
        )
    return {name: number for number, name in enumerate(names)}


def _read_classes(listed: Path, num_classes: int) -> dict[str, int]:
    try:
        text = read_file(listed, _MOST_CLASSES_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{listed}: cannot be read ({reason_of(error)}); save it as UTF-8"
        ) from error
    lines = text.rstrip().splitlines()
    numbers = {same_name(line.strip()): number for number, line in enumerate(lines)}
    if len(lines) != num_classes or len(numbers) != num_classes:
        raise DataError(
            f"{listed}: {len(lines)} lines, {len(numbers)} of them different; name each of the "
            f"{num_classes} classes in a line of its own"
        )
    return numbers


def _load_npz(file: Path, spec: DatasetSpec) -> ImageSet:
    try:
        with open_file(file) as opened, np.load(opened, allow_pickle=False) as arrays:
            missing = [name for name in ("images", "labels") if name not in arrays]
            if missing:
                raise DataError(f"{file}: lacks {' and '.join(missing)}; it has {list(arrays)}")
            sizes = {entry.filename: entry.file_size for entry in arrays.zip.infolist()}
            if sizes["images.npy"] + sizes["labels.npy"] > most_content(opened):
                raise DataError(f"{file}: would hold more than is believed of a file of its size")
            images, labels_N = arrays["images"], arrays["labels"]
    except DataError:
        raise
    except Exception as error:  # NumPy and zipfile raise whatever a damaged file suggests
        raise unreadable(file, "a readable .npz", error, "save it anew", expected=[ZIP]) from error
    if not isinstance(images, np.ndarray) or not isinstance(labels_N, np.ndarray):
        raise DataError(f"{file}: 'images' and 'labels' are no arrays; save it anew")
    if images.dtype != np.uint8:
        raise DataError(f"{file}: 'images' is {images.dtype}; save uint8, 0 black to 255")
    if labels_N.dtype.kind not in "iu" or labels_N.ndim != 1:
        raise DataError(
            f"{file}: 'labels' is {labels_N.dtype} of shape {labels_N.shape}; save integers (N,)"
        )
    images_NCHW = _channels_first(file, images, spec)
    if len(images_NCHW) != len(labels_N):
        raise DataError(
            f"{file}: {len(images_NCHW)} images but {len(labels_N)} labels; save as many of each"
        )
    if len(labels_N) == 0:
        raise DataError(f"{file}: holds no images; save at least one")
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= spec.num_classes:
        raise DataError(
            f"{file}: labels run from {low} to {high}; number the classes 0 to "
            f"{spec.num_classes - 1}"
        )
    return ImageSet(np.ascontiguousarray(images_NCHW), labels_N.astype(np.int64))


def _channels_first(
    file: Path, images: npt.NDArray[np.uint8], spec: DatasetSpec
) -> npt.NDArray[np.uint8]:
    channels, height, width = spec.image_shape
    if images.shape[1:] == (channels, height, width):
        return images
    if images.shape[1:] == (height, width, channels):
        return images.transpose(0, 3, 1, 2)
    if channels == 1 and images.shape[1:] == (height, width):
        return images[:, None]
    raise DataError(
        f"{file}: 'images' has shape {images.shape}; make it (N, {channels}, {height}, {width}) "
        f"or (N, {height}, {width}, {channels})"
    )
