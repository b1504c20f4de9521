"""The clients of a federation, reached over Flower's Grid: exchanges, roster, missing replies."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedzge_flwr import __version__
from fedzge_flwr.arrays import FloatArray
from fedzge_flwr.config import Settings
from fedzge_flwr.errors import ProtocolError, RosterError
from fedzge_flwr.ledger import ByteLedger
from fedzge_flwr.observers import MissingReply
from fedzge_flwr.protocol import (
    CompactDistillRequest,
    CompactLogitsRequest,
    DistillAskedRequest,
    DistillReply,
    DistillRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    LogitsReply,
    LogitsRequest,
    Reply,
    Request,
    TrainReply,
    TrainRequest,
    decode,
    encode,
    encoded_bytes,
)
from fedzge_flwr.question import Question, to_levels
from fedzge_flwr.server.clients import ClientAccuracy

LOGGER = logging.getLogger("flwr.fedzge")

R = TypeVar("R", bound=Reply)

_POLL_S = 0.5
_NOTICE_S = 5.0


@dataclass(frozen=True)
class Member:
    """A client that has said hello, and the node through which it is reached."""

    node_id: int
    hello: HelloReply


class GridClients:
    """`fedzge_flwr.server.clients.Clients` over a Grid.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    settings : Settings
        The run's settings.
    timeout : float
        Seconds to wait for the replies of one exchange.
    """

    def __init__(self, grid: Grid, settings: Settings, timeout: float) -> None:
        self._grid = grid
        self._settings = settings
        self._timeout = timeout
        self._members: dict[int, Member] = {}
        self._missing: list[MissingReply] = []
        self._untrained: set[int] = set()
        self._ledger = ByteLedger()
        self._round_ledger = ByteLedger()

    # -- roster -------------------------------------------------------------------------------

    @property
    def members(self) -> Mapping[int, Member]:
        """The known clients, by partition, in that order."""
        return dict(sorted(self._members.items()))

    @property
    def num_examples(self) -> dict[int, int]:
        """Training examples by partition."""
        return {number: member.hello.num_examples for number, member in self.members.items()}

    def gather(self) -> None:
        """Wait for ``num-clients`` nodes and learn who they are.

        Raises
        ------
        RosterError
            If too few nodes connect or answer, two claim one partition, or one has a partition
            that the settings do not know.
        """
        run = self._settings.run
        node_ids = self._wait_for_nodes(run.num_clients, run.node_timeout)
        request = HelloRequest(round=0, version=__version__)
        replies, failures = self._exchange_nodes(request, HelloReply, {}, {}, node_ids)
        for node_id in sorted(replies):
            self._admit(node_id, replies[node_id])
        for node_id, reason in sorted(failures.items()):
            LOGGER.warning("node %d does not take part: %s", node_id, reason)
        if len(self._members) < run.min_clients:
            first = next(iter(failures.values()), "no reply")
            raise RosterError(
                f"{len(self._members)} of {len(node_ids)} nodes said hello, 'min-clients' = "
                f"{run.min_clients}; the first other one: {first}"
            )

    def _wait_for_nodes(self, num_nodes: int, patience: float) -> list[int]:
        deadline = time.monotonic() + patience
        notice = time.monotonic() + _NOTICE_S
        # Right after the start the grid may know no node yet, and it lists them in no order.
        while len(node_ids := sorted(self._grid.get_node_ids())) < num_nodes:
            now = time.monotonic()
            if now >= deadline:
                raise RosterError(
                    f"{len(node_ids)} of 'num-clients' = {num_nodes} nodes connected within "
                    f"'node-timeout' = {patience:g} s; start more SuperNodes (in simulation: "
                    f'--federation-config "num-supernodes={num_nodes}"), or lower num-clients'
                )
            if now >= notice:
                LOGGER.info("waiting for nodes: %d of %d", len(node_ids), num_nodes)
                notice = now + _NOTICE_S
            time.sleep(_POLL_S)
        return node_ids

    def _admit(self, node_id: int, hello: HelloReply) -> None:
        num_clients = self._settings.run.num_clients
        if hello.num_partitions != num_clients or hello.partition >= num_clients:
            raise RosterError(
                f"node {node_id} has partition {hello.partition} of {hello.num_partitions}, but "
                f"'num-clients' = {num_clients}; make the two equal (in simulation: "
                f'--federation-config "num-supernodes={num_clients}")'
            )
        if hello.partition in self._members:
            other = self._members[hello.partition].node_id
            raise RosterError(
                f"nodes {other} and {node_id} both have partition {hello.partition}; give each "
                "SuperNode a partition-id of its own"
            )
        if hello.version != __version__:
            LOGGER.warning(
                "client %d runs fedzge-flwr %s, the server %s",
                hello.partition,
                hello.version,
                __version__,
            )
        self._members[hello.partition] = Member(node_id, hello)

    # -- what a round asks --------------------------------------------------------------------

    def train(self, round_: int, partitions: Sequence[int]) -> dict[int, float | None]:
        """Have clients train on their own data; losses, None of who has too few images to."""
        replies = self.exchange(TrainRequest(round=round_), TrainReply, partitions)
        losses: dict[int, float | None] = {}
        for partition, reply in replies.items():
            losses[partition] = reply.loss if reply.num_examples else None
            if not reply.num_examples and partition not in self._untrained:
                self._untrained.add(partition)
                LOGGER.warning(
                    "client %d has too few images to train on (%d): it answers with the model "
                    "that it began with",
                    partition,
                    self.num_examples[partition],
                )
        return losses

    def query(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, FloatArray]:
        """Ask for logits on a question's images; (B, K) of each client that answered."""
        request: Request
        if self._compact:
            request = CompactLogitsRequest(
                round=round_,
                base=to_levels(question.base_NCHW),
                directions=question.directions_as_bytes,
                eps=question.eps,
                two_sided=question.two_sided,
                to_distill=to_distill,
            )
        else:
            request = LogitsRequest(round=round_, images=question.images_BCHW)
        dims = {"B": question.num_images}
        replies = self.exchange(request, LogitsReply, partitions, dims=dims)
        return {partition: reply.logits for partition, reply in replies.items()}

    def distill(
        self,
        round_: int,
        partitions: Sequence[int],
        question: Question,
        logits_NK: FloatArray,
        temperature: float,
    ) -> dict[int, float]:
        """Have clients distil the ensemble's logits on a question's base images; their losses.

        By the compact wire the images are sent again only to clients that have not kept them.
        """
        replies: dict[int, DistillReply] = {}
        waiting: Sequence[int] = partitions
        if self._compact:
            asked = DistillAskedRequest(
                round=round_, temperature=temperature, digest=question.digest, logits=logits_NK
            )
            replies = self.exchange(asked, DistillReply, partitions)
            waiting = [n for n, reply in replies.items() if reply.outcome != "done"]
        if waiting:
            request = (
                CompactDistillRequest(
                    round=round_,
                    temperature=temperature,
                    images=to_levels(question.base_NCHW),
                    logits=logits_NK,
                )
                if self._compact
                else DistillRequest(
                    round=round_,
                    temperature=temperature,
                    images=question.base_NCHW,
                    logits=logits_NK,
                )
            )
            replies |= self.exchange(request, DistillReply, waiting)
        return {n: reply.loss for n, reply in sorted(replies.items()) if reply.outcome == "done"}

    @property
    def _compact(self) -> bool:
        return self._settings.run.wire == "compact"

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
        expect: Mapping[str, int] | None = None,
    ) -> dict[int, R]:
        """Send one request to some clients and decode their replies.

        Parameters
        ----------
        request : Request
            What to ask; all clients get the same.
        reply_type : type[Reply]
            The request's reply type.
        partitions : Sequence[int]
            Whom to ask. A client that is not connected counts as missing.
        dims, expect : Mapping[str, int], optional
            As in `fedzge_flwr.protocol.decode`; the number of classes and the round are known.

        Returns
        -------
        dict[int, Reply]
            By partition, in that order; without the clients that failed, which are noted for
            `take_missing` and named in the log.
        """
        nodes = {
            number: self._members[number].node_id
            for number in partitions
            if number in self._members
        }
        failures = {number: "not connected" for number in partitions if number not in nodes}
        known = {"K": self._settings.data.spec.num_classes, **(dims or {})}
        replies, failed = self._exchange_nodes(
            request, reply_type, known, expect or {}, list(nodes.values())
        )
        failures |= {
            number: failed[node_id] for number, node_id in nodes.items() if node_id in failed
        }
        for number, reason in sorted(failures.items()):
            LOGGER.warning(
                "round %d: client %d left out of %s: %s",
                request.round,
                number,
                request.ACTION,
                reason,
            )
            self._missing.append(MissingReply(number, request.ACTION, reason))
        return {
            number: replies[node_id]
            for number, node_id in sorted(nodes.items())
            if node_id in replies
        }

    def _exchange_nodes(
        self,
        request: Request,
        reply_type: type[R],
        dims: Mapping[str, int],
        expect: Mapping[str, int],
        node_ids: Sequence[int],
    ) -> tuple[dict[int, R], dict[int, str]]:
        """Return decoded replies, and why there is none, by node."""
        content = encode(request)
        messages = [
            Message(content, node_id, request.ACTION, group_id=str(request.round))
            for node_id in node_ids
        ]
        received = list(self._grid.send_and_receive(messages, timeout=self._timeout))
        self._book(
            request.ACTION, down=sum(encoded_bytes(messages)), up=sum(encoded_bytes(received))
        )
        # An error reply may carry another node's id: the id of the request is what counts.
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        replies: dict[int, R] = {}
        failures: dict[int, str] = {}
        for message in received:
            node_id = asked.get(message.metadata.reply_to_message_id)
            if node_id is None:
                LOGGER.warning("a reply to no request of this exchange was dropped")
            elif message.has_error():
                failures[node_id] = _reason(message)
            else:
                try:
                    replies[node_id] = decode(
                        reply_type,
                        message.content,
                        sender=f"node {node_id}",
                        expect={"round": request.round, **expect},
                        dims=dims,
                    )
                except ProtocolError as error:
                    failures[node_id] = str(error)
        for node_id in node_ids:
            if node_id not in replies and node_id not in failures:
                failures[node_id] = f"no reply within {self._timeout:g} s"
        return replies, failures

    # -- bookkeeping --------------------------------------------------------------------------

    def _book(self, action: str, *, down: int, up: int) -> None:
        self._ledger.add(action, down=down, up=up)
        self._round_ledger.add(action, down=down, up=up)

    @property
    def ledger(self) -> ByteLedger:
        """Bytes since the start."""
        return self._ledger

    def close_round(self) -> tuple[ByteLedger, tuple[MissingReply, ...]]:
        """Return this round's bytes and missing replies, and start the next round's count."""
        closed = (self._round_ledger, tuple(self._missing))
        self._round_ledger, self._missing = ByteLedger(), []
        return closed


def _reason(message: Message) -> str:
    """Return the first telling line of an error reply."""
    reason = message.error.reason or f"error code {message.error.code}"
    # Flower wraps the client's exception: "<class …>:<'\nException … occurred. Message: text'>".
    _, found, text = reason.partition("occurred. Message: ")
    lines = (text.removesuffix("'>") if found else reason).strip().splitlines()
    return lines[0][:500] if lines else f"error code {message.error.code}"
