"""Combining the clients' answers into the ensemble's logits.

A combination is a function of `Answers`; add one with ``ENSEMBLES["name"] = function``. Sums are in
float64 and in order of partition, so that they do not depend on who answered first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedzge_flwr.arrays import FloatArray

Float64Array: TypeAlias = npt.NDArray[np.float64]

_SMALLEST = 1e-8
"""Probabilities below it count as it: their logarithm is the ensemble's logit."""

_NEWEST_ROUND = 0.5
"""Weight of a round's answers in the running class tendency: clients change from round to round."""


@dataclass(frozen=True)
class Answers:
    """What clients answered, and what is known of them.

    Parameters
    ----------
    logits : Mapping[int, ndarray of float32]
        Logits (N, K) of the same images, by partition.
    weights : Mapping[int, float]
        Shares of the training examples, ≥ 0 and summing to 1, of the same partitions.
    tendencies : Mapping[int, ndarray of float64]
        Class tendencies (K,) of the same partitions (`update_tendencies`).
    temperature : float
        Divides the logits before a softmax, above 0. Classifiers are surer of synthetic images than
        of real ones, the more so the longer they train; softened, their answers teach more. A mean
        of logits takes none.
    """

    logits: Mapping[int, FloatArray]
    weights: Mapping[int, float]
    tendencies: Mapping[int, Float64Array]
    temperature: float = 1.0


Combination: TypeAlias = Callable[[Answers], FloatArray]
"""``Answers`` of N images and K classes to the ensemble's logits, float32 (N, K)."""


def ensemble_weights(num_examples: Mapping[int, int]) -> dict[int, float]:
    """Return each client's share of the training examples, in order of partition.

    Parameters
    ----------
    num_examples : Mapping[int, int]
        Training examples by partition, of the clients that answered. If all are 0, the weights are
        equal.

    Returns
    -------
    dict[int, float]
        Weights ≥ 0 that sum to 1.
    """
    total = sum(num_examples.values())
    return {
        partition: num_examples[partition] / total if total else 1.0 / len(num_examples)
        for partition in sorted(num_examples)
    }


def update_tendencies(
    tendencies: dict[int, Float64Array],
    logits: Mapping[int, FloatArray],
    temperature: float = 1.0,
) -> None:
    """Take a round's answers into the clients' running class tendencies.

    A client's tendency is its mean probability of each class over synthetic images: data-free, it
    tells what the client was trained on, since a classifier hardly ever answers with a class that
    it has not seen.

    Parameters
    ----------
    tendencies : dict[int, ndarray of float64]
        By partition, (K,) each, summing to 1; updated in place.
    logits : Mapping[int, ndarray of float32]
        Answers (N, K) on the round's unperturbed images, by partition.
    temperature : float
        As in `Answers`.
    """
    for partition, logits_NK in logits.items():
        mean_K = _probabilities(logits_NK, temperature).mean(axis=0)
        before_K = tendencies.get(partition, mean_K)
        tendencies[partition] = before_K + _NEWEST_ROUND * (mean_K - before_K)


def mean_logits(answers: Answers) -> FloatArray:
    """Return Σₘ wₘ·fₘ(x), the paper's ensemble (arXiv 2503.06028)."""
    return _weighted_sum(answers, lambda partition, logits: logits).astype(np.float32)


def mean_probability(answers: Answers) -> FloatArray:
    """Return log Σₘ wₘ·softmax(fₘ(x)/τ), the linear opinion pool.

    Unlike a mean of logits, it lets no client's very low logit veto a class that it never saw.
    """
    return _log(
        _weighted_sum(
            answers, lambda partition, logits: _probabilities(logits, answers.temperature)
        )
    )


def confidence(answers: Answers) -> FloatArray:
    """Return the opinion pool with weights wₘ·exp(−2·H), H the entropy of a client's answer.

    In the spirit of Cho et al., 2022, arXiv 2204.12703, who weigh by the variance of the answers.
    """

    def confident(partition: int, logits_NK: Float64Array) -> Float64Array:
        p_NK = _probabilities(logits_NK, answers.temperature)
        entropy_N1 = -(p_NK * np.log(np.maximum(p_NK, _SMALLEST))).sum(axis=1, keepdims=True)
        return np.asarray(p_NK * np.exp(-2.0 * entropy_N1), dtype=np.float64)

    return _log(_weighted_sum(answers, confident))


def class_tendency(answers: Answers) -> FloatArray:
    """Return the opinion pool in which a client's vote for a class weighs what it knows of it.

    log Σₘ vₘₖ·softmax(fₘ(x)/τ)ₖ, vₘₖ = wₘtₘₖ / Σⱼ wⱼtⱼₖ: wₘ·tₘₖ estimates client m's share of all
    training examples that are of class k, so vₘₖ is Bayes' posterior of the client given the class.
    This project's own; measured in the CHANGELOG.
    """
    knowledge = {
        partition: answers.weights[partition] * np.maximum(answers.tendencies[partition], _SMALLEST)
        for partition in sorted(answers.logits)
    }
    total_K = np.sum(list(knowledge.values()), axis=0)
    pool = sum(
        knowledge[partition]
        / total_K
        * _probabilities(answers.logits[partition], answers.temperature)
        for partition in sorted(answers.logits)
    )
    return _log(np.asarray(pool, dtype=np.float64))


ENSEMBLES: dict[str, Combination] = {
    "mean-logits": mean_logits,
    "mean-probability": mean_probability,
    "confidence": confidence,
    "class-tendency": class_tendency,
}


def _weighted_sum(
    answers: Answers, transform: Callable[[int, Float64Array], Float64Array]
) -> Float64Array:
    partitions = sorted(answers.logits)
    total = np.zeros(answers.logits[partitions[0]].shape, dtype=np.float64)
    for partition in partitions:
        logits_NK = answers.logits[partition].astype(np.float64)
        total += answers.weights[partition] * transform(partition, logits_NK)
    return total


def _probabilities(logits_NK: FloatArray | Float64Array, temperature: float) -> Float64Array:
    shifted = logits_NK.astype(np.float64) / temperature
    shifted -= shifted.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), dtype=np.float64)


def _log(pool_NK: Float64Array) -> FloatArray:
    normalised = pool_NK / pool_NK.sum(axis=1, keepdims=True)
    logits: FloatArray = np.log(np.maximum(normalised, _SMALLEST)).astype(np.float32)
    return logits
