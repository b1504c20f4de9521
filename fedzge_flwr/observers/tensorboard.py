"""A run's figures in TensorBoard; other trackers are observers of a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.observers.base import Observer
from fedzge_flwr.observers.round_row import RoundRow, rows_of
from fedzge_flwr.server.checkpoints import Checkpoint
from fedzge_flwr.server.round import RoundState
from fedzge_flwr.server.state import ServerState


class TensorBoard(Observer):
    """An observer that writes TensorBoard's event files.

    Parameters
    ----------
    folder : str or Path
        Where to; ``tensorboard --logdir`` of it or of a folder above shows them.
    resumed_from : Checkpoint, optional
        What a resumed run goes on from. What the folder has of later rounds is not shown any more,
        and the rows that the checkpoint keeps are written again: their figures may not have
        reached the disk.

    Raises
    ------
    ConfigError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path, resumed_from: Checkpoint | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "'tensorboard' = true needs TensorBoard: pip install 'fedzge-flwr[tensorboard]'"
            ) from error
        rows = [] if resumed_from is None else rows_of(resumed_from)
        again = None
        if resumed_from is not None:
            again = rows[0].round if rows else resumed_from.round + 1
        self._writer = SummaryWriter(str(folder), purge_step=again)
        for row in rows:
            self._write(row)

    def on_start(self, server: ServerState, clients: Mapping[int, str]) -> None:
        """Nothing is known yet."""

    def on_phase(self, round_: int, phase: str) -> None:
        """Phases are not tracked one by one."""

    def on_replies(self, answered: int, asked: int) -> None:
        """Nor are replies."""

    def on_round(self, server: ServerState, current: RoundState, row: RoundRow) -> None:
        """Write the round's figures, so that they can be seen at once."""
        self._write(row)
        self._writer.flush()

    def on_end(self, server: ServerState, error: BaseException | None) -> None:
        """Close the files."""
        self._writer.close()

    def _write(self, row: RoundRow) -> None:
        for name, value in row.figures().items():
            self._writer.add_scalar(name, value, row.round)
