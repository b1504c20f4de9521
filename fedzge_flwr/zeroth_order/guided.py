"""Queries along the directions in which the central model says that the ensemble is sensitive.

Prior-guided random search (Cheng et al., 2019, arXiv 1906.06919; Maheswaranathan et al., 2019,
arXiv 1806.10230) spends one direction on a surrogate's gradient. Here each likely class has one
more, and the estimate is the *projection* of the gradient onto what was asked, not an unbiased sum
in which the random directions' noise, √(d/q) times the gradient, would drown the guided ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.zeroth_order.base import Estimate, Objective, Queries
from fedzge_flwr.zeroth_order.chain_rule import (
    along,
    components,
    exact_parts,
    measured_slopes,
    surrogate_pullbacks,
)
from fedzge_flwr.zeroth_order.perturbing import Perturbing

_NEGLIGIBLE = 1e-4
"""Relative length under which a remainder is rounding: its direction means nothing."""


class Guided(Perturbing):
    """ĝ = direct part + α·g_s + Σⱼ (cⱼ − α·⟨g_s, uⱼ⟩)·uⱼ over orthonormal guided directions.

    u₁ is the surrogate's J_sᵀ·∂L/∂e, with ∂L/∂e at the surrogate's own logits since no answer is
    there yet; u₂ … are the rows of J_s of its likeliest classes, each less the mean row (∂L/∂e sums
    to zero over classes, as softmaxes do not see a common shift). What guidance does not fill is
    drawn at random, orthogonal to it. cⱼ are the measured slopes; what lies outside the directions
    is taken from the surrogate's gradient g_s, now with the answered ∂L/∂e, scaled by the one α
    that fits the batch's slopes best.

    The parameters are those of `Perturbing`, with q at most d; the sampler draws what guidance does
    not fill.
    """

    unbiased = False

    def ask(self, x_NCHW: Tensor, stream: torch.Generator, objective: Objective) -> Queries:
        """Choose q orthonormal directions per image."""
        with torch.no_grad():
            logits_NK = objective.surrogate_logits(x_NCHW)
        expected = exact_parts(objective, x_NCHW, logits_NK).by_logits_NK
        num_classes = logits_NK.shape[1]
        likely_NK = logits_NK.argsort(dim=1, descending=True, stable=True)
        rows_NKK = torch.eye(num_classes, device=x_NCHW.device)[likely_NK] - 1 / num_classes
        cotangents_MNK = torch.cat((expected[None], rows_NKK.transpose(0, 1)))[: self._q]
        guides = surrogate_pullbacks(objective, x_NCHW, cotangents_MNK)
        spare = self._sampler((self._q, *x_NCHW.shape), stream).to(x_NCHW.device)
        directions = orthonormal(guides.flatten(2), spare.double().flatten(2))
        directions = directions.reshape(-1, *x_NCHW.shape).to(x_NCHW.dtype)
        return Queries(x_NCHW, directions, self._eps, self._differences)

    def tell(self, queries: Queries, ensemble_logits_BNK: Tensor, objective: Objective) -> Estimate:
        """Project onto the directions; take the rest from the surrogate."""
        x_NCHW, u_QNCHW = queries.base_NCHW, queries.directions_QNCHW
        exact = exact_parts(objective, x_NCHW, ensemble_logits_BNK[0])
        slopes_QN = measured_slopes(queries, ensemble_logits_BNK, exact.by_logits_NK)
        (prior_NCHW,) = surrogate_pullbacks(objective, x_NCHW, exact.by_logits_NK[None])
        foreseen_QN = components(u_QNCHW, prior_NCHW)
        square = foreseen_QN.square().sum()
        alpha = (slopes_QN * foreseen_QN).sum() / square if square > 0 else square
        through_NCHW = alpha * prior_NCHW + along(u_QNCHW, slopes_QN - alpha * foreseen_QN)
        return Estimate(exact.direct_NCHW + through_NCHW, exact.terms)


def orthonormal(guides_MND: Tensor, spare_QND: Tensor) -> Tensor:
    """Orthonormalise each image's vectors, in order, by Gram and Schmidt.

    Parameters
    ----------
    guides_MND : Tensor
        M ≤ Q vectors of length D per image.
    spare_QND : Tensor
        Q random vectors, Q ≤ D. The j-th takes the place of a j-th guide that is missing, zero, or
        a combination of those before it.

    Returns
    -------
    Tensor
        (Q, N, D), in the inputs' dtype; float64 keeps rows orthogonal to its last digits.
    """
    done: list[Tensor] = []
    for number, spare_ND in enumerate(spare_QND):
        chosen_ND = _rejected(spare_ND, done)
        if number < len(guides_MND):
            guide_ND = guides_MND[number]
            left_ND = _rejected(guide_ND, done)
            length_N1 = guide_ND.norm(dim=1, keepdim=True)
            meant_N1 = left_ND.norm(dim=1, keepdim=True) > _NEGLIGIBLE * length_N1
            chosen_ND = torch.where(meant_N1, left_ND, chosen_ND)
        done.append(chosen_ND / chosen_ND.norm(dim=1, keepdim=True))
    return torch.stack(done)


def _rejected(vectors_ND: Tensor, done: list[Tensor]) -> Tensor:
    """Take from each vector what lies along earlier ones; twice, against rounding."""
    for _ in range(2):
        for u_ND in done:
            vectors_ND = vectors_ND - (vectors_ND * u_ND).sum(dim=1, keepdim=True) * u_ND
    return vectors_ND
