"""Who the clients of a federation are, and through which nodes they are reached.

Who a client is, its node says itself: its partition is a claim. The first node that makes it is
that client's from then on, also in what resumes the run, unless the settings name another
(``node-ids``). Flower binds the id of a node to its key, where nodes have keys.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedzge_flwr.common.errors import RosterError
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.grid.agreement import Agreement
from fedzge_flwr.grid.backoff import BackOff
from fedzge_flwr.grid.exchange import GridExchange
from fedzge_flwr.grid.own_data import OwnData
from fedzge_flwr.grid.pins import Pins, TurnedAway
from fedzge_flwr.grid.standing import Standing
from fedzge_flwr.wire.messages import HelloReply

LOGGER = logging.getLogger("flwr.fedzge")

_POLL_S = 0.5
_NOTICE_S = 5.0


@dataclass(frozen=True)
class Member:
    """A client that has said hello, and the node through which it is reached."""

    node_id: int
    hello: HelloReply


class Roster:
    """The known clients.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    exchange : GridExchange
        Carries hellos.
    settings : Settings
        How many clients there are, which nodes they may be, and how long to wait for them.
    """

    def __init__(self, grid: Grid, exchange: GridExchange, settings: Settings) -> None:
        self._grid = grid
        self._exchange = exchange
        self._run = run = settings.run
        self._agreement = Agreement(settings)
        self._pins = Pins(run)
        self.data = OwnData(run)
        self._members: dict[int, Member] = {}
        self._turned_away = TurnedAway()
        self._silent = BackOff[int]()
        self._changed: list[str] = []

    @property
    def members(self) -> Mapping[int, Member]:
        """The known clients, by partition, in that order."""
        return dict(sorted(self._members.items()))

    def snapshot(self) -> dict[int, int]:
        """Return which node each client is, for `restore`."""
        return self._pins.all()

    def restore(self, nodes: Mapping[int, int]) -> None:
        """Hold clients to what `snapshot` returned.

        Not in a simulation: nobody but Flower makes its nodes, and it makes new ones for each run.
        """
        if not is_simulated(self._grid):
            self._pins.restore(nodes)

    def gather(self, experiment: str) -> None:
        """Wait for ``num-clients`` nodes and learn who they are.

        A node that is turned away takes nobody's place: others are waited for.

        Raises
        ------
        RosterError
            If too few nodes connect in time, fewer than ``min-clients`` become clients, or one has
            other images than the run to resume began with.
        """
        run, deadline = self._run, time.monotonic() + self._run.node_timeout
        reasons: dict[int, str] = {}
        while True:
            strangers = self._wait_for_nodes(deadline) - reasons.keys() - self._nodes()
            reasons |= self._greet(strangers, experiment, 0, "does not take part")
            if self._changed:
                raise RosterError("; ".join(self._changed[:3]))
            there = len(self._nodes() | reasons.keys() - self._turned_away.nodes)
            no_more = time.monotonic() >= deadline or is_simulated(self._grid)
            if there >= run.num_clients or no_more:
                break
        if len(self._members) < run.min_clients:
            told = list(dict.fromkeys(reasons.values()))
            more = f" (and {len(told) - 3} other reasons)" if len(told) > 3 else ""
            raise RosterError(
                f"{len(self._members)} of {len(self._members) + len(reasons)} nodes take part, "
                f"'min-clients' = {run.min_clients}: {'; '.join(told[:3])}{more}"
            )

    def _nodes(self) -> set[int]:
        return {member.node_id for member in self._members.values()}

    def _wait_for_nodes(self, deadline: float) -> set[int]:
        """Return the nodes that are connected, once they are enough or time is up."""
        wanted, notice = self._run.num_clients, time.monotonic() + _NOTICE_S
        # Right after the start the grid may know no node yet.
        while len((listed := set(self._grid.get_node_ids())) - self._turned_away.nodes) < wanted:
            now, strangers = time.monotonic(), len(listed & self._turned_away.nodes)
            if now >= deadline and not strangers:
                raise RosterError(
                    f"{len(listed)} of 'num-clients' = {wanted} nodes connected within "
                    f"'node-timeout' = {self._run.node_timeout:g} s; start more SuperNodes (in "
                    f'simulation: --federation-config "num-supernodes={wanted}"), or lower '
                    "num-clients"
                )
            if now >= deadline:
                break
            if now >= notice:
                LOGGER.info("waiting for nodes: %d of %d", len(listed) - strangers, wanted)
                notice = now + _NOTICE_S
            time.sleep(_POLL_S)
        return listed

    def refresh(self, experiment: str, round_: int) -> None:
        """Take in nodes that have come since.

        One that is connected but does not answer would have each round wait for it: it is passed
        over for 1, 3, 7, … rounds.
        """
        listed = set(self._grid.get_node_ids())
        gone = {p for p, member in self._members.items() if member.node_id not in listed}
        # One that has disconnected and comes back is another process, and is asked at once.
        self._silent.keep(listed)
        self._turned_away.keep(listed)
        if self._run.node_changes == "warn":
            self._turned_away.reconsider(gone)
        strangers = {
            node
            for node in listed - self._nodes() - self._turned_away.nodes
            if self._silent.passed_over(node, round_) is None
        }
        self._greet(strangers, experiment, round_, "still does not take part")

    def _greet(
        self, nodes: Collection[int], experiment: str, round_: int, complaint: str
    ) -> dict[int, str]:
        """Ask nodes who they are, take in those that may be it, and return why others may not."""
        reasons: dict[int, str] = {}
        listed = set(self._grid.get_node_ids())
        # Of a node that can be nobody there is nothing to learn, and its hello might take long.
        welcome = [node for node in sorted(nodes) if self._may_be_somebody(node, listed)]
        for node in sorted(set(nodes) - set(welcome)):
            reasons[node] = self._turned_away.add(
                node, None, f"node {node} is turned away: {self._pins.taken(listed)}"
            )
        if not welcome:
            return reasons
        replies, failures = self._exchange.send(
            [(self._agreement.request(), welcome)],
            (HelloReply,),
            lambda node: Standing(experiment),
        )
        for node, failure in sorted(failures.items()):
            if failure.attack:
                reasons[node] = self._turned_away.add(
                    node, None, f"node {node} is turned away: {failure.reason}", for_good=True
                )
                continue
            reasons[node] = failure.reason
            LOGGER.warning("node %d %s: %s", node, complaint, failure.reason)
            # One that fails at once costs no time, but a line a round.
            self._silent.note(node, round_)
        for node, hello in sorted(replies.items()):
            self._silent.forget(node)
            if refusal := self._refusal(node, hello, listed):
                reasons[node] = self._turned_away.add(node, hello.partition, refusal)
            else:
                self._admit(node, hello, late=round_ > 0)
        self._agreement.tell()
        return reasons

    def _may_be_somebody(self, node: int, listed: Collection[int]) -> bool:
        return any(
            self._may_be(node, partition, listed)
            for partition in range(self._run.num_clients)
            if partition not in self._members or self._members[partition].node_id not in listed
        )

    def _may_be(self, node: int, partition: int, listed: Collection[int]) -> bool:
        """Whether a node may be a client, as far as settings and what was before say."""
        return self._pins.allow(node, partition, gone=self._pins.owner(partition) not in listed)

    def _refusal(self, node: int, hello: HelloReply, listed: Collection[int]) -> str:
        """Return why a node may not be whom it says it is; empty: it may."""
        num_clients, partition = self._run.num_clients, hello.partition
        if hello.num_partitions != num_clients or partition >= num_clients:
            return (
                f"node {node} has partition {partition} of {hello.num_partitions}, but "
                f"'num-clients' = {num_clients}; make the two equal (in simulation: "
                f'--federation-config "num-supernodes={num_clients}")'
            )
        if self._may_be(node, partition, listed):
            if refusal := self.data.refusal(hello):
                self._changed.append(refusal)
            return refusal
        return f"node {node} says that it is client {partition}: {self._pins.why(node, partition)}"

    def _admit(self, node: int, hello: HelloReply, *, late: bool) -> None:
        before = self._pins.owner(hello.partition)
        if before is not None and before != node:
            LOGGER.warning(
                "client %d is node %d now: node %d, which it was, is gone; nothing but its own "
                "word says that both are one owner's ('node-changes' = \"warn\")",
                hello.partition,
                node,
                before,
            )
        elif late:
            LOGGER.info("client %d is reached through node %d now", hello.partition, node)
        self._agreement.note(hello)
        self.data.note(hello)
        self._pins.pin(hello.partition, node)
        self._members[hello.partition] = Member(node, hello)


def is_simulated(grid: Grid) -> bool:
    """Whether all nodes are Flower's own, in this very process: nobody else can join those."""
    return any(kind.__name__ == "InMemoryGrid" for kind in type(grid).__mro__)
