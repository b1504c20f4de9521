"""The clients of a federation, reached over Flower's Grid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from flwr.serverapp import Grid

from fedzge_flwr.common.arrays import ByteArray
from fedzge_flwr.config.sections import MIN_TRAINING_IMAGES, Settings
from fedzge_flwr.grid.channel import Channel
from fedzge_flwr.grid.targets import PendingTargets, send_by_name
from fedzge_flwr.query.question import Question, image_digest
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.server.clients import ClientAccuracy, ClientAnswer
from fedzge_flwr.wire.messages import (
    NO_EXPERIMENT,
    CompactDistillRequest,
    DistillReply,
    DistillRequest,
    EvaluateReply,
    EvaluateRequest,
    LogitsReply,
    LogitsRequest,
    Request,
    RoundReply,
    RoundRequest,
    TrainReply,
    TrainRequest,
)

LOGGER = logging.getLogger("flwr.fedzge")


class GridClients:
    """`fedzge_flwr.server.clients.Clients` over a Grid.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    settings : Settings
        The run's settings.
    timeout : float
        Seconds to wait for the replies of an exchange that has no timeout of its own.
    experiment : str
        32 hexadecimal digits: what clients keep their models by.
    on_replies : Callable[[int, int], None], optional
        Told how many clients have replied of how many that were asked.
    """

    def __init__(
        self,
        grid: Grid,
        settings: Settings,
        timeout: float,
        experiment: str = NO_EXPERIMENT,
        on_replies: Callable[[int, int], None] | None = None,
    ) -> None:
        self._settings = settings
        self.channel = Channel(grid, settings, timeout, experiment, on_replies)
        self._pending = PendingTargets()
        self._trained = _Trained(settings, self.channel)

    @property
    def num_examples(self) -> dict[int, int]:
        """Training examples by partition."""
        return self.channel.num_examples

    def snapshot(self) -> dict[str, Any]:
        """Return all that lives through rounds, for `restore`."""
        return {
            **self.channel.snapshot(),
            **self._pending.snapshot(),
            "untrained": sorted(self._trained.never),
            "trained": sorted(self._trained.ever),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take up what `snapshot` returned."""
        self.channel.restore(snapshot)
        self._pending.restore(snapshot)
        self._trained.never = set(snapshot["untrained"])
        self._trained.ever = set(snapshot["trained"])

    def ask(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        """Have clients train on their own data and then answer; who fails at either is absent.

        Each one that is absent is noted as missing, with the reason.
        """
        self.channel.begin_round(round_)
        if self._settings.run.transport == "compact":
            answers = self._ask_at_once(round_, partitions, question, to_distill=to_distill)
        else:
            answers = self._ask_in_phases(round_, partitions, question)
        self.channel.account_for(round_, LogitsRequest.ACTION, partitions, answers)
        return answers

    def _ask_in_phases(
        self, round_: int, partitions: Sequence[int], question: Question
    ) -> dict[int, ClientAnswer]:
        """Have clients train, and then ask those that have."""
        trained = self.channel.exchange_one(TrainRequest(round=round_), TrainReply, partitions)
        self.channel.standings.note_training(partitions, trained)
        request = LogitsRequest(round=round_, images=question.images_BCHW)
        answered = self.channel.exchange_one(
            request,
            LogitsReply,
            list(trained),
            dims={"B": question.num_images},
            expect={"query": image_digest(request.images)},
        )
        return {
            partition: ClientAnswer(
                reply.logits,
                self._trained.loss(
                    partition, trained[partition].num_examples, trained[partition].loss
                ),
            )
            for partition, reply in answered.items()
        }

    def _ask_at_once(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        """Send pending targets and the question in one message."""
        fields = compact_fields(question, to_distill=to_distill)

        def request(targets: Targets, images: ByteArray) -> Request:
            return RoundRequest(
                round=round_,
                targets_round=targets.round,
                temperature=targets.temperature,
                digest=targets.digest,
                images=images,
                targets=targets.logits_NK,
                **fields,
            )

        spec = self._settings.data.spec
        nothing = Targets.none(spec.image_shape, spec.num_classes)

        replies = send_by_name(
            partial(
                self.channel.exchange,
                dims={"B": question.num_images},
                expect={"query": question.fingerprint},
            ),
            request,
            {partition: self._pending.of(partition, nothing) for partition in partitions},
            RoundReply,
        )
        self.channel.standings.note_training(partitions, replies)
        answers: dict[int, ClientAnswer] = {}
        for partition, reply in replies.items():
            self._pending.done(partition)
            answers[partition] = ClientAnswer(
                reply.logits,
                self._trained.loss(partition, reply.num_examples, reply.train_loss),
                self._distill_loss(round_, partition, reply.distill_loss, reply.distill_problem),
            )
        return answers

    def _distill_loss(self, round_: int, partition: int, loss: float, problem: str) -> float | None:
        """Return the loss, or None if nothing was distilled; note it if something went wrong."""
        if problem:
            self.channel.note_missing(round_, partition, DistillRequest.ACTION, problem)
        return loss or None

    def distill(self, round_: int, partitions: Sequence[int], targets: Targets) -> dict[int, float]:
        """Have clients distill targets; their losses.

        Under the compact transport they are put off: until a client is next asked, or `deliver`.
        """
        if self._settings.run.transport == "compact":
            self._pending.put(partitions, targets)
            return {}
        request = DistillRequest(
            round=round_,
            temperature=targets.temperature,
            images=targets.images_NCHW,
            logits=targets.logits_NK,
        )
        return self._losses(round_, self.channel.exchange_one(request, DistillReply, partitions))

    def deliver(self, round_: int) -> dict[int, float]:
        """Have pending targets distilled; images are sent again to who has not kept them."""
        if not self._pending:
            return {}

        def request(targets: Targets, images: ByteArray) -> Request:
            return CompactDistillRequest(
                round=targets.round,
                temperature=targets.temperature,
                digest=targets.digest,
                images=images,
                logits=targets.logits_NK,
            )

        done = send_by_name(self.channel.exchange, request, self._pending.all(), DistillReply)
        for partition in done:
            self._pending.done(partition)
        return self._losses(round_, done)

    def _losses(self, round_: int, replies: Mapping[int, DistillReply]) -> dict[int, float]:
        losses = {p: self._distill_loss(round_, p, r.loss, r.problem) for p, r in replies.items()}
        return {partition: loss for partition, loss in losses.items() if loss is not None}

    def evaluate(
        self, round_: int, partitions: Sequence[int], split: str, num_logits: int
    ) -> dict[int, ClientAccuracy]:
        """Have clients evaluate their models on ``"test"`` or ``"held-out"`` images."""
        replies = self.channel.exchange_one(
            EvaluateRequest(round=round_, split=split, num_logits=num_logits),
            EvaluateReply,
            partitions,
            dims={"M": num_logits},
            expect={"num_examples": num_logits} if num_logits else None,
        )
        return {
            partition: ClientAccuracy(reply.num_examples, reply.accuracy, reply.logits)
            for partition, reply in replies.items()
            if reply.num_examples > 0
        }


def compact_fields(question: Question, *, to_distill: bool) -> dict[str, Any]:
    """Return the fields of a compact query: the base images are levels there."""
    return {
        "base": question.base,
        "directions": question.directions.payload_QGP,
        "seed": question.directions.seed,
        "eps": question.eps,
        "differences": question.differences,
        "to_distill": to_distill,
    }


class _Trained:
    """What clients report of their local training; who never has is warned of once."""

    def __init__(self, settings: Settings, channel: Channel) -> None:
        self._settings = settings
        self._channel = channel
        self.never: set[int] = set()
        self.ever: set[int] = set()

    def loss(self, partition: int, num_examples: int, loss: float) -> float | None:
        """Return the loss, or None if nothing was trained on; the first time, warn of that.

        A client that has trained is through with it, by its rounds or by its owner's will. Where
        local training ends after some rounds, one that has images is taken for such a client.
        """
        if num_examples:
            self.ever.add(partition)
            return loss
        if partition in self.ever:
            return None
        images = self._channel.num_examples[partition]
        if self._settings.training.local_rounds > 0 and images >= MIN_TRAINING_IMAGES:
            return None
        if partition not in self.never:
            self.never.add(partition)
            LOGGER.warning(
                "client %d has not trained (it has %d images): it answers with the model that it "
                "began with",
                partition,
                images,
            )
        return None
