"""Which node may be which client, and which nodes may be none."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

from fedzge_flwr.config.sections import RunSettings

LOGGER = logging.getLogger("flwr.fedzge")

_WHAT_TO_DO = (
    "give each node a partition-id of its own; if it is the same owner's with another key, say so "
    "in 'node-ids'; where nodes have no keys, 'node-changes' = \"warn\" lets them come back"
)


class Pins:
    """Which node each client is: as the settings say, or as was said first.

    Parameters
    ----------
    run : RunSettings
        Its ``node-ids`` and ``node-changes``.
    """

    def __init__(self, run: RunSettings) -> None:
        self._named = run.node_of
        self._changes = run.node_changes
        self._num_clients = run.num_clients
        self._first: dict[int, int] = {}

    def all(self) -> dict[int, int]:
        """Return the nodes that were first, by partition."""
        return dict(sorted(self._first.items()))

    def restore(self, nodes: Mapping[int, int]) -> None:
        """Take up what `all` returned."""
        self._first = dict(nodes)

    def pin(self, partition: int, node: int) -> None:
        """Hold a client to a node."""
        self._first = {p: other for p, other in self._first.items() if other != node}
        self._first[partition] = node

    def owner(self, partition: int) -> int | None:
        """Return the node that a client is; None if nobody has said so yet."""
        return self._named.get(partition, self._first.get(partition))

    def allow(self, node: int, partition: int, *, gone: bool) -> bool:
        """Whether a node may be a client whose own node, if it has one, is gone or not."""
        owner = self.owner(partition)
        if owner == node:
            return True
        if partition in self._named or self._is_another(node, partition) is not None:
            return False
        return owner is None or (gone and self._changes == "warn")

    def why(self, node: int, partition: int) -> str:
        """Return why `allow` does not, and what to do about it."""
        other = self._is_another(node, partition)
        if other is not None:
            return f"it is client {other}; give each node a partition-id of its own, and keep it"
        return f"that is node {self.owner(partition)}; {_WHAT_TO_DO}"

    def taken(self, listed: Collection[int]) -> str:
        """Return that every client is a node already, and which of them are not connected."""
        owners = {p: self.owner(p) for p in range(self._num_clients)}
        away = [f"client {p} is node {n}" for p, n in owners.items() if n not in listed]
        told = f" ({', '.join(away[:3])}{', …' * (len(away) > 3)}: away)" if away else ""
        return f"all {self._num_clients} clients are other nodes{told}; {_WHAT_TO_DO}"

    def _is_another(self, node: int, partition: int) -> int | None:
        """Return which other client a node is."""
        for pins in (self._named, self._first):
            for other, its in pins.items():
                if its == node and other != partition and self.owner(other) == node:
                    return other
        return None


class TurnedAway:
    """Nodes that are not asked again while they stay connected; each is told of once."""

    def __init__(self) -> None:
        self._claims: dict[int, int | None] = {}
        self._for_good: set[int] = set()
        self._told: set[int] = set()

    @property
    def nodes(self) -> set[int]:
        """Their ids."""
        return self._claims.keys() | self._for_good

    def add(self, node: int, claim: int | None, reason: str, *, for_good: bool = False) -> str:
        """Turn a node away, and return the reason; ``claim``: whom it said that it is."""
        self._claims[node] = claim
        if for_good:
            self._for_good.add(node)
        LOGGER.log(logging.INFO if node in self._told else logging.WARNING, "%s", reason)
        self._told.add(node)
        return reason

    def keep(self, listed: Collection[int]) -> None:
        """Forget those that have disconnected: who comes back may have been mended."""
        self._claims = {node: claim for node, claim in self._claims.items() if node in listed}

    def reconsider(self, partitions: Iterable[int]) -> None:
        """Forget those that could be nobody, or one of these clients."""
        again = {None, *partitions}
        self._claims = {node: claim for node, claim in self._claims.items() if claim not in again}
