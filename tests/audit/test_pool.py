"""Which images are members, and which a shadow model is trained on."""

from __future__ import annotations

import numpy as np
import pytest

from fedzge_flwr.audit.pool import halves, pool_of
from fedzge_flwr.common.errors import AuditError
from fedzge_flwr.images.image_set import ImageSet


def images(labels: list[int], first: int = 0) -> ImageSet:
    """Images that each have a grey of their own."""
    greys = np.arange(first, first + len(labels), dtype=np.uint8)
    return ImageSet(np.tile(greys[:, None, None, None], (1, 1, 2, 2)), np.array(labels))


@pytest.mark.parametrize("num_models", [2, 8])
def test_of_every_image_half_of_the_models_had_it(num_models: int) -> None:
    labels = np.array([0] * 10 + [1] * 7 + [2])
    found = halves(labels, num_models, np.random.default_rng(0))
    assert found.shape == (num_models, 18)
    assert (found.sum(axis=0) == num_models // 2).all()
    assert (found[::2] == ~found[1::2]).all()
    for row in found:
        of_class = np.bincount(labels[row], minlength=3)
        assert of_class[0] == 5
        assert of_class[1] in (3, 4)
        assert of_class[2] in (0, 1)


def test_halves_differ_from_pair_to_pair_and_come_from_the_stream() -> None:
    labels = np.zeros(40, dtype=int)
    first = halves(labels, 4, np.random.default_rng(0))
    assert (first[0] != first[2]).any()
    assert (first == halves(labels, 4, np.random.default_rng(0))).all()
    assert (first != halves(labels, 4, np.random.default_rng(1))).any()


def test_outside_images_are_as_often_of_each_class_as_own_ones() -> None:
    own, outside = images([0] * 50 + [1] * 10), images([0] * 60 + [1] * 60 + [2] * 30, 60)
    pool = pool_of(own, outside, np.random.default_rng(0))
    assert np.bincount(pool.images.labels_N[~pool.member_N]).tolist() == [50, 10]
    assert (pool.members.images_NCHW == own.images_NCHW).all()
    assert (pool.members.labels_N == own.labels_N).all()
    # None is there twice.
    assert len(np.unique(pool.images.images_NCHW[:, 0, 0, 0])) == 120


def test_without_outside_images_half_of_the_own_are_no_members() -> None:
    own = images([0] * 60 + [1] * 60)
    pool = pool_of(own, None, np.random.default_rng(0))
    assert len(pool.images) == 120
    assert np.bincount(pool.members.labels_N).tolist() == [30, 30]


def test_too_few_images_are_said() -> None:
    with pytest.raises(AuditError, match=r"30 images .* 30 others are too few .* 40 of each"):
        pool_of(images([0] * 60), None, np.random.default_rng(0))
