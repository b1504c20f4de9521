"""Exchanges with clients by partition: where each stands, who is missing, what it took."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from flwr.serverapp import Grid

from fedzge_flwr.config.sections import Settings
from fedzge_flwr.grid.backoff import ClientBackOff
from fedzge_flwr.grid.exchange import Failure, GridExchange
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
        self._roster = Roster(grid, self._exchange, settings)
        self.standings = Standings(experiment, run.catch_up_rounds)
        self._back_off = ClientBackOff()
        self._barred: dict[int, str] = {}
        self._round = 0
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

    def begin_round(self, round_: int) -> None:
        """Take in nodes that have come since (`Roster.refresh`)."""
        self._round = round_
        self._roster.refresh(self.standings.experiment, round_)

    def snapshot(self) -> dict[str, Any]:
        """Return all that lives through rounds, for `restore`; members say hello anew."""
        return {
            **self.standings.snapshot(),
            "nodes": self._roster.snapshot(),
            "own-data": self._roster.data.all(),
            "barred": dict(self._barred),
            "total": {"down": self._total.down, "up": self._total.up},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take up what `snapshot` returned."""
        self.standings.restore(snapshot)
        self._roster.restore(snapshot["nodes"])
        # Checkpoints of earlier versions do not have it.
        self._roster.data.restore(snapshot.get("own-data", {}))
        self._barred = dict(snapshot["barred"])
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
            What to ask of whom, by partition.
        reply_types : Sequence[type[Reply]]
            The types that a reply may have.
        dims, expect : Mapping, optional
            As in `fedzge_flwr.wire.codec.decode`; classes and round are known.

        Returns
        -------
        dict[int, Reply]
            By partition, in that order; the others are noted as missing and named in the log.
        """
        members = self.members
        requests = {partition: request for request, of_group in groups for partition in of_group}
        nodes = {p: members[p].node_id for p in requests if p in members}
        passed_over = self._passed_over(nodes, requests)
        asked = {p: node for p, node in nodes.items() if p not in passed_over}
        partitions = {node: partition for partition, node in asked.items()}
        received, failed = self._exchange.send(
            [(request, [asked[p] for p in of_group if p in asked]) for request, of_group in groups],
            reply_types,
            lambda node: self.standings.of(partitions[node]),
            dims={"K": self._num_classes, **(dims or {})},
            expect=expect,
        )
        replies: dict[int, R] = {}
        for partition, request in sorted(requests.items()):
            action, node = request.ACTION, nodes.get(partition)
            if node in received:
                replies[partition] = received[node]
                self._note_reply(request, partition, received[node])
            elif node in failed:
                self._note_failure(request, partition, node, failed[node])
            else:
                # The log has said why one is passed over when it came to that.
                reason, news = passed_over.get(partition, "not connected"), node is None
                self.note_missing(self._round, partition, action, reason, news=news)
        return replies

    def _passed_over(
        self, nodes: Mapping[int, int], requests: Mapping[int, Request]
    ) -> dict[int, str]:
        """Return which of some clients are not asked, and why."""
        found = {
            p: self._barred.get(node) or self._back_off.reason(self._round, p, requests[p].ACTION)
            for p, node in nodes.items()
        }
        return {partition: reason for partition, reason in found.items() if reason}

    def _note_reply(self, request: Request, partition: int, reply: Reply) -> None:
        self._back_off.note_reply(self._round, partition, request.ACTION)
        self.standings.note_state(request.round, partition, reply)

    def _note_failure(self, request: Request, partition: int, node: int, failure: Failure) -> None:
        """Note why a client's reply is missing, and whether and when it is asked again."""
        reason = failure.reason
        if failure.attack:
            self._barred[node] = f"barred: in round {self._round} {reason}"
            reason += "; it is not asked any more in this run"
        if failure.silent:
            self._back_off.note_silence(self._round, partition, request.ACTION)
        else:
            self._back_off.note_reply(self._round, partition, request.ACTION)
        self.note_missing(self._round, partition, request.ACTION, reason)

    def note_missing(
        self, round_: int, partition: int, action: str, reason: str, *, news: bool = True
    ) -> None:
        """Note that a client was left out, and why, in the round's account and in the log.

        Parameters
        ----------
        round_, partition, action, reason
            Whose reply to what is missing, and why.
        news : bool
            Whether to warn of it: not of what the log has been told already.
        """
        level = logging.WARNING if news else logging.INFO
        LOGGER.log(
            level, "round %d: client %d left out of %s: %s", round_, partition, action, reason
        )
        self._missing.append(MissingReply(partition, action, reason))

    def account_for(
        self, round_: int, action: str, asked: Collection[int], answered: Collection[int]
    ) -> None:
        """See to it that whoever was to answer and has not is noted as missing in this round."""
        known = {item.partition for item in self._missing}
        for partition in sorted(set(asked) - set(answered) - known):
            self.note_missing(round_, partition, action, "it has not answered")

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
