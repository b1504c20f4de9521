"""Combining the clients' answers into the ensemble's logits.

A combination is a function of `Answers`; add one with ``ENSEMBLES["name"] = function``. Sums are in
float64 and in order of partition or of size, so that they do not depend on who answered first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.special import log_softmax, softmax

from fedzge_flwr.common.arrays import Float64Array, FloatArray
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.server.contrasts import Table

_SMALLEST = 1e-8
"""Probabilities below it count as it: their logarithm is the ensemble's logit."""

_REWEIGHTINGS = 16
"""Rounds of reweighted least squares; more change hardly anything."""

_TUNING = 2.385
"""Cauchy's weights at this many deviations lose 5 % of the efficiency of least squares if nobody
lies (Holland & Welsch, 1977)."""

_LEAST_SCALE = 0.5
"""Logits that differ by so little agree: where few clients know the same classes, most fit exactly,
and the median distance says nothing."""

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
        Divides the logits before they are combined, above 0. Classifiers are surer of synthetic
        images than of real ones, the more so the longer they train; softened, their answers teach
        more (Hinton et al., 2015, arXiv 1503.02531, who soften teacher and student alike). The
        paper's mean of logits takes none.
    """

    logits: Mapping[int, FloatArray]
    weights: Mapping[int, float]
    tendencies: Mapping[int, Float64Array]
    temperature: float = 1.0


Combination: TypeAlias = Callable[[Answers], FloatArray]
"""``Answers`` of N images and K classes to the ensemble's logits, float32 (N, K)."""


def check_combined(name: str, found: FloatArray, wanted: tuple[int, ...]) -> None:
    """Check an ensemble's logits, since one from outside the package may return anything.

    Raises
    ------
    ConfigError
        If they are not finite or not of the answers' shape.
    """
    if found.shape != wanted:
        raise ConfigError(
            f"ensemble '{name}' returned shape {found.shape} for logits of shape {wanted}: return "
            "as many"
        )
    if not np.isfinite(found).all():
        raise ConfigError(f"ensemble '{name}' returned values that are not finite: bound them")


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
    tendencies: dict[int, Float64Array], logits: Mapping[int, FloatArray]
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
    """
    for partition, logits_NK in logits.items():
        mean_K = _probabilities(logits_NK, 1.0).mean(axis=0)
        before_K = tendencies.get(partition, mean_K)
        tendencies[partition] = before_K + _NEWEST_ROUND * (mean_K - before_K)


def mean(answers: Answers) -> FloatArray:
    """Return Σₘ wₘ·fₘ(x), the paper's ensemble (arXiv 2503.06028)."""
    return _weighted_sum(answers, lambda partition, logits: logits).astype(np.float32)


def median(answers: Answers) -> FloatArray:
    """Return the log of the median over clients of softmax(fₘ(x)/τ), class by class.

    Wrong answers of fewer than half of the clients cannot take it out of the range of the others'.
    Coordinate-wise median of Yin et al., 2018, arXiv 1803.01498; see `trimmed_mean` for what the
    two share. Of two clients, and of the middle two of an even number, it is the mean.
    """
    return _trimmed(answers, lambda num_clients: (num_clients - 1) // 2)


def trimmed_mean(answers: Answers) -> FloatArray:
    """Return the log of the mean over clients of softmax(fₘ(x)/τ), but for each class's extremes.

    Of M clients' values the k highest and the k lowest are left out, k = ⌈M/5⌉ but at most
    (M−1)/2: so k clients that answer anything at all cannot take it out of the range of the
    others'. 10 clients bear two such, 3 to 5 bear one (of 3 and 4 it is the median); of 2 it is the
    mean, since nothing tells which of two that disagree is wrong. Coordinate-wise trimmed mean of
    Yin et al., 2018, arXiv 1803.01498, there of gradients.

    Of probabilities, since logits have each client's own scale and common shift, and since
    where garbage is one extreme, honest answers are cut off at the other: that shifts means of
    logarithms, whose low extremes are far away, by more (`docs/evidence.md`).
    Claimed numbers of examples do not weigh: a claim costs nothing and must buy nothing. Only who
    claims to have none is left out, if others have some.
    """
    return _trimmed(answers, lambda num_clients: min(-(-num_clients // 5), (num_clients - 1) // 2))


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
    This project's own; measured in `docs/evidence.md`.
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


def known_contrasts(answers: Answers) -> FloatArray:
    """Return logits whose contrasts between classes are those of the clients that know both.

    A classifier's logits are log-odds: fₘⱼ − fₘₖ says how much sooner the image is of class j than
    of k, and is worth something only if client m has seen both; how likely the image is to be of
    any other class it cannot say. So each client's logits are taken as e + cₘ + noise, with an
    offset of its own and a precision that grows with what it knows of a class:

    minₑ min_c Σₘ Σₖ wₘtₘₖ (fₘₖ(x)/τ − eₖ − cₘ)²

    This is weighted least squares of an incomplete two-way table (Yates, 1933, "The analysis of
    replicated experiments when the field results are incomplete"), linear in the answers; the
    logarithmic opinion pool (Genest & Zidek, 1986) if all clients know all classes alike. Its use
    here is this project's own; measured in `docs/evidence.md`.
    """
    partitions, logits_MNK = _softened(answers)
    table = _table(answers, partitions, logits_MNK, answers.weights)
    return table.fitted(np.ones(logits_MNK.shape[:2])).astype(np.float32)


def robust_contrasts(answers: Answers) -> FloatArray:
    """Return known contrasts that no single client decides, whatever it answers or claims.

    `known_contrasts` is linear in the answers, so one client can make it anything. Here three
    things are bounded:

    - what an answer says: log softmax(fₘ(x)/τ) ends where the median client's lowest one does, so
      that nobody is surer of an image than the others;
    - a client's weight: at most the median of the clients' weights, so that a claimed number of
      examples buys no more than that;
    - whom it can outvote: a client counts the less, the further it is from what the others say, in
      the classes that it knows, on this image and wherever it gave the same answer,

    uₘ(x) = s² / (s² + dₘ(x)² + Σₖ pₘₖ(x) Dₘₖ),   dₘ(x)² = min_c Σₖ tₘₖ (fₘₖ(x) − eₖ(x) − c)².

    p is softmax(f/τ), and Dₘₖ the mean of dₘ² over all images that are combined together, weighted
    by pₘₖ: what the client's word for class k was worth. s is 2.385 times the median of all dₘ(x),
    but at least ½. These are the weights of Cauchy's distribution, Student's t of one degree of
    freedom (Lange, Little & Taylor, 1989, "Robust statistical modeling using the t distribution"),
    with reliability by class in the spirit of Dawid & Skene, 1979, "Maximum likelihood estimation
    of observer error-rates using the EM algorithm". The fit is by sixteen rounds of reweighted
    least squares from equal weights, and the constant that for which honest clients lose 5 % of
    their efficiency (Holland & Welsch, 1977, "Robust regression using iteratively reweighted
    least-squares"). A client pulls with u·d ≤ s/2, and the less, the more it lies. Nobody can
    contradict a client about what it alone knows. Measured in `docs/evidence.md`.
    """
    partitions, logits_MNK = _softened(answers)
    logs_MNK = log_softmax(logits_MNK, axis=2)
    table = _table(answers, partitions, _bounded(logs_MNK), _capped(answers.weights))
    p_MNK, trust_MN = np.exp(logs_MNK), np.ones(logs_MNK.shape[:2])
    for _ in range(_REWEIGHTINGS):
        trust_MN = _trust(table.distances(table.fitted(trust_MN)), p_MNK)
    return table.fitted(trust_MN).astype(np.float32)


ENSEMBLES: dict[str, Combination] = {
    "mean": mean,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "mean-probability": mean_probability,
    "confidence": confidence,
    "class-tendency": class_tendency,
    "known-contrasts": known_contrasts,
    "robust-contrasts": robust_contrasts,
}
"""Ways to combine answers by name, as the setting ``ensemble`` has them."""


def _softened(answers: Answers) -> tuple[list[int], Float64Array]:
    """Return who has a weight, in order of partition, and what they answered, (M, N, K), over τ."""
    partitions = [partition for partition in sorted(answers.logits) if answers.weights[partition]]
    logits_MNK = np.stack([answers.logits[p].astype(np.float64) for p in partitions])
    return partitions, logits_MNK / answers.temperature


def _table(
    answers: Answers,
    partitions: Sequence[int],
    logits_MNK: Float64Array,
    weights: Mapping[int, float],
) -> Table:
    return Table.of(
        logits_MNK,
        np.array([weights[p] for p in partitions], dtype=np.float64),
        np.stack([answers.tendencies[p] for p in partitions]),
    )


def _bounded(logs_MNK: Float64Array) -> Float64Array:
    """Return logarithms that end, on each image, at the median of the clients' lowest ones.

    Of an even number of clients it is the higher one, as half of the clients must decide nothing.
    """
    lowest_N = np.quantile(logs_MNK.min(axis=2), 0.5, axis=0, method="higher")
    return np.asarray(np.maximum(logs_MNK, lowest_N[:, None]), dtype=np.float64)


def _trust(distances_MN: Float64Array, p_MNK: Float64Array) -> Float64Array:
    """Return uₘ(x) of squared distances and of the probabilities that clients answered with."""
    scale = max(_TUNING**2 * float(np.median(distances_MN)), _LEAST_SCALE**2)
    of_client_M1 = distances_MN.mean(axis=1, keepdims=True)
    # A class that a client never answers with counts as its answers do on average.
    of_class_MK = (np.einsum("mn,mnk->mk", distances_MN, p_MNK) + of_client_M1) / (
        p_MNK.sum(axis=1) + 1
    )
    words_MN = np.einsum("mnk,mk->mn", p_MNK, of_class_MK)
    return np.asarray(scale / (scale + distances_MN + words_MN), dtype=np.float64)


def _capped(weights: Mapping[int, float]) -> dict[int, float]:
    """Return weights of at most their median, the lower one of an even number."""
    positive = [weight for weight in weights.values() if weight > 0]
    most = float(np.quantile(positive, 0.5, method="lower"))
    return {partition: min(weight, most) for partition, weight in weights.items()}


def _trimmed(answers: Answers, num_trimmed: Callable[[int], int]) -> FloatArray:
    """Return the log of the mean, class by class, of what lies between the extremes."""
    p_MNK = np.stack(
        [
            _probabilities(logits_NK, answers.temperature)
            for partition, logits_NK in answers.logits.items()
            if answers.weights[partition] > 0
        ]
    )
    p_MNK.sort(axis=0)
    trim = num_trimmed(len(p_MNK))
    p_NK = p_MNK[trim : len(p_MNK) - trim].mean(axis=0)
    # Not normalised over classes, which would let one class's values move another's.
    return np.asarray(np.log(np.maximum(p_NK, _SMALLEST)), dtype=np.float32)


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
    return np.asarray(softmax(logits_NK.astype(np.float64) / temperature, axis=1))


def _log(pool_NK: Float64Array) -> FloatArray:
    normalised = pool_NK / pool_NK.sum(axis=1, keepdims=True)
    logits: FloatArray = np.log(np.maximum(normalised, _SMALLEST)).astype(np.float32)
    return logits
