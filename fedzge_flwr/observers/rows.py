"""The rows of a run folder: ``rounds.jsonl``, and the tables that are made from it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.common.files import append_line, atomic_path, atomic_write_text
from fedzge_flwr.common.reading import parse_json, read_within
from fedzge_flwr.observers.round_row import RoundRow

if TYPE_CHECKING:
    import pandas as pd

_LOGGER = logging.getLogger("flwr.fedzge")
_MOST_NAMED = 5


class RowsFile:
    """``rounds.jsonl``: a row a round, on disk before anything counts on it.

    Rows are read from the file when they are needed: what is kept in memory does not grow with the
    rounds.

    Parameters
    ----------
    path : Path
        The file; made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, row: RoundRow) -> None:
        """Append a row, which is on disk when this returns.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        append_line(self._path, _line(row.to_json()))

    def read(self) -> list[RoundRow]:
        """Return the rows that are whole.

        Raises
        ------
        OSError
            If the file is there and cannot be read.
        """
        return [row for line in self._lines() if (row := _parsed(line)) is not None]

    def recover(self, last: int, kept: Sequence[Mapping[str, Any]]) -> None:
        """Make the file what it was after a round: each row up to it, once and in order.

        A half row at the end is cut, and rows of later rounds are dropped, since those rounds are
        done again. Rows that are lost or damaged come back from the checkpoint, as far as it keeps
        them; the log names them.

        Parameters
        ----------
        last : int
            The round, from 0.
        kept : Sequence[Mapping[str, Any]]
            The newest rows, as `RoundRow.to_json` gives them.

        Raises
        ------
        RunFolderError
            If a line within the file is damaged and nobody has its row; the file is as it was.
        OSError
            If the file cannot be read or written.
        """
        *lines, half = self._lines()
        back = {int(row["round"]): _line(row) for row in kept if row["round"] <= last}
        rows = [(_parsed(line), line.decode(errors="replace")) for line in (*lines, half)]
        found = {row.round: text for row, text in rows if row is not None and row.round <= last}
        # What has no end was not written to its end, and is no damage.
        damaged = [at for at, (row, text) in enumerate(rows[:-1], 1) if row is None and text]
        missing = sorted(set(range(1, last + 1)) - back.keys() - found.keys())
        if missing and damaged:
            raise RunFolderError(
                f"{self._path}, line {damaged[0]}: the row is damaged, and the checkpoint does not "
                f"have it ({_rounds(missing)}): restore the line from a copy, or remove it; the "
                "run then goes on without that round's figures"
            )
        if rebuilt := sorted(back.keys() - found.keys()):
            _LOGGER.warning(
                "%s had lost %s: back from the checkpoint", self._path.name, _rounds(rebuilt)
            )
        if missing:
            _LOGGER.warning(
                "%s has no row of %s, nor has the checkpoint: their figures are left out",
                self._path.name,
                _rounds(missing),
            )
        whole = {**back, **found}
        text = "".join(f"{whole[round_]}\n" for round_ in sorted(whole))
        if [line for _, line in rows] != text.split("\n"):
            atomic_write_text(self._path, text)

    def _lines(self) -> list[bytes]:
        """Return the lines; the last is b"" or a half one."""
        try:
            return read_within(self._path.parent, self._path.name, sys.maxsize).split(b"\n")
        except FileNotFoundError:
            return [b""]


class AccuracyTable:
    """``accuracy.csv``: accuracies in [0, 1], a row a round; made from the rows.

    Parameters
    ----------
    path : Path
        The file; made with the first row.
    num_clients : int
        Columns are ``central``, ``client-0`` and so on.
    """

    def __init__(self, path: Path, num_clients: int) -> None:
        self._path = path
        self._columns = ["central", *(f"client-{p}" for p in range(num_clients))]

    def frame(self, rows: Iterable[RoundRow]) -> pd.DataFrame:
        """Return rows as a table with the index ``round``."""
        import pandas as pd

        table = {
            row.round: {
                "central": row.central_accuracy,
                **{f"client-{p}": accuracy for p, accuracy in row.client_accuracy.items()},
            }
            for row in rows
        }
        frame = pd.DataFrame.from_dict(table, orient="index", columns=self._columns, dtype=float)
        frame.index.name = "round"
        return frame

    def append(self, row: RoundRow) -> None:
        """Append a row.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        new = not self._path.exists()
        lines = self.frame([row]).to_csv(header=new).splitlines()
        # Not synced: it is made anew from the rows when a run ends, or is resumed.
        for line in lines:
            append_line(self._path, line, durable=False)

    def write(self, rows: Iterable[RoundRow]) -> None:
        """Write the whole table anew.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        with atomic_path(self._path) as temporary:
            self.frame(rows).to_csv(temporary)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False)


def _parsed(line: bytes) -> RoundRow | None:
    """Return the row of a line; None if it is not a whole one."""
    try:
        row = RoundRow.from_json(parse_json(line))
    except Exception:  # noqa: BLE001 - what is no row can be wrong in any way
        return None
    return row if isinstance(row.round, int) and row.round > 0 else None


def _rounds(rounds: Sequence[int]) -> str:
    """Return ``"round 3"``, or ``"rounds 3, 4 and 7"``; of many the first few."""
    named = [str(round_) for round_ in rounds[:_MOST_NAMED]]
    more = len(rounds) - len(named)
    if more:
        named.append(f"{more} more")
    return f"round{'s' * (len(rounds) > 1)} " + " and ".join(
        [", ".join(named[:-1]), named[-1]] if named[1:] else named
    )
