"""Memory of what was asked about, and of the ensemble's answers.

Distillation from the newest images alone forgets what older ones taught (Binici et al., 2022, arXiv
2108.05698; CaBaGE, arXiv 2409.10643, replays in the black-box setting); an answer, once paid for,
is used many times.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_BYTES = 4_000_000_000
"""Of images: what a machine that trains on images of 224 pixels has to spare."""


def most_kept(size: int, image_shape: tuple[int, int, int]) -> int:
    """Return how many images of (C, H, W) levels are kept, if ``size`` are wanted: at most 4 GB."""
    return min(size, max(_MOST_BYTES // math.prod(image_shape), 2))


class Memory:
    """The newest (image or code, ensemble logits) pairs, on the CPU.

    Parameters
    ----------
    size : int
        Pairs kept, at least 1; the oldest go first. An image takes C·H·W bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._asked: Tensor | None = None
        self._logits: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._asked is None else len(self._asked)

    @property
    def asked(self) -> Tensor:
        """What was asked about, oldest first; raises ValueError while there is nothing.

        Images as levels, uint8 (M, C, H, W), or patterns' codes, float32 (M, D).
        """
        if self._asked is None:
            raise ValueError("the memory is empty")
        return self._asked

    @property
    def logits_MK(self) -> Tensor:
        """The ensemble's float32 logits on them; raises ValueError while there are none."""
        if self._logits is None:
            raise ValueError("the memory is empty")
        return self._logits

    def snapshot(self) -> tuple[Tensor, Tensor] | None:
        """Return what `restore` takes up; None while there is nothing."""
        return (self.asked, self.logits_MK) if len(self) else None

    def restore(self, snapshot: tuple[Tensor, Tensor] | None) -> None:
        """Take up what `snapshot` returned."""
        if snapshot is not None:
            self._asked, self._logits = snapshot

    def add(self, asked: Tensor, logits_NK: Tensor) -> None:
        """Take in what a round asked about, and the ensemble's logits on it."""
        asked, logits = asked.cpu(), logits_NK.cpu().float()
        if self._asked is not None and self._logits is not None:
            asked = torch.cat((self._asked, asked))
            logits = torch.cat((self._logits, logits))
        # Copied, so that what is forgotten is freed.
        self._asked = asked[-self._size :].clone()
        self._logits = logits[-self._size :].clone()


class Memories(NamedTuple):
    """What a run remembers, with the ensemble's answers.

    Parameters
    ----------
    images : Memory
        All images that were asked about.
    codes : Memory
        The codes of those that are patterns.
    """

    images: Memory
    codes: Memory

    @classmethod
    def of(cls, size: int) -> Memories:
        """Return empty ones of some size."""
        return cls(Memory(size), Memory(size))

    def add(self, images: Tensor, logits_NK: Tensor, codes_ED: Tensor, first: int) -> None:
        """Take in a round's images, and the codes of those from ``first`` on that are patterns."""
        self.images.add(images, logits_NK)
        if len(codes_ED):
            self.codes.add(codes_ED, logits_NK[first : first + len(codes_ED)])
