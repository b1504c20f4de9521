"""Random directions, one per image, from seeded streams.

A sampler is a function ``(num_directions, num_images, (C, H, W), stream) -> Directions`` whose rows
u of length d = C·H·W have unit norm and satisfy E[uuᵀ] = I/d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from fedzge_flwr.query.directions import SEEDS, Directions

DirectionSampler: TypeAlias = Callable[
    [int, int, tuple[int, int, int], torch.Generator], Directions
]


def sphere(
    num_directions: int, num_images: int, image_shape: tuple[int, int, int], stream: torch.Generator
) -> Directions:
    """Draw directions uniformly from the unit sphere of R^d (arXiv 2503.06028)."""
    shape = (num_directions, num_images, *image_shape)
    # Normalised in float64, so that the norm is 1 to the last bit of float32.
    normal = torch.randn(shape, generator=stream, dtype=torch.float64)
    norms = normal.flatten(2).norm(dim=2)
    unit: Tensor = normal / norms.reshape(*shape[:2], 1, 1, 1)
    return Directions.written_out(unit.float().numpy())


def rademacher(
    num_directions: int, num_images: int, image_shape: tuple[int, int, int], stream: torch.Generator
) -> Directions:
    """Draw directions with entries ±1/√d from random bits: a seed is all that travels."""
    seed = int(torch.randint(SEEDS, (), generator=stream))
    return Directions.from_seed(num_directions, num_images, image_shape, seed)


DIRECTIONS: dict[str, DirectionSampler] = {"sphere": sphere, "rademacher": rademacher}
"""Distributions of random directions by name, as the setting ``directions`` has them."""
