"""Who the clients of a federation are, and through which nodes they are reached."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedzge_flwr.common.errors import RosterError
from fedzge_flwr.common.version import __version__
from fedzge_flwr.config.sections import RunSettings
from fedzge_flwr.grid.exchange import GridExchange
from fedzge_flwr.grid.standing import Standing
from fedzge_flwr.wire.messages import HelloReply, HelloRequest

LOGGER = logging.getLogger("flwr.fedzge")

_POLL_S = 0.5
_NOTICE_S = 5.0


@dataclass(frozen=True)
class Member:
    """A client that has said hello, and the node through which it is reached."""

    node_id: int
    hello: HelloReply


@dataclass
class _Silence:
    """How often a node has not answered a hello, and in how many rounds it is next asked again."""

    times: int = 0
    rounds_left: int = 0


class Roster:
    """The known clients.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    exchange : GridExchange
        Carries hellos.
    run : RunSettings
        How many clients there are, and how long to wait for them.
    """

    def __init__(self, grid: Grid, exchange: GridExchange, run: RunSettings) -> None:
        self._grid = grid
        self._exchange = exchange
        self._run = run
        self._members: dict[int, Member] = {}
        self._turned_away: set[int] = set()
        self._silent: dict[int, _Silence] = {}

    @property
    def members(self) -> Mapping[int, Member]:
        """The known clients, by partition, in that order."""
        return dict(sorted(self._members.items()))

    def gather(self, experiment: str) -> None:
        """Wait for ``num-clients`` nodes and learn who they are.

        Raises
        ------
        RosterError
            If too few nodes connect or answer, two claim one partition, or one has a partition
            that the settings do not know.
        """
        run = self._run
        node_ids = self._wait_for_nodes(run.num_clients, run.node_timeout)
        request = HelloRequest(round=0, version=__version__)
        replies, failures = self._exchange.send(
            [(request, node_ids)], (HelloReply,), lambda node: Standing(experiment)
        )
        for node_id in sorted(replies):
            self._admit(node_id, replies[node_id])
        for node_id, reason in sorted(failures.items()):
            LOGGER.warning("node %d does not take part: %s", node_id, reason)
            self._note_silence(node_id)
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

    def refresh(self, experiment: str) -> None:
        """Take in nodes that have come since, also in the place of nodes that are gone.

        A SuperNode that was restarted may have another id. One that is connected but does not
        answer would have each round wait for it: it is passed over for 1, 3, 7, … rounds.
        """
        listed = set(self._grid.get_node_ids())
        known = {member.node_id for member in self._members.values()}
        gone = {p for p, member in self._members.items() if member.node_id not in listed}
        # One that has disconnected and comes back is another process, and is asked at once.
        self._silent = {node: past for node, past in self._silent.items() if node in listed}
        for past in self._silent.values():
            past.rounds_left -= 1
        waiting = {node for node, past in self._silent.items() if past.rounds_left > 0}
        strangers = sorted(listed - known - self._turned_away - waiting)
        if not strangers or (len(self._members) == self._run.num_clients and not gone):
            return
        replies, failures = self._exchange.send(
            [(HelloRequest(round=0, version=__version__), strangers)],
            (HelloReply,),
            lambda node: Standing(experiment),
        )
        for node_id, reason in sorted(failures.items()):
            LOGGER.warning("node %d still does not take part: %s", node_id, reason)
            self._note_silence(node_id)
        for node_id, hello in sorted(replies.items()):
            before = self._members.pop(hello.partition, None) if hello.partition in gone else None
            try:
                self._admit(node_id, hello)
                LOGGER.info("client %d is reached through node %d now", hello.partition, node_id)
            except RosterError as error:
                self._turned_away.add(node_id)
                if before is not None:
                    self._members[hello.partition] = before
                LOGGER.warning("%s", error)

    def _note_silence(self, node_id: int) -> None:
        past = self._silent.setdefault(node_id, _Silence())
        past.times += 1
        past.rounds_left = 2**past.times

    def _admit(self, node_id: int, hello: HelloReply) -> None:
        num_clients = self._run.num_clients
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
