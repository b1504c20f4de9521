"""Differential privacy of a linear layer: noisy gradients, and what they cost.

Neighbours are data sets of which one has an image more. A quantity that such an image moves by at
most 1, with normal noise of deviation σ, is 1/σ-GDP; releases of μ₁ and μ₂ are √(μ₁² + μ₂²)-GDP
together, exactly, also if the second depends on the first (Dong, Roth & Su, 2019, arXiv
1905.02383).
"""

from __future__ import annotations

import math
import secrets
from typing import NamedTuple

import numpy as np

from fedzge_flwr.common.arrays import Float64Array, IntArray

# Chosen on five divisions of three data sets, by no owner's images: `docs/evidence.md`.
_FEWEST_STEPS, _MOST_STEPS = 5, 100
_LR = 8.0
_MOMENTUM = 0.9
_COUNTS_SHARE = 0.05
"""Of μ², for how many images of each class there are."""
_LEAST_COUNT = 20.0
_UNSEEN = 0.01
_UNIT = 2.0**-53


def delta_of(mu: float, epsilon: float) -> float:
    """Return the δ of a μ-GDP release at some ε ≥ 0 (Balle & Wang, 2018, arXiv 1805.06530).

    δ = Φ(μ/2 − ε/μ) − exp(ε) Φ(−μ/2 − ε/μ), of μ > 0.
    """
    from scipy.special import log_ndtr, ndtr

    # In logarithms: exp(ε) alone overflows.
    beyond = math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))
    return float(ndtr(mu / 2 - epsilon / mu)) - beyond


def mu_of(epsilon: float, delta: float) -> float:
    """Return the largest μ whose release is (ε, δ)-private.

    Parameters
    ----------
    epsilon : float
        Above 0, at most 100.
    delta : float
        In (0, 1).
    """
    from scipy.optimize import brentq

    # From below: what is rounded must not exceed δ.
    found = brentq(lambda mu: delta_of(mu, epsilon) - delta, 1e-9, 200.0, xtol=1e-13, rtol=1e-13)
    return float(found) * (1 - 1e-12)


def epsilon_of(mu: float, delta: float) -> float:
    """Return the ε of a μ-GDP release at some δ in (0, 1); 0 if it needs none."""
    from scipy.optimize import brentq

    if delta_of(mu, 0.0) <= delta:
        return 0.0
    return float(brentq(lambda epsilon: delta_of(mu, epsilon) - delta, 0.0, 1e5, xtol=1e-12))


def secure_normal(*shape: int) -> Float64Array:
    """Return standard normal noise from the system's secure source, and from no seed.

    Four draws make one: from a single one, what floating point cannot represent would tell the
    number beneath (Holohan & Braghin, 2021, arXiv 2107.10138).
    """
    from scipy.special import ndtri

    num = 4 * math.prod(shape)
    words = np.frombuffer(secrets.token_bytes(8 * num), dtype="<u8")
    drawn: Float64Array = ndtri(((words >> np.uint64(11)) + 0.5) * _UNIT)
    noise: Float64Array = drawn.reshape(4, *shape).sum(axis=0) / 2
    return noise


class Release(NamedTuple):
    """All that may be known of a client's images.

    Parameters
    ----------
    weights_KE : ndarray of float64
        A linear layer.
    counts_K : ndarray of float64
        How many images of each class there are, with noise; at least 0.
    """

    weights_KE: Float64Array
    counts_K: Float64Array

    @property
    def num_examples(self) -> int:
        """How many images there are, with noise; at least 1."""
        return max(round(float(self.counts_K.sum())), 1)


def steps_of(mu: float, num_examples: float) -> int:
    """Return how many noisy steps teach most: √(μ n), from 5 to 100.

    Each step more spreads the same μ thinner. So few images, or a small μ, bear few. The number of
    images is the noisy one, so that the steps tell nothing more of them.
    """
    return min(max(round(math.sqrt(mu * num_examples)), _FEWEST_STEPS), _MOST_STEPS)


def released(features_NE: Float64Array, labels_N: IntArray, num_classes: int, mu: float) -> Release:
    """Train a linear layer on all images at once, by gradients with noise; μ-GDP in all.

    Gradient descent with momentum on the cross-entropy, log-prior added by noisy counts
    (`fedzge_flwr.learning.training.log_class_prior`). An image's gradient (p − y) φᵀ, p its
    probabilities and y its class, is cut to length 1 (Abadi et al., 2016, arXiv 1607.00133). All
    images are in each step: nothing is drawn, and the sum over steps is exact.

    Parameters
    ----------
    features_NE : ndarray of float64
        Of length at most 1; any number of images.
    labels_N : ndarray of int
        Classes 0 … K−1.
    num_classes : int
        K.
    mu : float
        Above 0.
    """
    classes_NK = np.eye(num_classes)[labels_N]
    count_noise = secure_normal(num_classes) / (mu * math.sqrt(_COUNTS_SHARE))
    counts_K = np.maximum(classes_NK.sum(axis=0) + count_noise, 0.0)
    total = max(float(counts_K.sum()), _LEAST_COUNT)
    prior_K = np.log(counts_K / total + _UNSEEN)
    steps = steps_of(mu, total)
    deviation = math.sqrt(steps / (1 - _COUNTS_SHARE)) / mu
    weights_KE = np.zeros((num_classes, features_NE.shape[1]))
    speed_KE = np.zeros_like(weights_KE)
    for _ in range(steps):
        gradient_KE = clipped_gradient(weights_KE, features_NE, classes_NK, prior_K)
        gradient_KE += deviation * secure_normal(*weights_KE.shape)
        speed_KE = _MOMENTUM * speed_KE - gradient_KE / total
        weights_KE = weights_KE + _LR * speed_KE
    return Release(weights_KE, counts_K)


def clipped_gradient(
    weights_KE: Float64Array,
    features_NE: Float64Array,
    classes_NK: Float64Array,
    prior_K: Float64Array,
) -> Float64Array:
    """Return the sum over images of their gradients (K, E), each cut to length 1.

    Features longer than 1 are cut too, so that no image moves the sum by more than 1.
    """
    from scipy.special import softmax

    lengths_N = np.linalg.norm(features_NE, axis=1, keepdims=True)
    features_NE = features_NE / np.maximum(lengths_N, 1.0)
    errors_NK = softmax(features_NE @ weights_KE.T + prior_K, axis=1) - classes_NK
    errors_NK /= np.maximum(np.linalg.norm(errors_NK, axis=1, keepdims=True), 1.0)
    found: Float64Array = errors_NK.T @ features_NE
    return found
