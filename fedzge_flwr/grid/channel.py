"""Exchanges with clients by partition: where each stands, who is missing, what it took."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from flwr.serverapp import Grid

from fedzge_flwr.config.sections import Settings
from fedzge_flwr.grid.exchange import GridExchange
from fedzge_flwr.grid.roster import Member, Roster
from fedzge_flwr.grid.standing import Standings
from fedzge_flwr.grid.targets import Group
from fedzge_flwr.wire.messages import Reply, Request
from fedzge_flwr.wire.traffic import MissingReply, RoundAccount, Traffic, total

LOGGER = logging.getLogger("flwr.fedzge")

R = TypeVar("R", bound=Reply)


class Channel:
    """Requests to clients, and their replies, by partition.

    Parameters
    ----------
    grid, settings, timeout, experiment, on_replies
        As for `fedzge_flwr.grid.clients.GridClients`.
    """

    def __init__(
        self,
        grid: Grid,
        settings: Settings,
        timeout: float,
        experiment: str,
        on_replies: Callable[[int, int], None] | None,
    ) -> None:
        run = settings.run
        self._num_classes = settings.data.spec.num_classes
        self._exchange = GridExchange(grid, run, timeout, on_replies)
        self._roster = Roster(grid, self._exchange, run)
        self.standings = Standings(experiment, run.catch_up_rounds)
        self._missing: list[MissingReply] = []
        self._total = Traffic()

    @property
    def members(self) -> Mapping[int, Member]:
        """The known clients, by partition, in that order."""
        return self._roster.members

    @property
    def num_examples(self) -> dict[int, int]:
        """Training examples by partition."""
        return {partition: member.hello.num_examples for partition, member in self.members.items()}

    def gather(self) -> None:
        """Wait for ``num-clients`` nodes and learn who they are (`Roster.gather`)."""
        self._roster.gather(self.standings.experiment)

    def refresh(self) -> None:
        """Take in nodes that have come since (`Roster.refresh`)."""
        self._roster.refresh(self.standings.experiment)

    def snapshot(self) -> dict[str, Any]:
        """Return all that lives through rounds, for `restore`; members say hello anew."""
        total_bytes = {"down": self._total.down, "up": self._total.up}
        return {**self.standings.snapshot(), "total": total_bytes}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take up what `snapshot` returned."""
        self.standings.restore(snapshot)
        self._total = Traffic(**snapshot["total"])

    def exchange_one(
        self,
        request: Request,
        reply_type: type[R],
        partitions: Sequence[int],
        *,
        dims: Mapping[str, int] | None = None,
        expect: Mapping[str, int | str] | None = None,
    ) -> dict[int, R]:
        """Send one request to some clients: `exchange` with one group."""
        return self.exchange([(request, partitions)], (reply_type,), dims=dims, expect=expect)

    def exchange(
        self,
        groups: Sequence[Group],
        reply_types: Sequence[type[R]],
        *,
        dims: Mapping[str, int] | None = None,
        expect: Mapping[str, int | str] | None = None,
    ) -> dict[int, R]:
        """Send clients a request each, all to one action, and decode their replies.

        Parameters
        ----------
        groups : Sequence[tuple[Request, Sequence[int]]]
            What to ask of whom, by partition. A client that is not connected counts as missing.
        reply_types : Sequence[type[Reply]]
            The types that a reply may have.
        dims, expect : Mapping, optional
            As in `fedzge_flwr.wire.codec.decode`; the number of classes and the round are known.

        Returns
        -------
        dict[int, Reply]
            By partition, in that order; without the clients that failed, which are noted as missing
            and named in the log.
        """
        members = self.members
        requests = {partition: request for request, of_group in groups for partition in of_group}
        nodes = {p: members[p].node_id for p in requests if p in members}
        partitions = {node: partition for partition, node in nodes.items()}
        received, failed = self._exchange.send(
            [(request, [nodes[p] for p in of_group if p in nodes]) for request, of_group in groups],
            reply_types,
            lambda node: self.standings.of(partitions[node]),
            dims={"K": self._num_classes, **(dims or {})},
            expect=expect,
        )
        failures = {partition: "not connected" for partition in requests if partition not in nodes}
        failures |= {partitions[node]: reason for node, reason in failed.items()}
        for partition, reason in sorted(failures.items()):
            request = requests[partition]
            self.note_missing(request.round, partition, request.ACTION, reason)
        replies = {p: received[node] for p, node in sorted(nodes.items()) if node in received}
        for partition, reply in replies.items():
            self.standings.note_state(requests[partition].round, partition, reply)
        return replies

    def note_missing(self, round_: int, partition: int, action: str, reason: str) -> None:
        """Note that a client was left out, and why, in the round's account and in the log."""
        LOGGER.warning("round %d: client %d left out of %s: %s", round_, partition, action, reason)
        self._missing.append(MissingReply(partition, action, reason))

    def close_round(self) -> RoundAccount:
        """Return this round's bytes and missing replies, and start the next round's count."""
        ledger = self._exchange.take_ledger()
        missing, self._missing = tuple(self._missing), []
        of_round = total(ledger.protocol.values())
        self._total = total((self._total, of_round))
        by_client = {
            partition: ledger.protocol[member.node_id]
            for partition, member in self.members.items()
            if member.node_id in ledger.protocol
        }
        return RoundAccount(
            by_client, of_round, self._total, total(ledger.evaluation.values()), missing
        )
