"""Which images an attack is tried on, and which of them each shadow model is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedzge_flwr.common.arrays import BoolArray, IntArray
from fedzge_flwr.common.errors import AuditError
from fedzge_flwr.images.image_set import ImageSet

_LEAST_IMAGES = 40


@dataclass(frozen=True)
class Pool:
    """Images of which an attack says who is a member.

    Parameters
    ----------
    images : ImageSet
        The owner's, then those from outside.
    member_N : ndarray of bool
        Whether the audited model was trained on an image, (N,).
    """

    images: ImageSet
    member_N: BoolArray

    @property
    def members(self) -> ImageSet:
        """The images that the audited model was trained on."""
        return self.images.take(np.flatnonzero(self.member_N))


def pool_of(own: ImageSet, outside: ImageSet | None, stream: np.random.Generator) -> Pool:
    """Return the pool of an audit.

    With images from outside, as many of each class as the owner has, the audited model was trained
    on all of the owner's. Without, half of the owner's images of each class stand for outside ones:
    what is audited is the way of training, on half as many images.

    Raises
    ------
    AuditError
        If there are too few images.
    """
    if outside is None:
        found = Pool(own, halves(own.labels_N, 2, stream)[0])
    else:
        chosen = np.flatnonzero(_as_often(own.labels_N, outside.labels_N, stream))
        other = outside.take(chosen)
        images = ImageSet(
            np.concatenate((own.images_NCHW, other.images_NCHW)),
            np.concatenate((own.labels_N, other.labels_N)),
        )
        found = Pool(images, np.arange(len(images)) < len(own))
    if min(found.member_N.sum(), (~found.member_N).sum()) < _LEAST_IMAGES:
        raise AuditError(
            f"{found.member_N.sum()} images that the model was trained on and "
            f"{(~found.member_N).sum()} others are too few for an audit: {_LEAST_IMAGES} of each"
        )
    return found


def halves(labels_N: IntArray, num_models: int, stream: np.random.Generator) -> BoolArray:
    """Return which images (N,) each of so many models is trained on, (S, N).

    Models 2i and 2i + 1 have complementary halves of each class, so that of every image half of the
    models had it. An odd image of a class goes to either.
    """
    rows = []
    for _ in range(num_models // 2):
        first_N = np.zeros(len(labels_N), dtype=bool)
        for k in np.unique(labels_N):
            of_class = stream.permutation(np.flatnonzero(labels_N == k))
            size = (len(of_class) + int(stream.integers(2))) // 2
            first_N[of_class[:size]] = True
        rows += [first_N, ~first_N]
    return np.stack(rows)


def _as_often(own_N: IntArray, labels_M: IntArray, stream: np.random.Generator) -> BoolArray:
    """Choose of each class as many as there are among the owner's, or all that there are."""
    chosen_M = np.zeros(len(labels_M), dtype=bool)
    for k in np.unique(own_N):
        of_class = stream.permutation(np.flatnonzero(labels_M == k))
        chosen_M[of_class[: int((own_N == k).sum())]] = True
    return chosen_M
