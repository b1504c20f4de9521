"""What the estimators share that ask about copies along directions."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Differences, num_copies
from fedzge_flwr.zeroth_order.base import Objective, Queries
from fedzge_flwr.zeroth_order.samplers import DirectionSampler


class Perturbing:
    """Asks about each image and about copies of it along q random directions.

    Parameters
    ----------
    sampler : DirectionSampler
        Draws the directions.
    q : int
        Directions per image, at least 1.
    eps : float
        Step ε > 0, in units of the shared pixel range.
    differences : {"forward", "central"}
        How slopes are measured; the paper's are forward.
    """

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
        return num_copies(self._q, two_sided=self._differences == "central")

    def ask(self, x_NCHW: Tensor, stream: torch.Generator, objective: Objective) -> Queries:
        """Draw q directions per image."""
        return Queries(x_NCHW, self._drawn(x_NCHW, stream), self._eps, self._differences)

    def _drawn(self, x_NCHW: Tensor, stream: torch.Generator) -> Directions:
        num_images, channels, height, width = x_NCHW.shape
        return self._sampler(self._q, num_images, (channels, height, width), stream)
