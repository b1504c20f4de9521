"""The generator's objective and the distillation loss (arXiv 2503.06028).

All functions are differentiable, keep the dtype of their inputs, and call no model. Shapes: N
images of d = C·H·W pixels, K classes, latent dimension nz. Another objective is added with
``OBJECTIVES["name"] = function``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.registry import lookup


@dataclass(frozen=True)
class ObjectiveWeights:
    """The constants of the generator's objective, as the settings have them.

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


LossTerms: TypeAlias = Mapping[str, Tensor]
"""An objective and its terms by name, each a scalar: the generator minimises "total", the others
are for the record."""

GeneratorObjective: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, ObjectiveWeights], LossTerms
]
"""As `generator_objective`: images, noise, labels, the ensemble's and the central model's logits,
weights; differentiable in images and logits, any number of times, in any floating-point type."""

BoundObjective: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], LossTerms]
"""A `GeneratorObjective` with its weights."""


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
    """Return L = L_fid + β1·L_adv + β2·L_div + β3·L_info (arXiv 2503.06028) and its terms.

    Parameters
    ----------
    x_NCHW : Tensor
        Generated images, in the shared pixel range.
    z_ND, y_N : Tensor
        The noise and the int64 labels that they were generated from.
    ensemble_logits_NK, central_logits_NK : Tensor
        Logits of the clients' ensemble and of the central model on these images.
    weights : ObjectiveWeights
        T and β1 … β3.

    Returns
    -------
    Mapping[str, Tensor]
        Scalars: "fidelity", "adversarial", "diversity", "information", "total".
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
    return {
        "fidelity": fidelity,
        "adversarial": adversarial,
        "diversity": diversity,
        "information": information,
        "total": total,
    }


OBJECTIVES: dict[str, GeneratorObjective] = {"fedzge": generator_objective}
"""The generator's objectives by name, as the setting ``objective`` has them."""


def bound_objective(name: str, weights: ObjectiveWeights) -> BoundObjective:
    """Return an objective of the registry with its weights.

    Raises
    ------
    ConfigError
        If there is none of that name; when it is called, if it returns no scalar "total", or one
        that cannot be differentiated.
    """
    objective = lookup(OBJECTIVES, name, "objective")

    def bound(
        x_NCHW: Tensor,
        z_ND: Tensor,
        y_N: Tensor,
        ensemble_logits_NK: Tensor,
        central_logits_NK: Tensor,
    ) -> LossTerms:
        terms = objective(x_NCHW, z_ND, y_N, ensemble_logits_NK, central_logits_NK, weights)
        named = isinstance(terms, Mapping) and "total" in terms
        if not named or any(getattr(term, "shape", None) != () for term in terms.values()):
            raise ConfigError(
                f"objective '{name}' must return scalar tensors by name, with what is minimised as "
                "'total'"
            )
        inputs = (x_NCHW, ensemble_logits_NK, central_logits_NK)
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        if wanted and not terms["total"].requires_grad:
            raise ConfigError(
                f"objective '{name}': 'total' depends on neither images nor logits, or was detached"
            )
        return terms

    return bound


def detached(terms: LossTerms) -> LossTerms:
    """Return the terms without their graph."""
    return {name: term.detach() for name, term in terms.items()}


def distillation_loss(
    teacher_logits_NK: Tensor, student_logits_NK: Tensor, temperature: float
) -> Tensor:
    """Return T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over the batch.

    The T² keeps the gradient's size independent of T (Hinton et al., 2015, arXiv 1503.02531).
    """
    return temperature**2 * kl_divergence(teacher_logits_NK, student_logits_NK, temperature)
