"""What every estimator offers, and what passes between it and the round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedzge_flwr.losses import LossTerms

LossFn: TypeAlias = Callable[[Tensor, Tensor], LossTerms]
"""``(images (N, C, H, W), ensemble logits (N, K)) -> terms``: the objective as the server knows it.

It evaluates the central model itself, so that an estimator may differentiate through both arguments
while the clients stay a black box.
"""


@dataclass(frozen=True)
class Queries:
    """The images that one estimate asks about.

    Parameters
    ----------
    base_NCHW : Tensor
        The generated images.
    directions_QNCHW : Tensor
        q directions per image.
    eps : float
        Step ε > 0 along each direction, in units of the shared pixel range.
    """

    base_NCHW: Tensor
    directions_QNCHW: Tensor
    eps: float

    @property
    def images_BNCHW(self) -> Tensor:
        """All B = 1+q copies: the base at index 0, then x + εuⱼ."""
        base = self.base_NCHW.unsqueeze(0)
        return torch.cat((base, base + self.eps * self.directions_QNCHW))


@dataclass(frozen=True)
class Estimate:
    """An estimate of the gradient of the objective.

    Parameters
    ----------
    gradient_NCHW : Tensor
        Estimate of ∂L/∂x in the dtype of the loss terms.
    base : LossTerms
        The objective at the unperturbed images.
    """

    gradient_NCHW: Tensor
    base: LossTerms


class Estimator(Protocol):
    """Ask, then tell. Stateless between calls: all randomness comes from the stream passed in."""

    @property
    def copies(self) -> int:
        """Queries per image, the unperturbed one included."""
        ...

    def ask(self, x_NCHW: Tensor, stream: torch.Generator) -> Queries:
        """Choose the queries for a batch of images.

        Parameters
        ----------
        x_NCHW : Tensor
            Images, detached from the generator.
        stream : torch.Generator
            The CPU stream of this batch's directions.
        """
        ...

    def tell(self, queries: Queries, ensemble_logits_BNK: Tensor, loss_fn: LossFn) -> Estimate:
        """Estimate ∂L/∂x from the ensemble's answers.

        Parameters
        ----------
        queries : Queries
            What `ask` returned.
        ensemble_logits_BNK : Tensor
            The ensemble's logits on ``queries.images_BNCHW``.
        loss_fn : LossFn
            The objective.
        """
        ...
