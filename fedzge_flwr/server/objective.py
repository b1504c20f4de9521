"""The generator's objective on one batch, as the server can evaluate it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedzge_flwr.learning.losses import BoundObjective, LossTerms
from fedzge_flwr.learning.outputs import logits_of


@dataclass(frozen=True)
class BatchObjective:
    """The estimators' `Objective`, of the central model and one batch's noise and labels.

    The central model answers in evaluation mode, so that no query leaks into its running
    statistics.

    Parameters
    ----------
    central : nn.Module
        The central model.
    z_ND, y_N : Tensor
        The batch's noise and labels; its images are an argument.
    function : BoundObjective
        What is to be minimised.
    surrogate_shift : int
        Pixels by which `surrogate_logits` moves images; 0 leaves the central model as it is.
    chunk : int
        Images whose graph through the central model is held at once, with their shifted copies.
    """

    central: nn.Module
    z_ND: Tensor
    y_N: Tensor
    function: BoundObjective
    surrogate_shift: int
    chunk: int

    def terms(
        self, images_NCHW: Tensor, ensemble_logits_NK: Tensor, central_logits_NK: Tensor
    ) -> LossTerms:
        """Evaluate the objective.

        In float64: its differences over a step of ε are a few units of float32's last place. The
        central model itself stays in float32.
        """
        return self.function(
            images_NCHW.double(),
            self.z_ND.double(),
            self.y_N,
            ensemble_logits_NK.double(),
            central_logits_NK.double(),
        )

    def central_logits(self, images_NCHW: Tensor) -> Tensor:
        """Return the central model's logits."""
        self.central.eval()
        return logits_of(self.central(images_NCHW))

    def surrogate_logits(self, images_NCHW: Tensor) -> Tensor:
        """Return the central model's mean logits over an image and its four shifted copies.

        Two networks that agree on an image have gradients that differ from pixel to pixel; the mean
        over small translations keeps what they share (Dong et al., 2019, arXiv 1904.02884).
        """
        steps = [(0, 0)]
        if self.surrogate_shift:
            s = self.surrogate_shift
            steps += [(s, 0), (-s, 0), (0, s), (0, -s)]
        moved = torch.cat([images_NCHW.roll(step, dims=(2, 3)) for step in steps])
        logits_SNK = self.central_logits(moved).unflatten(0, (len(steps), -1))
        mean_NK: Tensor = logits_SNK.mean(dim=0)
        return mean_NK
