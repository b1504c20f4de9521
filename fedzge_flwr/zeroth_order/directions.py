"""Random directions, one per image, from seeded streams.

A sampler is a function ``(shape (Q, N, C, H, W), stream) -> float32 tensor`` on the CPU whose rows
u of length d = C·H·W have unit norm and satisfy E[uuᵀ] = I/d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

DirectionSampler: TypeAlias = Callable[[tuple[int, ...], torch.Generator], Tensor]


def sphere(shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
    """Draw directions uniformly from the unit sphere of R^d (arXiv 2503.06028)."""
    # Normalised in float64, so that the norm is 1 to the last bit of float32.
    normal = torch.randn(shape, generator=stream, dtype=torch.float64)
    norms = normal.flatten(2).norm(dim=2)
    unit: Tensor = normal / norms.reshape(*shape[:2], 1, 1, 1)
    return unit.float()


def rademacher(shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
    """Draw directions with entries ±1/√d from random bits.

    E[uuᵀ] = I/d as on the sphere, and the same on every machine to the last bit: no logarithm or
    cosine of a normal draw is in it, so that a seed is enough to send them.
    """
    num_bits = math.prod(shape)
    octets = torch.randint(256, (-(-num_bits // 8), 1), generator=stream, dtype=torch.uint8)
    bits = (octets >> torch.arange(8, dtype=torch.uint8)) & 1
    signs = bits.flatten()[:num_bits].float().mul_(2).sub_(1)
    return signs.mul_(1 / math.sqrt(math.prod(shape[2:]))).reshape(shape)


DIRECTIONS: dict[str, DirectionSampler] = {"sphere": sphere, "rademacher": rademacher}
