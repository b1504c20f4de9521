"""How sure a model may be: one number that its logits are multiplied by."""

from __future__ import annotations

import math

import numpy as np

from fedzge_flwr.common.arrays import Float64Array, FloatArray, IntArray

_LEAST, _MOST = 0.1, 100.0


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
