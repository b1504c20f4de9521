"""The paper's estimator: one difference of the batch's loss per direction, shared by all images."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.zeroth_order.base import Estimate, Objective, Queries
from fedzge_flwr.zeroth_order.chain_rule import in_chunks
from fedzge_flwr.zeroth_order.perturbing import Perturbing


class BatchDifference(Perturbing):
    """Differences of the whole batch's loss (arXiv 2503.06028).

    ĝ = (d/q) Σⱼ (L(x+εuⱼ) − L(x))/ε · uⱼ, where L is a mean over the batch already and uⱼ holds
    one direction per image. (The released code divides by N once more, and takes L_info's
    logarithm at the unperturbed images; neither is done here.)

    The parameters are those of `Perturbing`.
    """

    unbiased = True

    @torch.no_grad()
    def tell(self, queries: Queries, ensemble_logits_BNK: Tensor, objective: Objective) -> Estimate:
        """Estimate ∂L/∂x from the losses at the base and at the perturbed batches."""
        copies = [
            objective.terms(
                x_NCHW, logits_NK, in_chunks(objective.central_logits, x_NCHW, objective.chunk)
            )
            for x_NCHW, logits_NK in zip(queries.images_BNCHW, ensemble_logits_BNK, strict=True)
        ]
        slopes_Q = queries.slopes(torch.stack([terms["total"] for terms in copies]))
        gradient = torch.zeros_like(queries.base_NCHW, dtype=slopes_Q.dtype)
        for slope, u_NCHW in zip(slopes_Q, queries.directions_QNCHW, strict=True):
            gradient += slope * u_NCHW
        num_pixels = queries.base_NCHW[0].numel()
        return Estimate(gradient * (num_pixels / len(queries.directions_QNCHW)), copies[0])
