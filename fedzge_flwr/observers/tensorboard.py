"""A run's figures in TensorBoard; other trackers are observers of a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.observers.base import Observer, RoundRow
from fedzge_flwr.server.round import RoundState
from fedzge_flwr.server.state import ServerState


class TensorBoard(Observer):
    """An observer that writes TensorBoard's event files.

    Parameters
    ----------
    folder : str or Path
        Where to; ``tensorboard --logdir`` of it or of a folder above shows them.

    Raises
    ------
    ConfigError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "'tensorboard' = true needs TensorBoard: pip install 'fedzge-flwr[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def on_start(self, server: ServerState, clients: Mapping[int, str]) -> None:
        """Nothing is known yet."""

    def on_phase(self, round_: int, phase: str) -> None:
        """Phases are not tracked one by one."""

    def on_replies(self, answered: int, asked: int) -> None:
        """Nor are replies."""

    def on_round(self, server: ServerState, current: RoundState, row: RoundRow) -> None:
        """Write the round's figures, so that they can be seen at once."""
        for name, value in row.figures().items():
            self._writer.add_scalar(name, value, row.round)
        self._writer.flush()

    def on_end(self, server: ServerState, error: BaseException | None) -> None:
        """Close the files."""
        self._writer.close()
