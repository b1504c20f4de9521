"""Exchanges over Flower's Grid: requests to nodes, their replies, and how many bytes that took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, cast

from flwr.app import Message
from flwr.serverapp import Grid

from fedzge_flwr.common.errors import ProtocolError
from fedzge_flwr.common.text import printable
from fedzge_flwr.config.sections import RunSettings
from fedzge_flwr.grid.standing import Standing
from fedzge_flwr.wire.codec import decode, encode, encode_arrays
from fedzge_flwr.wire.messages import (
    DistillRequest,
    EvaluateRequest,
    HelloRequest,
    LogitsRequest,
    Refused,
    Reply,
    Request,
    RoundRequest,
    TrainRequest,
)
from fedzge_flwr.wire.size import encoded_bytes, payload_bytes
from fedzge_flwr.wire.traffic import ByteLedger, Traffic, split

LOGGER = logging.getLogger("flwr.fedzge")

R = TypeVar("R", bound=Reply)

_SHORTEST_POLL_S, _LONGEST_POLL_S = 0.1, 1.0
_POLL_SHARE = 0.02
"""Between two looks for replies there is this part of the time already waited, within bounds."""


class GridExchange:
    """Sends requests and decodes replies, by node.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    run : RunSettings
        Its timeouts.
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
    ) -> tuple[dict[int, R], dict[int, str]]:
        """Send nodes a request each, all to one action, and wait for their replies.

        Parameters
        ----------
        groups : Sequence[tuple[Request, Sequence[int]]]
            What to ask of which nodes. A request's arrays are encoded once for all of them.
        reply_types : Sequence[type[Reply]]
            The types that a reply may have; any may be a refusal instead.
        standing : Callable[[int], Standing]
            From a node to where the experiment stands for it.
        dims, expect
            As in `fedzge_flwr.wire.codec.decode`; the round is known.

        Returns
        -------
        tuple[dict[int, Reply], dict[int, str]]
            Decoded replies by node, and why there is none.
        """
        messages = self._encoded(groups, standing)
        requests = {node: request for request, nodes in groups for node in nodes}
        timeout = self._timeout_of(requests.values())
        received = self._exchanged(messages, timeout)
        # An error reply may carry another node's id: the id of the request is what counts.
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        replies: dict[int, R] = {}
        failures: dict[int, str] = {}
        for message, size in zip(received, encoded_bytes(received), strict=True):
            sender = asked.get(message.metadata.reply_to_message_id)
            if sender is None:
                LOGGER.warning("a reply to no request of this exchange was dropped")
                continue
            expected = {"round": requests[sender].round, **(expect or {})}
            reply = _decoded(message, sender, reply_types, expected, dims or {})
            payload = {} if isinstance(reply, str) else payload_bytes(reply)
            self._book(requests[sender], sender, Traffic(up=split(size, payload)))
            if isinstance(reply, str):
                failures[sender] = reply
            else:
                replies[sender] = reply
        silent = requests.keys() - replies.keys() - failures.keys()
        return replies, failures | dict.fromkeys(silent, f"no reply within {timeout:g} s")

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

    def _timeout_of(self, requests: Iterable[Request]) -> float:
        """Return the seconds to wait for replies to some requests."""
        own = (self._timeouts.get(request.ACTION, 0.0) for request in requests)
        return max(own, default=0.0) or self._timeout

    def _exchanged(self, messages: Sequence[Message], timeout: float) -> list[Message]:
        """Push messages and pull their replies.

        Grid.send_and_receive looks for them every three seconds, and says nothing until all are
        there.
        """
        started = time.monotonic()
        # What Flower could not send has no id, and will have no reply.
        waiting = {message_id for message_id in self._grid.push_messages(messages) if message_id}
        received: list[Message] = []
        self._tell(0, len(messages))
        while waiting:
            found = list(self._grid.pull_messages(waiting))
            received += found
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            if found:
                self._tell(len(received), len(messages))
            waited = time.monotonic() - started
            if waited >= timeout:
                break
            if waiting:
                pause = min(max(_POLL_SHARE * waited, _SHORTEST_POLL_S), _LONGEST_POLL_S)
                time.sleep(min(pause, timeout - waited))
        return received

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


def _decoded(
    message: Message,
    node_id: int,
    reply_types: Sequence[type[R]],
    expect: Mapping[str, int | str],
    dims: Mapping[str, int],
) -> R | str:
    """Return a reply, or why there is none: the client failed, refused, or sent rubbish."""
    if message.has_error():
        return _reason(message)
    types: tuple[type[Reply], ...] = (*reply_types, Refused)
    try:
        reply = decode(types, message.content, sender=f"node {node_id}", expect=expect, dims=dims)
    except ProtocolError as error:
        return str(error)
    if isinstance(reply, Refused):
        return f"refused: {reply.reason}"
    # One of the others, since it was decoded as one of them.
    return cast(R, reply)


def _reason(message: Message) -> str:
    """Return the first telling line of an error reply."""
    reason = message.error.reason or f"error code {message.error.code}"
    # Flower wraps the client's exception: "<class …>:<'\nException … occurred. Message: text'>".
    _, found, text = reason.partition("occurred. Message: ")
    lines = (text.removesuffix("'>") if found else reason).strip().splitlines()
    return printable(lines[0], 500) if lines else f"error code {message.error.code}"
