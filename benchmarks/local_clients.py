"""A federation in one process: black boxes called directly, without Flower, Ray or messages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from safetensors.numpy import load_file, save_file

from fedzge_flwr.black_boxes.contract import EvaluationSplit
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.black_boxes.private import PrivateBlackBox, Releases
from fedzge_flwr.client.distilling import distill_within
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.config.owner import OwnerSettings
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.query.question import Question
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.server.clients import ClientAccuracy, ClientAnswer


class LocalClients:
    """`fedzge_flwr.server.clients.Clients` over PyTorch black boxes of this process.

    Parameters
    ----------
    settings : Settings
        The run's settings; one black box for each of ``num-clients``.
    cache : Path, optional
        Where trained models are kept, for other runs of the same clients: what they learn of their
        own data does not depend on what others answer. Once they distill it does, and nothing is
        kept or taken any more. Nor are private clients, whose noise no seed repeats. It knows the
        settings but not the code: after a change of numbers take another folder.
    epsilon : float, optional
        ε of each client's privacy, δ = 10⁻⁵; None: none is private.
    """

    def __init__(
        self, settings: Settings, cache: Path | None = None, epsilon: float | None = None
    ) -> None:
        num_clients = settings.run.num_clients
        partitions = range(num_clients)
        self._boxes = [self._box(settings, p, epsilon) for p in partitions]
        self._local_rounds = settings.training.local_rounds
        self._cache = cache if epsilon is None else None
        run, training = settings.run, settings.training
        # What says in which rounds a client trains, and on what.
        sampled = (run.seed, run.num_clients, run.fraction_train)
        trained = (sampled, settings.data, training, settings.optimizer)
        self._key = hashlib.sha256(repr(trained).encode()).hexdigest()[:16]
        self._trained = dict.fromkeys(partitions, 0)
        self._best = dict.fromkeys(partitions, 0.0)
        self._num_examples = {p: self._boxes[p].profile().num_examples for p in partitions}

    @staticmethod
    def _box(settings: Settings, partition: int, epsilon: float | None) -> TorchBlackBox:
        num_clients = settings.run.num_clients
        if epsilon is None:
            return TorchBlackBox(settings, partition, num_clients)
        return PrivateBlackBox(settings, partition, num_clients, Releases(epsilon, 1e-5, None))

    @property
    def num_examples(self) -> dict[int, int]:
        """Training examples by partition."""
        return dict(self._num_examples)

    def train(self, round_: int, partitions: Sequence[int]) -> dict[int, float | None]:
        """Train each client on its own data, unless that is over for it."""
        return {partition: self._train(partition, round_) for partition in partitions}

    def _train(self, partition: int, round_: int) -> float | None:
        if 0 < self._local_rounds <= self._trained[partition]:
            return None
        self._trained[partition] += 1
        box = self._boxes[partition]
        if self._cache is None:
            report = box.fit(round_)
            return report.loss if report.num_examples else None
        path = self._cache / f"{self._key}-{partition}-{round_}.safetensors"
        if not path.exists():
            box.fit(round_)
            self._cache.mkdir(parents=True, exist_ok=True)
            state = {name: np.ascontiguousarray(value) for name, value in box.state().items()}
            with atomic_path(path, durable=False) as temporary:
                save_file(state, temporary)
        # In either case, so that the first run is as the later ones.
        box.load_state({name: value.copy() for name, value in load_file(path).items()})
        return 0.0

    def ask(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        """Train each client and return its logits."""
        losses, images_BCHW = self.train(round_, partitions), question.images_BCHW
        return {p: ClientAnswer(self._boxes[p].logits(images_BCHW), losses[p]) for p in partitions}

    def distill(self, round_: int, partitions: Sequence[int], targets: Targets) -> dict[int, float]:
        """Have each client distill, as its endpoint would."""
        self._cache = None
        return {p: self._distill(p, round_, targets) for p in partitions}

    def _distill(self, partition: int, round_: int, targets: Targets) -> float:
        """Distill; what costs more on own images than an owner allows by default is undone."""
        most = OwnerSettings().max_accuracy_loss / 100
        done = distill_within(self._boxes[partition], targets, self._best[partition], most)
        self._best[partition] = done.best
        if done.undone:
            print(f"  round {round_}: distillation of client {partition} was undone", flush=True)
        return done.loss

    def deliver(self, round_: int) -> dict[int, float]:
        """Nothing is ever put off."""
        return {}

    def evaluate(
        self, round_: int, partitions: Sequence[int], split: str, num_logits: int
    ) -> dict[int, ClientAccuracy]:
        """Evaluate each client."""
        outcomes = {p: self._boxes[p].evaluate(cast(EvaluationSplit, split)) for p in partitions}
        return {
            p: ClientAccuracy(outcome.num_examples, outcome.accuracy, outcome.logits_NK)
            for p, outcome in outcomes.items()
        }
