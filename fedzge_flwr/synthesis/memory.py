"""Memory of past images and of the ensemble's answers on them.

Distillation from the newest images alone forgets what older ones taught (Binici et al., 2022, arXiv
2108.05698; CaBaGE, arXiv 2409.10643, replays in the black-box setting); an answer, once paid for,
is used many times.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Memory:
    """The newest (image, ensemble logits) pairs, on the CPU.

    Parameters
    ----------
    size : int
        Pairs kept, at least 1; the oldest go first. An image takes C·H·W bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._images: Tensor | None = None
        self._logits: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._images is None else len(self._images)

    @property
    def images_u8_MCHW(self) -> Tensor:
        """The images, uint8, oldest first; raises ValueError while there are none."""
        if self._images is None:
            raise ValueError("the memory is empty")
        return self._images

    @property
    def logits_MK(self) -> Tensor:
        """The ensemble's float32 logits on them; raises ValueError while there are none."""
        if self._logits is None:
            raise ValueError("the memory is empty")
        return self._logits

    def restore(self, images_u8_MCHW: Tensor, logits_MK: Tensor) -> None:
        """Take up what `images_u8_MCHW` and `logits_MK` were."""
        self._images, self._logits = images_u8_MCHW, logits_MK

    def add(self, images_u8_NCHW: Tensor, logits_NK: Tensor) -> None:
        """Take in a round's images, uint8, and the ensemble's logits on them."""
        images, logits = images_u8_NCHW.cpu(), logits_NK.cpu().float()
        if self._images is not None and self._logits is not None:
            images = torch.cat((self._images, images))
            logits = torch.cat((self._logits, logits))
        # Copied, so that what is forgotten is freed.
        self._images = images[-self._size :].clone()
        self._logits = logits[-self._size :].clone()
