from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import DataSettings
from fedzge_flwr.data import decode
from fedzge_flwr.data.decode import CACHE_FOLDER
from fedzge_flwr.data.evaluation import check_partition
from fedzge_flwr.data.idx import read_idx
from fedzge_flwr.data.loading import LOADERS, load_split
from fedzge_flwr.data.partition import client_data, partition_indices
from fedzge_flwr.images.spec import DATASETS, DatasetSpec
from tests.helpers.fabricate import images_for, labels_for, make_dataset, make_idx, write_idx

FILE_SETS = [name for name in DATASETS if name != "digits"]


def settings(dataset: str = "digits", **options: Any) -> DataSettings:
    return DataSettings.model_validate(
        {"dataset": dataset, **{key.replace("_", "-"): value for key, value in options.items()}}
    )


@pytest.mark.parametrize("name", FILE_SETS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_own_format(name: str, split: Any, tmp_path: Path) -> None:
    make_dataset(name, tmp_path)
    images = load_split(settings(name, data_dir=str(tmp_path)), split)
    spec = DATASETS[name]
    assert images.images_NCHW.shape == (len(images), *spec.image_shape)
    assert images.images_NCHW.dtype == np.uint8
    # The fabricated pixels grow with the label by 2, over noise below 40: pixels, labels and
    # their order fit together only if channels and axes were read aright.
    if name != "cifar10" or split == "test":  # cifar10's training set is five files
        labels = labels_for(len(images), spec.num_classes)
        by_class = name == "food101" or (name == "tinyimagenet" and split == "train")
        order = np.argsort(labels if by_class else np.arange(len(labels)), kind="stable")
        assert (images.labels_N == labels[order]).all()
        shape = (3072,) if name.startswith("cifar") else spec.image_shape
        if shape[0] == 1:
            shape = shape[1:]
        wanted = images_for(labels, shape).reshape(images.images_NCHW.shape)
        assert (images.images_NCHW == wanted[order]).all()
    assert set(images.labels_N) == set(range(spec.num_classes)) or len(images) < spec.num_classes


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_idx_files_straight_in_the_folder(gz: str, tmp_path: Path) -> None:
    make_idx(tmp_path, ("train", "t10k"), 10, 0, gz)
    assert len(load_split(settings("fashionmnist", data_dir=str(tmp_path)), "train")) == 60


@pytest.mark.parametrize("name", ["food101", "tinyimagenet"])
def test_image_files_are_decoded_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process maps what the first has kept; a list of other files is decoded anew."""
    load = LOADERS[name]
    make_dataset(name, tmp_path)
    first = load(tmp_path, False, "test")
    (kept,) = (tmp_path / CACHE_FOLDER).iterdir()
    monkeypatch.setattr(decode, "_decode", lambda *_: pytest.fail("decoded again"))
    again = load(tmp_path, False, "test")
    monkeypatch.undo()
    assert isinstance(again.images_NCHW, np.memmap)
    assert (again.images_NCHW == first.images_NCHW).all()
    assert not isinstance(again.take(np.arange(3)).images_NCHW, np.memmap)
    load(tmp_path, False, "train")
    assert len(list((tmp_path / CACHE_FOLDER).iterdir())) == 2
    for file in tmp_path.rglob("*.jpg" if name == "food101" else "*.JPEG"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable image"):
        load(tmp_path, False, "test")
    assert kept in (tmp_path / CACHE_FOLDER).iterdir()


def test_a_picture_that_is_replaced_is_decoded_anew(tmp_path: Path) -> None:
    """By one of the same size, too."""
    file = tmp_path / "a.bmp"
    found = []
    for grey in (10, 200):
        Image.new("L", (4, 4), grey).save(file)
        os.utime(file, ns=(grey, grey))
        found.append(int(decode.decode_files([file], (1, 4, 4), "t", tmp_path).max()))
    assert found == [10, 200]


def test_room_for_decoded_images_is_there_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of a file with holes that the disk has no room for ends the process by SIGBUS."""
    make_dataset("tinyimagenet", tmp_path)
    allocated = []

    def look(files: Any, images_NCHW: Any, name: str) -> None:
        (file,) = (tmp_path / CACHE_FOLDER).iterdir()
        allocated.append(512 * file.stat().st_blocks >= images_NCHW.nbytes)

    monkeypatch.setattr(decode, "_decode", look)
    LOADERS["tinyimagenet"](tmp_path, False, "test")
    assert allocated == [True]


def test_without_room_images_are_decoded_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_dataset("food101", tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    logging.getLogger("flwr").propagate = True
    images = LOADERS["food101"](tmp_path, False, "test")
    assert not isinstance(images.images_NCHW, np.memmap)
    assert "food101-test cannot be kept in" in caplog.text
    assert "(No space left on device)" in caplog.text
    assert list((tmp_path / CACHE_FOLDER).iterdir()) == []


def test_image_files_below_a_folder_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_dataset("food101", tmp_path)
    (tmp_path / CACHE_FOLDER).write_text("in the way")
    logging.getLogger("flwr").propagate = True
    images = LOADERS["food101"](tmp_path, False, "test")
    assert len(images) == 101
    assert "food101-test cannot be kept in" in caplog.text


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("food101", "food-101/meta/test.json", "[1]"),
        ("food101", "food-101/meta/test.json", '{"a": 3}'),
        ("food101", "food-101/meta/test.json", "not json"),
        ("tinyimagenet", "tiny-imagenet-200/val/val_annotations.txt", "a.JPEG\tn9\n"),
        ("tinyimagenet", "tiny-imagenet-200/val/val_annotations.txt", "a.JPEG\n"),
    ],
)
def test_malformed_lists_of_image_files(name: str, file: str, text: str, tmp_path: Path) -> None:
    make_dataset(name, tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=f"{Path(file).name}: .*fetch") as caught:
        LOADERS[name](tmp_path, False, "test")
    assert "\n" not in str(caught.value)


def test_digits_are_embedded_split_and_balanced() -> None:
    train, test = (load_split(settings(), split) for split in ("train", "test"))  # type: ignore[arg-type]
    assert (len(train), len(test)) == (1437, 360)
    assert train.images_NCHW.max() == 255
    assert np.bincount(test.labels_N).min() >= 34


def test_unpublished_files_are_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_dataset("cifar10", tmp_path)
    logging.getLogger("flwr").propagate = True
    with caplog.at_level(logging.WARNING):
        load_split(settings("cifar10", data_dir=str(tmp_path)), "test")
    assert "is not the published one" in caplog.text


@pytest.mark.parametrize("name", FILE_SETS)
def test_missing_data_names_folder_and_fix(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_split(settings(name, data_dir=str(tmp_path / "nowhere")), "train")
    text = str(caught.value)
    assert str(tmp_path / "nowhere") in text
    assert "'download' = true" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\x08\x01\0\0\0\x05abc", r"declares shape \(5,\) but holds 3 bytes"),
        (b"\0\0\x08\x03\0\0\0\x05", "declares shape"),
        (b"\0\0\x0d\x01\0\0\0\x01a", "not an idx file"),
        (b"", "not an idx file"),
        (b"<html>", "not an idx file"),
    ],
)
def test_malformed_idx(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_idx(path, data[3] if data[3:] else 1)
    zipped = tmp_path / "file.gz"
    zipped.write_bytes(b"\x1f\x8b" + data)
    with pytest.raises(DataError, match=r"file\.gz: cannot be read"):
        read_idx(zipped, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("labels", "labels .* run from 0 to 12, expected 0 to 9"),
        ("count", "60 images but 59 labels"),
        ("shape", r"shape \(1, 20, 20\), expected \(1, 28, 28\)"),
        ("empty", "hold no images"),
    ],
)
def test_inconsistent_files(change: str, message: str, tmp_path: Path) -> None:
    make_idx(tmp_path, ("train", "t10k"), 10, 0, "")
    images, labels = (tmp_path / f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    if change == "labels":
        write_idx(labels, (labels_for(60, 13)).astype(np.uint8))
    elif change == "count":
        write_idx(labels, labels_for(59, 10).astype(np.uint8))
    elif change == "shape":
        write_idx(images, images_for(labels_for(60, 10), (20, 20)))
    else:
        write_idx(images, np.zeros((0, 28, 28), np.uint8))
        write_idx(labels, np.zeros(0, np.uint8))
    with pytest.raises(DataError, match=message):
        load_split(settings("mnist", data_dir=str(tmp_path)), "train")


def test_subset_is_the_same_for_every_seed_and_not_too_large() -> None:
    some = load_split(settings(num_train_images=100), "train")
    assert len(some) == 100
    assert len(np.unique(some.labels_N)) == 10
    with pytest.raises(DataError, match="'num-train-images' = 5000, but digits has 1437"):
        load_split(settings(num_train_images=5000), "train")


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_partition_divides_everything_once(partition: str) -> None:
    parts = partition_indices(settings(partition=partition), 7, 3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(1437))
    again = partition_indices(settings(partition=partition, data_dir="/elsewhere"), 7, 3)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    other = partition_indices(settings(partition=partition), 7, 4)
    assert {frozenset(part.tolist()) for part in parts}.isdisjoint(
        frozenset(part.tolist()) for part in other
    )
    if partition == "dirichlet":
        assert sorted(map(len, parts)) != sorted(map(len, other))


def class_spread(alpha: float, partition: str = "dirichlet") -> float:
    labels = load_split(settings(), "train").labels_N
    parts = partition_indices(settings(partition=partition, alpha=alpha), 5, 0)
    shares = np.stack([np.bincount(labels[part], minlength=10) / len(part) for part in parts])
    return float(shares.std(axis=0).mean())


def test_smaller_alpha_is_more_heterogeneous() -> None:
    iid, mild, strong = class_spread(1.0, "iid"), class_spread(1.0), class_spread(0.1)
    assert iid < 0.03 < mild < strong


def test_minimum_partition_size_holds_or_is_explained() -> None:
    parts = partition_indices(settings(alpha=0.1), 10, 0)
    assert min(map(len, parts)) >= 10
    with pytest.raises(DataError, match=r"'alpha' = 0\.01 .*'min-partition-size' = 10"):
        partition_indices(settings(alpha=0.01), 100, 0)


def test_empty_partitions_are_allowed_when_asked_for() -> None:
    parts = partition_indices(settings(alpha=0.01, min_partition_size=0), 100, 0)
    assert min(map(len, parts)) == 0


def test_more_clients_than_the_data_allow() -> None:
    with pytest.raises(DataError, match=r"'num-clients' = 200 is too many .* at most 143"):
        partition_indices(settings(), 200, 0)
    with pytest.raises(DataError, match=r"'min-partition-size' = 1438 is more .* at most 287$"):
        partition_indices(settings(min_partition_size=1438), 5, 0)
    with pytest.raises(DataError, match="'num-clients' = 1438 is too many"):
        partition_indices(settings(partition="iid"), 1438, 0)


@pytest.mark.parametrize("each", [1, 2, 5])
def test_a_pathological_partition_has_so_many_classes_each(each: int) -> None:
    images = load_split(settings(), "train")
    some = settings(partition="pathological", classes_per_client=each)
    parts = partition_indices(some, 12, 0)
    assert [len(set(images.labels_N[part])) for part in parts] == [each] * 12
    whole = np.concatenate(parts).tolist()
    assert sorted(whole) == list(range(1437))
    again = partition_indices(settings(**{**some.model_dump(), "data_dir": "/else"}), 12, 0)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


def test_pathological_partitions_that_cannot_be() -> None:
    with pytest.raises(DataError, match="'classes-per-client' = 11 of 10 classes cannot be given"):
        partition_indices(settings(partition="pathological", classes_per_client=11), 5, 0)
    with pytest.raises(DataError, match="to each of 'num-clients' = 1400 with 1437 images"):
        partition_indices(settings(partition="pathological", classes_per_client=9), 1400, 0)


def test_classes_that_no_client_has_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    config = {"partition": "pathological", "classes-per-client": 1, "num-clients": 7}
    logging.getLogger("flwr").propagate = True
    check_partition(from_run_config(config))
    assert "no client has images of class 7, 8, 9" in caplog.text


def test_own_images_are_nowhere_in_common() -> None:
    own = settings("own", image_shape="3,48,64", num_classes=7)
    assert own.spec == DatasetSpec(7, (3, 48, 64))
    with pytest.raises(DataError, match=r"'dataset' = 'own' has no images in common: .*data-path"):
        load_split(own, "test")


def test_hold_out_takes_its_share_from_training() -> None:
    whole = client_data(settings(), 5, 0, 2, hold_out=False)
    split = client_data(settings(holdout_fraction=0.25), 5, 0, 2, hold_out=True)
    assert len(whole.held_out) == 0
    assert len(split.held_out) == round(0.25 * len(whole.train))
    assert len(split.train) + len(split.held_out) == len(whole.train)


def test_loaded_images_cannot_be_changed() -> None:
    images = load_split(settings(), "train")
    with pytest.raises(ValueError, match="read-only"):
        images.images_NCHW[0] = 0
