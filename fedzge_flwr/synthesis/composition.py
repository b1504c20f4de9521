"""How many of a round's images come from which source, and those that no generator makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True)
class Sources:
    """Where images come from that no generator makes.

    Parameters
    ----------
    image_shape : tuple of int
        (C, H, W).
    memories : Memories
        Past images and codes, with the answers to them; empty, there is nothing to evolve or to
        breed from.
    chooser : nn.Module, optional
        The central model, whose classes choose among candidates (`screen`); None while it knows
        nothing to choose by.
    candidates : int
        Images drawn for each one that is returned.
    stream : Callable[[Purpose], torch.Generator]
        The round's streams.
    """

    image_shape: tuple[int, int, int]
    memories: Memories
    chooser: nn.Module | None
    candidates: int
    stream: Callable[[Purpose], torch.Generator]

    def drawn(self, counts: Counts) -> Drawn:
        """Return the images: evolved, new patterns, procedural, bred."""
        evolve_codes = partial(evolve, self.memories.codes)
        evolved = self._patterns(counts.evolved, Purpose.EVOLUTION, evolve_codes)
        new = self._patterns(counts.patterns, Purpose.PATTERNS, draw_codes)
        images = (
            evolved.images_NCHW,
            new.images_NCHW,
            self._images(counts.procedural, Purpose.PROCEDURAL, procedural_images),
            self._images(counts.bred, Purpose.SEARCH, self._bred),
        )
        return Drawn(torch.cat(images), torch.cat((evolved.codes_ED, new.codes_ED)))

    def _patterns(
        self, num: int, purpose: Purpose, draw: Callable[[int, int, torch.Generator], Tensor]
    ) -> Drawn:
        channels, stream = self.image_shape[0], self.stream(purpose)
        codes_ND = (
            draw(self._times * num, channels, stream) if num else draw_codes(0, channels, stream)
        )
        images_NCHW = render(codes_ND, self.image_shape)
        chosen = self._choice(images_NCHW, num, stream)
        return Drawn(images_NCHW[chosen], codes_ND[chosen])

    def _images(
        self,
        num: int,
        purpose: Purpose,
        draw: Callable[[int, tuple[int, int, int], torch.Generator], Tensor],
    ) -> Tensor:
        stream = self.stream(purpose)
        if not num:
            return torch.zeros(0, *self.image_shape)
        drawn_NCHW = draw(self._times * num, self.image_shape, stream)
        return drawn_NCHW[self._choice(drawn_NCHW, num, stream)]

    def _bred(self, num: int, image_shape: tuple[int, int, int], stream: torch.Generator) -> Tensor:
        return breed(self.memories.images, num, stream)

    @property
    def _times(self) -> int:
        return 1 if self.chooser is None else self.candidates

    def _choice(self, drawn_NCHW: Tensor, num: int, stream: torch.Generator) -> Tensor:
        """Return which candidates are asked about, (num,)."""
        if self.chooser is None or len(drawn_NCHW) == num:
            return torch.arange(num)
        return screen(predict(self.chooser, drawn_NCHW, _SCREENING_BATCH), num, stream)
