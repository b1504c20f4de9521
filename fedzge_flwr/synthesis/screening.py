"""Which of the images drawn are asked about: those that even out the classes of the answers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.learning.distillation import class_weights

_LEAST_SHARE = 0.01


def class_demand(logits_MK: Tensor) -> Tensor:
    """Return probabilities (K,) of asking for each class: inverse to its share of the answers.

    Parameters
    ----------
    logits_MK : Tensor
        The ensemble's logits so far, M ≥ 1.
    """
    share_K = logits_MK.softmax(dim=1).mean(dim=0)
    demand_K = 1.0 / (share_K + _LEAST_SHARE)
    return demand_K / demand_K.sum()


def screen(logits_NK: Tensor, num: int, stream: torch.Generator) -> Tensor:
    """Choose candidates so that their classes are as even as they allow.

    Candidates cost no query. Drawn without replacement, weighed by `class_weights` with power 1.
    The criterion is this project's own; that a student should choose what its black-box teacher is
    asked about is active learning (Orekondy et al., 2019, "Knockoff nets", arXiv 1812.02766).

    Parameters
    ----------
    logits_NK : Tensor
        What the central model says of the candidates.
    num : int
        How many to choose, at most N.
    stream : torch.Generator
        A CPU stream.

    Returns
    -------
    Tensor
        int64 (num,): which they are.
    """
    return torch.multinomial(class_weights(logits_NK, 1.0), num, generator=stream)
