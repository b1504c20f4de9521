"""∂L/∂x = direct + Jᵀ·∂L/∂e: what the server knows exactly, so that queries are left for Jᵀ alone.

e(x) are the ensemble's logits and J = ∂e/∂x is the clients' Jacobian, the one thing that the server
cannot compute. Since images do not influence one another's logits, each image has its own, and an
answer tells of its own image only: no other image's noise is in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedzge_flwr.losses import LossTerms
from fedzge_flwr.zeroth_order.base import Objective, Queries

_CHUNK = 64
"""Images whose graph through the surrogate is held at once."""


class ExactParts(NamedTuple):
    """What of ∂L/∂x needs no query (see `exact_parts`)."""

    terms: LossTerms
    by_logits_NK: Tensor
    direct_NCHW: Tensor


def exact_parts(objective: Objective, x_NCHW: Tensor, ensemble_logits_NK: Tensor) -> ExactParts:
    """Differentiate the objective by its two arguments.

    Parameters
    ----------
    objective : Objective
        The batch's objective.
    x_NCHW, ensemble_logits_NK : Tensor
        Images, and the ensemble's logits on them.

    Returns
    -------
    ExactParts
        The detached terms; ∂L/∂e at those logits; and the direct part of ∂L/∂x, which goes through
        diversity and central model. Both in float64.
    """
    x = x_NCHW.detach().requires_grad_()
    logits_NK = ensemble_logits_NK.detach().double().requires_grad_()
    with torch.enable_grad():
        terms = objective.terms(x, logits_NK)
        # By arguments, so that nothing is added to the central model's parameters.
        by_x, by_logits_NK = torch.autograd.grad(
            terms.total, (x, logits_NK), materialize_grads=True
        )
    return ExactParts(LossTerms(*(t.detach() for t in terms)), by_logits_NK, by_x.double())


def measured_slopes(queries: Queries, logits_BNK: Tensor, by_logits_NK: Tensor) -> Tensor:
    """Return ⟨Jᵢᵀ·∂L/∂eᵢ, uᵢⱼ⟩ as measured: the answers' slopes, weighted by ∂L/∂e; (Q, N)."""
    return (queries.slopes(logits_BNK.double()) * by_logits_NK).sum(dim=2)


def surrogate_pullbacks(objective: Objective, x_NCHW: Tensor, cotangents_MNK: Tensor) -> Tensor:
    """Return J_sᵀ·cotangent with the surrogate's Jacobian, for M cotangents of each image.

    Parameters
    ----------
    objective : Objective
        Has the surrogate.
    x_NCHW : Tensor
        Images.
    cotangents_MNK : Tensor
        Gradients by the logits.

    Returns
    -------
    Tensor
        float64 (M, N, C, H, W).
    """
    pulled = []
    for x_chunk, cotangents in zip(
        x_NCHW.detach().split(_CHUNK), cotangents_MNK.split(_CHUNK, dim=1), strict=True
    ):
        x = x_chunk.clone().requires_grad_()
        with torch.enable_grad():
            logits_NK = objective.surrogate_logits(x)
            rows = [
                torch.autograd.grad(logits_NK, x, one.to(logits_NK.dtype), retain_graph=True)[0]
                for one in cotangents
            ]
        pulled.append(torch.stack(rows).double())
    return torch.cat(pulled, dim=1)


def along(directions_QNCHW: Tensor, coefficients_QN: Tensor) -> Tensor:
    """Return Σⱼ cᵢⱼ·uᵢⱼ for each image, (N, C, H, W)."""
    return torch.einsum("qn,qnchw->nchw", coefficients_QN, directions_QNCHW.double())


def components(directions_QNCHW: Tensor, vectors_NCHW: Tensor) -> Tensor:
    """Return ⟨vᵢ, uᵢⱼ⟩, (Q, N)."""
    return torch.einsum("nchw,qnchw->qn", vectors_NCHW, directions_QNCHW.double())
