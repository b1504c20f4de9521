"""The clients of a federation, reached over Flower's Grid: exchanges, roster, missing replies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from flwr.serverapp import Grid

from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.grid.exchange import GridExchange, Standing
from fedzge_flwr.grid.roster import Member, Roster
from fedzge_flwr.learning.training import MIN_TRAINING_IMAGES
from fedzge_flwr.observers.base import MissingReply
from fedzge_flwr.query.question import Question, image_digest, to_levels
from fedzge_flwr.server.clients import ClientAccuracy, ClientAnswer
from fedzge_flwr.wire.messages import (
    MOST_OWED,
    NO_EXPERIMENT,
    CompactDistillRequest,
    CompactLogitsRequest,
    DistillReply,
    DistillRequest,
    EvaluateReply,
    EvaluateRequest,
    ImagesNeeded,
    LogitsReply,
    LogitsRequest,
    Reply,
    Request,
    RoundReply,
    RoundRequest,
    TrainReply,
    TrainRequest,
)
from fedzge_flwr.wire.traffic import Traffic, total

LOGGER = logging.getLogger("flwr.fedzge")

R = TypeVar("R", bound=Reply)


@dataclass(frozen=True)
class RoundAccount:
    """A round's encoded bytes, evaluation's apart, and who was left out.

    Parameters
    ----------
    by_client : dict[int, Traffic]
        By partition.
    all_nodes : Traffic
        Of all nodes, those that are no client of the run included.
    since_start : Traffic
        The same since the start.
    evaluation : Traffic
        Of all nodes, for evaluation.
    missing : tuple of MissingReply
        Who was left out, and why.
    """

    by_client: dict[int, Traffic]
    all_nodes: Traffic
    since_start: Traffic
    evaluation: Traffic
    missing: tuple[MissingReply, ...]


@dataclass(frozen=True)
class _Targets:
    """Targets that a client has yet to distil: of which round, on which images, as levels."""

    round: int
    images: ByteArray
    digest: str
    logits_NK: FloatArray
    temperature: float


def _nothing_pending(question: Question, num_classes: int) -> _Targets:
    no_logits = np.zeros((0, num_classes), dtype=np.float32)
    return _Targets(0, to_levels(question.base_NCHW[:0]), "", no_logits, 1.0)


def _compact(question: Question, to_distill: bool) -> dict[str, Any]:
    """Return the fields of a compact query."""
    return {
        "base": to_levels(question.base_NCHW),
        "directions": question.directions.payload_QGP,
        "seed": question.directions.seed,
        "eps": question.eps,
        "two_sided": question.two_sided,
        "to_distill": to_distill,
    }


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
        self._exchange = GridExchange(grid, settings.run, timeout, on_replies)
        self._roster = Roster(grid, self._exchange, settings.run)
        self._settings = settings
        self._experiment = experiment
        self._states: dict[int, str] = {}
        self._durable: dict[int, str] = {}
        self._strayed: set[int] = set()
        self._missing: list[MissingReply] = []
        self._untrained: set[int] = set()
        self._owed: dict[int, int] = {}
        self._pending: dict[int, _Targets] = {}
        self._total = Traffic()

    # -- roster -------------------------------------------------------------------------------

    @property
    def members(self) -> Mapping[int, Member]:
        """The known clients, by partition, in that order."""
        return self._roster.members

    @property
    def num_examples(self) -> dict[int, int]:
        """Training examples by partition."""
        return {number: member.hello.num_examples for number, member in self.members.items()}

    def gather(self) -> None:
        """Wait for ``num-clients`` nodes and learn who they are (`Roster.gather`)."""
        self._roster.gather(self._experiment)

    # -- checkpoints --------------------------------------------------------------------------

    @property
    def states(self) -> dict[int, str]:
        """The clients' names of the states that their models are in, by partition."""
        return dict(self._states)

    def make_durable(self, states: Mapping[int, str]) -> None:
        """Let clients forget what came before these states: no checkpoint needs it any more."""
        self._durable = dict(states)

    def snapshot(self) -> dict[str, Any]:
        """Return all that lives through rounds, for `restore`; members say hello anew."""
        return {
            "experiment": self._experiment,
            "states": dict(self._states),
            "owed": dict(self._owed),
            "pending": {number: item.round for number, item in self._pending.items()},
            "targets": {item.round: vars(item) for item in self._pending.values()},
            "total": {"down": self._total.down, "up": self._total.up},
            "untrained": sorted(self._untrained),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take up what `snapshot` returned."""
        self._experiment = snapshot["experiment"]
        self._states = dict(snapshot["states"])
        self._owed = dict(snapshot["owed"])
        targets = {number: _Targets(**fields) for number, fields in snapshot["targets"].items()}
        self._pending = {number: targets[round_] for number, round_ in snapshot["pending"].items()}
        self._total = Traffic(**snapshot["total"])
        self._untrained = set(snapshot["untrained"])

    # -- what a round asks --------------------------------------------------------------------

    def ask(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        """Have clients train on their own data and then answer; who fails at either is absent."""
        self._roster.refresh(self._experiment)
        if self._settings.run.exchanges == "one":
            return self._ask_at_once(round_, partitions, question, to_distill=to_distill)
        trained = self.exchange(TrainRequest(round=round_), TrainReply, partitions)
        self._note_training(partitions, trained)
        request: Request
        if self._settings.run.wire == "compact":
            request = CompactLogitsRequest(round=round_, **_compact(question, to_distill))
            query = question.fingerprint
        else:
            request = LogitsRequest(round=round_, images=question.images_BCHW)
            query = image_digest(request.images)
        answered = self.exchange(
            request,
            LogitsReply,
            list(trained),
            dims={"B": question.num_images},
            expect={"query": query},
        )
        return {
            number: ClientAnswer(
                reply.logits,
                self._train_loss(number, trained[number].num_examples, trained[number].loss),
            )
            for number, reply in answered.items()
        }

    def _ask_at_once(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        """Send pending targets and the question in one message; images only to who needs them."""
        fields = _compact(question, to_distill)

        def request(targets: _Targets, images: ByteArray) -> Request:
            return RoundRequest(
                round=round_,
                targets_round=targets.round,
                temperature=targets.temperature,
                digest=targets.digest,
                images=images,
                targets=targets.logits_NK,
                **fields,
            )

        nothing = _nothing_pending(question, self._settings.data.spec.num_classes)
        replies = self._exchange_by_name(
            request,
            {number: self._pending.get(number, nothing) for number in partitions},
            RoundReply,
            dims={"B": question.num_images},
            expect={"query": question.fingerprint},
        )
        self._note_training(partitions, replies)
        answers: dict[int, ClientAnswer] = {}
        for number, reply in replies.items():
            self._pending.pop(number, None)
            answers[number] = ClientAnswer(
                reply.logits,
                self._train_loss(number, reply.num_examples, reply.train_loss),
                self._distill_loss(round_, number, reply.distill_loss, reply.distill_problem),
            )
        return answers

    def _exchange_by_name(
        self,
        make: Callable[[_Targets, ByteArray], Request],
        targets: Mapping[int, _Targets],
        reply_type: type[R],
        *,
        dims: Mapping[str, int] | None = None,
        expect: Mapping[str, int | str] | None = None,
    ) -> dict[int, R]:
        """Send clients a request with targets; the images, to those alone that have not kept them.

        Clients with the same targets get one and the same object: it is encoded and held once.
        """
        replies: dict[int, R] = {}
        waiting = targets
        for with_images in (False, True):
            of_round = {item.round: item for item in waiting.values()}
            made = {
                number: make(item, item.images if with_images else item.images[:0])
                for number, item in of_round.items()
            }
            got = self.exchange_each(
                {number: made[item.round] for number, item in waiting.items()},
                (reply_type, ImagesNeeded),
                dims=dims,
                expect=expect,
            )
            replies |= {n: reply for n, reply in got.items() if isinstance(reply, reply_type)}
            waiting = {n: targets[n] for n, reply in got.items() if isinstance(reply, ImagesNeeded)}
            if not waiting:
                break
        return dict(sorted(replies.items()))

    def _distill_loss(self, round_: int, partition: int, loss: float, problem: str) -> float | None:
        """Return the loss, or None if nothing was distilled; note it if something went wrong."""
        if problem:
            self._note_missing(round_, partition, DistillRequest.ACTION, problem)
        return loss or None

    def _note_training(self, partitions: Sequence[int], replies: Container[int]) -> None:
        """Note who owes how many rounds of training."""
        for number in partitions:
            if number in replies:
                self._owed.pop(number, None)
            elif self._settings.run.catch_up_rounds:
                owed = self._owed.get(number, 0) + 1
                self._owed[number] = min(owed, self._settings.run.catch_up_rounds, MOST_OWED)

    def _train_loss(self, partition: int, num_examples: int, loss: float) -> float | None:
        """Return the loss, or None if nothing was trained on; the first time, warn of that.

        Where local training ends after some rounds, a client that has images is through with it.
        """
        if num_examples:
            return loss
        through = self._settings.client.local_rounds > 0
        if through and self.num_examples[partition] >= MIN_TRAINING_IMAGES:
            return None
        if partition not in self._untrained:
            self._untrained.add(partition)
            LOGGER.warning(
                "client %d has not trained (it has %d images): it answers with the model that it "
                "began with",
                partition,
                self.num_examples[partition],
            )
        return None

    def distill(
        self,
        round_: int,
        partitions: Sequence[int],
        question: Question,
        logits_NK: FloatArray,
        temperature: float,
    ) -> dict[int, float]:
        """Have clients distil the ensemble's logits on a question's base images; their losses.

        In one exchange a round they are put off: until a client is next asked, or `deliver`.
        """
        if self._settings.run.wire == "dense":
            request = DistillRequest(
                round=round_, temperature=temperature, images=question.base_NCHW, logits=logits_NK
            )
            return self._losses(round_, self.exchange(request, DistillReply, partitions))
        images = to_levels(question.base_NCHW)
        targets = _Targets(round_, images, question.digest, logits_NK, temperature)
        self._pending |= dict.fromkeys(partitions, targets)
        if self._settings.run.exchanges == "one":
            return {}
        losses = self.deliver(round_)
        # What a client missed in a phase of its own, it has missed.
        self._pending.clear()
        return losses

    def deliver(self, round_: int) -> dict[int, float]:
        """Have pending targets distilled; images are sent again to who has not kept them."""
        if not self._pending:
            return {}

        def request(targets: _Targets, images: ByteArray) -> Request:
            return CompactDistillRequest(
                round=targets.round,
                temperature=targets.temperature,
                digest=targets.digest,
                images=images,
                logits=targets.logits_NK,
            )

        pending = dict(sorted(self._pending.items()))
        done = self._exchange_by_name(request, pending, DistillReply)
        for number in done:
            del self._pending[number]
        return self._losses(round_, done)

    def _losses(self, round_: int, replies: Mapping[int, DistillReply]) -> dict[int, float]:
        losses = {n: self._distill_loss(round_, n, r.loss, r.problem) for n, r in replies.items()}
        return {number: loss for number, loss in losses.items() if loss is not None}

    def evaluate(
        self, round_: int, partitions: Sequence[int], split: str, num_logits: int
    ) -> dict[int, ClientAccuracy]:
        """Have clients evaluate their models on ``"test"`` or ``"held-out"`` images."""
        replies = self.exchange(
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

    # -- exchanges ----------------------------------------------------------------------------

    def exchange(
        self,
        request: Request,
        reply_type: type[R],
        partitions: Sequence[int],
        *,
        dims: Mapping[str, int] | None = None,
        expect: Mapping[str, int | str] | None = None,
    ) -> dict[int, R]:
        """Send one request to some clients: `exchange_each` with the same for all."""
        requests = dict.fromkeys(partitions, request)
        return self.exchange_each(requests, (reply_type,), dims=dims, expect=expect)

    def exchange_each(
        self,
        requests: Mapping[int, Request],
        reply_types: Sequence[type[R]],
        *,
        dims: Mapping[str, int] | None = None,
        expect: Mapping[str, int | str] | None = None,
    ) -> dict[int, R]:
        """Send clients a request each, all to one action, and decode their replies.

        Parameters
        ----------
        requests : Mapping[int, Request]
            What to ask of whom, by partition. A client that is not connected counts as missing.
        reply_types : Sequence[type[Reply]]
            The types that a reply may have.
        dims, expect : Mapping[str, int], optional
            As in `fedzge_flwr.wire.codec.decode`; the number of classes and the round are known.

        Returns
        -------
        dict[int, Reply]
            By partition, in that order; without the clients that failed, which are noted as missing
            and named in the log.
        """
        members = self.members
        nodes = {number: members[number].node_id for number in requests if number in members}
        failures = {number: "not connected" for number in requests if number not in nodes}
        received, failed = self._exchange.send(
            {nodes[number]: requests[number] for number in nodes},
            reply_types,
            {nodes[number]: self._standing(number) for number in nodes},
            dims={"K": self._settings.data.spec.num_classes, **(dims or {})},
            expect=expect,
        )
        failures |= {
            number: failed[node_id] for number, node_id in nodes.items() if node_id in failed
        }
        for number, reason in sorted(failures.items()):
            self._note_missing(requests[number].round, number, requests[number].ACTION, reason)
        replies = {
            number: received[node_id]
            for number, node_id in sorted(nodes.items())
            if node_id in received
        }
        for number, reply in replies.items():
            self._take_state(requests[number].round, number, reply)
        return replies

    def _standing(self, partition: int) -> Standing:
        """Return what a request says of where the experiment stands for a client."""
        return Standing(
            self._experiment,
            self._states.get(partition, ""),
            self._durable.get(partition, ""),
            self._owed.get(partition, 0),
        )

    def _take_state(self, round_: int, partition: int, reply: Reply) -> None:
        """Note which state a client is in, and warn if it did not begin with that known here."""
        known = self._states.get(partition, "")
        self._states[partition] = reply.state
        if reply.began == known or partition in self._strayed:
            return
        self._strayed.add(partition)
        LOGGER.warning(
            "round %d: client %d %s; a 'state-dir' of its owner's keeps models through restarts "
            "and lost replies",
            round_,
            partition,
            "no longer has its model and began anew"
            if not reply.began
            else "went on from another model than the server knows of",
        )

    # -- bookkeeping --------------------------------------------------------------------------

    def _note_missing(self, round_: int, partition: int, action: str, reason: str) -> None:
        LOGGER.warning("round %d: client %d left out of %s: %s", round_, partition, action, reason)
        self._missing.append(MissingReply(partition, action, reason))

    def close_round(self) -> RoundAccount:
        """Return this round's bytes and missing replies, and start the next round's count."""
        ledger = self._exchange.take_ledger()
        missing, self._missing = tuple(self._missing), []
        of_round = total(ledger.protocol.values())
        self._total = total((self._total, of_round))
        by_client = {
            number: ledger.protocol[member.node_id]
            for number, member in self.members.items()
            if member.node_id in ledger.protocol
        }
        return RoundAccount(
            by_client,
            of_round,
            self._total,
            total(ledger.evaluation.values()),
            missing,
        )
