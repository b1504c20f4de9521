"""Scores by which answers tell members, the images that a model was trained on, from others.

An attack sees a model's answer on an image of a known class, and what models trained alike answer
that had the image (in) or had it not (out). All here is NumPy; a higher score speaks for a member.
"""

from __future__ import annotations

import numpy as np

from fedzge_flwr.common.arrays import BoolArray, Float64Array, FloatArray, IntArray

_LEAST_DEVIATION = 1e-6


def margins(logits_NK: FloatArray, labels_N: IntArray) -> Float64Array:
    """Return log(p/(1 − p)) (N,) of the probability p of each image's class, from logits (N, K).

    The logit scaling of Carlini et al., 2022, arXiv 2112.03570, section VI-A, which makes it nearly
    normal. As z_y − log Σ_{k≠y} exp z_k, it loses no digits where p is near 1.
    """
    logits = np.asarray(logits_NK, dtype=np.float64)
    rows = np.arange(len(labels_N))
    others = logits.copy()
    others[rows, labels_N] = -np.inf
    most = others.max(axis=1)
    rest = most + np.log(np.exp(others - most[:, None]).sum(axis=1))
    found: Float64Array = logits[rows, labels_N] - rest
    return found


def online_lira(target_N: Float64Array, shadows_SN: Float64Array, in_SN: BoolArray) -> Float64Array:
    """Return the log-likelihood ratio (N,) of the online likelihood ratio attack.

    log N(φ; μ_in, σ_in²) − log N(φ; μ_out, σ_out²), with deviations that all images share, as for
    few shadow models (Carlini et al., 2022, arXiv 2112.03570, algorithm 1 and section VI-B).

    Parameters
    ----------
    target_N : ndarray
        The target's `margins`, (N,).
    shadows_SN : ndarray
        The shadow models', (S, N).
    in_SN : ndarray of bool
        Whether a shadow model was trained on an image, (S, N); of each image some were and some
        were not.
    """
    mean_in, deviation_in = _fitted(shadows_SN, in_SN)
    mean_out, deviation_out = _fitted(shadows_SN, ~in_SN)
    return _log_normal(target_N, mean_in, deviation_in) - _log_normal(
        target_N, mean_out, deviation_out
    )


def offline_lira(
    target_N: Float64Array, shadows_SN: Float64Array, in_SN: BoolArray
) -> Float64Array:
    """Return (φ − μ_out)/σ_out (N,): LiRA by models without the image alone.

    It orders as the published Φ of it does (Carlini et al., 2022, arXiv 2112.03570, equation 4),
    and does not saturate. Parameters are those of `online_lira`.
    """
    mean, deviation = _fitted(shadows_SN, ~in_SN)
    return (target_N - mean) / deviation


def rmia(
    target_N: Float64Array,
    shadows_SN: Float64Array,
    in_SN: BoolArray,
    *,
    gamma: float = 1.0,
) -> Float64Array:
    """Return the share (N,) of other images that an image's likelihood ratio dominates.

    The robust attack (Zarifzadeh et al., 2024, arXiv 2312.03262, equation 3): an image x beats z if
    (p_x/p̄_x) / (p_z/p̄_z) ≥ γ, where p is the target's probability and p̄ the mean of the shadow
    models', half of them in and half out. Parameters are those of `online_lira`; ``gamma`` is γ.
    """
    p_N = _probabilities(target_N)
    p_SN = _probabilities(shadows_SN)
    mean_in = mean_where(p_SN, in_SN)
    mean_out = mean_where(p_SN, ~in_SN)
    ratio_N = p_N / np.maximum((mean_in + mean_out) / 2, np.finfo(np.float64).tiny)
    ordered = np.sort(ratio_N)
    # An image does not compete with itself.
    beaten = np.searchsorted(ordered, ratio_N / gamma, side="right") - (gamma <= 1)
    found: Float64Array = beaten / max(len(ratio_N) - 1, 1)
    return found


def _fitted(values_SN: Float64Array, chosen_SN: BoolArray) -> tuple[Float64Array, float]:
    """Return the mean (N,) over the chosen models, and the deviation around it over all images."""
    mean_N = mean_where(values_SN, chosen_SN)
    squares = np.where(chosen_SN, (values_SN - mean_N) ** 2, 0.0).sum()
    # A mean fitted to each image takes a degree of freedom.
    freedom = max(int(chosen_SN.sum()) - values_SN.shape[1], 1)
    return mean_N, max(float(np.sqrt(squares / freedom)), _LEAST_DEVIATION)


def mean_where(values_SN: Float64Array, chosen_SN: BoolArray) -> Float64Array:
    """Return the mean (N,) of values (S, N) over the models chosen for each image, at least one."""
    found: Float64Array = np.where(chosen_SN, values_SN, 0.0).sum(axis=0) / chosen_SN.sum(axis=0)
    return found


def _log_normal(values_N: Float64Array, mean_N: Float64Array, deviation: float) -> Float64Array:
    """Return the log-density of the normal distribution, but for log √2π."""
    found: Float64Array = -0.5 * ((values_N - mean_N) / deviation) ** 2 - np.log(deviation)
    return found


def _probabilities(margins_N: Float64Array) -> Float64Array:
    from scipy.special import expit

    found: Float64Array = expit(margins_N)
    return found
