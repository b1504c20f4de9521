"""Rows of a table: images of one pixel's height, in which neighbours have nothing in common."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.images.pixels import PIXEL_RANGE

_LEAST, _MOST = 0.2, 3.0
"""Of a row's exponent: 0.3 puts values at the ends of the range, 5 into its middle."""


def independent_values(
    num_images: int, image_shape: tuple[int, int, int], stream: torch.Generator
) -> Tensor:
    """Draw images whose values are independent of one another.

    A row draws how far its values lie from the middle of the range: |v| is u to a power, u uniform
    in [0, 1].

    Parameters
    ----------
    num_images : int
        N ≥ 0.
    image_shape : tuple of int
        (C, H, W).
    stream : torch.Generator
        A CPU stream; the same stream gives the same images.

    Returns
    -------
    Tensor
        float32 (N, C, H, W) on the CPU, in the shared pixel range.
    """
    spread_N111 = _LEAST + _MOST * torch.rand(num_images, 1, 1, 1, generator=stream)
    values_NCHW = 2 * torch.rand(num_images, *image_shape, generator=stream) - 1
    return PIXEL_RANGE.from_unit(values_NCHW.sign() * values_NCHW.abs().pow(1 / spread_N111))
