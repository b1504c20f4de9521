"""Gradients from answers: estimators that say what to ask and read a gradient from the reply.

An estimator never calls a client's model, and knows the central one through the objective only.
``ask`` turns images into queries; whoever holds the clients answers them; ``tell`` turns the
answers into ∂L/∂x. Add one with ``ESTIMATORS["name"] = Class``; the contract tests take it up.
"""

from __future__ import annotations

from collections.abc import Callable

from fedzge_flwr.zeroth_order.base import (
    Differences,
    Estimate,
    Estimator,
    Objective,
    Queries,
)
from fedzge_flwr.zeroth_order.batch_difference import BatchDifference
from fedzge_flwr.zeroth_order.directions import (
    DIRECTIONS,
    DirectionSampler,
    rademacher,
    sphere,
)
from fedzge_flwr.zeroth_order.guided import Guided
from fedzge_flwr.zeroth_order.per_image import PerImage
from fedzge_flwr.zeroth_order.surrogate import Surrogate

ESTIMATORS: dict[str, Callable[[DirectionSampler, int, float, Differences], Estimator]] = {
    "batch-difference": BatchDifference,
    "per-image": PerImage,
    "guided": Guided,
    "surrogate": Surrogate,
}

__all__ = [
    "DIRECTIONS",
    "ESTIMATORS",
    "BatchDifference",
    "Differences",
    "DirectionSampler",
    "Estimate",
    "Estimator",
    "Guided",
    "Objective",
    "PerImage",
    "Queries",
    "Surrogate",
    "rademacher",
    "sphere",
]
