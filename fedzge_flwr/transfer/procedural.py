"""Procedural images: dead leaves and kin, drawn from nothing but random numbers.

Dead leaves (Lee, Mumford & Huang, 2001, "Occlusion models for natural images") are shapes of a
scale-invariant law of sizes, each covering what lies beneath it. Networks learn usable features
from such images alone (Baradad et al., 2021, arXiv 2106.05963). Their kin here are a few shapes on
a plain ground, and strokes: most photographs, products and characters show one thing in the middle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedzge_flwr.pixels import PIXEL_RANGE

_LEAVES = 24
_MIN_RADIUS, _MAX_RADIUS = 0.06, 1.0
_PLAIN_GROUND = 0.67


def procedural_images(
    num_images: int, image_shape: tuple[int, int, int], stream: torch.Generator
) -> Tensor:
    """Draw images: a third covered with leaves, a third objects, a third strokes.

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
    channels, height, width = image_shape
    draw = _Draw(num_images, stream)
    grid_2HW = _grid(height, width)
    kind_N = draw.integers(3)
    mirrored_N = (draw.uniform(0, 1) < 0.5) & (kind_N == 1)
    x_NCHW = _fill(draw, channels, grid_2HW, flat=kind_N > 0)
    # How many leaves of the loop an image shows: all, a few, or a few joined strokes.
    few_N = 1 + draw.integers(7)
    shown_N = torch.where(kind_N == 0, _LEAVES, few_N)
    end_N2 = draw.uniform_pairs(-0.6, 0.6)
    thickness_N = draw.uniform(0.05, 0.2)
    for leaf in range(_LEAVES):
        # Objects and strokes need fewer passes; their random numbers are drawn all the same.
        mask_NHW = _leaf_mask(draw, grid_2HW, central=kind_N == 1)
        start_N2, end_N2 = end_N2, draw.uniform_pairs(-0.8, 0.8)
        stroke_NHW = _stroke_mask(grid_2HW, start_N2, end_N2, thickness_N)
        mask_NHW = torch.where((kind_N == 2)[:, None, None], stroke_NHW, mask_NHW)
        mask_NHW = mask_NHW | (mask_NHW.flip(2) & mirrored_N[:, None, None])
        mask_NHW = mask_NHW & (leaf < shown_N)[:, None, None]
        fill_NCHW = _fill(draw, channels, grid_2HW, flat=kind_N == 2)
        x_NCHW = torch.where(mask_NHW[:, None], fill_NCHW, x_NCHW)
    x_NCHW = _soften(x_NCHW, draw.uniform(0, 1))
    return PIXEL_RANGE.from_unit(x_NCHW.mul(2).sub(1).clamp(-1, 1))


@dataclass(frozen=True)
class _Draw:
    """Random numbers, one for each image."""

    num: int
    stream: torch.Generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(self.num, *shape, generator=self.stream) * (high - low) + low

    def uniform_pairs(self, low: float, high: float) -> Tensor:
        return self.uniform(low, high, 2)

    def integers(self, high: int) -> Tensor:
        return torch.randint(high, (self.num,), generator=self.stream)


def _grid(height: int, width: int) -> Tensor:
    """Pixel centres as (2, H, W), y and x in [-1, 1]."""
    y = (torch.arange(height) + 0.5) / height * 2 - 1
    x = (torch.arange(width) + 0.5) / width * 2 - 1
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))


def _rotated(grid_2HW: Tensor, centre_N2: Tensor, angle_N: Tensor) -> tuple[Tensor, Tensor]:
    y_NHW = grid_2HW[0] - centre_N2[:, 0, None, None]
    x_NHW = grid_2HW[1] - centre_N2[:, 1, None, None]
    cos, sin = angle_N.cos()[:, None, None], angle_N.sin()[:, None, None]
    return cos * x_NHW + sin * y_NHW, cos * y_NHW - sin * x_NHW


def _leaf_mask(draw: _Draw, grid_2HW: Tensor, central: Tensor) -> Tensor:
    """Superellipses |x/a|^p + |y/b|^p < 1 (diamonds to boxes), radii with density ∝ r⁻³."""
    u_N = draw.uniform(0, 1)
    low, high = _MIN_RADIUS**-2, _MAX_RADIUS**-2
    radius_N = (low + u_N * (high - low)).rsqrt()
    # A thing in the middle is not made of specks.
    radius_N = torch.where(central, draw.uniform(0.15, 0.7), radius_N)
    spread_N = torch.where(central, 0.45, 1.1)
    centre_N2 = draw.uniform_pairs(-1, 1) * spread_N[:, None]
    aspect_N = draw.uniform(-1.0, 1.0).exp()
    power_N = draw.uniform(0.0, 2.5).exp()[:, None, None]
    # Upright as often as not: edges of things are.
    turned_N = draw.uniform(0, 1) < 0.5
    angle_N = torch.where(turned_N, draw.uniform(0, math.pi), 0.0)
    x_NHW, y_NHW = _rotated(grid_2HW, centre_N2, angle_N)
    a_N11 = (radius_N * aspect_N.sqrt())[:, None, None]
    b_N11 = (radius_N / aspect_N.sqrt())[:, None, None]
    return (x_NHW / a_N11).abs() ** power_N + (y_NHW / b_N11).abs() ** power_N < 1


def _stroke_mask(grid_2HW: Tensor, start_N2: Tensor, end_N2: Tensor, thickness_N: Tensor) -> Tensor:
    """Points within a thickness of a segment."""
    along_N2 = end_N2 - start_N2
    to_point_N2HW = grid_2HW - start_N2[:, :, None, None]
    dot_NHW = (to_point_N2HW * along_N2[:, :, None, None]).sum(1)
    t_NHW = (dot_NHW / (along_N2.square().sum(1) + 1e-6)[:, None, None]).clamp(0, 1)
    nearest_N2HW = t_NHW[:, None] * along_N2[:, :, None, None]
    distance_NHW = (to_point_N2HW - nearest_N2HW).square().sum(1).sqrt()
    return distance_NHW < thickness_N[:, None, None]


def _fill(draw: _Draw, channels: int, grid_2HW: Tensor, flat: Tensor) -> Tensor:
    """Colours in [0, 1]: plain, a gradient, or a grating; ``flat`` ones often black or white."""
    colour_NC = draw.uniform(0, 1, channels)
    # Channels of one image are alike more often than not.
    grey_N1 = draw.uniform(0, 1, 1)
    saturation_N1 = draw.uniform(0, 1, 1)
    colour_NC = grey_N1 + saturation_N1 * (colour_NC - grey_N1)
    extreme_N1 = (draw.uniform(0, 1, 1) < 0.5).float()
    plain_N1 = ((draw.uniform(0, 1) < _PLAIN_GROUND) & flat)[:, None]
    colour_NC = torch.where(plain_N1, extreme_N1, colour_NC)
    angle_N = draw.uniform(0, math.pi)
    zero_N2 = torch.zeros(draw.num, 2)
    along_NHW, _ = _rotated(grid_2HW, zero_N2, angle_N)
    gradient_NHW = along_NHW * draw.uniform(-0.5, 0.5)[:, None, None]
    frequency_N11 = draw.uniform(1.0, 3.2).exp()[:, None, None]
    phase_N11 = draw.uniform(0, 2 * math.pi)[:, None, None]
    grating_NHW = (along_NHW * frequency_N11 + phase_N11).sin() * draw.uniform(0, 0.5)[
        :, None, None
    ]
    texture_N = draw.integers(3)[:, None, None]
    texture_NHW = torch.where(texture_N == 1, gradient_NHW, grating_NHW)
    textured_N11 = ((texture_N > 0) & ~plain_N1[:, :, None]).float()
    return (colour_NC[:, :, None, None] + (texture_NHW * textured_N11)[:, None]).clamp(0, 1)


def _soften(x_NCHW: Tensor, amount_N: Tensor) -> Tensor:
    """Mix images with their 3×3 binomial blur."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel[None, :] / 16.0)[None, None]
    channels = x_NCHW.shape[1]
    padded = torch.nn.functional.pad(x_NCHW, (1, 1, 1, 1), mode="replicate")
    blurred = torch.nn.functional.conv2d(padded, kernel.expand(channels, 1, 3, 3), groups=channels)
    amount = amount_N[:, None, None, None]
    return x_NCHW + amount * (blurred - x_NCHW)
