"""Run folders as a report reads them, and which of them are the same but for their seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.common.reading import place
from fedzge_flwr.common.text import printable
from fedzge_flwr.config.parsing import NUMBERS_DO_NOT_DEPEND_ON
from fedzge_flwr.observers.round_row import RoundRow
from fedzge_flwr.report.reading import read_config, read_pictures, read_rows

_SAME_BUT_FOR = NUMBERS_DO_NOT_DEPEND_ON | {"seed"}
_MOST_KEYS = 3

Reading = Callable[[RoundRow], float | None]

ACCURACIES: Mapping[str, Reading] = {
    "central": lambda row: row.central_accuracy,
    "ensemble": lambda row: row.ensemble_accuracy,
    "mean client": lambda row: row.mean_client_accuracy,
}
"""The accuracies by which runs are compared, by the names that they are shown under."""


@dataclass(frozen=True)
class Run:
    """A run folder's content.

    Parameters
    ----------
    folder : Path
        The folder.
    config : Mapping[str, Any]
        What its ``config.json`` says, as `fedzge_flwr.report.reading.read_config` returns it.
    rows : Sequence[RoundRow]
        The rounds so far, at least one.
    pictures : Mapping[int, bytes]
        PNGs of synthetic images, by round; of many rounds a few.
    """

    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[RoundRow]
    pictures: Mapping[int, bytes]

    @property
    def name(self) -> str:
        """The folder's name as a text, which not every name of a file is."""
        return printable(self.folder.name)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The run config, every key."""
        settings: Mapping[str, Any] = self.config["settings"]
        return settings

    def last(self, reading: Reading) -> float | None:
        """Return what the last round that has it reads; None if none has."""
        found = (reading(row) for row in reversed(self.rows))
        return next((value for value in found if value is not None), None)


def load_run(folder: Path) -> Run:
    """Read a run folder; the run may still go on.

    Raises
    ------
    RunFolderError
        If it is no run folder, has no round yet, or holds what a run does not write.
    """
    folder = place(folder)
    config, rows = read_config(folder), read_rows(folder)
    if not rows:
        raise RunFolderError(f"{folder} has no finished round yet; come back after the first")
    return Run(folder, config, rows, read_pictures(folder))


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for their seeds.

    Parameters
    ----------
    label : str
        By which settings they differ from the other groups.
    runs : Sequence[Run]
        At least one.
    """

    label: str
    runs: Sequence[Run]

    def curve(self, x: Reading, y: Reading) -> tuple[list[float], list[float], list[float]]:
        """Return mean x, mean y and deviation of y over the runs, of the rounds that all have.

        The deviation is that of the runs themselves (no n − 1).
        """
        by_round = [{row.round: row for row in run.rows} for run in self.runs]
        points = []
        for round_ in sorted(set.intersection(*(set(rows) for rows in by_round))):
            read = [(x(rows[round_]), y(rows[round_])) for rows in by_round]
            if all(a is not None and b is not None for a, b in read):
                xs, ys = np.array(read, dtype=float).T
                points.append((float(xs.mean()), float(ys.mean()), float(ys.std())))
        return ([], [], []) if not points else tuple(map(list, zip(*points, strict=True)))  # type: ignore[return-value]


def group(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ by seed alone, in the order given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(_counted(run), sort_keys=True), []).append(run)
    groups = list(found.values())
    keys = sorted({key for run in runs for key in _counted(run)})
    differing = [
        key for key in keys if len({repr(item[0].settings.get(key)) for item in groups}) > 1
    ]
    # A recipe goes with values of its own, which say little beside it.
    short = ["recipe"] if "recipe" in differing else differing
    labels = [_label(item, short) for item in groups]
    if len(set(labels)) < len(labels):
        labels = [_label(item, differing) for item in groups]
    return [Group(label, item) for label, item in zip(labels, groups, strict=True)]


def _counted(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key not in _SAME_BUT_FOR}


def _label(runs: Sequence[Run], differing: Sequence[str]) -> str:
    first = runs[0]
    if not differing:
        return first.name if len(runs) == 1 else f"{len(runs)} seeds"
    text = ", ".join(f"{key} {first.settings.get(key)}" for key in differing[:_MOST_KEYS])
    more = len(differing) - _MOST_KEYS
    return text if more <= 0 else f"{text}, {more} more"
