"""Patterns moved by the central model's gradient: what a search without queries would find.

A pattern is a differentiable function of its code, so that the central model can stand in for the
ensemble, as it does for the generator with ``estimator = "surrogate"``. The control for evolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedzge_flwr.learning.outputs import logits_of
from fedzge_flwr.synthesis.memory import Memories
from fedzge_flwr.synthesis.patterns import draw_codes, render
from fedzge_flwr.synthesis.screening import class_demand
from fedzge_flwr.synthesis.sources import Proposed

_STEPS = 10
_STEP = 0.05
_AT_ONCE = 250


@dataclass(frozen=True)
class Steered:
    """A source: new patterns, each moved until the central model sees a wanted class in it.

    Parameters
    ----------
    central : nn.Module
        The central model.
    """

    central: nn.Module

    def __call__(
        self,
        num: int,
        image_shape: tuple[int, int, int],
        told: Memories,
        stream: torch.Generator,
    ) -> Proposed:
        """Return so many, wanted by class as for evolution."""
        codes_ND = draw_codes(num, image_shape[0], stream)
        if len(told.images):
            demand_K = class_demand(told.images.logits_MK)
            wanted_N = torch.multinomial(demand_K, num, True, generator=stream)
            parts = zip(codes_ND.split(_AT_ONCE), wanted_N.split(_AT_ONCE), strict=True)
            codes_ND = torch.cat([self._moved(*part, image_shape) for part in parts])
        return Proposed(render(codes_ND, image_shape), codes_ND)

    def _moved(
        self, codes_ND: Tensor, wanted_N: Tensor, image_shape: tuple[int, int, int]
    ) -> Tensor:
        self.central.eval()
        codes_ND = codes_ND.clone().requires_grad_()
        optimizer = torch.optim.Adam([codes_ND], lr=_STEP)
        for _ in range(_STEPS):
            logits_NK = logits_of(self.central(render(codes_ND, image_shape)))
            (gradient_ND,) = torch.autograd.grad(
                F.cross_entropy(logits_NK, wanted_N, reduction="sum"), codes_ND
            )
            codes_ND.grad = gradient_ND
            optimizer.step()
        return codes_ND.detach()
