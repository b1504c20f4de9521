"""Evening out the classes of synthetic images.

Asked about synthetic images, classifiers answer half of them with one class and hardly any with
some others; a student that sees them as they come learns the rare classes last, if at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_SHARE = 0.01
"""A class that is answered more rarely counts as if it were so often."""


def class_weights(logits_NK: Tensor, power: float) -> Tensor:
    """Return how often each image is to be drawn, relative to the others.

    An image whose likeliest class is k weighs (share of k + 0.01)^−power: class-balanced sampling,
    as in long-tailed recognition (Kang et al., 2020, arXiv 1910.09217), by a model's answers for
    want of labels.

    Parameters
    ----------
    logits_NK : Tensor
        Logits of at least one image.
    power : float
        0: all alike; 0.5: square-root sampling; 1: all classes that occur equally often.

    Returns
    -------
    Tensor
        float32 (N,), above 0, on the CPU.
    """
    classes_N = logits_NK.argmax(dim=1).cpu()
    counts_K = torch.bincount(classes_N, minlength=logits_NK.shape[1])
    share_K = counts_K.float() / len(classes_N)
    return (share_K + _LEAST_SHARE).pow(-power)[classes_N]


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
