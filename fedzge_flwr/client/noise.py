"""Noise on answers that asking again does not average away.

The noise of an answer is a function of a secret of the node's, of the model's state, and of the
image. So one question to one model has one answer, however often, in whatever batch and by whatever
endpoint it is asked. Neighbours of an image have other noise: what averaging over them tells is
bounded by the budget alone.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fedzge_flwr.black_boxes.contract import State
from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.images.pixels import pixel_values

_UNIT = 2.0**-53


def model_digest(state: State) -> bytes:
    """Return the SHA-256 of a model's state: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        # Not ascontiguousarray, which makes a vector of a scalar.
        values = np.asarray(state[name], order="C")
        digest.update(f"{name!r} {values.dtype.str} {values.shape} ".encode())
        digest.update(values.tobytes())
    return digest.digest()


def image_keys(images_NCHW: ByteArray | FloatArray) -> list[bytes]:
    """Return what tells images apart: equal for equal pixels, as levels or as values."""
    # −0 and 0 are one pixel in two encodings.
    values = pixel_values(images_NCHW) + np.float32(0)
    return [np.asarray(image, "<f4", order="C").tobytes() for image in values]


def noise(secret: bytes, model: bytes, keys: list[bytes], num_classes: int) -> FloatArray:
    """Return standard normal noise, a row for each key; float64 (N, K).

    The uniform bits are SHAKE-256's (FIPS 202), by which who lacks the secret cannot tell them from
    random ones; the normal distribution's quantile function makes noise of them.

    Parameters
    ----------
    secret : bytes
        The node's, of 32 bytes.
    model : bytes
        `model_digest` of the state that answers.
    keys : list of bytes
        What is asked about: `image_keys`.
    num_classes : int
        Number of classes K.
    """
    from scipy.special import ndtri

    rows = b"".join(hashlib.shake_256(secret + model + key).digest(8 * num_classes) for key in keys)
    words = np.frombuffer(rows, dtype="<u8").reshape(len(keys), num_classes)
    drawn: FloatArray = ndtri(((words >> np.uint64(11)) + 0.5) * _UNIT)
    return drawn
