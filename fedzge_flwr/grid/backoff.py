"""Whom not to wait for: who was silent is asked again ever more rarely."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass
class Silence:
    """How often in a row somebody was silent, when last, and in which round it is asked again."""

    times: int = 0
    round: int = 0
    until: int = 0


class BackOff(Generic[K]):
    """Those who were silent, each passed over for 1, 3, 7, … rounds until it replies."""

    def __init__(self) -> None:
        self._silent: dict[K, Silence] = {}

    def note(self, who: K, round_: int, *, next_round: bool = False) -> None:
        """Note that somebody was waited for in vain; it may be asked in the next round even so."""
        past = self._silent.setdefault(who, Silence())
        past.times += 1
        past.round = round_
        past.until = round_ + (1 if next_round else 2**past.times)

    def passed_over(self, who: K, round_: int) -> Silence | None:
        """Return the silence for which somebody is not asked in a round; None if it is asked."""
        past = self._silent.get(who)
        return past if past is not None and round_ < past.until else None

    def forget(self, who: K) -> None:
        """Forget the silence of somebody who has replied."""
        self._silent.pop(who, None)

    def keep(self, those: Collection[K]) -> None:
        """Forget all others' silence."""
        self._silent = {who: past for who, past in self._silent.items() if who in those}


class ClientBackOff:
    """The same for clients, each of which is asked for several things in a round.

    Who is silent is not asked for anything until its turn. Who has replied to something else in
    the same round is there: it is passed over for the rest of that round, and for longer only when
    it comes to what it was silent about. So a client of which evaluation asks too much goes on
    answering queries.
    """

    def __init__(self) -> None:
        self._clients = BackOff[int]()
        self._actions = BackOff[tuple[int, str]]()
        self._heard: dict[int, int] = {}

    def note_reply(self, round_: int, partition: int, action: str) -> None:
        """Note that a client has replied, be it with an error."""
        self._heard[partition] = round_
        self._clients.forget(partition)
        self._actions.forget((partition, action))

    def note_silence(self, round_: int, partition: int, action: str) -> None:
        """Note that a client's reply was waited for in vain."""
        self._clients.note(partition, round_, next_round=self._heard.get(partition) == round_)
        self._actions.note((partition, action), round_)

    def reason(self, round_: int, partition: int, action: str) -> str | None:
        """Return why a client is not asked for something in a round; None if it is."""
        found = (
            self._clients.passed_over(partition, round_),
            self._actions.passed_over((partition, action), round_),
        )
        silences = [past for past in found if past is not None]
        if not silences:
            return None
        last = max(silences, key=lambda past: past.until)
        return f"passed over: silent in round {last.round}, next asked in round {last.until}"
