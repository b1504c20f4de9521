"""The estimators by name.

Add one with ``ESTIMATORS["name"] = Class``; the contract tests take it up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from fedzge_flwr.query.copies import Differences
from fedzge_flwr.zeroth_order.base import Estimator
from fedzge_flwr.zeroth_order.batch_difference import BatchDifference
from fedzge_flwr.zeroth_order.guided import Guided
from fedzge_flwr.zeroth_order.per_image import PerImage
from fedzge_flwr.zeroth_order.samplers import DirectionSampler
from fedzge_flwr.zeroth_order.surrogate import Surrogate

EstimatorBuilder: TypeAlias = Callable[[DirectionSampler, int, float, Differences], Estimator]
"""``(sampler, q, eps, differences)`` to an estimator."""

ESTIMATORS: dict[str, EstimatorBuilder] = {
    "batch-difference": BatchDifference,
    "per-image": PerImage,
    "guided": Guided,
    "surrogate": Surrogate,
}
"""Estimators by name, as the setting ``estimator`` has them."""
