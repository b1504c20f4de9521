"""Class-balanced evolutionary search over the memory.

On images drawn blindly the ensemble answers some classes hardly ever, and the central model cannot
learn what it is never shown. So new images are bred from those that came nearest to a wanted class:
mutation and crossover with selection by the ensemble's own past answers, which cost no new query
(after MAP-Elites, Mouret & Clune, 2015, arXiv 1504.04909: elites by class; and Nguyen, Yosinski &
Clune, 2015, arXiv 1412.1897, who bred images for a classifier's classes).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.synthesis.memory import Memory
from fedzge_flwr.synthesis.procedural import procedural_images
from fedzge_flwr.synthesis.screening import class_demand

_ELITE = 40


def breed(memory: Memory, num_images: int, stream: torch.Generator) -> Tensor:
    """Breed images from the memory's elites of the classes in demand.

    A class's elites are the images on which the ensemble gave it the highest probability. Two of
    them are moved, turned, scaled and perhaps mirrored, then crossed: one alone, parts of both,
    parts of one and of a procedural image, or their mean; contrast and brightness change a little.

    Parameters
    ----------
    memory : Memory
        At least one image.
    num_images : int
        N ≥ 0.
    stream : torch.Generator
        A CPU stream.

    Returns
    -------
    Tensor
        float32 (N, C, H, W) on the CPU, in the shared pixel range.
    """
    logits_MK = memory.logits_MK
    probabilities_MK = logits_MK.softmax(dim=1)
    wanted_N = torch.multinomial(class_demand(logits_MK), num_images, True, generator=stream)
    elites_EK = probabilities_MK.topk(min(_ELITE, len(memory)), dim=0).indices

    def parent() -> Tensor:
        rank_N = torch.randint(len(elites_EK), (num_images,), generator=stream)
        chosen = memory.asked[elites_EK[rank_N, wanted_N]]
        return jitter(PIXEL_RANGE.from_uint8(chosen), stream)

    first_NCHW, second_NCHW = parent(), parent()
    shape = (first_NCHW.shape[1], first_NCHW.shape[2], first_NCHW.shape[3])
    stranger_NCHW = procedural_images(num_images, shape, stream)
    silhouette_NCHW = procedural_images(num_images, shape, stream)[:, :1]
    mask_NCHW = silhouette_NCHW > silhouette_NCHW.mean(dim=(1, 2, 3), keepdim=True)
    faint_N111 = _uniform(num_images, 0, 1, stream) < 0.5
    stranger_NCHW = torch.where(faint_N111, (stranger_NCHW + first_NCHW) / 2, stranger_NCHW)
    kinds = (
        first_NCHW,
        torch.where(mask_NCHW, first_NCHW, second_NCHW),
        torch.where(mask_NCHW, first_NCHW, stranger_NCHW),
        (first_NCHW + second_NCHW) / 2,
    )
    kind_N = torch.multinomial(
        torch.tensor([0.3, 0.25, 0.25, 0.2]), num_images, True, generator=stream
    )
    child_NCHW = torch.stack(kinds)[kind_N, torch.arange(num_images)]
    return relit(child_NCHW, stream)


def relit(x_NCHW: Tensor, stream: torch.Generator) -> Tensor:
    """Change the contrast (by e^±0.3) and the brightness (by ±15 % of half the range) of images."""
    gain_N111 = _uniform(len(x_NCHW), -0.3, 0.3, stream).exp()
    middle = (PIXEL_RANGE.high + PIXEL_RANGE.low) / 2
    half = (PIXEL_RANGE.high - PIXEL_RANGE.low) / 2
    offset_N111 = _uniform(len(x_NCHW), -0.15, 0.15, stream) * half
    x_NCHW = (x_NCHW - middle) * gain_N111 + middle + offset_N111
    return x_NCHW.clamp(PIXEL_RANGE.low, PIXEL_RANGE.high)


def jitter(x_NCHW: Tensor, stream: torch.Generator) -> Tensor:
    """Turn (±20°), scale (0.78 to 1.28), move (±10 % of the side) and mirror (half of) images."""
    num_images = len(x_NCHW)
    angle_N = _uniform(num_images, -0.35, 0.35, stream).flatten()
    scale_N = _uniform(num_images, -0.25, 0.25, stream).exp().flatten()
    stretch_N = _uniform(num_images, -0.12, 0.12, stream).exp().flatten()
    move_N2 = torch.rand(num_images, 2, generator=stream) * 0.4 - 0.2
    mirror_N = torch.where(torch.rand(num_images, generator=stream) < 0.5, -1.0, 1.0)
    cos, sin = angle_N.cos(), angle_N.sin()
    across_N, down_N = scale_N * mirror_N, scale_N * stretch_N
    theta_N23 = torch.stack(
        (
            torch.stack((cos * across_N, -sin * down_N, move_N2[:, 0]), dim=1),
            torch.stack((sin * across_N, cos * down_N, move_N2[:, 1]), dim=1),
        ),
        dim=1,
    )
    grid = F.affine_grid(theta_N23, list(x_NCHW.shape), align_corners=False)
    return F.grid_sample(x_NCHW, grid, padding_mode="border", align_corners=False)


def _uniform(num: int, low: float, high: float, stream: torch.Generator) -> Tensor:
    """Return one number for each image, (N, 1, 1, 1)."""
    return torch.rand(num, 1, 1, 1, generator=stream) * (high - low) + low
