"""Procedural images: dead leaves and kin, drawn from nothing but random numbers.

Dead leaves (Lee, Mumford & Huang, 2001, "Occlusion models for natural images") are shapes of a
scale-invariant law of sizes, each covering what lies beneath it. Networks learn usable features
from such images alone (Baradad et al., 2021, arXiv 2106.05963). Their kin here are a few shapes on
a plain ground, and strokes: most photographs, products and characters show one thing in the middle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fedzge_flwr.images.pixels import PIXEL_RANGE

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
    x_NCHW = _Fill.drawn(draw, channels, flat=kind_N > 0).render(grid_2HW)
    # How many leaves of the loop an image shows: all, a few, or a few joined strokes.
    few_N = 1 + draw.integers(7)
    shown_N = torch.where(kind_N == 0, _LEAVES, few_N)
    end_N2 = draw.uniform_pairs(-0.6, 0.6)
    thickness_N = draw.uniform(0.05, 0.2)
    for number in range(_LEAVES):
        # Random numbers are drawn for all images, and only what is shown is rendered.
        leaf = _Leaf.drawn(draw, central=kind_N == 1)
        start_N2, end_N2 = end_N2, draw.uniform_pairs(-0.8, 0.8)
        stroke = _Stroke(start_N2, end_N2, thickness_N)
        fill = _Fill.drawn(draw, channels, flat=kind_N == 2)
        shown = torch.nonzero((kind_N != 2) & (number < shown_N)).flatten()
        mask_NHW = _of(leaf, shown).mask(grid_2HW)
        mask_NHW = mask_NHW | (mask_NHW.flip(2) & mirrored_N[shown, None, None])
        _paint(x_NCHW, shown, mask_NHW, _of(fill, shown).render(grid_2HW))
        shown = torch.nonzero((kind_N == 2) & (number < shown_N)).flatten()
        mask_NHW = _of(stroke, shown).mask(grid_2HW)
        _paint(x_NCHW, shown, mask_NHW, _of(fill, shown).render(grid_2HW))
    x_NCHW = _soften(x_NCHW, draw.uniform(0, 1))
    return PIXEL_RANGE.from_unit(x_NCHW.mul(2).sub(1).clamp(-1, 1))


T = TypeVar("T", "_Leaf", "_Stroke", "_Fill")


def _paint(x_NCHW: Tensor, indices: Tensor, mask_SHW: Tensor, colour_SCHW: Tensor) -> None:
    """Cover what lies under the masks, in the images of these indices (S,)."""
    x_NCHW[indices] = torch.where(mask_SHW[:, None], colour_SCHW, x_NCHW[indices])


def _of(parameters: T, indices: Tensor) -> T:
    """Return the parameters of some of the images."""
    return type(parameters)(*(value[indices] for value in parameters))


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


class _Leaf(NamedTuple):
    """Superellipses |x/a|^p + |y/b|^p < 1, diamonds to boxes: centres (N, 2), the rest (N,)."""

    centre_N2: Tensor
    angle_N: Tensor
    a_N: Tensor
    b_N: Tensor
    power_N: Tensor

    @classmethod
    def drawn(cls, draw: _Draw, central: Tensor) -> _Leaf:
        """Draw radii with density ∝ r⁻³."""
        u_N = draw.uniform(0, 1)
        low, high = _MIN_RADIUS**-2, _MAX_RADIUS**-2
        radius_N = (low + u_N * (high - low)).rsqrt()
        # A thing in the middle is not made of specks.
        radius_N = torch.where(central, draw.uniform(0.15, 0.7), radius_N)
        spread_N = torch.where(central, 0.45, 1.1)
        centre_N2 = draw.uniform_pairs(-1, 1) * spread_N[:, None]
        aspect_N = draw.uniform(-1.0, 1.0).exp()
        power_N = draw.uniform(0.0, 2.5).exp()
        # Upright as often as not: edges of things are.
        turned_N = draw.uniform(0, 1) < 0.5
        angle_N = torch.where(turned_N, draw.uniform(0, math.pi), 0.0)
        return cls(
            centre_N2, angle_N, radius_N * aspect_N.sqrt(), radius_N / aspect_N.sqrt(), power_N
        )

    def mask(self, grid_2HW: Tensor) -> Tensor:
        """Return the points inside, (N, H, W)."""
        x_NHW, y_NHW = _rotated(grid_2HW, self.centre_N2, self.angle_N)
        power_N11 = self.power_N[:, None, None]
        across_NHW = (x_NHW / self.a_N[:, None, None]).abs() ** power_N11
        return across_NHW + (y_NHW / self.b_N[:, None, None]).abs() ** power_N11 < 1


class _Stroke(NamedTuple):
    """Segments (N, 2) to (N, 2), drawn with a thickness (N,)."""

    start_N2: Tensor
    end_N2: Tensor
    thickness_N: Tensor

    def mask(self, grid_2HW: Tensor) -> Tensor:
        """Return the points within the thickness of the segment, (N, H, W)."""
        along_N2 = self.end_N2 - self.start_N2
        to_point_N2HW = grid_2HW - self.start_N2[:, :, None, None]
        dot_NHW = (to_point_N2HW * along_N2[:, :, None, None]).sum(1)
        t_NHW = (dot_NHW / (along_N2.square().sum(1) + 1e-6)[:, None, None]).clamp(0, 1)
        nearest_N2HW = t_NHW[:, None] * along_N2[:, :, None, None]
        distance_NHW = (to_point_N2HW - nearest_N2HW).square().sum(1).sqrt()
        return distance_NHW < self.thickness_N[:, None, None]


class _Fill(NamedTuple):
    """Colours in [0, 1]: plain, a gradient, or a grating; ``flat`` ones often black or white."""

    colour_NC: Tensor
    angle_N: Tensor
    slope_N: Tensor
    frequency_N: Tensor
    phase_N: Tensor
    amplitude_N: Tensor
    texture_N: Tensor
    plain_N: Tensor

    @classmethod
    def drawn(cls, draw: _Draw, channels: int, flat: Tensor) -> _Fill:
        """Draw colours; channels of one image are alike more often than not."""
        colour_NC = draw.uniform(0, 1, channels)
        grey_N1 = draw.uniform(0, 1, 1)
        saturation_N1 = draw.uniform(0, 1, 1)
        colour_NC = grey_N1 + saturation_N1 * (colour_NC - grey_N1)
        extreme_N1 = (draw.uniform(0, 1, 1) < 0.5).float()
        plain_N = (draw.uniform(0, 1) < _PLAIN_GROUND) & flat
        return cls(
            colour_NC=torch.where(plain_N[:, None], extreme_N1, colour_NC),
            angle_N=draw.uniform(0, math.pi),
            slope_N=draw.uniform(-0.5, 0.5),
            frequency_N=draw.uniform(1.0, 3.2).exp(),
            phase_N=draw.uniform(0, 2 * math.pi),
            amplitude_N=draw.uniform(0, 0.5),
            texture_N=draw.integers(3),
            plain_N=plain_N,
        )

    def render(self, grid_2HW: Tensor) -> Tensor:
        """Return the colours at each point, (N, C, H, W)."""
        along_NHW, _ = _rotated(grid_2HW, torch.zeros(len(self.angle_N), 2), self.angle_N)
        gradient_NHW = along_NHW * self.slope_N[:, None, None]
        wave_NHW = along_NHW * self.frequency_N[:, None, None] + self.phase_N[:, None, None]
        grating_NHW = wave_NHW.sin() * self.amplitude_N[:, None, None]
        texture_NHW = torch.where(self.texture_N[:, None, None] == 1, gradient_NHW, grating_NHW)
        textured_N = ((self.texture_N > 0) & ~self.plain_N).float()
        texture_NHW = texture_NHW * textured_N[:, None, None]
        return (self.colour_NC[:, :, None, None] + texture_NHW[:, None]).clamp(0, 1)


def _soften(x_NCHW: Tensor, amount_N: Tensor) -> Tensor:
    """Mix images with their 3×3 binomial blur."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel[None, :] / 16.0)[None, None]
    channels = x_NCHW.shape[1]
    padded = torch.nn.functional.pad(x_NCHW, (1, 1, 1, 1), mode="replicate")
    blurred = torch.nn.functional.conv2d(padded, kernel.expand(channels, 1, 3, 3), groups=channels)
    amount = amount_N[:, None, None, None]
    return x_NCHW + amount * (blurred - x_NCHW)
