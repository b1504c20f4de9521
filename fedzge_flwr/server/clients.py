"""What a round may ask of the clients, whoever carries the messages.

The strategy implements `Clients` over Flower's grid; anything else that can reach black boxes may.
Clients are known by partition. Whoever does not answer, or answers rubbish, is absent from the
result: the round goes on with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.query.question import Question
from fedzge_flwr.query.targets import Targets


@dataclass(frozen=True)
class ClientAccuracy:
    """A client's evaluation: images, accuracy in [0, 1], logits (M, K) on the common test set.

    ``logits_MK`` has no rows when none were asked for.
    """

    num_examples: int
    accuracy: float
    logits_MK: FloatArray


@dataclass(frozen=True)
class ClientAnswer:
    """What a client sends back in a round.

    Parameters
    ----------
    logits_BK : ndarray of float32
        Logits on all images of the question.
    train_loss : float, optional
        Loss of local training; None if the client has too few images to train on.
    distill_loss : float, optional
        Loss of a distillation that had been put off; None if there was none.
    """

    logits_BK: FloatArray
    train_loss: float | None
    distill_loss: float | None = None


class Clients(Protocol):
    """The federation as the server sees it."""

    @property
    def num_examples(self) -> dict[int, int]:
        """Training examples of each known client, by partition."""
        ...

    def ask(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        """Have clients train on their own data and then answer; who fails at either is absent.

        ``to_distill`` foretells that `distill` may follow with targets on the same images.
        """
        ...

    def distill(self, round_: int, partitions: Sequence[int], targets: Targets) -> dict[int, float]:
        """Have clients distill the ensemble's logits on the images of this round's question.

        Returns the losses of those that did. Whoever carries the messages may put it off until a
        client is next asked, whose answer then has the loss, or until `deliver`.
        """
        ...

    def deliver(self, round_: int) -> dict[int, float]:
        """Have done what `distill` put off, whosever turn it is; the losses of those that did."""
        ...

    def evaluate(
        self, round_: int, partitions: Sequence[int], split: str, num_logits: int
    ) -> dict[int, ClientAccuracy]:
        """Have clients evaluate their models on ``"test"`` or ``"held-out"`` images.

        ``num_logits`` is 0, or the size of the common test set: its logits are then returned.
        """
        ...
