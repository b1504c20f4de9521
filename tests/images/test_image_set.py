"""Labelled images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedzge_flwr import (
    ImageSet,
)
from fedzge_flwr.common.errors import DataError
from fedzge_flwr.images.pixels import from_levels
from tests.helpers.boxes import digits


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 1, 8, 8), np.float32), np.zeros(2, int), "images are float32 of shape"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros(2, int), "give uint8 (N, C, H, W)"),
        (np.zeros((2, 1, 8, 8), np.uint8), np.zeros(3, int), r"of shape (3,) for 2 images"),
        (np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2), "labels are float64"),
        (np.zeros((2, 1, 8, 8), np.uint8), [0, 1], "labels are a list; give integers (N,)"),
        ([[[[1]]]], np.zeros(1, int), "images are a list; give uint8 (N, C, H, W)"),
        (np.zeros((2, 1, 0, 8), np.uint8), np.zeros(2, int), "of shape (2, 1, 0, 8); give uint8"),
    ],
)
def test_images_that_do_not_fit_their_labels(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        ImageSet(images, labels)
    assert message in str(caught.value)


def test_images_from_what_a_model_is_given() -> None:
    images = digits(num=30)
    again = ImageSet.from_inputs(
        torch.from_numpy(images.inputs_NCHW), torch.tensor(images.labels_N)
    )
    np.testing.assert_array_equal(again.images_NCHW, images.images_NCHW)
    np.testing.assert_array_equal(again.labels_N, images.labels_N)
    near = ImageSet.from_inputs(np.array([[[[-1.0004, 1.0004, 0.0]]]]), [1])
    assert near.images_NCHW.tolist() == [[[[0, 255, 128]]]]
    for wrong in (images.images_NCHW, 2 * images.inputs_NCHW):
        with pytest.raises(DataError, match=r"images go from .*: give them in \[-1, 1\]"):
            ImageSet.from_inputs(wrong, images.labels_N)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (0.5, 1, "images are of shape (); give (N, C, H, W)"),
        (np.zeros((2, 8, 8)), [0, 1], "images are of shape (2, 8, 8); give (N, C, H, W)"),
        (np.zeros((2, 1, 0, 8)), [0, 1], "images are of shape (2, 1, 0, 8); give (N, C, H, W)"),
        ([[[[0.1, 0.2], [0.3]]]], [0], "images are no array of numbers: give (N, C, H, W), all of"),
        (["cat"], [0], "images are no array of numbers: give (N, C, H, W), all of"),
        (np.zeros((2, 1, 8, 8)), [[0], [0, 1]], "labels are no array of numbers: give integers"),
    ],
)
def test_inputs_that_are_none(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        ImageSet.from_inputs(images, labels)
    assert message in str(caught.value)


def test_an_image_set_is_read_only_and_the_arrays_given_are_not() -> None:
    pixels, labels = np.zeros((2, 1, 8, 8), np.uint8), np.array([1, 2], np.int32)
    images = ImageSet(pixels, labels)
    assert images.labels_N.dtype == np.int64
    for array in (images.images_NCHW, images.labels_N, images.take(np.array([1])).images_NCHW):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    pixels[0], labels[0] = 1, 1


def test_labelled_images_are_what_queries_are() -> None:
    images = digits(num=3)
    assert (images.inputs_NCHW == from_levels(images.images_NCHW)).all()
