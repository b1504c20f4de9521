"""What of the clients' answers a user should know: said once of each client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.text import clients_named
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.server.round import Answered

_SLACK = 0.02
"""By how much rounding or an owner's noise may move a sum of probabilities."""


def is_distribution(logits_NK: FloatArray) -> bool:
    """Say whether answers (N, K) are probabilities: taken for logits, they say next to nothing."""
    if len(logits_NK) == 0 or logits_NK.shape[1] < 2:
        return False
    return bool(logits_NK.min() >= 0 and np.abs(logits_NK.sum(axis=1) - 1).max() <= _SLACK)


class Doubts:
    """Which clients a run has warned of, and why.

    Parameters
    ----------
    settings : Settings
        The run's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._told: dict[str, set[int]] = {"unmoved": set(), "probabilities": set()}

    def of(self, answered: Answered | None) -> list[str]:
        """Return a line for each doubt that this round's answers raise for the first time."""
        if answered is None:
            return []
        found = {"unmoved": answered.unmoved, "probabilities": answered.probabilities}
        lines: list[str] = []
        for kind, partitions in found.items():
            new = [partition for partition in partitions if partition not in self._told[kind]]
            self._told[kind].update(new)
            if new:
                lines.append(f"{clients_named(new)} {_TEXTS[kind](self._settings)}")
        return lines

    def snapshot(self) -> dict[str, list[int]]:
        """Return what was said, for `restore`."""
        return {kind: sorted(partitions) for kind, partitions in self._told.items()}

    def restore(self, told: Mapping[str, Sequence[int]]) -> None:
        """Take up what `snapshot` returned."""
        self._told = {kind: set(told.get(kind, ())) for kind in self._told}


def _unmoved(settings: Settings) -> str:
    return (
        "answered the same to images and to their copies at 'eps' = "
        f"{settings.queries.eps:g}, as trees and rounded logits do: left out of the generator's "
        "gradient, kept in the ensemble; a larger 'eps' may move them"
    )


def _probabilities(settings: Settings) -> str:
    return (
        "answered with probabilities where logits are wanted, so that all classes seem nearly "
        'alike: leave out the model\'s softmax, or give its black box output="probabilities"'
    )


_TEXTS: dict[str, Callable[[Settings], str]] = {
    "unmoved": _unmoved,
    "probabilities": _probabilities,
}
