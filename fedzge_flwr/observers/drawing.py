"""The pictures of a run folder: for people, and no result, so that none of them can end a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.file_kinds import reason_of
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.observers.asked import AskedPictures
from fedzge_flwr.observers.round_row import RoundRow

_LOGGER = logging.getLogger("flwr.fedzge")


class RunPictures:
    """All pictures of a run folder. Of one that cannot be drawn the log warns once.

    Parameters
    ----------
    folder : Path
        The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._asked = AskedPictures(folder / "generated")
        self._undrawn: set[str] = set()

    def of_round(self, round_: int, images_NCHW: FloatArray, logits_NK: FloatArray) -> None:
        """Draw what was asked about in a round, by the class that the ensemble gave it."""
        with self._drawing("generated"):
            self._asked.draw(round_, images_NCHW, logits_NK)

    def of_run(self, rows: Sequence[RoundRow]) -> None:
        """Draw ``accuracy.png``, ``bytes.png`` and ``synthetic.png``, of what there is."""
        drawn: dict[str, Callable[[Path], None]] = {}
        with self._drawing("pictures"):
            from fedzge_flwr.observers.pictures import draw_accuracy, draw_bytes, draw_synthetic

            if rows:
                drawn["accuracy.png"] = partial(draw_accuracy, rows)
                drawn["bytes.png"] = partial(draw_bytes, rows)
            if self._asked.samples is not None:
                drawn["synthetic.png"] = partial(draw_synthetic, *self._asked.samples)
        for name, draw in drawn.items():
            with self._drawing(name), atomic_path(self._folder / name) as temporary:
                draw(temporary)

    def drop_after(self, round_: int) -> None:
        """Remove the pictures of later rounds.

        Raises
        ------
        OSError
            If one cannot be removed.
        """
        self._asked.drop_after(round_)

    @contextmanager
    def _drawing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of whatever a drawing library needs
            if what not in self._undrawn:
                self._undrawn.add(what)
                _LOGGER.warning(
                    "%s cannot be drawn (%s): the run goes on without; all figures are in "
                    "rounds.jsonl",
                    self._folder / what,
                    reason_of(error),
                )
