"""A federation in one process: black boxes called directly, without Flower, Ray or messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from fedzge_flwr.black_boxes.contract import EvaluationSplit
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.query.question import Question
from fedzge_flwr.server.clients import ClientAccuracy, ClientAnswer


class LocalClients:
    """`fedzge_flwr.server.clients.Clients` over PyTorch black boxes of this process.

    Parameters
    ----------
    settings : Settings
        The run's settings; one black box for each of ``num-clients``.
    """

    def __init__(self, settings: Settings) -> None:
        num_clients = settings.run.num_clients
        self._boxes = [TorchBlackBox(settings, n, num_clients) for n in range(num_clients)]
        self._local_rounds = settings.client.local_rounds
        self._trained = dict.fromkeys(range(num_clients), 0)
        self._num_examples = {n: box.profile().num_examples for n, box in enumerate(self._boxes)}

    @property
    def num_examples(self) -> dict[int, int]:
        """Training examples by partition."""
        return dict(self._num_examples)

    def train(self, round_: int, partitions: Sequence[int]) -> dict[int, float | None]:
        """Train each client on its own data, unless that is over for it."""
        return {number: self._train(number, round_) for number in partitions}

    def _train(self, number: int, round_: int) -> float | None:
        if 0 < self._local_rounds <= self._trained[number]:
            return None
        report = self._boxes[number].fit(round_)
        self._trained[number] += 1
        return report.loss if report.num_examples else None

    def ask(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        """Train each client and return its logits."""
        losses, images_BCHW = self.train(round_, partitions), question.images_BCHW
        return {
            number: ClientAnswer(self._boxes[number].logits(images_BCHW), losses[number])
            for number in partitions
        }

    def distill(
        self,
        round_: int,
        partitions: Sequence[int],
        question: Question,
        logits_NK: FloatArray,
        temperature: float,
    ) -> dict[int, float]:
        """Have each client distil."""
        return {
            number: self._boxes[number].distill(round_, question.base_NCHW, logits_NK, temperature)
            for number in partitions
        }

    def deliver(self, round_: int) -> dict[int, float]:
        """Nothing is ever put off."""
        return {}

    def evaluate(
        self, round_: int, partitions: Sequence[int], split: str, num_logits: int
    ) -> dict[int, ClientAccuracy]:
        """Evaluate each client."""
        outcomes = {n: self._boxes[n].evaluate(cast(EvaluationSplit, split)) for n in partitions}
        return {
            n: ClientAccuracy(outcome.num_examples, outcome.accuracy, outcome.logits_NK)
            for n, outcome in outcomes.items()
        }
