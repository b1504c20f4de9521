"""CIFAR's pickles: what the standard library reads of plain data, and no more."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedzge_flwr.data.cifar import CIFAR10, CIFAR100, CifarSet
from fedzge_flwr.data.plain_pickle import read_plain_pickle
from fedzge_flwr.data.svhn import _MD5
from tests.helpers.fabricate import make_cifar

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip
INTEGERS = arrays.integer_dtypes(endianness="?") | arrays.unsigned_integer_dtypes(endianness="?")


@given(
    PLAIN,
    arrays.arrays(INTEGERS, arrays.array_shapes(min_dims=0, min_side=0)),
    st.booleans(),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=100)
def test_plain_values_are_read_as_pickle_reads_them(
    value: Any, array: np.ndarray, fortran: bool, protocol: int
) -> None:
    array = np.asfortranarray(array) if fortran else array
    whole = {"data": array, "labels": [np.int64(3), np.uint8(7), 1], "more": value}
    data = pickle.dumps(whole, protocol)
    found, wanted = read_plain_pickle(data, 1 << 20), pickle.loads(data)
    # NumPy turns the bytes of another order around.
    assert found["data"].dtype.newbyteorder("=") == wanted["data"].dtype.newbyteorder("=")
    np.testing.assert_array_equal(found.pop("data"), wanted.pop("data"))
    assert found == wanted


def _of_python_2(text: bytes) -> bytes:
    if len(text) < 256:
        return b"U" + bytes([len(text)]) + text
    return b"T" + struct.pack("<i", len(text)) + text


def published(images: np.ndarray, labels: list[int]) -> bytes:
    """Return a file as the published ones were written, by Python 2 and NumPy 1."""
    text = _of_python_2
    kind = b"cnumpy\ndtype\nq\x08" + text(b"u1") + b"K\x00K\x01\x87Rq\x09(K\x03" + text(b"|")
    kind += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"K" + bytes([len(images)]) + b"M\x00\x0c\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05"
    array += text(b"b") + b"q\x06\x87Rq\x07(K\x01" + shape + kind + b"\x89"
    array += text(images.tobytes()) + b"tb"
    numbers = b"]q\x0a(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x01(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def test_the_published_layout_is_read() -> None:
    images = np.random.default_rng(0).integers(256, size=(3, 3072), dtype=np.uint8)
    data = published(images, [6, 9, 0])
    for found in (pickle.loads(data, encoding="latin1"), read_plain_pickle(data, 1 << 20)):
        assert found["labels"] == [6, 9, 0]
        np.testing.assert_array_equal(found["data"], images, strict=True)


@pytest.mark.parametrize("loader", [CIFAR10, CIFAR100])
def test_checksums_are_those_that_torchvision_fetches_by(loader: CifarSet) -> None:
    import torchvision.datasets as tv

    base = getattr(tv, loader.name)
    assert loader.folder == base.base_folder
    assert list(loader.files["train"].items()) == [tuple(item) for item in base.train_list]
    assert list(loader.files["test"].items()) == [tuple(item) for item in base.test_list]
    assert {key: tv.SVHN.split_list[key][2] for key in _MD5} == dict(_MD5)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_torchvision_reads_the_same(name: str, tmp_path: Path) -> None:
    """On files of one's own, once it is told to pass over checksums."""
    import torchvision.datasets as tv

    base, loader = getattr(tv, name), {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}[name]
    make_cifar(tmp_path, 10 if name == "CIFAR10" else 100)
    members: dict[str, Any] = {
        key: [[file, None] for file, _ in getattr(base, key)] for key in ("train_list", "test_list")
    }
    own = type(name, (base,), {**members, "meta": {**base.meta, "md5": None}})
    for split in ("train", "test"):
        theirs = own(str(tmp_path), train=split == "train")
        ours = loader(tmp_path, False, split)  # type: ignore[arg-type]
        np.testing.assert_array_equal(ours.images_NCHW, theirs.data.transpose(0, 3, 1, 2))
        assert ours.labels_N.tolist() == theirs.targets
