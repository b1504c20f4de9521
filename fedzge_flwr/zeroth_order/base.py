"""What every estimator offers, and what passes between it and the round.

An estimator never calls a client's model, and knows the central one through the objective only.
``ask`` turns images into a question; whoever holds the clients answers it; ``tell`` turns the
answers into ∂L/∂x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedzge_flwr.learning.losses import LossTerms
from fedzge_flwr.query.copies import Differences
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question


class Objective(Protocol):
    """What the server knows of one batch: the objective and its own model, never the clients."""

    @property
    def chunk(self) -> int:
        """Images whose graph through the central model is held at once."""
        ...

    def terms(
        self, images_NCHW: Tensor, ensemble_logits_NK: Tensor, central_logits_NK: Tensor
    ) -> LossTerms:
        """Evaluate the objective; differentiable in all three arguments."""
        ...

    def central_logits(self, images_NCHW: Tensor) -> Tensor:
        """Return the central model's logits (N, K), differentiable in the images.

        No image may influence another's logits.
        """
        ...

    def surrogate_logits(self, images_NCHW: Tensor) -> Tensor:
        """Return logits (N, K) of a white-box stand-in for the ensemble, as `central_logits` does.

        It is made of the central model.
        """
        ...


def ask_about(
    x_NCHW: Tensor, directions: Directions, eps: float, differences: Differences = "forward"
) -> Question:
    """Return the question about images on any device, as they are, along some directions."""
    return Question(x_NCHW.detach().cpu().numpy(), directions, eps, differences)


def asked_tensors(question: Question, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a question's images (N, C, H, W), and its directions (Q, N, C, H, W) in their dtype.

    The directions are those that clients decode.
    """
    x_NCHW = torch.from_numpy(question.base_NCHW).to(device)
    return x_NCHW, torch.from_numpy(question.directions_QNCHW).to(device, x_NCHW.dtype)


@dataclass(frozen=True)
class Estimate:
    """An estimate of the gradient of the objective.

    Parameters
    ----------
    gradient_NCHW : Tensor
        Estimate of ∂L/∂x in float64.
    base : LossTerms
        The objective at the unperturbed images, detached.
    """

    gradient_NCHW: Tensor
    base: LossTerms


class Estimator(Protocol):
    """Ask, then tell. Stateless between calls: all randomness comes from the stream passed in."""

    @property
    def unbiased(self) -> bool:
        """Whether the mean over directions is ∂L/∂x (up to O(ε)), whatever the central model is.

        A biased one is exact at best within what the central model knows.
        """
        ...

    def ask(self, x_NCHW: Tensor, stream: torch.Generator, objective: Objective) -> Question:
        """Choose what to ask about a batch of images.

        The question's base images are these very ones, and it asks about as many copies of each as
        `fedzge_flwr.query.copies.copies_asked` says.

        Parameters
        ----------
        x_NCHW : Tensor
            Images, detached from the generator; on the 256 levels that bytes have, but for the
            paper's recipe with ``transport = "dense"``.
        stream : torch.Generator
            The CPU stream of this batch's directions.
        objective : Objective
            The batch's objective; its central model may guide the choice.
        """
        ...

    def tell(
        self, question: Question, ensemble_logits_BNK: Tensor, objective: Objective
    ) -> Estimate:
        """Estimate ∂L/∂x from the ensemble's answers.

        Parameters
        ----------
        question : Question
            What `ask` returned.
        ensemble_logits_BNK : Tensor
            The ensemble's logits on x, then on x + εuⱼ, then, for central differences, on x − εuⱼ.
        objective : Objective
            The same as `ask`'s.
        """
        ...
