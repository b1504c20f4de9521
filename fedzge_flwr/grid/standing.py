"""Where an experiment stands for each client: the state of its model, and what it owes.

A request says it, so that a client whose last reply was lost, or whose server went back to a
checkpoint, goes on from the model that the server knows.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedzge_flwr.wire.messages import MOST_OWED, NO_EXPERIMENT, Reply

LOGGER = logging.getLogger("flwr.fedzge")


@dataclass(frozen=True)
class Standing:
    """Where an experiment stands for a client: see `fedzge_flwr.wire.messages.Request`.

    ``owed`` is for requests to train.
    """

    experiment: str = NO_EXPERIMENT
    state: str = ""
    durable: str = ""
    owed: int = 0


class Standings:
    """Those of all clients, by partition.

    Parameters
    ----------
    experiment : str
        32 hexadecimal digits: what clients keep their models by.
    catch_up_rounds : int
        Most missed rounds of local training that a client makes up for.
    """

    def __init__(self, experiment: str, catch_up_rounds: int) -> None:
        self.experiment = experiment
        self._catch_up_rounds = min(catch_up_rounds, MOST_OWED)
        self._states: dict[int, str] = {}
        self._durable: dict[int, str] = {}
        self._owed: dict[int, int] = {}
        self._strayed: set[int] = set()

    @property
    def states(self) -> dict[int, str]:
        """The clients' names of the states that their models are in, by partition."""
        return dict(self._states)

    def make_durable(self, states: Mapping[int, str]) -> None:
        """Let clients forget what came before these states: no checkpoint needs it any more."""
        self._durable = dict(states)

    def of(self, partition: int) -> Standing:
        """Return what a request says to a client."""
        return Standing(
            self.experiment,
            self._states.get(partition, ""),
            self._durable.get(partition, ""),
            self._owed.get(partition, 0),
        )

    def note_training(self, asked: Sequence[int], replied: Collection[int]) -> None:
        """Note who owes how many rounds of training: those that were asked and did not reply."""
        for partition in asked:
            if partition in replied:
                self._owed.pop(partition, None)
            elif self._catch_up_rounds:
                owed = self._owed.get(partition, 0) + 1
                self._owed[partition] = min(owed, self._catch_up_rounds)

    def note_state(self, round_: int, partition: int, reply: Reply) -> None:
        """Note which state a client is in, and warn if it did not begin with that known here."""
        known = self._states.get(partition, "")
        self._states[partition] = reply.state
        if reply.began == known or partition in self._strayed:
            return
        self._strayed.add(partition)
        LOGGER.warning(
            "round %d: client %d %s; a 'state-dir' of its owner's keeps models through restarts "
            "and lost replies",
            round_,
            partition,
            "no longer has its model and began anew"
            if not reply.began
            else "went on from another model than the server knows of",
        )

    def snapshot(self) -> dict[str, Any]:
        """Return all that lives through rounds, for `restore`."""
        return {
            "experiment": self.experiment,
            "states": dict(self._states),
            "owed": dict(self._owed),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take up what `snapshot` returned."""
        self.experiment = snapshot["experiment"]
        self._states = dict(snapshot["states"])
        self._owed = dict(snapshot["owed"])
