"""Evolution of patterns by the ensemble's answers: a zeroth-order search, whose queries all teach.

An evolution strategy (Rechenberg, 1973; Beyer & Schwefel, 2002, doi:10.1023/A:1015059928466) moves
codes (`fedzge_flwr.synthesis.patterns`) towards what a black box answers, by mutation and selection
alone. Each class has elites of its own, as in MAP-Elites (Mouret & Clune, 2015, arXiv 1504.04909),
so that a class which hardly any image is answered with gets the most children. A child is asked
about as any image is: its answer selects parents, and is a label.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedzge_flwr.synthesis.memory import Memory
from fedzge_flwr.synthesis.patterns import inherited, mutated
from fedzge_flwr.synthesis.screening import class_demand

_ELITE = 40
_CROSSED = 0.3
_LEAST_STEP, _LARGEST_STEP = 0.05, 0.5


def evolve(archive: Memory, num: int, channels: int, stream: torch.Generator) -> Tensor:
    """Make children of the elites of the classes in demand.

    A class's elites are the codes whose images the ensemble preferred it on by the largest margin
    over every other class. A child is a mutated copy of one, or of a cross of two; its step is
    log-uniform, from a local search to another image.

    Parameters
    ----------
    archive : Memory
        Codes with the ensemble's logits on their images, at least one.
    num : int
        N ≥ 1.
    channels : int
        C of the images.
    stream : torch.Generator
        A CPU stream.

    Returns
    -------
    Tensor
        Codes, float32 (N, D).
    """
    wanted_N = torch.multinomial(class_demand(archive.logits_MK), num, True, generator=stream)
    elites_EK = margins(archive.logits_MK).topk(min(_ELITE, len(archive)), dim=0).indices

    def parent() -> Tensor:
        rank_N = torch.randint(len(elites_EK), (num,), generator=stream)
        return archive.asked[elites_EK[rank_N, wanted_N]]

    first_ND, second_ND = parent(), parent()
    crossed_N = torch.rand(num, generator=stream) < _CROSSED
    child_ND = inherited(first_ND, second_ND, crossed_N, channels, stream)
    low, high = math.log(_LEAST_STEP), math.log(_LARGEST_STEP)
    steps_N = (torch.rand(num, generator=stream) * (high - low) + low).exp()
    return mutated(child_ND, steps_N, channels, stream)


def margins(logits_MK: Tensor) -> Tensor:
    """Return each class's logit less the greatest of the others, (M, K); K ≥ 2."""
    greatest_M2 = logits_MK.topk(2, dim=1).values
    is_first_MK = torch.zeros_like(logits_MK, dtype=torch.bool)
    is_first_MK.scatter_(1, logits_MK.argmax(dim=1, keepdim=True), True)
    return logits_MK - torch.where(is_first_MK, greatest_M2[:, 1:], greatest_M2[:, :1])
