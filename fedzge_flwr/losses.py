"""The generator's objective and the distillation loss (arXiv 2503.06028).

All functions are differentiable, keep the dtype of their inputs, and call no model. Shapes: N
images of d = C·H·W pixels, K classes, latent dimension nz.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class ObjectiveWeights:
    """The constants of the generator's objective.

    Parameters
    ----------
    temperature : float
        T > 0 of the adversarial term's softmaxes.
    beta1, beta2, beta3 : float
        Weights of the adversarial, the diversity and the information term.
    """

    temperature: float
    beta1: float
    beta2: float
    beta3: float


class LossTerms(NamedTuple):
    """The generator's objective and its four terms, each a scalar tensor."""

    fidelity: Tensor
    adversarial: Tensor
    diversity: Tensor
    information: Tensor
    total: Tensor


def fidelity_loss(ensemble_logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Return the mean cross-entropy of the ensemble's logits against the generator's labels."""
    return F.cross_entropy(ensemble_logits_NK, y_N)


def kl_divergence(
    teacher_logits_NK: Tensor, student_logits_NK: Tensor, temperature: float
) -> Tensor:
    """Return KL(softmax(teacher/T) ‖ softmax(student/T)), the mean over the batch, ≥ 0, in nats."""
    return F.kl_div(
        F.log_softmax(student_logits_NK / temperature, dim=1),
        F.log_softmax(teacher_logits_NK / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def adversarial_loss(
    ensemble_logits_NK: Tensor, central_logits_NK: Tensor, temperature: float
) -> Tensor:
    """Return −KL(softmax(e/T) ‖ softmax(s/T)), without the T² of distillation.

    Its minimum is where the central model disagrees most with the ensemble, so that distillation
    has something to transfer ("transferability").
    """
    return -kl_divergence(ensemble_logits_NK, central_logits_NK, temperature)


def diversity_loss(x_NCHW: Tensor, z_ND: Tensor) -> Tensor:
    """Return exp(−mean over all N² ordered pairs of ‖xᵢ−xⱼ‖²/d · ‖zᵢ−zⱼ‖²/nz), in (0, 1].

    Distances come from the Gram matrix: N×N numbers, where expanding the pairs would take N×N×d.
    Its cancellation costs digits where images are alike, so callers that take differences of this
    value pass float64.
    """
    return torch.exp(-(_mean_square_distances(x_NCHW) * _mean_square_distances(z_ND)).mean())


def _mean_square_distances(points: Tensor) -> Tensor:
    """Return the (N, N) squared Euclidean distances between rows, divided by their length."""
    # Distances do not change when a common offset is taken away, and the Gram matrix of centred
    # rows loses fewer digits.
    flat = points.flatten(1)
    flat = flat - flat.mean(dim=0)
    gram = flat @ flat.T
    squares = gram.diagonal()
    distances = squares[:, None] + squares[None, :] - 2.0 * gram
    return distances / flat.shape[1]


def information_loss(ensemble_logits_NK: Tensor) -> Tensor:
    """Return Σₖ p̄ₖ log p̄ₖ of the batch-mean probabilities p̄, in [−log K, 0] ("equilibrium")."""
    num_images = ensemble_logits_NK.shape[0]
    log_probabilities_NK = F.log_softmax(ensemble_logits_NK, dim=1)
    log_mean = torch.logsumexp(log_probabilities_NK, dim=0) - math.log(num_images)
    return (log_mean.exp() * log_mean).sum()


def generator_objective(
    x_NCHW: Tensor,
    z_ND: Tensor,
    y_N: Tensor,
    ensemble_logits_NK: Tensor,
    central_logits_NK: Tensor,
    weights: ObjectiveWeights,
) -> LossTerms:
    """Return L = L_fid + β1·L_adv + β2·L_div + β3·L_info and its terms.

    Parameters
    ----------
    x_NCHW : Tensor
        Generated images.
    z_ND, y_N : Tensor
        The noise and the int64 labels that they were generated from.
    ensemble_logits_NK, central_logits_NK : Tensor
        Logits of the clients' ensemble and of the central model on these images.
    weights : ObjectiveWeights
        T and β1 … β3.
    """
    fidelity = fidelity_loss(ensemble_logits_NK, y_N)
    adversarial = adversarial_loss(ensemble_logits_NK, central_logits_NK, weights.temperature)
    diversity = diversity_loss(x_NCHW, z_ND)
    information = information_loss(ensemble_logits_NK)
    total = (
        fidelity
        + weights.beta1 * adversarial
        + weights.beta2 * diversity
        + weights.beta3 * information
    )
    return LossTerms(fidelity, adversarial, diversity, information, total)


def distillation_loss(
    teacher_logits_NK: Tensor, student_logits_NK: Tensor, temperature: float
) -> Tensor:
    """Return T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over the batch.

    The T² keeps the gradient's size independent of T (Hinton et al., 2015, arXiv 1503.02531).
    """
    return temperature**2 * kl_divergence(teacher_logits_NK, student_logits_NK, temperature)
