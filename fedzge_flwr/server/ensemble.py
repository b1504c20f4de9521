"""Combining clients' logits: eᵢ = Σₘ wₘ·fₘ(xᵢ), wₘ the client's share of training examples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedzge_flwr.arrays import FloatArray


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


def ensemble_logits(logits: Mapping[int, FloatArray], weights: Mapping[int, float]) -> FloatArray:
    """Return the weighted mean of the clients' logits.

    Parameters
    ----------
    logits : Mapping[int, ndarray of float32]
        Logits of any one shape, by partition.
    weights : Mapping[int, float]
        Weights of the same partitions.

    Returns
    -------
    ndarray of float32
        Summed in float64 and in order of partition, so that it does not depend on who came first.
    """
    partitions = sorted(logits)
    total = np.zeros(logits[partitions[0]].shape, dtype=np.float64)
    for partition in partitions:
        total += weights[partition] * logits[partition].astype(np.float64)
    return total.astype(np.float32)
