"""Bytes on the wire, by action and direction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedzge_flwr.protocol import EvaluateRequest


@dataclass
class Traffic:
    """Encoded bytes to (down) and from (up) the clients."""

    down: int = 0
    up: int = 0

    def __iadd__(self, other: Traffic) -> Traffic:
        self.down += other.down
        self.up += other.up
        return self


@dataclass
class ByteLedger:
    """Traffic by action, of all clients together.

    Parameters
    ----------
    by_action : dict[str, Traffic]
        Flower's message type (``"query.logits"``) to its traffic.
    """

    by_action: dict[str, Traffic] = field(default_factory=dict)

    def add(self, action: str, *, down: int = 0, up: int = 0) -> None:
        """Book bytes under an action."""
        self.by_action.setdefault(action, Traffic())
        self.by_action[action] += Traffic(down, up)

    @property
    def protocol(self) -> Traffic:
        """All traffic but evaluation's."""
        return _total(
            item for name, item in self.by_action.items() if name != EvaluateRequest.ACTION
        )

    @property
    def evaluation(self) -> Traffic:
        """Evaluation's traffic: it serves the experimenter, not the method."""
        return _total(
            item for name, item in self.by_action.items() if name == EvaluateRequest.ACTION
        )


def _total(items: Iterable[Traffic]) -> Traffic:
    total = Traffic()
    for item in items:
        total += item
    return total
