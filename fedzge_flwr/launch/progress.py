"""Showing a run that goes on in another process, from the files of its run folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fedzge_flwr.display import percent

_QUIET_S = 10.0
_COLUMNS = (
    ("round", 9),
    ("central", 8),
    ("ensemble", 9),
    ("mean client", 12),
    ("queries/client", 15),
    ("down MB", 9),
    ("up MB", 8),
    ("s", 6),
)


class Progress:
    """Prints a line a round, and what is going on in between.

    In a terminal the current phase is a live line; elsewhere it is printed once it has lasted for
    10 seconds.

    Parameters
    ----------
    folder : Path
        The run folder; need not exist yet. If it does, it is shown once the run has taken it up,
        with the rounds that had been done before.
    num_rounds : int
        Rounds of the run.
    """

    def __init__(self, folder: Path, num_rounds: int) -> None:
        self._folder = folder
        self._before = self._taken_up()
        self._num_rounds = num_rounds
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._status = self._console.status("")
        self._offset = 0
        self._rows = 0
        self._told = ""
        self._phase = ""
        self._phase_since = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)

    def now(self, text: str) -> None:
        """Say what is going on right now."""
        if text != self._phase:
            self._phase, self._phase_since = text, time.monotonic()
        elapsed = time.monotonic() - self._phase_since
        if self._console.is_terminal:
            self._status.update(f"{text} ({elapsed:.0f} s)")
        elif elapsed > _QUIET_S and text != self._told:
            self.say(f"  {text} …")
            self._told = text

    def poll(self, otherwise: str) -> None:
        """Read what is new in the run folder and show it.

        Parameters
        ----------
        otherwise : str
            What is going on when the folder does not say.
        """
        if self._before and self._taken_up() == self._before:
            self.now(otherwise)
            return
        rows = self._folder / "rounds.jsonl"
        if rows.is_file():
            with rows.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._show_row(json.loads(line))
        self.now(self._current_phase() or otherwise)

    def _taken_up(self) -> int:
        """Return when a server last wrote that it has begun, in nanoseconds; 0: never."""
        try:
            return (self._folder / "config.json").stat().st_mtime_ns
        except OSError:
            return 0

    def _current_phase(self) -> str | None:
        try:
            progress = json.loads((self._folder / "progress.json").read_text(encoding="utf-8"))
        except OSError:
            return None
        phase = str(progress["phase"]).replace("_", " ")
        return f"round {progress['round']}/{self._num_rounds}: {phase}"

    def _show_row(self, row: Mapping[str, Any]) -> None:
        if self._rows == 0:
            self.say("".join(name.rjust(width) for name, width in _COLUMNS))
        self._rows += 1
        cells = (
            f"{row['round']}/{self._num_rounds}",
            percent(row["central_accuracy"]),
            percent(row["ensemble_accuracy"]),
            percent(row["mean_client_accuracy"]),
            f"{row['queries_per_client']:,}",
            f"{row['bytes_down_total'] / 1e6:,.1f}",
            f"{row['bytes_up_total'] / 1e6:,.1f}",
            f"{row['seconds']:.1f}",
        )
        self.say(
            "".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
        )
        for missing in row["missing"]:
            self.say(
                f"  client {missing['partition']} left out of {missing['action']}: "
                f"{missing['reason']}"
            )
        if row["skipped"]:
            self.say(f"  skipped: {row['skipped']}")
