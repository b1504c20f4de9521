"""How many of a round's images come from which source, and those that no generator makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.sections import MIN_TRAINING_IMAGES, ImageSettings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.synthesis.memory import Memories
from fedzge_flwr.synthesis.screening import screen
from fedzge_flwr.synthesis.sources import Proposed, Source

_SCREENING_BATCH = 500


class Counts(NamedTuple):
    """How many of a round's images are generated, and how many are of each source."""

    generated: int
    others: dict[str, int]


class Drawn(NamedTuple):
    """Images that no generator makes: patterns first, with their codes.

    Parameters
    ----------
    images_NCHW : Tensor
        float32, on the CPU, in the shared pixel range.
    codes_ED : Tensor
        Codes of the first E images; none without patterns.
    counts : dict of str to int
        How many images are of which source, in their order.
    """

    images_NCHW: Tensor
    codes_ED: Tensor
    counts: dict[str, int]


def image_counts(images: ImageSettings) -> Counts:
    """Return how many images each source makes in a round.

    Each has at least the whole part of its due, and what that leaves goes to the largest rests. A
    generator cannot make a single image.
    """
    sources = images.source_shares
    num_images, total = images.synthetic_batch_size, images.generator_share + sum(sources.values())
    generated = round(num_images * images.generator_share / total)
    if not sources:
        return Counts(num_images, {})
    if generated < MIN_TRAINING_IMAGES:
        generated = 0
    left, shares = num_images - generated, sum(sources.values())
    due = {name: left * (share / shares) for name, share in sources.items()}
    others = {name: math.floor(part) for name, part in due.items()}
    rests = sorted(due, key=lambda name: others[name] - due[name])
    for name in rests[: left - sum(others.values())]:
        others[name] += 1
    return Counts(generated, others)


@dataclass(frozen=True)
class Composition:
    """What the sources are asked with in a round.

    Parameters
    ----------
    sources : Mapping[str, Source]
        By name.
    image_shape : tuple of int
        (C, H, W).
    memories : Memories
        What was told so far.
    chooser : nn.Module, optional
        The central model, whose classes choose among candidates (`screen`); None while it knows
        nothing to choose by.
    candidates : int
        Images drawn for each one that is returned.
    stream : torch.Generator
        The round's.
    """

    sources: Mapping[str, Source]
    image_shape: tuple[int, int, int]
    memories: Memories
    chooser: nn.Module | None
    candidates: int
    stream: torch.Generator

    def drawn(self, counts: Mapping[str, int]) -> Drawn:
        """Return so many images of each source.

        Raises
        ------
        ConfigError
            If a source from outside the package proposes anything but as many images as it was
            asked for, float32 of the shape asked for, in the shared pixel range.
        """
        proposed = {name: self._chosen(name, num) for name, num in counts.items() if num}
        ordered = sorted(proposed.items(), key=lambda found: found[1].codes_ND is None)
        images = [part.images_NCHW for _, part in ordered]
        codes = [part.codes_ND for _, part in ordered if part.codes_ND is not None]
        return Drawn(
            torch.cat([torch.zeros(0, *self.image_shape), *images]),
            torch.cat(codes) if codes else torch.zeros(0, 0),
            {name: len(part.images_NCHW) for name, part in ordered},
        )

    def _chosen(self, name: str, num: int) -> Proposed:
        wanted = num if self.chooser is None else num * self.candidates
        images_NCHW, codes_ND = found = self.sources[name](
            wanted, self.image_shape, self.memories, self.stream
        )
        _check_proposed(name, images_NCHW, (wanted, *self.image_shape))
        if self.chooser is None or wanted == num:
            return found
        says_NK = predict(self.chooser, images_NCHW, _SCREENING_BATCH)
        chosen = screen(says_NK, num, self.stream)
        return Proposed(images_NCHW[chosen], None if codes_ND is None else codes_ND[chosen])


def _check_proposed(name: str, images_NCHW: Tensor, wanted: tuple[int, ...]) -> None:
    if images_NCHW.shape != wanted or images_NCHW.dtype != torch.float32:
        kind = str(images_NCHW.dtype).removeprefix("torch.")
        raise ConfigError(
            f"source '{name}' proposed {kind} images of shape {tuple(images_NCHW.shape)}; it was "
            f"asked for float32 of {wanted}"
        )
    low, high = PIXEL_RANGE.low, PIXEL_RANGE.high
    # Not the negation: nothing compares with what is no number.
    if not ((images_NCHW >= low) & (images_NCHW <= high)).all():
        raise ConfigError(
            f"source '{name}' proposed pixel values outside [{low:g}, {high:g}] or not finite"
        )
