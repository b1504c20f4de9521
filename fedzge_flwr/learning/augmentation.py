"""Images of a batch changed at random, such that their labels stay right.

A client that has seen its images moved and covered says less about what it has seen there, and
more about what is there: its answers on synthetic images, of which half are unlike anything that it
was trained on, become worth more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_SHIFT = 14
"""The side by the largest shift: 2 pixels of 28 or 32."""

_PATCH = 3
"""The side by a patch's."""


class Augmentation(NamedTuple):
    """Which changes are made; ``random-shifts`` and ``random-erasing``."""

    random_shifts: bool
    random_erasing: bool

    def applied(self, x_NCHW: Tensor, stream: torch.Generator) -> Tensor:
        """Return the images, `shifted` and then `erased`, by a CPU stream."""
        x_NCHW = shifted(x_NCHW, stream) if self.random_shifts else x_NCHW
        return erased(x_NCHW, stream) if self.random_erasing else x_NCHW


NO_AUGMENTATION = Augmentation(random_shifts=False, random_erasing=False)


def shifted(x_NCHW: Tensor, stream: torch.Generator) -> Tensor:
    """Move each image by up to a fourteenth of its sides, at least a pixel, in all directions.

    Pixels that come in are those of the edge. Random crops of padded images, as of He et al., 2016,
    arXiv 1512.03385, section 4.2.

    Parameters
    ----------
    x_NCHW : Tensor
        The images, (N, C, H, W), on any device; they stay as they are.
    stream : torch.Generator
        A CPU stream.

    Returns
    -------
    Tensor
        Images of the same shape.
    """
    num_images, _, height, width = x_NCHW.shape
    rows_NH = _moved(num_images, height, stream).to(x_NCHW.device)
    columns_NW = _moved(num_images, width, stream).to(x_NCHW.device)
    images_N = torch.arange(num_images, device=x_NCHW.device)
    # Indices on both sides of a slice: their axes come first.
    found_NHWC = x_NCHW[images_N[:, None, None], :, rows_NH[:, :, None], columns_NW[:, None, :]]
    return found_NHWC.permute(0, 3, 1, 2)


def _moved(num_images: int, side: int, stream: torch.Generator) -> Tensor:
    most = max(round(side / _LARGEST_SHIFT), 1)
    shifts_N = torch.randint(-most, most + 1, (num_images,), generator=stream)
    return (torch.arange(side) + shifts_N[:, None]).clamp(0, side - 1)


def erased(x_NCHW: Tensor, stream: torch.Generator) -> Tensor:
    """Cover a part of every second image, on average, by a rectangle of one random colour.

    Random erasing is Zhong et al., 2020, arXiv 1708.04896; here the rectangle has a third of each
    side, and lies within the image.

    Parameters
    ----------
    x_NCHW : Tensor
        The images, (N, C, H, W), in the shared pixel range, on any device; they stay as they are.
    stream : torch.Generator
        A CPU stream.

    Returns
    -------
    Tensor
        Images of the same shape, in the same range.
    """
    num_images, channels, height, width = x_NCHW.shape
    inside_NHW = (
        _span(num_images, height, stream)[:, :, None] & _span(num_images, width, stream)[:, None, :]
    )
    covered_N = torch.rand(num_images, generator=stream) < 0.5
    colours_NC = 2 * torch.rand(num_images, channels, generator=stream) - 1
    mask_NCHW = (inside_NHW & covered_N[:, None, None])[:, None].to(x_NCHW.device)
    return torch.where(mask_NCHW, colours_NC[:, :, None, None].to(x_NCHW), x_NCHW)


def _span(num_images: int, side: int, stream: torch.Generator) -> Tensor:
    """Return which of ``side`` pixels a third lies on that starts anywhere, bool (N, side)."""
    length = max(side // _PATCH, 1)
    starts_N1 = torch.randint(side - length + 1, (num_images, 1), generator=stream)
    return (torch.arange(side) >= starts_N1) & (torch.arange(side) < starts_N1 + length)
