"""What follows a run while it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fedzge_flwr.observers.round_row import RoundRow
from fedzge_flwr.server.round import RoundState
from fedzge_flwr.server.state import ServerState


class Observer(Protocol):
    """Follows a run; `RunFolder` and `TensorBoard` are ones.

    ``row`` is the record. ``server`` and ``current`` are the strategy's own state, to be looked at
    and not changed: central model, generator and the round's images, as this version has them.
    """

    def on_start(self, server: ServerState, clients: Mapping[int, str]) -> None:
        """Take note that the run starts; ``clients`` describes each known one, by partition."""
        ...

    def on_phase(self, round_: int, phase: str) -> None:
        """Take note that a phase starts."""
        ...

    def on_replies(self, answered: int, asked: int) -> None:
        """Take note of how many clients have replied in this phase, of how many asked."""
        ...

    def on_round(self, server: ServerState, current: RoundState, row: RoundRow) -> None:
        """Take note that a round has ended."""
        ...

    def on_end(self, server: ServerState, error: BaseException | None) -> None:
        """Take note that the run has ended, by itself or by an error, perhaps before round 1."""
        ...
