"""What every estimator offers, and what passes between it and the round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fedzge_flwr.learning.losses import LossTerms
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Differences


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


@dataclass(frozen=True)
class Queries:
    """The images that one estimate asks about.

    Parameters
    ----------
    base_NCHW : Tensor
        The generated images.
    directions : Directions
        q ≥ 0 for each image.
    eps : float
        Step ε > 0 along each direction, in units of the shared pixel range.
    differences : {"forward", "central"}
        Whether each direction is asked about on one side or on both.
    """

    base_NCHW: Tensor
    directions: Directions
    eps: float
    differences: Differences = "forward"

    @cached_property
    def directions_QNCHW(self) -> Tensor:
        """The directions as clients decode them, in the images' dtype and on their device."""
        decoded = torch.from_numpy(self.directions.decoded())
        return decoded.to(self.base_NCHW.device, self.base_NCHW.dtype)

    @property
    def images_BNCHW(self) -> Tensor:
        """All copies: the base at index 0, then x + εuⱼ, then, for central ones, x − εuⱼ."""
        base = self.base_NCHW.unsqueeze(0)
        steps = self.eps * self.directions_QNCHW
        if self.differences == "central":
            return torch.cat((base, base + steps, base - steps))
        return torch.cat((base, base + steps))

    def slopes(self, values_B: Tensor) -> Tensor:
        """Return the derivative along each direction of what was evaluated on all copies.

        Parameters
        ----------
        values_B : Tensor
            (B, …), in the order of `images_BNCHW`; float64, since the differences are small.

        Returns
        -------
        Tensor
            (Q, …).
        """
        num_directions = len(self.directions.payload_QGP)
        ahead = values_B[1 : 1 + num_directions]
        if self.differences == "central":
            return (ahead - values_B[1 + num_directions :]) / (2 * self.eps)
        return (ahead - values_B[0]) / self.eps


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
    def copies(self) -> int:
        """Queries per image, the unperturbed one included: as `fedzge_flwr.COPIES` has it."""
        ...

    @property
    def unbiased(self) -> bool:
        """Whether the mean over directions is ∂L/∂x (up to O(ε)), whatever the central model is.

        A biased one is exact at best within what the central model knows.
        """
        ...

    def ask(self, x_NCHW: Tensor, stream: torch.Generator, objective: Objective) -> Queries:
        """Choose the queries for a batch of images.

        The queries' base images are these very ones.

        Parameters
        ----------
        x_NCHW : Tensor
            Images, detached from the generator; with ``wire = "compact"``, on the 256 levels that
            bytes have.
        stream : torch.Generator
            The CPU stream of this batch's directions.
        objective : Objective
            The batch's objective; its central model may guide the choice.
        """
        ...

    def tell(self, queries: Queries, ensemble_logits_BNK: Tensor, objective: Objective) -> Estimate:
        """Estimate ∂L/∂x from the ensemble's answers.

        Parameters
        ----------
        queries : Queries
            What `ask` returned.
        ensemble_logits_BNK : Tensor
            The ensemble's logits on ``queries.images_BNCHW``.
        objective : Objective
            The same as `ask`'s.
        """
        ...
