"""Bytes on the wire, by node and by what they are for; and what came to nothing on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedzge_flwr.wire.messages import EvaluateRequest


@dataclass
class Traffic:
    """Encoded bytes to (down) and from (up) clients, by what they are for.

    The names are those of `fedzge_flwr.wire.size.payload_bytes`, and ``"envelope"`` for the rest of
    a message.
    """

    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)

    def add(self, other: Traffic) -> None:
        """Add another's bytes."""
        for mine, theirs in ((self.down, other.down), (self.up, other.up)):
            for purpose, size in theirs.items():
                mine[purpose] = mine.get(purpose, 0) + size

    @property
    def total_down(self) -> int:
        """All bytes to clients."""
        return sum(self.down.values())

    @property
    def total_up(self) -> int:
        """All bytes from clients."""
        return sum(self.up.values())


def split(size: int, payload: Mapping[str, int]) -> dict[str, int]:
    """Return a message's bytes by what they are for, the envelope included."""
    return {**payload, "envelope": size - sum(payload.values())}


def total(items: Iterable[Traffic]) -> Traffic:
    """Return the sum of some traffic."""
    added = Traffic()
    for item in items:
        added.add(item)
    return added


@dataclass
class ByteLedger:
    """Traffic of the method and, apart, of evaluation, which serves the experimenter.

    Parameters
    ----------
    protocol, evaluation : dict[int, Traffic]
        By node.
    """

    protocol: dict[int, Traffic] = field(default_factory=dict)
    evaluation: dict[int, Traffic] = field(default_factory=dict)

    def add(self, action: str, node_id: int, traffic: Traffic) -> None:
        """Book an action's traffic with a node."""
        book = self.evaluation if action == EvaluateRequest.ACTION else self.protocol
        book.setdefault(node_id, Traffic()).add(traffic)


@dataclass(frozen=True)
class MissingReply:
    """A client that was left out: its partition, the action asked of it, and why."""

    partition: int
    action: str
    reason: str


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
