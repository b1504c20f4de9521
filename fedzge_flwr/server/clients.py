"""What a round may ask of the clients, whoever carries the messages.

The strategy implements `Clients` over Flower's grid; anything else that can reach black boxes may.
Clients are known by partition. Whoever does not answer, or answers rubbish, is absent from the
result: the round goes on with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedzge_flwr.arrays import FloatArray
from fedzge_flwr.question import Question


@dataclass(frozen=True)
class ClientAccuracy:
    """A client's evaluation: images, accuracy in [0, 1], logits (M, K) on the common test set.

    ``logits_MK`` has no rows when none were asked for.
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

    def train(self, round_: int, partitions: Sequence[int]) -> dict[int, float | None]:
        """Have clients train on their own data; losses, None of who has too few images to."""
        ...

    def query(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, FloatArray]:
        """Ask for logits on a question's images; (B, K) of each client that answered.

        ``to_distill`` foretells that `distill` may follow with the same question.
        """
        ...

    def distill(
        self,
        round_: int,
        partitions: Sequence[int],
        question: Question,
        logits_NK: FloatArray,
        temperature: float,
    ) -> dict[int, float]:
        """Have clients distil the ensemble's logits on a question's base images; their losses."""
        ...

    def evaluate(
        self, round_: int, partitions: Sequence[int], split: str, num_logits: int
    ) -> dict[int, ClientAccuracy]:
        """Have clients evaluate their models on ``"test"`` or ``"held-out"`` images.

        ``num_logits`` is 0, or the size of the common test set: its logits are then returned.
        """
        ...
