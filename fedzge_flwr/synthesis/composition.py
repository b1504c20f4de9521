"""How many of a round's images are generated, bred and procedural, and the latter two."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedzge_flwr.common.randomness import Purpose
from fedzge_flwr.config.sections import MIN_TRAINING_IMAGES, ImageSettings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.synthesis.memory import Memory
from fedzge_flwr.synthesis.procedural import procedural_images
from fedzge_flwr.synthesis.screening import screen
from fedzge_flwr.synthesis.search import breed

_SCREENING_BATCH = 500


class Counts(NamedTuple):
    """How many of a round's images are of which origin."""

    generated: int
    bred: int
    procedural: int


def image_counts(images: ImageSettings, *, past: bool) -> Counts:
    """Return how many images the generator, the search and the procedures make in a round.

    Without past images there is nothing to breed from: procedural ones stand in, or generated ones
    if those are switched off.
    """
    num_images = images.synthetic_batch_size
    shares = (images.generator_share, images.search_share, images.procedural_share)
    generated, bred = (round(num_images * share / sum(shares)) for share in shares[:2])
    if generated < MIN_TRAINING_IMAGES:
        generated = 0
    procedural = num_images - generated - bred
    if not images.procedural_share:
        # What rounding leaves goes to a source that is not switched off.
        bred, generated = (
            (bred + procedural, generated) if images.search_share else (bred, num_images)
        )
        procedural = 0
    if past:
        return Counts(generated, bred, procedural)
    if images.procedural_share or not generated:
        return Counts(generated, 0, procedural + bred)
    return Counts(generated + bred, 0, procedural)


def other_images(
    counts: Counts,
    image_shape: tuple[int, int, int],
    memory: Memory | None,
    chooser: nn.Module | None,
    candidates: int,
    stream: Callable[[Purpose], torch.Generator],
) -> Tensor:
    """Return the round's procedural images, then those bred from the memory.

    Parameters
    ----------
    counts : Counts
        How many of each; none are bred without a memory.
    image_shape : tuple of int
        (C, H, W).
    memory : Memory, optional
        Past images and answers.
    chooser : nn.Module, optional
        The central model, whose classes choose among candidates (`screen`); None while it knows
        nothing to choose by.
    candidates : int
        Images drawn for each one that is returned.
    stream : Callable[[Purpose], torch.Generator]
        The round's streams.

    Returns
    -------
    Tensor
        Levels, uint8 (N, C, H, W), on the CPU.
    """
    times = 1 if chooser is None else candidates

    def chosen(drawn_NCHW: Tensor, num_images: int, stream: torch.Generator) -> Tensor:
        if chooser is None or len(drawn_NCHW) == num_images:
            return drawn_NCHW
        logits_NK = predict(chooser, drawn_NCHW, _SCREENING_BATCH)
        return screen(drawn_NCHW, logits_NK, num_images, stream)

    found = [torch.zeros(0, *image_shape)]
    if counts.procedural:
        procedural = stream(Purpose.PROCEDURAL)
        drawn_NCHW = procedural_images(times * counts.procedural, image_shape, procedural)
        found.append(chosen(drawn_NCHW, counts.procedural, procedural))
    if counts.bred and memory is not None:
        search = stream(Purpose.SEARCH)
        found.append(chosen(breed(memory, times * counts.bred, search), counts.bred, search))
    return PIXEL_RANGE.to_uint8(torch.cat(found))
