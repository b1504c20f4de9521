"""The images by which a client judges whether a distillation has harmed its model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.images.image_set import ImageSet


def judging_images(
    held_out: ImageSet | None, trained_on: ImageSet | None, most: int
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Return images with their labels that a model is to know, evenly chosen.

    Of images that it is trained on, halves are taken: each is the mean of one and of the next of
    its class. A model that rehearses its own images can be right on each of them and wrong on all
    that is like them; it is then wrong on what lies between them, too. No random number is drawn.

    Parameters
    ----------
    held_out, trained_on : ImageSet, optional
        The client's own images.
    most : int
        Most images, at least 1.

    Returns
    -------
    tuple of ndarray
        float32 (N, C, H, W) in the shared pixel range, and int64 (N,); first those held out.
    """
    sets = [own for own in (held_out, trained_on) if own is not None and len(own)]
    num_held_out = len(held_out) if held_out is not None else 0
    total = sum(len(own) for own in sets)
    if total == 0:
        return np.zeros((0, 0, 0, 0), dtype=np.float32), np.zeros(0, dtype=np.int64)
    rows = np.linspace(0, total - 1, min(most, total)).astype(np.int64)
    inputs, labels = [], []
    if held_out is not None and num_held_out:
        chosen = held_out.take(rows[rows < num_held_out])
        inputs.append(chosen.inputs_NCHW)
        labels.append(chosen.labels_N)
    if trained_on is not None and len(trained_on):
        own = rows[rows >= num_held_out] - num_held_out
        partners = _next_of_class(trained_on.labels_N)[own]
        one, other = trained_on.take(own), trained_on.take(partners)
        inputs.append((one.inputs_NCHW + other.inputs_NCHW) / np.float32(2))
        labels.append(one.labels_N)
    return np.concatenate(inputs), np.concatenate(labels)


def _next_of_class(labels_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each image the number of the next of its class, for the last that of the first."""
    following = np.arange(len(labels_N))
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        following[rows] = np.roll(rows, -1)
    return following
