"""Images of a table of pictures, with real tables of Hugging Face's library."""

from __future__ import annotations

import io
from typing import Any

import datasets
import numpy as np
import pytest
from flwr_datasets.partitioner import IidPartitioner
from PIL import Image

from fedzge_flwr import ImageSet
from fedzge_flwr.common.errors import DataError
from fedzge_flwr.config.parsing import make_settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.images.rows import images_of

DIGITS = load_split(make_settings().data, "train").take(np.arange(12))


LEVEL = datasets.Value("int64")


def _png() -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(DIGITS.images_NCHW[0, 0]).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


PNG = _png()


def table_of(pictures: list[Any], labels: list[Any], **features: Any) -> datasets.Dataset:
    found = {"image": datasets.Image(), "label": datasets.ClassLabel(10), **features}
    return datasets.Dataset.from_dict(
        {"image": pictures, "label": labels}, datasets.Features(found)
    )


def digits() -> datasets.Dataset:
    pictures = [Image.fromarray(image[0]) for image in DIGITS.images_NCHW]
    return table_of(pictures, DIGITS.labels_N.tolist())


def test_pictures_and_labels_are_those_of_the_table() -> None:
    found = ImageSet.from_dataset(digits())
    assert np.array_equal(found.images_NCHW, DIGITS.images_NCHW)
    assert np.array_equal(found.labels_N, DIGITS.labels_N)


def test_columns_of_other_names_and_a_partition() -> None:
    partitioner = IidPartitioner(3)
    partitioner.dataset = digits().rename_columns({"image": "img", "label": "fine"})
    found = ImageSet.from_dataset(partitioner.load_partition(1), "img", "fine")
    assert np.array_equal(found.images_NCHW, DIGITS.images_NCHW[4:8])


def test_a_loaders_own_transforms_are_put_aside() -> None:
    """They normalise: the images that are asked about are as they are stored."""

    def normalise(rows: dict[str, Any]) -> dict[str, Any]:
        return {"pixels": [(np.asarray(image) / 255 - 0.3) / 0.4 for image in rows["image"]]}

    for table in (digits().with_transform(normalise), digits().with_format("torch")):
        assert np.array_equal(ImageSet.from_dataset(table).images_NCHW, DIGITS.images_NCHW)


def test_a_size_of_ones_own() -> None:
    found = ImageSet.from_dataset(digits(), size=(3, 16, 12))
    assert found.images_NCHW.shape == (12, 3, 16, 12)
    first = Image.fromarray(DIGITS.images_NCHW[0, 0]).convert("RGB")
    wanted = np.asarray(first.resize((12, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(found.images_NCHW[0], wanted)


def test_levels_in_an_array_are_pictures_too() -> None:
    for shape, feature in (
        ((8, 8), datasets.Array2D((8, 8), "uint8")),
        ((8, 8, 1), datasets.Array3D((8, 8, 1), "uint8")),
        ((8, 8), datasets.List(datasets.List(datasets.Value("int64")))),
    ):
        table = table_of(
            [image[0].reshape(shape) for image in DIGITS.images_NCHW],
            DIGITS.labels_N.tolist(),
            image=feature,
        )
        assert np.array_equal(ImageSet.from_dataset(table).images_NCHW, DIGITS.images_NCHW)


def test_a_process_reads_a_table_once() -> None:
    """Each message makes a black box, and a partition is a new object each time."""
    images_of.cache_clear()
    partitioner = IidPartitioner(2)
    partitioner.dataset = digits()
    for _ in range(3):
        for part in range(2):
            ImageSet.from_dataset(partitioner.load_partition(part))
    assert images_of.cache_info().misses == 2
    ImageSet.from_dataset(partitioner.load_partition(0), size=(1, 4, 4))
    assert images_of.cache_info().misses == 3


def test_an_empty_table() -> None:
    found = ImageSet.from_dataset(digits().select([]), size=(1, 8, 8))
    assert found.images_NCHW.shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("table", "options", "problem"),
    [
        (digits(), {"image": "img"}, "no column 'img': this data set has image, label"),
        ([1, 2], {}, "a list is no table of pictures: give a datasets.Dataset"),
        (
            datasets.DatasetDict({"train": digits()}),
            {},
            "a DatasetDict is several tables, train: give one split, as dataset['train']",
        ),
        (
            table_of([Image.new("L", (8, 8))], ["cat"], label=datasets.Value("string")),
            {},
            "labels that are no integers: number the classes from 0, as dataset.class_encode",
        ),
        (
            table_of([Image.new("L", (8, 8)), Image.new("L", (8, 9))], [0, 1]),
            {},
            "picture 1 is of 9×8 pixels, the first of 8×8: give size=(C, H, W)",
        ),
        (
            table_of(["a", "b"], [0, 1], image=datasets.Value("string")),
            {},
            "column 'image', row 0: a str is no picture: give Pillow's, or levels from 0 to 255",
        ),
        (
            table_of([[[0.5]]], [0], image=datasets.List(datasets.List(datasets.Value("float32")))),
            {},
            "row 0: a list is no picture",
        ),
        (table_of([Image.new("I;16", (8, 8))], [0]), {}, "picture 0 has more than 8 bits"),
        (
            table_of([[[1, 2], [3]]], [0], image=datasets.List(datasets.List(LEVEL))),
            {},
            "column 'image', row 0: a list is no picture: give Pillow's, or levels",
        ),
        (
            table_of([PNG, {"bytes": b"no picture", "path": None}], [0, 1]),
            {},
            "column 'image', row 1: cannot be read as a picture (of no kind that Pillow knows): ",
        ),
        (
            table_of([PNG, {"bytes": PNG["bytes"][:60], "path": None}], [0, 1]),
            {},
            "column 'image', row 1: cannot be read as a picture (",
        ),
        (
            table_of(["/nowhere/at/all.png"], [0]),
            {},
            "row 0: cannot be read as a picture (No such file or directory",
        ),
        (digits().select([]), {}, "no rows, and so no first picture: give size=(C, H, W)"),
        *(
            (digits(), {"size": size}, f"size = {size!r}: give (C, H, W), C 1 for grey or 3 for")
            for size in ((8, 8), (1, 0, 8), (4, 8, 8), (2, 8, 8), (1, 8.0, 8), 8, "188")
        ),
    ],
)
def test_what_is_no_table_of_pictures_is_named(
    table: Any, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DataError) as error:
        ImageSet.from_dataset(table, **options)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_size_may_be_a_list() -> None:
    found = ImageSet.from_dataset(digits(), size=[1, 4, 4])  # type: ignore[arg-type]
    assert found.images_NCHW.shape == (12, 1, 4, 4)


def test_a_streamed_one_is_named() -> None:
    with pytest.raises(DataError, match="not streamed"):
        ImageSet.from_dataset(digits().to_iterable_dataset())
