"""Patterns: images of small random networks of the coordinates, each with the code that makes it.

Compositional pattern-producing networks (Stanley, 2007, "Compositional pattern producing networks")
map a pixel's place to its value. Theirs are shapes with edges and plain grounds, mirrored as often
as not. A code has some 200 numbers, where an image has a thousand, and a small change of it changes
the image as a whole: what zeroth-order search needs (Nguyen, Yosinski & Clune, 2015, arXiv
1412.1897, evolve them for a classifier's classes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedzge_flwr.images.pixels import PIXEL_RANGE

_HIDDEN = 12
"""Units of each of the two hidden layers: a quarter of each activation."""

_INPUTS = 5
"""x, y, the distances from the middle, round and square, and 1."""

_OFFSET = 0.7
_LEAST_SPREAD = 0.1
_AT_ONCE = 200


class _Blocks(NamedTuple):
    """A code's blocks, which are inherited whole, each (N, its length).

    ``contrast`` is a logarithm; colours are drawn towards grey by ``colour`` in [0, 1]; ``mirror``
    below a half makes an image that is its own mirror.
    """

    first: Tensor
    second: Tensor
    last: Tensor
    offset: Tensor
    contrast: Tensor
    colour: Tensor
    mirror: Tensor

    @classmethod
    def of(cls, codes_ND: Tensor, channels: int) -> _Blocks:
        """Return the blocks of codes of images of some channels."""
        return cls(*codes_ND.split(_lengths(channels), dim=1))

    @property
    def codes_ND(self) -> Tensor:
        """The codes."""
        return torch.cat(self, dim=1)


def _lengths(channels: int) -> list[int]:
    return [_INPUTS * _HIDDEN, _HIDDEN**2, _HIDDEN * channels, channels, 1, 1, 1]


def draw_codes(num: int, channels: int, stream: torch.Generator) -> Tensor:
    """Draw codes.

    Parameters
    ----------
    num : int
        N ≥ 0.
    channels : int
        C of the images.
    stream : torch.Generator
        A CPU stream.

    Returns
    -------
    Tensor
        float32 (N, D), D = 60 + 144 + 13·C + 3.
    """

    def normal(length: int) -> Tensor:
        return torch.randn(num, length, generator=stream)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(num, 1, generator=stream) * (high - low) + low

    first, second, last, offset, *_ = _lengths(channels)
    return _Blocks(
        first=normal(first) * uniform(0.3, 1.2).exp(),
        second=normal(second) * uniform(-0.5, 0.8).exp() / _HIDDEN**0.5,
        last=normal(last) / _HIDDEN**0.5,
        offset=normal(offset) * _OFFSET,
        contrast=uniform(-0.3, 2.5),
        colour=uniform(0.0, 1.0),
        mirror=uniform(0.0, 1.0),
    ).codes_ND


def inherited(
    codes_ND: Tensor, others_ND: Tensor, crossed_N: Tensor, channels: int, stream: torch.Generator
) -> Tensor:
    """Return codes of which some have each block from either parent, as a coin falls.

    Parameters
    ----------
    codes_ND, others_ND : Tensor
        The parents.
    crossed_N : Tensor
        Which are crossed (bool); the others are the first parent's.
    channels, stream
        As for `draw_codes`.
    """
    blocks = []
    of_both = zip(_Blocks.of(codes_ND, channels), _Blocks.of(others_ND, channels), strict=True)
    for one_NB, other_NB in of_both:
        coin_N = torch.rand(len(codes_ND), generator=stream) < 0.5
        blocks.append(torch.where((crossed_N & coin_N)[:, None], other_NB, one_NB))
    return torch.cat(blocks, dim=1)


def mutated(codes_ND: Tensor, steps_N: Tensor, channels: int, stream: torch.Generator) -> Tensor:
    """Return codes with normal noise on what is continuous in them.

    Parameters
    ----------
    codes_ND : Tensor
        Codes of images of ``channels``.
    steps_N : Tensor
        Each one's step > 0, relative to the deviation of its weights in a layer.
    channels, stream
        As for `draw_codes`.
    """
    noise_ND = torch.randn(codes_ND.shape, generator=stream) * steps_N[:, None]
    blocks, noise = _Blocks.of(codes_ND, channels), _Blocks.of(noise_ND, channels)

    def moved(weights_NB: Tensor, noise_NB: Tensor) -> Tensor:
        spread_N1 = weights_NB.std(dim=1, keepdim=True).clamp_min(_LEAST_SPREAD)
        return weights_NB + spread_N1 * noise_NB

    return blocks._replace(
        first=moved(blocks.first, noise.first),
        second=moved(blocks.second, noise.second),
        last=moved(blocks.last, noise.last),
        offset=blocks.offset + _OFFSET * noise.offset,
        contrast=blocks.contrast + noise.contrast,
    ).codes_ND


def render(codes_ND: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Return the images of codes, float32 (N, C, H, W) on the CPU, in the shared pixel range."""
    chunks = [_rendered(chunk_ND, image_shape) for chunk_ND in codes_ND.split(_AT_ONCE)]
    return torch.cat([torch.zeros(0, *image_shape), *chunks])


def _rendered(codes_ND: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = image_shape
    parts = _Blocks.of(codes_ND, channels)
    hidden_NPH = _activated(
        _places(parts.mirror < 0.5, height, width) @ parts.first.unflatten(1, (_INPUTS, _HIDDEN))
    )
    hidden_NPH = _activated(hidden_NPH @ parts.second.unflatten(1, (_HIDDEN, _HIDDEN)))
    values_NPC = hidden_NPH @ parts.last.unflatten(1, (_HIDDEN, channels)) + parts.offset[:, None]
    grey_NP1 = values_NPC.mean(dim=2, keepdim=True)
    values_NPC = grey_NP1 + parts.colour[:, None] * (values_NPC - grey_NP1)
    unit_NPC = (values_NPC * parts.contrast.exp()[:, None]).tanh()
    return PIXEL_RANGE.from_unit(unit_NPC.transpose(1, 2).reshape(-1, channels, height, width))


def _places(mirrored_N1: Tensor, height: int, width: int) -> Tensor:
    """Return what each image's network is given of each pixel, (N, H·W, 5)."""
    y_H = (torch.arange(height) + 0.5) / height * 2 - 1
    x_W = (torch.arange(width) + 0.5) / width * 2 - 1
    y_P, x_P = (grid.flatten() for grid in torch.meshgrid(y_H, x_W, indexing="ij"))
    across_NP = torch.where(mirrored_N1, 1.5 * x_P.abs(), x_P)
    return torch.stack(
        (
            across_NP,
            y_P.expand_as(across_NP),
            (across_NP.square() + y_P.square()).sqrt(),
            torch.maximum(x_P.abs(), y_P.abs()).expand_as(across_NP),
            torch.ones_like(across_NP),
        ),
        dim=2,
    )


def _activated(sums_NPH: Tensor) -> Tensor:
    waves, steps, bumps, folds = sums_NPH.chunk(4, dim=2)
    return torch.cat(
        (waves.sin(), steps.tanh(), 2 * (-bumps.square()).exp() - 1, folds.abs().clamp(max=3) - 1),
        dim=2,
    )
