"""∂L/∂x = direct + Jᵀ·∂L/∂e: what the server knows exactly, so that queries are left for Jᵀ alone.

e(x) are the ensemble's logits and J = ∂e/∂x is the clients' Jacobian, the one thing that the server
cannot compute. Since images do not influence one another's logits, each image has its own, and an
answer tells of its own image only: no other image's noise is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedzge_flwr.learning.losses import LossTerms, detached
from fedzge_flwr.learning.numerics import in_batches
from fedzge_flwr.query.question import Question
from fedzge_flwr.zeroth_order.base import Objective


class PartialGradients(NamedTuple):
    """The objective's gradients by each of its arguments, the others held (detached, float64)."""

    terms: LossTerms
    by_images_NCHW: Tensor
    by_ensemble_NK: Tensor
    by_central_NK: Tensor


class ExactParts(NamedTuple):
    """What of ∂L/∂x needs no query (see `exact_parts`)."""

    terms: LossTerms
    by_logits_NK: Tensor
    direct_NCHW: Tensor


def partial_gradients(
    objective: Objective, x_NCHW: Tensor, ensemble_logits_NK: Tensor
) -> PartialGradients:
    """Differentiate the objective by images, the ensemble's logits and the central model's."""
    x = x_NCHW.detach().requires_grad_()
    ensemble_NK = ensemble_logits_NK.detach().double().requires_grad_()
    central_NK = in_chunks(objective.central_logits, x_NCHW, objective.chunk).requires_grad_()
    with torch.enable_grad():
        terms = objective.terms(x, ensemble_NK, central_NK)
        gradients = torch.autograd.grad(
            terms["total"], (x, ensemble_NK, central_NK), materialize_grads=True
        )
    return PartialGradients(detached(terms), *(gradient.double() for gradient in gradients))


def exact_parts(objective: Objective, x_NCHW: Tensor, ensemble_logits_NK: Tensor) -> ExactParts:
    """Differentiate the objective by the ensemble's logits, and by the images as far as is known.

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
    partial = partial_gradients(objective, x_NCHW, ensemble_logits_NK)
    (through_central,) = pullbacks(
        objective.central_logits, x_NCHW, partial.by_central_NK[None], objective.chunk
    )
    through_central += partial.by_images_NCHW
    return ExactParts(partial.terms, partial.by_ensemble_NK, through_central)


def in_chunks(model: Callable[[Tensor], Tensor], x_NCHW: Tensor, chunk: int) -> Tensor:
    """Return a model's logits (N, K) without a graph, ``chunk`` images at a time."""
    with torch.no_grad():
        return torch.cat(in_batches(lambda rows: model(x_NCHW[rows]), len(x_NCHW), chunk))


def measured_slopes(question: Question, logits_BNK: Tensor, by_logits_NK: Tensor) -> Tensor:
    """Return ⟨Jᵢᵀ·∂L/∂eᵢ, uᵢⱼ⟩ as measured: the answers' slopes, weighted by ∂L/∂e; (Q, N)."""
    return (question.slopes(logits_BNK.double()) * by_logits_NK).sum(dim=2)


def pullbacks(
    model: Callable[[Tensor], Tensor], x_NCHW: Tensor, cotangents_MNK: Tensor, chunk: int
) -> Tensor:
    """Return J_mᵀ·cotangent with the model's Jacobian, for M cotangents of each image.

    Parameters
    ----------
    model : Callable[[Tensor], Tensor]
        Maps images to logits, each image on its own.
    x_NCHW : Tensor
        Images.
    cotangents_MNK : Tensor
        Gradients by the logits.
    chunk : int
        Images whose graph is held at once.

    Returns
    -------
    Tensor
        float64 (M, N, C, H, W).
    """

    def pulled(rows: slice) -> Tensor:
        x = x_NCHW[rows].detach().clone().requires_grad_()
        with torch.enable_grad():
            logits_NK = model(x)
            # By argument, so that nothing is added to the model's parameters.
            of_cotangents = [
                torch.autograd.grad(logits_NK, x, one.to(logits_NK.dtype), retain_graph=True)[0]
                for one in cotangents_MNK[:, rows]
            ]
        return torch.stack(of_cotangents).double()

    return torch.cat(in_batches(pulled, len(x_NCHW), chunk), dim=1)


def along(directions_QNCHW: Tensor, coefficients_QN: Tensor) -> Tensor:
    """Return Σⱼ cᵢⱼ·uᵢⱼ for each image, (N, C, H, W), in float64."""
    total = torch.zeros_like(directions_QNCHW[0], dtype=torch.float64)
    # One by one: all directions in float64 would be as much memory again as twice the queries.
    for u_NCHW, c_N in zip(directions_QNCHW, coefficients_QN, strict=True):
        total += c_N[:, None, None, None] * u_NCHW
    return total


def components(directions_QNCHW: Tensor, vectors_NCHW: Tensor) -> Tensor:
    """Return ⟨vᵢ, uᵢⱼ⟩, (Q, N), in float64."""
    return torch.stack([(u * vectors_NCHW).sum(dim=(1, 2, 3)) for u in directions_QNCHW])
