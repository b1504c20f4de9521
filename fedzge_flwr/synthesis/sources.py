"""Where images come from that no generator makes: the sources by name.

A source is asked for images, and told what was answered: all that was asked about lies in the
memories, with the ensemble's logits. It keeps nothing itself, so that a run goes on from a
checkpoint as if it had never stopped. Add one with ``SOURCES["name"] = function``; the contract
tests take it up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fedzge_flwr.synthesis.evolution import evolve
from fedzge_flwr.synthesis.memory import Memories
from fedzge_flwr.synthesis.patterns import draw_codes, render
from fedzge_flwr.synthesis.procedural import procedural_images
from fedzge_flwr.synthesis.search import breed
from fedzge_flwr.synthesis.tables import independent_values


class Proposed(NamedTuple):
    """Images to ask about.

    Parameters
    ----------
    images_NCHW : Tensor
        float32, on the CPU, in the shared pixel range.
    codes_ND : Tensor, optional
        What `fedzge_flwr.synthesis.patterns.render` makes them of, if they are patterns.
    """

    images_NCHW: Tensor
    codes_ND: Tensor | None = None


Source: TypeAlias = Callable[[int, tuple[int, int, int], Memories, torch.Generator], Proposed]
"""``(number of images, (C, H, W), what was told so far, stream)`` to that many images.

In the first round nothing was told. The stream is on the CPU; the same stream gives the same.
"""


def evolved(
    num: int, image_shape: tuple[int, int, int], told: Memories, stream: torch.Generator
) -> Proposed:
    """Return children of the patterns told of (`evolve`); new ones while there are none."""
    if not len(told.codes):
        return patterns(num, image_shape, told, stream)
    codes_ND = evolve(told.codes, num, image_shape[0], stream)
    return Proposed(render(codes_ND, image_shape), codes_ND)


def patterns(
    num: int, image_shape: tuple[int, int, int], told: Memories, stream: torch.Generator
) -> Proposed:
    """Return new patterns (`draw_codes`)."""
    codes_ND = draw_codes(num, image_shape[0], stream)
    return Proposed(render(codes_ND, image_shape), codes_ND)


def bred(
    num: int, image_shape: tuple[int, int, int], told: Memories, stream: torch.Generator
) -> Proposed:
    """Return children of the images told of (`breed`); procedural ones while there are none."""
    if not len(told.images):
        return procedural(num, image_shape, told, stream)
    return Proposed(breed(told.images, num, stream))


def procedural(
    num: int, image_shape: tuple[int, int, int], told: Memories, stream: torch.Generator
) -> Proposed:
    """Return dead leaves and kin (`procedural_images`)."""
    return Proposed(procedural_images(num, image_shape, stream))


def independent(
    num: int, image_shape: tuple[int, int, int], told: Memories, stream: torch.Generator
) -> Proposed:
    """Return images for rows of tables (`independent_values`)."""
    return Proposed(independent_values(num, image_shape, stream))


SOURCES: dict[str, Source] = {
    "evolved": evolved,
    "patterns": patterns,
    "bred": bred,
    "procedural": procedural,
    "independent": independent,
}
"""Sources by name, as the setting ``image-sources`` has them."""
