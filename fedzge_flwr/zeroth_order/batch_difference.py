"""The paper's estimator: one difference of the batch's loss per direction, shared by all images."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.zeroth_order.base import Estimate, LossFn, Queries
from fedzge_flwr.zeroth_order.directions import DirectionSampler


class BatchDifference:
    """Forward differences of the whole batch's loss (arXiv 2503.06028).

    ĝ = (d/q) Σⱼ (L(x+εuⱼ) − L(x))/ε · uⱼ, where L is a mean over the batch already and uⱼ holds
    one direction per image. (The released code divides by N once more, and takes L_info's
    logarithm at the unperturbed images; neither is done here.)

    Parameters
    ----------
    sampler : DirectionSampler
        Draws the directions.
    q : int
        Directions per image, at least 1.
    eps : float
        Step ε > 0.
    """

    def __init__(self, sampler: DirectionSampler, q: int, eps: float) -> None:
        self._sampler = sampler
        self._q = q
        self._eps = eps

    @property
    def copies(self) -> int:
        """Queries per image: 1 + q."""
        return 1 + self._q

    def ask(self, x_NCHW: Tensor, stream: torch.Generator) -> Queries:
        """Draw q directions per image."""
        directions = self._sampler((self._q, *x_NCHW.shape), stream)
        return Queries(x_NCHW, directions.to(x_NCHW.device, x_NCHW.dtype), self._eps)

    @torch.no_grad()
    def tell(self, queries: Queries, ensemble_logits_BNK: Tensor, loss_fn: LossFn) -> Estimate:
        """Estimate ∂L/∂x from the losses at the base and at the q perturbed batches."""
        images_BNCHW = queries.images_BNCHW
        base = loss_fn(images_BNCHW[0], ensemble_logits_BNK[0])
        gradient = torch.zeros_like(queries.base_NCHW, dtype=base.total.dtype)
        for u_NCHW, x_NCHW, logits_NK in zip(
            queries.directions_QNCHW, images_BNCHW[1:], ensemble_logits_BNK[1:], strict=True
        ):
            slope = (loss_fn(x_NCHW, logits_NK).total - base.total) / queries.eps
            gradient += slope * u_NCHW
        num_pixels = queries.base_NCHW[0].numel()
        return Estimate(gradient * (num_pixels / len(queries.directions_QNCHW)), base)
