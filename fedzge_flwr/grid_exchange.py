"""Exchanges over Flower's Grid: requests to nodes, their replies, and how many bytes that took."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from flwr.app import Message
from flwr.serverapp import Grid

from fedzge_flwr.config import RunSettings
from fedzge_flwr.display import printable
from fedzge_flwr.errors import ProtocolError
from fedzge_flwr.ledger import ByteLedger, Traffic, split
from fedzge_flwr.protocol import (
    NO_EXPERIMENT,
    DistillRequest,
    EvaluateRequest,
    LogitsRequest,
    Refused,
    Reply,
    Request,
    RoundRequest,
    TrainRequest,
    decode,
    encode,
    encode_arrays,
    encoded_bytes,
    payload_bytes,
)

LOGGER = logging.getLogger("flwr.fedzge")

R = TypeVar("R", bound=Reply)


@dataclass(frozen=True)
class Standing:
    """Where an experiment stands for a client: see `fedzge_flwr.protocol.Request`.

    ``owed`` is for requests to train.
    """

    experiment: str = NO_EXPERIMENT
    state: str = ""
    durable: str = ""
    owed: int = 0


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
    """

    def __init__(self, grid: Grid, run: RunSettings, timeout: float) -> None:
        self._grid = grid
        self._timeout = timeout
        self._timeouts = {
            TrainRequest.ACTION: run.train_timeout,
            RoundRequest.ACTION: run.train_timeout,
            LogitsRequest.ACTION: run.query_timeout,
            DistillRequest.ACTION: run.distill_timeout,
            EvaluateRequest.ACTION: run.evaluate_timeout,
        }
        self._ledger = ByteLedger()

    def send(
        self,
        requests: Mapping[int, Request],
        reply_types: Sequence[type[R]],
        standing: Mapping[int, Standing],
        *,
        dims: Mapping[str, int] | None = None,
        expect: Mapping[str, int | str] | None = None,
    ) -> tuple[dict[int, R], dict[int, str]]:
        """Send nodes a request each, all to one action, and wait for their replies.

        Parameters
        ----------
        requests : Mapping[int, Request]
            What to ask of whom, by node. Those that are one object have their arrays encoded once.
        reply_types : Sequence[type[Reply]]
            The types that a reply may have; any may be a refusal instead.
        standing : Mapping[int, Standing]
            Where the experiment stands for each of them.
        dims, expect : Mapping, optional
            As in `fedzge_flwr.protocol.decode`; the round is known.

        Returns
        -------
        tuple[dict[int, Reply], dict[int, str]]
            Decoded replies by node, and why there is none. A late reply to an earlier exchange is
            neither: Flower returns those alone that answer these very messages.
        """
        arrays = {id(request): encode_arrays(request) for request in requests.values()}
        messages = [
            Message(
                encode(_standing_at(request, standing[node]), arrays[id(request)]),
                node,
                request.ACTION,
                group_id=str(request.round),
            )
            for node, request in requests.items()
        ]
        payloads = {id(request): payload_bytes(request) for request in requests.values()}
        for message, size in zip(messages, encoded_bytes(messages), strict=True):
            node_id = message.metadata.dst_node_id
            request = requests[node_id]
            self._book(request, node_id, Traffic(down=split(size, payloads[id(request)])))
        actions = {request.ACTION for request in requests.values()}
        timeout = max((self._timeouts.get(name, 0.0) for name in actions), default=0.0)
        timeout = timeout or self._timeout
        received = list(self._grid.send_and_receive(messages, timeout=timeout))
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
            payload: dict[str, int] = {}
            reply = _decoded(message, sender, reply_types, expected, dims or {})
            if isinstance(reply, str):
                failures[sender] = reply
            else:
                replies[sender] = reply
                payload = payload_bytes(reply)
            self._book(requests[sender], sender, Traffic(up=split(size, payload)))
        for node_id in requests:
            if node_id not in replies and node_id not in failures:
                failures[node_id] = f"no reply within {timeout:g} s"
        return replies, failures

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
