"""Queries along the directions in which the central model says that the ensemble is sensitive.

Prior-guided random search (Cheng et al., 2019, arXiv 1906.06919; Maheswaranathan et al., 2019,
arXiv 1806.10230) spends one direction on a surrogate's gradient. Here each likely class has one
more, and the estimate is the *projection* of the gradient onto what was asked, not an unbiased sum
in which the random directions' noise, √(d/q) times the gradient, would drown the guided ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedzge_flwr.learning.numerics import in_batches
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question
from fedzge_flwr.zeroth_order.base import Estimate, Objective, ask_about, asked_tensors
from fedzge_flwr.zeroth_order.chain_rule import (
    along,
    components,
    exact_parts,
    in_chunks,
    measured_slopes,
    partial_gradients,
    pullbacks,
)
from fedzge_flwr.zeroth_order.perturbing import Perturbing

_NEGLIGIBLE = 1e-4
"""Relative length under which a remainder is rounding: its direction means nothing."""


class Guided(Perturbing):
    """ĝ = direct part + α·g_s + Σⱼ aⱼ·uⱼ, with the measured slope along every uⱼ.

    Before they are rounded, u₁ is the surrogate's J_sᵀ·∂L/∂e, with ∂L/∂e at the surrogate's own
    logits since no answer is there yet; u₂ … are the rows of J_s of its likeliest classes, each
    less the mean row (∂L/∂e sums to zero over classes, as softmaxes do not see a common shift), all
    orthonormal. What guidance does not fill is drawn at random, orthogonal to it. Then each is
    rounded to the ternary direction nearest to it (`Directions.ternary`): a twentieth of float32's
    bytes for a few hundredths of the cosine.

    The a solve ⟨α·g_s + Σⱼ aⱼ·uⱼ, uᵢ⟩ = cᵢ for the measured slopes cᵢ. What lies outside the
    directions is taken from the surrogate's gradient g_s, now with the answered ∂L/∂e, scaled by
    the one α that fits the batch's slopes best.

    The parameters are those of `Perturbing`, with q at most d; the sampler draws what guidance does
    not fill.
    """

    unbiased = False

    def ask(self, x_NCHW: Tensor, stream: torch.Generator, objective: Objective) -> Question:
        """Choose q directions per image."""
        logits_NK = in_chunks(objective.surrogate_logits, x_NCHW, objective.chunk)
        expected_NK = partial_gradients(objective, x_NCHW, logits_NK).by_ensemble_NK
        num_classes = logits_NK.shape[1]
        likely_NK = logits_NK.argsort(dim=1, descending=True, stable=True)
        rows_NKK = torch.eye(num_classes, device=x_NCHW.device)[likely_NK] - 1 / num_classes
        cotangents_MNK = torch.cat((expected_NK[None], rows_NKK.transpose(0, 1)))[: self._q]
        spare_QNCHW = torch.from_numpy(self._drawn(x_NCHW, stream).decoded())
        payloads = in_batches(
            lambda rows: (
                self._chosen(
                    objective, x_NCHW[rows], cotangents_MNK[:, rows], spare_QNCHW[:, rows]
                ).payload_QGP
            ),
            len(x_NCHW),
            objective.chunk,
        )
        _, channels, height, width = x_NCHW.shape
        directions = Directions(np.concatenate(payloads, axis=1), (channels, height, width))
        return ask_about(x_NCHW, directions, self._eps, self._differences)

    def _chosen(
        self,
        objective: Objective,
        x_NCHW: Tensor,
        cotangents_MNK: Tensor,
        spare_QNCHW: Tensor,
    ) -> Directions:
        """Choose the directions of some images, each by itself."""
        guides = pullbacks(objective.surrogate_logits, x_NCHW, cotangents_MNK, len(x_NCHW))
        spare = spare_QNCHW.to(x_NCHW.device)
        directions = orthonormal(guides.flatten(2), spare.double().flatten(2))
        return Directions.ternary(directions.reshape(spare.shape).float().cpu().numpy())

    def tell(
        self, question: Question, ensemble_logits_BNK: Tensor, objective: Objective
    ) -> Estimate:
        """Fit the slopes; take what lies outside the directions from the surrogate."""
        x_NCHW, u_QNCHW = asked_tensors(question, ensemble_logits_BNK.device)
        exact = exact_parts(objective, x_NCHW, ensemble_logits_BNK[0])
        slopes_QN = measured_slopes(question, ensemble_logits_BNK, exact.by_logits_NK)
        (prior_NCHW,) = pullbacks(
            objective.surrogate_logits, x_NCHW, exact.by_logits_NK[None], objective.chunk
        )
        foreseen_QN = components(u_QNCHW, prior_NCHW)
        square = foreseen_QN.square().sum()
        alpha = (slopes_QN * foreseen_QN).sum() / square if square > 0 else square
        gram_QQN = torch.stack([components(u_QNCHW, u_NCHW.double()) for u_NCHW in u_QNCHW])
        # Directions may coincide once they are rounded: the shortest of all solutions.
        inverse_NQQ = torch.linalg.pinv(gram_QQN.permute(2, 0, 1), rtol=_NEGLIGIBLE, hermitian=True)
        wanted_QN = torch.einsum("nqp,pn->qn", inverse_NQQ, slopes_QN - alpha * foreseen_QN)
        through_NCHW = alpha * prior_NCHW + along(u_QNCHW, wanted_QN)
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
