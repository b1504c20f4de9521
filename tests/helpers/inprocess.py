"""A Grid that hands real Messages to a real ClientApp in this process."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1
Tamper = Callable[[Message, Message], Message | None]


class InProcessGrid(Grid):
    """Nodes that each run the ClientApp with a context of their own.

    Requests and replies pass through Flower's own serialisation; ``tamper`` may replace a reply
    or, with None, lose it; a request that ``lose`` says is lost reaches nobody. Nobody waits for
    what is lost. ``slow`` says how many seconds the reply to a request takes, infinite if it never
    comes. ``shuffle`` is the seed of the order in which replies come in.
    """

    def __init__(
        self,
        app: ClientApp,
        run_config: dict[str, Any],
        num_nodes: int,
        *,
        shuffle: int | None = None,
        node_configs: dict[int, dict[str, Any]] | None = None,
        tamper: Tamper | None = None,
        lose: Callable[[Message], bool] | None = None,
        slow: Callable[[Message], float] | None = None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, SERVER_NODE, 3
        self.app = app
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self._replies: dict[str, Message] = {}
        self.tamper = tamper
        self.lose = lose
        self.slow = slow
        self._ready: dict[str, float] = {}
        self.parameters: dict[str, set[bytes]] = {}
        self._random = random.Random(shuffle) if shuffle is not None else None
        first = 1000 + (shuffle or 0)
        self.contexts = {
            first + 17 * number: Context(
                run_id=7,
                node_id=first + 17 * number,
                node_config=(node_configs or {}).get(
                    number, {"partition-id": number, "num-partitions": num_nodes}
                ),
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for number in range(num_nodes)
        }

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver at once. What is lost, there or back, has no id: nobody waits for it."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.sent.append(message)
            reply = None
            if self.lose is None or not self.lose(message):
                reply = self.deliver(message)
                if self.tamper is not None:
                    reply = self.tamper(message, reply)
            if reply is not None:
                self._replies[message.metadata.message_id] = reply
                self.received.append(reply)
                if self.slow is not None and (seconds := self.slow(message)):
                    self._ready[message.metadata.message_id] = time.monotonic() + seconds
            ids.append(message.metadata.message_id if reply is not None else "")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        now, asked = time.monotonic(), set(message_ids)
        # What comes too late is there when nobody asks for it any more.
        there = [
            number
            for number in self._replies
            if number not in self._ready or (number in asked and self._ready[number] <= now)
        ]
        replies = [self._replies.pop(number) for number in there]
        if self._random:
            self._random.shuffle(replies)
        return replies

    def get_node_ids(self) -> Iterable[int]:
        ids = list(self.contexts)
        if self._random:
            self._random.shuffle(ids)
        return ids

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def deliver(self, message: Message) -> Message:
        context = self.contexts[message.metadata.dst_node_id]
        delivered = through_the_wire(message)
        try:
            reply = through_the_wire(self.app(delivered, context))
            self._note_parameters(context)
            return reply
        except Exception as error:  # noqa: BLE001 - a node reports whatever its app raised
            reason = f"<class 'X'>:<'\nException ClientAppException occurred. Message: {error}'>"
            return Message(Error(code=0, reason=reason), reply_to=message)

    def _note_parameters(self, context: Context) -> None:
        """Remember the bytes of every parameter that a client has ever had, by name."""
        for record in context.state.array_records.values():
            for name, array in record.items():
                self.parameters.setdefault(name, set()).add(array.numpy().tobytes())


def through_the_wire(message: Message) -> Message:
    """Serialise and deserialise a message as Flower does."""
    from flwr.common.serde import message_from_proto, message_to_proto

    parsed = type(message_to_proto(message)).FromString(
        message_to_proto(message).SerializeToString()
    )
    arrived = message_from_proto(parsed)
    arrived.metadata.__dict__.update(copy.copy(message.metadata.__dict__))
    return arrived
