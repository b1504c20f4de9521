"""What a round may ask of the clients, whoever carries the messages.

The strategy implements `Clients` over Flower's grid; anything else that can reach black boxes may.
Clients are known by partition. Whoever does not answer, or answers rubbish, is absent from the
result: the round goes on with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ClientAccuracy:
    """A client's evaluation: images, accuracy in [0, 1], logits (M, K) on the common test set.

    ``logits_MK`` has no rows when the client was evaluated on its own held-out images.
    """

    num_examples: int
    accuracy: float
    logits_MK: FloatArray


class Clients(Protocol):
    """The federation as the server sees it."""

    @property
    def num_examples(self) -> dict[int, int]:
        """Training examples of each known client, by partition."""
        ...

    def train(self, round_: int, partitions: Sequence[int]) -> dict[int, float]:
        """Have clients train on their own data; the losses of those that did."""
        ...

    def query(
        self, round_: int, partitions: Sequence[int], images_BCHW: FloatArray
    ) -> dict[int, FloatArray]:
        """Ask for logits; (B, K) of each client that answered."""
        ...

    def distill(
        self,
        round_: int,
        partitions: Sequence[int],
        images_NCHW: FloatArray,
        logits_NK: FloatArray,
        temperature: float,
    ) -> dict[int, float]:
        """Have clients distil the ensemble's logits; the losses of those that did."""
        ...

    def evaluate(
        self, round_: int, partitions: Sequence[int], split: str
    ) -> dict[int, ClientAccuracy]:
        """Have clients evaluate their models on ``"test"`` or ``"held-out"`` images."""
        ...
