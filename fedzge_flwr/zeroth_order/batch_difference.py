"""The paper's estimator: one difference of the batch's loss per direction, shared by all images."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.query.question import Question
from fedzge_flwr.zeroth_order.base import Estimate, Objective, asked_tensors
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
    def tell(
        self, question: Question, ensemble_logits_BNK: Tensor, objective: Objective
    ) -> Estimate:
        """Estimate ∂L/∂x from the losses at the base and at the perturbed batches."""
        x_NCHW, u_QNCHW = asked_tensors(question, ensemble_logits_BNK.device)
        steps = question.eps * u_QNCHW
        asked = [x_NCHW, *(x_NCHW + steps)]
        if question.differences == "central":
            asked += list(x_NCHW - steps)
        copies = [
            objective.terms(
                copy_NCHW,
                logits_NK,
                in_chunks(objective.central_logits, copy_NCHW, objective.chunk),
            )
            for copy_NCHW, logits_NK in zip(asked, ensemble_logits_BNK, strict=True)
        ]
        slopes_Q = question.slopes(torch.stack([terms["total"] for terms in copies]))
        gradient = torch.zeros_like(x_NCHW, dtype=slopes_Q.dtype)
        for slope, u_NCHW in zip(slopes_Q, u_QNCHW, strict=True):
            gradient += slope * u_NCHW
        num_pixels = x_NCHW[0].numel()
        return Estimate(gradient * (num_pixels / len(u_QNCHW)), copies[0])
