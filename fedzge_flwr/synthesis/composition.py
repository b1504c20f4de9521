"""How many of a round's images come from which source, and those that no generator makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedzge_flwr.common.randomness import Purpose
from fedzge_flwr.config.sections import MIN_TRAINING_IMAGES, ImageSettings
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.synthesis.evolution import evolve
from fedzge_flwr.synthesis.memory import Memories
from fedzge_flwr.synthesis.patterns import draw_codes, render
from fedzge_flwr.synthesis.procedural import procedural_images
from fedzge_flwr.synthesis.screening import screen
from fedzge_flwr.synthesis.search import breed

_SCREENING_BATCH = 500


class Counts(NamedTuple):
    """How many of a round's images are of which source."""

    generated: int
    evolved: int
    bred: int
    patterns: int
    procedural: int


class Drawn(NamedTuple):
    """Images that no generator makes: those of patterns first, with their codes.

    Parameters
    ----------
    images_NCHW : Tensor
        float32, on the CPU, in the shared pixel range.
    codes_ED : Tensor
        Codes of the first E images; none without patterns.
    """

    images_NCHW: Tensor
    codes_ED: Tensor


def image_counts(images: ImageSettings, *, past: bool) -> Counts:
    """Return how many images each source makes in a round.

    Without past images there is nothing to evolve or to breed from: new patterns and procedural
    images stand in, or generated ones if those are switched off. What rounding leaves goes to the
    source of the largest share that is no generator, which cannot make a single image.
    """
    shares = {
        "generated": images.generator_share,
        "evolved": images.evolution_share,
        "bred": images.search_share,
        "patterns": images.pattern_share,
        "procedural": images.procedural_share,
    }
    num_images, total = images.synthetic_batch_size, sum(shares.values())
    counts = {name: round(num_images * share / total) for name, share in shares.items()}
    if counts["generated"] < MIN_TRAINING_IMAGES:
        counts["generated"] = 0
    others = {name: share for name, share in shares.items() if share and name != "generated"}
    rest = max(others, key=lambda name: others[name]) if others else "generated"
    counts[rest] += num_images - sum(counts.values())
    if not past:
        counts["patterns"] += counts.pop("evolved")
        stand_in = [name for name in ("procedural", "patterns", "generated") if counts[name]]
        counts[(stand_in or ["procedural"])[0]] += counts.pop("bred")
    return Counts(**{"evolved": 0, "bred": 0, **counts})


def other_images(
    counts: Counts,
    image_shape: tuple[int, int, int],
    memories: Memories | None,
    chooser: nn.Module | None,
    candidates: int,
    stream: Callable[[Purpose], torch.Generator],
) -> Drawn:
    """Return the images that no generator makes: evolved, new patterns, procedural, bred.

    Parameters
    ----------
    counts : Counts
        How many of each; none are evolved or bred without a memory.
    image_shape : tuple of int
        (C, H, W).
    memories : Memories, optional
        Past images and codes, with the answers to them.
    chooser : nn.Module, optional
        The central model, whose classes choose among candidates (`screen`); None while it knows
        nothing to choose by.
    candidates : int
        Images drawn for each one that is returned.
    stream : Callable[[Purpose], torch.Generator]
        The round's streams.
    """
    times = 1 if chooser is None else candidates

    def chosen(drawn_NCHW: Tensor, num: int, stream: torch.Generator) -> Tensor:
        """Which of the candidates: their numbers (num,)."""
        if chooser is None or len(drawn_NCHW) == num:
            return torch.arange(num)
        return screen(predict(chooser, drawn_NCHW, _SCREENING_BATCH), num, stream)

    channels = image_shape[0]
    images, codes = [torch.zeros(0, *image_shape)], [draw_codes(0, channels, torch.Generator())]

    def of_codes(
        num: int, purpose: Purpose, draw: Callable[[int, torch.Generator], Tensor]
    ) -> None:
        if num:
            drawn = stream(purpose)
            codes_ND = draw(times * num, drawn)
            images_NCHW = render(codes_ND, image_shape)
            which = chosen(images_NCHW, num, drawn)
            images.append(images_NCHW[which])
            codes.append(codes_ND[which])

    def of_pixels(
        num: int, purpose: Purpose, draw: Callable[[int, torch.Generator], Tensor]
    ) -> None:
        if num:
            drawn = stream(purpose)
            images_NCHW = draw(times * num, drawn)
            images.append(images_NCHW[chosen(images_NCHW, num, drawn)])

    if memories is not None:
        past = memories.codes
        of_codes(counts.evolved, Purpose.EVOLUTION, lambda n, g: evolve(past, n, channels, g))
    of_codes(counts.patterns, Purpose.PATTERNS, lambda n, g: draw_codes(n, channels, g))
    of_pixels(
        counts.procedural, Purpose.PROCEDURAL, lambda n, g: procedural_images(n, image_shape, g)
    )
    if memories is not None:
        of_pixels(counts.bred, Purpose.SEARCH, lambda n, g: breed(memories.images, n, g))
    return Drawn(torch.cat(images), torch.cat(codes))
