"""Gradients from answers: estimators that say what to ask and read a gradient from the reply.

An estimator never calls a model. ``ask`` turns images into queries; whoever holds the clients
answers them; ``tell`` turns the answers into ∂L/∂x. Add one with ``ESTIMATORS["name"] = Class``.
"""

from __future__ import annotations

from collections.abc import Callable

from fedzge_flwr.zeroth_order.base import Estimate, Estimator, LossFn, Queries
from fedzge_flwr.zeroth_order.batch_difference import BatchDifference
from fedzge_flwr.zeroth_order.directions import DIRECTIONS, DirectionSampler, sphere

ESTIMATORS: dict[str, Callable[[DirectionSampler, int, float], Estimator]] = {
    "batch-difference": BatchDifference,
}

__all__ = [
    "DIRECTIONS",
    "ESTIMATORS",
    "BatchDifference",
    "DirectionSampler",
    "Estimate",
    "Estimator",
    "LossFn",
    "Queries",
    "sphere",
]
