"""No perturbed queries: the gradient through the central model in the clients' place."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.query.copies import Differences
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question
from fedzge_flwr.zeroth_order.base import Estimate, Objective, ask_about, asked_tensors
from fedzge_flwr.zeroth_order.chain_rule import exact_parts, pullbacks
from fedzge_flwr.zeroth_order.samplers import DirectionSampler


class Surrogate:
    """ĝ = direct part + J_sᵀ·∂L/∂e: the chain rule with the surrogate's Jacobian.

    ∂L/∂e is taken at the answered logits. Only the images themselves are asked about, which
    distillation wants anyway. Gradients of a distilled substitute transfer (Papernot et al., 2017,
    arXiv 1602.02697).

    Parameters
    ----------
    sampler, q, eps, differences
        As every estimator's; unused, since nothing is perturbed.
    """

    unbiased = False

    def __init__(
        self, sampler: DirectionSampler, q: int, eps: float, differences: Differences = "forward"
    ) -> None:
        self._eps = eps

    def ask(self, x_NCHW: Tensor, stream: torch.Generator, objective: Objective) -> Question:
        """Ask about the images alone."""
        num_images, channels, height, width = x_NCHW.shape
        nothing = Directions.none((channels, height, width), num_images)
        return ask_about(x_NCHW, nothing, self._eps)

    def tell(
        self, question: Question, ensemble_logits_BNK: Tensor, objective: Objective
    ) -> Estimate:
        """Pull ∂L/∂e back through the surrogate."""
        x_NCHW, _ = asked_tensors(question, ensemble_logits_BNK.device)
        exact = exact_parts(objective, x_NCHW, ensemble_logits_BNK[0])
        (through_NCHW,) = pullbacks(
            objective.surrogate_logits, x_NCHW, exact.by_logits_NK[None], objective.chunk
        )
        return Estimate(exact.direct_NCHW + through_NCHW, exact.terms)
