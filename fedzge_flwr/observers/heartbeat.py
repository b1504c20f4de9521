"""A line now and then within a round that takes long: no silent minutes."""

from __future__ import annotations

import logging
import time

LOGGER = logging.getLogger("flwr.fedzge")

_EVERY_S = 20.0


class Heartbeat:
    """Logs what takes long in a round: phases that are over, and how many clients have replied.

    Parameters
    ----------
    every : float
        Fewest seconds between two lines, those of rounds included.
    """

    def __init__(self, every: float = _EVERY_S) -> None:
        self._every = every
        self._last = time.monotonic()
        self._doing, self._since = "hello", self._last

    def on_start(self, server: object, clients: object) -> None:
        """Say nothing: the strategy does."""
        return

    def on_phase(self, round_: int, phase: str) -> None:
        """Say what has ended, if nothing was said for long."""
        now = time.monotonic()
        self._say(f"{self._doing}: {now - self._since:.0f} s")
        self._doing, self._since = f"round {round_}: {phase.replace('_', ' ')}", now

    def on_replies(self, answered: int, asked: int) -> None:
        """Say how many have replied, if nothing was said for long."""
        self._say(f"{self._doing}: {answered} of {asked} clients have replied")

    def on_round(self, server: object, current: object, row: object) -> None:
        """Count the round's own line."""
        self._last = time.monotonic()

    def on_end(self, server: object, error: object) -> None:
        """Say nothing."""
        return

    def _say(self, text: str) -> None:
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            LOGGER.info("%s", text)
