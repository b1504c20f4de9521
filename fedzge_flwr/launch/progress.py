"""Showing a run that goes on in another process, from the files of its run folder."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fedzge_flwr.common.reading import parse_json, read_within
from fedzge_flwr.common.text import duration, percent
from fedzge_flwr.observers.naming import WARNINGS_FILE

_QUIET_S = 10.0
_MOST_BYTES = 1_000_000
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

    In a terminal the current phase is a live line, with the clients that have replied, what the run
    has cost so far and how long it will still take if rounds go on as they went; elsewhere it is
    printed once it has lasted for 10 seconds. The server's warnings are shown as they come, and
    counted at the end.

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
        # The dots of the usual one are of Unicode.
        utf = self._console.encoding.startswith("utf")
        self._status = self._console.status("", spinner="dots" if utf else "line")
        self._offset = 0
        self._rows = 0
        self._costs = ""
        self._seconds: list[float] = []
        self._last_row = time.monotonic()
        self._left_out: Counter[int] = Counter()
        self._warnings = 0
        # Those of the run that is resumed have been shown.
        self._warnings_offset = len(self._read(WARNINGS_FILE, 0))
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

    def now(self, text: str, details: str = "") -> None:
        """Say what is going on right now; details only where a line can be replaced."""
        if text != self._phase:
            self._phase, self._phase_since = text, time.monotonic()
        elapsed = time.monotonic() - self._phase_since
        if self._console.is_terminal:
            self._status.update(f"{text} ({elapsed:.0f} s){details}")
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
        warnings = self._read(WARNINGS_FILE, self._warnings_offset)
        self._warnings_offset += len(warnings)
        for warning in warnings.decode(errors="replace").splitlines():
            self._warnings += 1
            self.say(f"  warning: {warning}")
        rows = self._read("rounds.jsonl", self._offset)
        self._offset += len(rows)
        for line in rows.splitlines():
            try:
                self._show_row(parse_json(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                self.say("  a row of rounds.jsonl is damaged and is not shown")
        phase = self._current_phase()
        if phase is None:
            self.now(otherwise)
        else:
            self.now(*phase)

    def recap(self) -> None:
        """Count the warnings, which may have scrolled away, and say who was left out how often."""
        if self._warnings:
            self.say(f"warnings: {self._warnings}, see {self._folder / WARNINGS_FILE}")
        if self._left_out:
            counts = [f"client {p}: {times}" for p, times in sorted(self._left_out.items())]
            self.say(f"rounds in which clients were left out: {', '.join(counts)}")

    def _read(self, name: str, offset: int) -> bytes:
        """Return the whole lines that a file of the run folder has from an offset on."""
        try:
            with (self._folder / name).open("rb") as file:
                file.seek(offset)
                found = file.read()
        except OSError:
            return b""
        return found[: found.rfind(b"\n") + 1]

    def _taken_up(self) -> int:
        """Return when a server last wrote that it has begun, in nanoseconds; 0: never."""
        try:
            return (self._folder / "config.json").stat().st_mtime_ns
        except OSError:
            return 0

    def _current_phase(self) -> tuple[str, str] | None:
        """Return what is going on, and the details that change while it does."""
        try:
            progress = parse_json(read_within(self._folder, "progress.json", _MOST_BYTES))
            phase, round_ = str(progress["phase"]).replace("_", " "), int(progress["round"])
            details = [self._costs, self._time_left(round_)]
            if "asked" in progress:
                details.insert(0, f"{progress['answered']} of {progress['asked']} clients")
        except (OSError, ValueError, KeyError, TypeError):
            # It is of this moment and not synced: after a loss of power it may be anything.
            return None
        text = f"round {round_}/{self._num_rounds}: {phase}"
        return text, "".join(f", {detail}" for detail in details if detail)

    def _time_left(self, round_: int) -> str:
        """Return how long this round and those after it take if they are like those before."""
        if not self._seconds:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        left = mean * (self._num_rounds - round_ + 1) - (time.monotonic() - self._last_row)
        return f"about {duration(left)} left" if left > 0 else ""

    def _show_row(self, row: Mapping[str, Any]) -> None:
        if self._rows == 0:
            self.say("".join(name.rjust(width) for name, width in _COLUMNS))
        self._rows += 1
        self._seconds.append(float(row["seconds"]))
        self._last_row = time.monotonic()
        megabytes = (row["bytes_down_total"] + row["bytes_up_total"]) / 1e6
        self._costs = f"{row['queries_per_client']:,} queries a client, {megabytes:,.1f} MB"
        self._left_out.update({missing["partition"] for missing in row["missing"]})
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
        if row["skipped"]:
            self.say(f"  skipped: {row['skipped']}")
