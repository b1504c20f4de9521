"""Which of the images drawn are asked about: those that even out the classes of the answers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.learning.distillation import class_weights


def screen(candidates_NCHW: Tensor, logits_NK: Tensor, num: int, stream: torch.Generator) -> Tensor:
    """Choose images so that their classes are as even as the candidates allow.

    Candidates cost no query. Drawn without replacement, weighed by `class_weights` with power 1.
    The criterion is this project's own; that a student should choose what its black-box teacher is
    asked about is active learning (Orekondy et al., 2019, "Knockoff nets", arXiv 1812.02766).

    Parameters
    ----------
    candidates_NCHW : Tensor
        Images, on the CPU.
    logits_NK : Tensor
        What the central model says of them.
    num : int
        Images to choose, at most N.
    stream : torch.Generator
        A CPU stream.

    Returns
    -------
    Tensor
        (num, C, H, W).
    """
    return candidates_NCHW[torch.multinomial(class_weights(logits_NK, 1.0), num, generator=stream)]
