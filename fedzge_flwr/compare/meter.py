"""A Grid that counts bytes to and from each client, by encoded messages, and misses no client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedzge_flwr.common.errors import ComparisonError
from fedzge_flwr.wire.size import encoded_bytes

UNCOUNTED = ("evaluate", "query.tally")
"""Messages for the experimenter's sake, by the beginning of their type."""


class MeteredGrid(Grid):
    """Another grid, with the bytes of all messages but those of evaluation.

    A client that fails ends the run: Flower's strategies, and FedZGE, would go on without it, and
    what they then have is no run with all clients.

    Parameters
    ----------
    grid : Grid
        What carries the messages.
    is_local : bool
        Whether the clients run in this process.
    """

    def __init__(self, grid: Grid, *, is_local: bool = False) -> None:
        self._grid = grid
        self.is_local = is_local
        self.down = 0
        self.up = 0

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def create_message(self, *args: Any, **options: Any) -> Message:
        """Make a message as the grid does."""
        return self._grid.create_message(*args, **options)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are there."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return the nodes that are there, with what is known of them."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        sent = list(messages)
        self.down += _counted(sent)
        return self._grid.push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there.

        Raises
        ------
        ComparisonError
            If a client failed.
        """
        replies = list(self._grid.pull_messages(message_ids))
        self.up += _counted(replies)
        _check(replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for their replies; return them in order of the nodes.

        Flower's strategies ask nodes in an order drawn at random, without a seed, and add up
        weights in the order of the replies: their sum differs in its last bits.

        Raises
        ------
        ComparisonError
            If a client failed, or did not answer in time.
        """
        sent = list(messages)
        self.down += _counted(sent)
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        self.up += _counted(replies)
        _check(replies)
        if len(replies) < len(sent):
            raise ComparisonError(
                f"{sent[0].metadata.message_type}: {len(sent) - len(replies)} of {len(sent)} "
                "clients did not answer: a comparison needs all of them; see their logs"
            )
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


def _counted(messages: Iterable[Message]) -> int:
    counted = [m for m in messages if not m.metadata.message_type.startswith(UNCOUNTED)]
    return sum(encoded_bytes(counted))


def _check(replies: Iterable[Message]) -> None:
    for reply in replies:
        if reply.has_error():
            raise ComparisonError(
                f"{reply.metadata.message_type}: a client failed: {reply.error.reason}"
            )
