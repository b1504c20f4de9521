"""Exchanges over Flower's Grid: requests to nodes, their replies, and how many bytes that took."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from flwr.app import Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from fedzge_flwr.common.errors import ProtocolError
from fedzge_flwr.common.text import printable
from fedzge_flwr.config.sections import RunSettings
from fedzge_flwr.grid.inflow import InflowError, at_most
from fedzge_flwr.grid.standing import Standing
from fedzge_flwr.wire.codec import decode, encode, encode_arrays
from fedzge_flwr.wire.messages import (
    DistillRequest,
    EvaluateRequest,
    HelloRequest,
    ImagesNeeded,
    LogitsRequest,
    Refused,
    Reply,
    Request,
    RoundRequest,
    TrainRequest,
)
from fedzge_flwr.wire.size import encoded_bytes, held_bytes, most_bytes, payload_bytes
from fedzge_flwr.wire.traffic import ByteLedger, Traffic, split

LOGGER = logging.getLogger("flwr.fedzge")

R = TypeVar("R", bound=Reply)

_SHORTEST_POLL_S, _LONGEST_POLL_S = 0.1, 1.0
_POLL_SHARE = 0.02
"""Between two looks for replies there is this part of the time already waited, within bounds."""

_MOST_PULLS = 32
"""Requests for replies in one look: of so many clients or fewer, each reply is pulled by itself."""

_UNREADABLE = (
    AssertionError,
    AttributeError,
    DecodeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What Flower raises when it rebuilds a message of objects that do not belong together."""


@dataclass(frozen=True)
class Failure:
    """Why a node's reply is missing.

    Parameters
    ----------
    reason : str
        For people.
    silent : bool
        Whether it was waited for until its time was up.
    attack : bool
        Whether it was so large that no honest node sends it.
    num_bytes : int
        What it took as far as it was loaded.
    """

    reason: str
    silent: bool = False
    attack: bool = False
    num_bytes: int = 0


_UNSENT = Failure("no message could be sent to its node")


class _Patience:
    """How long the replies to some messages are waited for.

    Parameters
    ----------
    timeout : float
        Seconds, for all.
    enough : int
        So many answers are a quorum.
    grace : float
        Seconds for the others once there is one.
    """

    def __init__(self, timeout: float, enough: int, grace: float) -> None:
        self._started = time.monotonic()
        self._timeout, self._enough, self._grace = timeout, enough, grace
        self._deadline = self._started + timeout
        self.hurried = False

    def over(self, answers: int) -> bool:
        """Whether nobody is waited for any more, now that there are so many answers."""
        now = time.monotonic()
        if answers >= self._enough and not self.hurried:
            self.hurried = now + self._grace < self._deadline
            self._deadline = min(self._deadline, now + self._grace)
        return now >= self._deadline

    def pause(self) -> None:
        """Let some time pass before the next look, but not more than there is."""
        now = time.monotonic()
        pause = min(max(_POLL_SHARE * (now - self._started), _SHORTEST_POLL_S), _LONGEST_POLL_S)
        time.sleep(max(min(pause, self._deadline - now), 0.0))

    def failure(self) -> Failure:
        """Return why a reply that has not come is missing."""
        if self.hurried:
            reason = f"no reply within 'grace-period' = {self._grace:g} s after a quorum's"
            return Failure(reason)
        return Failure(f"no reply within {self._timeout:g} s", silent=True)


def _answers(replies: Collection[Reply]) -> int:
    """Return how many are of a quorum; who needs images has done nothing yet."""
    return sum(not isinstance(reply, ImagesNeeded) for reply in replies)


class GridExchange:
    """Sends requests and decodes replies, by node.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    run : RunSettings
        Its timeouts, and which part of the nodes is a quorum.
    timeout : float
        Seconds to wait for the replies to an action that has no timeout of its own.
    on_replies : Callable[[int, int], None], optional
        Told how many nodes have replied of how many that were asked, whenever that changes.
    """

    def __init__(
        self,
        grid: Grid,
        run: RunSettings,
        timeout: float,
        on_replies: Callable[[int, int], None] | None = None,
    ) -> None:
        self._grid = grid
        self._run = run
        self._timeout = timeout
        self._on_replies = on_replies
        self._timeouts = {
            # A hello is no work: who does not answer it soon would not answer what follows.
            HelloRequest.ACTION: run.node_timeout,
            TrainRequest.ACTION: run.train_timeout,
            RoundRequest.ACTION: run.train_timeout,
            LogitsRequest.ACTION: run.query_timeout,
            DistillRequest.ACTION: run.distill_timeout,
            EvaluateRequest.ACTION: run.evaluate_timeout,
        }
        self._ledger = ByteLedger()

    def send(
        self,
        groups: Sequence[tuple[Request, Sequence[int]]],
        reply_types: Sequence[type[R]],
        standing: Callable[[int], Standing],
        *,
        dims: Mapping[str, int] | None = None,
        expect: Mapping[str, int | str] | None = None,
    ) -> tuple[dict[int, R], dict[int, Failure]]:
        """Send nodes a request each, all to one action, and wait for their replies.

        Parameters
        ----------
        groups : Sequence[tuple[Request, Sequence[int]]]
            What to ask of which nodes; a request's arrays are encoded once.
        reply_types : Sequence[type[Reply]]
            The types that a reply may have; any may be a refusal instead.
        standing : Callable[[int], Standing]
            From a node to where the experiment stands for it.
        dims, expect
            As in `fedzge_flwr.wire.codec.decode`; the round is known.

        Returns
        -------
        tuple[dict[int, Reply], dict[int, Failure]]
            Decoded replies by node, or why there is none.
        """
        requests = {node: request for request, nodes in groups for node in nodes}
        patience = self._patience(requests.values())
        waiting = self._pushed(self._encoded(groups, standing))
        num_sent, most = len(waiting), most_bytes(reply_types, dims or {})
        unsent = requests.keys() - set(waiting.values())
        replies, failures = dict[int, R](), dict[int, Failure]()
        self._tell(0, len(requests))
        while waiting:
            for node, message in self._pulled(waiting, most):
                expected = {"round": requests[node].round, **(expect or {})}
                reply, size = _read(message, node, reply_types, expected, dims or {}, most)
                del message
                if isinstance(reply, Failure):
                    failures[node], payload = reply, {}
                else:
                    replies[node], payload = reply, payload_bytes(reply)
                self._book(requests[node], node, Traffic(up=split(size, payload)))
                self._tell(num_sent - len(waiting), len(requests))
            if not waiting or patience.over(_answers(replies.values())):
                break
            patience.pause()
        failures |= dict.fromkeys(unsent, _UNSENT)
        return replies, failures | dict.fromkeys(waiting.values(), patience.failure())

    def _pushed(self, messages: Sequence[Message]) -> dict[str, int]:
        """Push messages; return the nodes of those that will have a reply, by message."""
        # What Flower could not send has no id, and will have no reply.
        sent = {message_id for message_id in self._grid.push_messages(messages) if message_id}
        # An error reply may carry another node's id: the id of the request is what counts.
        found = [message.metadata for message in messages]
        return {item.message_id: item.dst_node_id for item in found if item.message_id in sent}

    def _patience(self, requests: Collection[Request]) -> _Patience:
        """Return how long replies to some requests are waited for."""
        own = (self._timeouts.get(request.ACTION, 0.0) for request in requests)
        timeout = max(own, default=0.0) or self._timeout
        hello = any(isinstance(request, HelloRequest) for request in requests)
        # A product that is whole but for floating point is not rounded up.
        quorum = math.ceil(round(self._run.quorum * len(requests), 9))
        # Whoever has not said hello cannot take part: there is no quorum of those who may.
        enough = len(requests) if hello else max(quorum, self._run.min_clients)
        return _Patience(timeout, enough, self._run.grace_period)

    def _encoded(
        self,
        groups: Sequence[tuple[Request, Sequence[int]]],
        standing: Callable[[int], Standing],
    ) -> list[Message]:
        """Return the messages of some requests, and book their bytes."""
        messages: list[Message] = []
        for request, nodes in groups:
            arrays = encode_arrays(request)
            of_group = [
                Message(
                    encode(_standing_at(request, standing(node)), arrays),
                    node,
                    request.ACTION,
                    group_id=str(request.round),
                )
                for node in nodes
            ]
            payload = payload_bytes(request)
            for node, size in zip(nodes, encoded_bytes(of_group), strict=True):
                self._book(request, node, Traffic(down=split(size, payload)))
            messages += of_group
        return messages

    def _pulled(
        self, waiting: dict[str, int], most: int
    ) -> Iterator[tuple[int, Message | Failure]]:
        """Pull the replies that are there, by node, and strike them off those waited for.

        Grid.send_and_receive looks for them every three seconds, and says nothing until all are
        there.
        """
        ids = list(waiting)
        size = math.ceil(len(ids) / _MOST_PULLS)
        for start in range(0, len(ids), size):
            yield from self._pulled_at_once(ids[start : start + size], waiting, most)

    def _pulled_at_once(
        self, ids: Sequence[str], waiting: dict[str, int], most: int
    ) -> Iterator[tuple[int, Message | Failure]]:
        """Pull replies in one request.

        Flower rebuilds a message from the objects that its sender has sent. When one cannot be
        rebuilt, it and those pulled before it in the same request are gone.
        """
        try:
            with at_most(self._grid, most * len(ids)):
                found = list(self._grid.pull_messages(ids))
        except (InflowError, *_UNREADABLE) as error:
            if len(ids) > 1:
                for message_id in ids:
                    yield from self._pulled_at_once([message_id], waiting, most)
            elif isinstance(error, InflowError):
                yield waiting.pop(ids[0]), _too_large(error.held, most)
            else:
                reason = f"its reply cannot be read ({printable(repr(error), 200)})"
                yield waiting.pop(ids[0]), Failure(reason)
            return
        while found:
            node = waiting.pop(found[-1].metadata.reply_to_message_id, None)
            if node is None:
                found.pop()
                LOGGER.warning("a reply to no request of this exchange was dropped")
            else:
                # Held by nobody else: it may be large.
                yield node, found.pop()

    def _tell(self, answered: int, asked: int) -> None:
        if self._on_replies is not None:
            self._on_replies(answered, asked)

    def take_ledger(self) -> ByteLedger:
        """Return the bytes since the last call, and start anew."""
        ledger, self._ledger = self._ledger, ByteLedger()
        return ledger

    def _book(self, request: Request, node_id: int, traffic: Traffic) -> None:
        self._ledger.add(request.ACTION, node_id, traffic)


def _standing_at(request: Request, standing: Standing) -> Request:
    if isinstance(request, (TrainRequest, RoundRequest)):
        request = replace(request, owed=standing.owed)
    return replace(
        request,
        experiment=standing.experiment,
        state=standing.state,
        durable=standing.durable,
    )


def _read(
    message: Message | Failure,
    node_id: int,
    reply_types: Sequence[type[R]],
    expect: Mapping[str, int | str],
    dims: Mapping[str, int],
    most: int,
) -> tuple[R | Failure, int]:
    """Return a reply and its bytes, or why there is none.

    Nothing of one that takes more than ``most`` bytes is copied or looked into.
    """
    if isinstance(message, Failure):
        return message, message.num_bytes
    held = held_bytes(message)
    if held > most:
        return _too_large(held, most), held
    (size,) = encoded_bytes([message])
    return _decoded(message, node_id, reply_types, expect, dims), size


def _too_large(held: int, most: int) -> Failure:
    reason = f"its reply takes {held / 1e6:,.1f} MB; at most {most / 1e6:,.1f} MB are right"
    return Failure(reason, attack=True, num_bytes=held)


def _decoded(
    message: Message,
    node_id: int,
    reply_types: Sequence[type[R]],
    expect: Mapping[str, int | str],
    dims: Mapping[str, int],
) -> R | Failure:
    """Return a reply, or why there is none: the client failed, refused, or sent rubbish."""
    if message.has_error():
        return Failure(_reason(message))
    types: tuple[type[Reply], ...] = (*reply_types, Refused)
    try:
        reply = decode(types, message.content, sender=f"node {node_id}", expect=expect, dims=dims)
    except ProtocolError as error:
        return Failure(str(error))
    if isinstance(reply, Refused):
        return Failure(f"refused: {reply.reason}")
    # One of the others, since it was decoded as one of them.
    return cast(R, reply)


def _reason(message: Message) -> str:
    """Return the first telling line of an error reply."""
    reason = message.error.reason or f"error code {message.error.code}"
    # Flower wraps the client's exception: "<class …>:<'\nException … occurred. Message: text'>".
    _, found, text = reason.partition("occurred. Message: ")
    lines = (text.removesuffix("'>") if found else reason).strip().splitlines()
    return printable(lines[0], 500) if lines else f"error code {message.error.code}"
