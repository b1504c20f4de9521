"""How sure a model may be: one number that its logits are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedzge_flwr.common.arrays import Float64Array, FloatArray, IntArray

_LEAST, _MOST = 0.1, 100.0

_SCALES: tuple[float, ...] = tuple(2.0 ** (step / 4) for step in range(-8, 25))
"""From 1/4 to 64, by fourths of a doubling."""

_WRONG = 0.005
"""The share of labels that are taken for drawn by lot. So clients that are always right do not make
a model sure without end, each by its few images."""


def fitted_scale(logits_NK: FloatArray, labels_N: IntArray) -> float:
    """Return the scale s > 0 whose softmax(s·logits) has the least cross-entropy on labels.

    Temperature scaling (Guo et al., 2017, "On calibration of modern neural networks", arXiv
    1706.04599), for who has labelled images. `Rescaled` multiplies a model's logits by it.

    One more image is added, with the mean loss of all images and all classes. So a model that is
    always right does not become sure without end.

    Parameters
    ----------
    logits_NK : ndarray of float
        (N, K), N ≥ 1.
    labels_N : ndarray of int
        What is right, in 0 … K-1.

    Returns
    -------
    float
        From 0.1 to 100.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logits = np.asarray(logits_NK, dtype=np.float64)
    rows = np.arange(len(logits))

    def loss(log_scale: float) -> float:
        scaled: Float64Array = log_softmax(math.exp(log_scale) * logits, axis=1)
        unsure = scaled.mean()
        return float(-(scaled[rows, labels_N].sum() + unsure) / (len(logits) + 1))

    found = minimize_scalar(
        loss, bounds=(math.log(_LEAST), math.log(_MOST)), method="bounded", options={"xatol": 1e-4}
    )
    return float(math.exp(found.x))


def losses_by_scale(logits_NK: FloatArray, labels_N: IntArray) -> list[float]:
    """Return a client's losses of a model whose logits are multiplied by each of 33 scales.

    They are means over its images, and so a metric like another: their mean over clients, weighted
    by numbers of images, is that of all images. `best_scale` has the best scale of that, and no
    image or label left its client.

    Parameters
    ----------
    logits_NK : ndarray of float
        (N, K), N ≥ 1: what the model says of the client's images.
    labels_N : ndarray of int
        What is right, in 0 … K-1.

    Returns
    -------
    list of float
        Cross-entropies in nats, of labels of which one in 200 is taken for drawn by lot.
    """
    from scipy.special import log_softmax

    logits = np.asarray(logits_NK, dtype=np.float64)
    rows = np.arange(len(logits))
    losses = []
    for scale in _SCALES:
        scaled: Float64Array = log_softmax(scale * logits, axis=1)
        right = scaled[rows, labels_N].mean()
        losses.append(-float((1 - _WRONG) * right + _WRONG * scaled.mean()))
    return losses


def best_scale(losses: Sequence[float]) -> float:
    """Return the scale of the least loss: temperature scaling by clients' labels.

    Between scales that were tried it is where a parabola through three losses is least, by the
    logarithm of the scale.

    Parameters
    ----------
    losses : sequence of float
        Means of what `losses_by_scale` returns at clients.

    Returns
    -------
    float
        From 1/4 to 64. `Rescaled` multiplies a model's logits by it.

    Raises
    ------
    ValueError
        If they are not 33 finite numbers.
    """
    tried = np.asarray(losses, dtype=np.float64)
    if tried.shape != (len(_SCALES),) or not np.isfinite(tried).all():
        raise ValueError(
            f"losses are not {len(_SCALES)} finite numbers: give what "
            "'losses_by_scale' returns, or its mean over clients"
        )
    best = int(tried.argmin())
    if best in (0, len(_SCALES) - 1):
        return _SCALES[best]
    below, least, above = tried[best - 1 : best + 2]
    bend = below - 2 * least + above
    offset = 0.5 * (below - above) / bend if bend > 0 else 0.0
    return float(_SCALES[best] * 2 ** (offset / 4))
