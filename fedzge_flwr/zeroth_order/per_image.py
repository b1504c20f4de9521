"""The chain rule, with queries for each image's own Jacobian only."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.zeroth_order.base import (
    Differences,
    Estimate,
    Objective,
    Queries,
    num_copies,
)
from fedzge_flwr.zeroth_order.chain_rule import along, exact_parts, measured_slopes
from fedzge_flwr.zeroth_order.directions import DirectionSampler


class PerImage:
    """ĝᵢ = direct part + (d/q) Σⱼ ⟨∂L/∂eᵢ, (e(xᵢ+εuᵢⱼ) − e(xᵢ))/ε⟩ uᵢⱼ.

    The paper's estimator lets each image's direction be weighted by what all images' perturbations
    did together: with the same queries, this has about √N times its cosine.

    Parameters
    ----------
    sampler : DirectionSampler
        Draws the directions.
    q : int
        Directions per image, at least 1.
    eps : float
        Step ε > 0.
    differences : {"forward", "central"}
        How slopes are measured.
    """

    unbiased = True

    def __init__(
        self, sampler: DirectionSampler, q: int, eps: float, differences: Differences = "forward"
    ) -> None:
        self._sampler = sampler
        self._q = q
        self._eps = eps
        self._differences = differences

    @property
    def copies(self) -> int:
        """Queries per image: 1 + q, or 1 + 2q."""
        return num_copies(self._q, self._differences)

    def ask(self, x_NCHW: Tensor, stream: torch.Generator, objective: Objective) -> Queries:
        """Draw q directions per image."""
        directions = self._sampler((self._q, *x_NCHW.shape), stream)
        directions = directions.to(x_NCHW.device, x_NCHW.dtype)
        return Queries(x_NCHW, directions, self._eps, self._differences)

    def tell(self, queries: Queries, ensemble_logits_BNK: Tensor, objective: Objective) -> Estimate:
        """Weight each image's directions by what they did to its own logits."""
        x_NCHW = queries.base_NCHW
        exact = exact_parts(objective, x_NCHW, ensemble_logits_BNK[0])
        slopes_QN = measured_slopes(queries, ensemble_logits_BNK, exact.by_logits_NK)
        scale = x_NCHW[0].numel() / self._q
        through_NCHW = along(queries.directions_QNCHW, scale * slopes_QN)
        return Estimate(exact.direct_NCHW + through_NCHW, exact.terms)
