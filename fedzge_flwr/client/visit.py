"""What an endpoint works with while it answers one message."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedzge_flwr.black_boxes.contract import BlackBox, State
from fedzge_flwr.client.guard import Guard
from fedzge_flwr.client.noise import model_digest
from fedzge_flwr.client.store import Kept, Progress, StateStore
from fedzge_flwr.common.arrays import ByteArray
from fedzge_flwr.common.errors import DivergenceError


@dataclass
class Visit:
    """A black box, what has become of it in this message, and what its owner allows.

    Parameters
    ----------
    box : BlackBox
        The model.
    guard : Guard
        What the owner allows.
    store : StateStore
        Where this client's part of the experiment is kept.
    began : Kept
        The state that the model began with.
    asked : dict[str, ndarray of uint8]
        The images last asked about, as levels, by digest; only if they may be distilled.
    progress : Progress
        What the model has been through.
    in_step : bool
        Whether the model began in the state that the server goes on from.
    changed : bool
        Whether the model has been trained or has distilled in this message.
    """

    box: BlackBox
    guard: Guard
    store: StateStore
    began: Kept
    asked: dict[str, ByteArray]
    progress: Progress
    in_step: bool
    changed: bool = False
    _state: State | None = None

    def note(self, **progress: Any) -> None:
        """Note what the model has been through: fields of `Progress`."""
        self.progress = replace(self.progress, **progress)

    def change(self) -> None:
        """Note that the model is about to change."""
        self.changed = True
        self._state = None

    def state(self) -> State:
        """Return the model's state: what is kept of it, and what noise depends on.

        A model that has not changed is in the state that was loaded: a pickle of what another
        pickle made need not have the same bytes.
        """
        if not self.changed and self.began.model is not None:
            return self.began.model
        if self._state is None:
            self._state = self.box.state()
        return self._state

    def digest(self) -> bytes:
        """Return the digest of the model's state."""
        return model_digest(self.state())

    def keep(self) -> str:
        """Keep the model and return its name.

        Raises
        ------
        DivergenceError
            If it has diverged: it is thrown away for the one before.
        StateError
            If it cannot be kept.
        """
        check_finite(self.state())
        return self.store.keep(self.state(), self.progress)


def check_finite(state: State) -> None:
    """Check that a model has not diverged.

    Raises
    ------
    DivergenceError
        If a number of its state is not finite.
    """
    for name, value in state.items():
        if np.issubdtype(value.dtype, np.inexact) and not np.isfinite(value).all():
            raise DivergenceError(
                f"the model diverged ('{name}' is not finite) and is kept as it was before; lower "
                "'local-lr' or 'client-distill-lr'"
            )
