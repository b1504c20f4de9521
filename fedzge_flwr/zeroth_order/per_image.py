"""The chain rule, with queries for each image's own Jacobian only."""

from __future__ import annotations

from torch import Tensor

from fedzge_flwr.query.question import Question
from fedzge_flwr.zeroth_order.base import Estimate, Objective, asked_tensors
from fedzge_flwr.zeroth_order.chain_rule import along, exact_parts, measured_slopes
from fedzge_flwr.zeroth_order.perturbing import Perturbing


class PerImage(Perturbing):
    """ĝᵢ = direct part + (d/q) Σⱼ ⟨∂L/∂eᵢ, (e(xᵢ+εuᵢⱼ) − e(xᵢ))/ε⟩ uᵢⱼ.

    The paper's estimator lets each image's direction be weighted by what all images' perturbations
    did together: with the same queries, this has about √N times its cosine.

    The parameters are those of `Perturbing`.
    """

    unbiased = True

    def tell(
        self, question: Question, ensemble_logits_BNK: Tensor, objective: Objective
    ) -> Estimate:
        """Weight each image's directions by what they did to its own logits."""
        x_NCHW, u_QNCHW = asked_tensors(question, ensemble_logits_BNK.device)
        exact = exact_parts(objective, x_NCHW, ensemble_logits_BNK[0])
        slopes_QN = measured_slopes(question, ensemble_logits_BNK, exact.by_logits_NK)
        scale = x_NCHW[0].numel() / question.num_directions
        through_NCHW = along(u_QNCHW, scale * slopes_QN)
        return Estimate(exact.direct_NCHW + through_NCHW, exact.terms)
