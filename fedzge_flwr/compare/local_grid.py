"""Flower's Grid within one process: no Ray, no SuperLink, one client after another.

A comparison of ten methods with three seeds starts thirty runs; each start of Ray takes seconds.
Messages pass through Flower's own encoding, so that a client never holds the server's objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_RUN, _SERVER, _TASK = 1, 1, 1
_FIRST_NODE = 1000


class LocalGrid(Grid):
    """Nodes of this process, each with a context of its own.

    Parameters
    ----------
    app : ClientApp
        What every node runs.
    run_config : Mapping[str, Any]
        The run's settings, as the nodes see them.
    num_nodes : int
        Number of nodes; their partitions count from 0.
    """

    def __init__(self, app: ClientApp, run_config: Mapping[str, Any], num_nodes: int) -> None:
        # What Flower's own processes set before they run an app.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN, _SERVER, _TASK
        self._app = app
        self._replies: dict[str, Message] = {}
        self._contexts = {
            _FIRST_NODE + partition: Context(
                run_id=_RUN,
                node_id=_FIRST_NODE + partition,
                node_config={"partition-id": partition, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for partition in range(num_nodes)
        }

    def set_run(self, run: Run) -> None:
        """Not used: there is one run."""
        raise NotImplementedError("a grid of one process has one run")

    @property
    def run(self) -> Run:
        """Not used: there is one run."""
        raise NotImplementedError("a grid of one process has one run")

    def create_message(self, *args: Any, **options: Any) -> Message:
        """Not used: make a ``Message``."""
        raise NotImplementedError("make a Message")

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes, in order of their partitions."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have each message answered at once; return their ids."""
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, once."""
        there = [number for number in message_ids if number in self._replies]
        return [self._replies.pop(number) for number in there]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Have each message answered; return the replies."""
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> str:
        number = str(uuid4())
        message.metadata.__dict__["_message_id"] = number
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = _encoded(self._app(_encoded(message), context))
        except Exception as error:  # noqa: BLE001 - a node reports whatever its app raises
            reply = Message(Error(code=0, reason=str(error)), reply_to=message)
        self._replies[number] = reply
        return number


def _encoded(message: Message) -> Message:
    """Return what arrives of a message."""
    arrived: Message = message_from_proto(message_to_proto(message))
    return arrived
