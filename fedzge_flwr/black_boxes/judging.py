"""Whether a model knows its client's own images: by this a harmful distillation is recognised."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.images.image_set import ImageSet

_UNSEEN = 0.01
"""How likely a class without own images is held to be, beside each that has some; as in the loss
(`fedzge_flwr.learning.training.log_class_prior`)."""


def right_on_own(
    logits: Callable[[FloatArray], FloatArray],
    held_out: ImageSet | None,
    trained_on: ImageSet | None,
    most: int,
) -> npt.NDArray[np.bool_]:
    """Say of each of a client's own images, evenly chosen, whether its model is right.

    Classes that it has no image of count for less (`_own_classes_first`). On an image that it is
    trained on it must be right twice: on the image, and on the mean of it and of the next of its
    class. One that rehearses its own images can be right on each of them and wrong on all like
    them; then it is wrong on what lies between them, too. No random number is drawn.

    Parameters
    ----------
    logits : Callable[[ndarray], ndarray]
        From float32 images (N, C, H, W) to logits (N, K).
    held_out, trained_on : ImageSet, optional
        The client's own images; a set without any may have whatever shape.
    most : int
        Most images, at least 1.

    Returns
    -------
    ndarray of bool
        (N,), first those held out; empty without images.
    """
    nothing = np.zeros(0, dtype=np.int64)
    held_out, trained_on = held_out or None, trained_on or None
    num_held_out = len(held_out) if held_out is not None else 0
    total = num_held_out + (len(trained_on) if trained_on is not None else 0)
    if total == 0:
        return nothing.astype(np.bool_)
    rows = np.linspace(0, total - 1, min(most, total)).astype(np.int64)
    inputs: list[FloatArray] = []
    labels = [nothing]
    if held_out is not None:
        chosen = held_out.take(rows[rows < num_held_out])
        inputs.append(chosen.inputs_NCHW)
        labels.append(chosen.labels_N)
    if trained_on is not None:
        own = rows[rows >= num_held_out] - num_held_out
        one = trained_on.take(own)
        other = trained_on.take(_next_of_class(trained_on.labels_N)[own])
        inputs += [one.inputs_NCHW, (one.inputs_NCHW + other.inputs_NCHW) / np.float32(2)]
        labels += [one.labels_N, one.labels_N]
    found_NK = _own_classes_first(logits(np.concatenate(inputs)), held_out, trained_on)
    found = found_NK.argmax(axis=1) == np.concatenate(labels)
    held = int(np.count_nonzero(rows < num_held_out))
    return np.concatenate((found[:held], np.logical_and(*np.split(found[held:], 2))))


def _own_classes_first(logits_NK: FloatArray, *own: ImageSet | None) -> FloatArray:
    """Add log 0.01 to the logits of classes without own images.

    A client of few classes that learns the others takes some of its images for those, by logits
    alone, and would seem to have lost what it knew: on clothes an honest distillation, by which a
    client of five classes came from 41 to 71 % on all ten, left it 63 % of its own images for 96
    (`docs/evidence.md`).
    """
    own_labels_M = np.concatenate([images.labels_N for images in own if images is not None])
    unseen_K = np.bincount(own_labels_M, minlength=logits_NK.shape[1]) == 0
    return logits_NK + np.where(unseen_K, np.log(_UNSEEN), 0.0).astype(np.float32)


def _next_of_class(labels_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each image the number of the next of its class, for the last that of the first."""
    following = np.arange(len(labels_N))
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        following[rows] = np.roll(rows, -1)
    return following
