"""What the estimators share that ask about copies along directions."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.query.copies import Differences
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question
from fedzge_flwr.zeroth_order.base import Objective, ask_about
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

    def ask(self, x_NCHW: Tensor, stream: torch.Generator, objective: Objective) -> Question:
        """Draw q directions per image."""
        return ask_about(x_NCHW, self._drawn(x_NCHW, stream), self._eps, self._differences)

    def _drawn(self, x_NCHW: Tensor, stream: torch.Generator) -> Directions:
        num_images, channels, height, width = x_NCHW.shape
        return self._sampler(self._q, num_images, (channels, height, width), stream)
