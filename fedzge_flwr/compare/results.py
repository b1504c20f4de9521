"""Results of a comparison on disk, a file for each run, and the table that they make."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedzge_flwr.common.errors import ComparisonError
from fedzge_flwr.common.file_kinds import unreadable
from fedzge_flwr.common.files import atomic_write_text
from fedzge_flwr.common.text import percent_spread
from fedzge_flwr.compare.catalogue import METHODS, method_named
from fedzge_flwr.compare.session import Measured, Point
from fedzge_flwr.config.parsing import NUMBERS_DO_NOT_DEPEND_ON
from fedzge_flwr.config.sections import Settings

_MEGA = 1e6


@dataclass(frozen=True)
class Result:
    """One run of a method: its settings, without the seed, and what was measured.

    Parameters
    ----------
    method : str
        Its name.
    seed : int
        The run's seed.
    settings : dict[str, Any]
        The settings that numbers depend on, but for the seed.
    measured : Measured
        What was measured.
    """

    method: str
    seed: int
    settings: dict[str, Any]
    measured: Measured

    @classmethod
    def of(cls, method: str, settings: Settings, found: Measured) -> Result:
        """Return the result of a run with these settings."""
        return cls(method, settings.run.seed, numbers_of(settings), found)

    @property
    def last(self) -> Point:
        """The last round."""
        return self.measured.points[-1]

    @property
    def accuracy(self) -> float:
        """The accuracy after the last round of what a user would deploy, in [0, 1]."""
        found = _figure(self.method, self.last)
        assert found is not None
        return found

    @property
    def best(self) -> float:
        """The highest such accuracy of a round, which nobody could choose without test labels."""
        found = (_figure(self.method, point) for point in self.measured.points)
        return max(value for value in found if value is not None)


def _figure(method: str, point: Point) -> float | None:
    central = method_named(method).figure == "central"
    return point.central if central else point.mean_client


def numbers_of(settings: Settings) -> dict[str, Any]:
    """Return the settings that a run's numbers depend on, but for the seed."""
    left_out = NUMBERS_DO_NOT_DEPEND_ON | {"seed"}
    return {k: v for k, v in settings.to_run_config().items() if k not in left_out}


def path_of(folder: Path, method: str, seed: int) -> Path:
    """Return where the result of a run lies."""
    return folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', method)}-s{seed}.json"


def write(folder: Path, result: Result) -> Path:
    """Write a result; it appears when it is whole.

    Raises
    ------
    ComparisonError
        If it cannot be written.
    """
    path = path_of(folder, result.method, result.seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(asdict(result), indent=1))
    except OSError as error:
        raise ComparisonError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def kept(folder: Path, method: str, seed: int, settings: Settings) -> Result | None:
    """Return the result of an earlier run; None if there is none.

    Raises
    ------
    FedZGEError
        If the file is something else, or of a run with other settings.
    """
    path = path_of(folder, method, seed)
    if not path.exists():
        return None
    result = _read(path)
    if difference := _difference(result, settings):
        raise ComparisonError(
            f"{path} is of a run with {difference}; remove it, or name another folder"
        )
    return result


def _difference(result: Result, settings: Settings) -> str:
    """Say in which setting a result's run differs from another; empty if in none."""
    wanted, found = numbers_of(settings), result.settings
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            return f"'{key}' = {found.get(key)!r}, not {wanted.get(key)!r}"
    return ""


def _read(path: Path) -> Result:
    fix = "remove it, or name another folder"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = found["measured"]
        points = tuple(Point(**point) for point in whole.pop("points"))
        return Result(
            str(found["method"]),
            int(found["seed"]),
            dict(found["settings"]),
            Measured(points=points, **whole),
        )
    except Exception as error:
        raise unreadable(path, "a comparison's result", error, fix) from error


def all_in(folder: Path) -> list[Result]:
    """Return all results of a folder, in the methods' order.

    Raises
    ------
    FedZGEError
        If there are none, or a file is something else.
    """
    results = [_read(path) for path in sorted(folder.glob("*-s*.json"))]
    if not results:
        raise ComparisonError(f"{folder}: no results of a comparison are there; run one first")
    order = list(METHODS)
    place = {name: order.index(name) if name in order else len(order) for name in order}
    return sorted(results, key=lambda r: (place.get(r.method, len(order)), r.method, r.seed))


def of_settings(
    results: Sequence[Result], settings: Settings, told: Callable[[str], None]
) -> list[Result]:
    """Return the results of runs with these settings: a mean of others would be one of nothing.

    A folder may hold others of earlier comparisons, and of methods that are not asked for now.

    Parameters
    ----------
    results : Sequence[Result]
        Of whatever settings.
    settings : Settings
        Of whatever seed.
    told : Callable[[str], None]
        Takes a line if any are left out.
    """
    differences = [_difference(result, settings) for result in results]
    others = [pair for pair in zip(results, differences, strict=True) if pair[1]]
    if others:
        first, difference = others[0]
        name, number = path_of(Path(), first.method, first.seed), len(others)
        told(
            f"left out: {number} result{'s' if number > 1 else ''} of other settings, as {name} "
            f"with {difference}"
        )
    return [result for result, found in zip(results, differences, strict=True) if not found]


_COLUMNS = (
    "method",
    "what leaves a client",
    "accuracy",
    "of",
    "best round",
    "mean client",
    "ensemble",
    "steps a client",
    "queries a client",
    "MB down",
    "MB up",
    "wall s",
    "client s",
    "server s",
    "several architectures",
    "public data",
)


def table(results: Sequence[Result]) -> pd.DataFrame:
    """Return a row for each method: accuracies in %, mean ± deviation over seeds."""
    names = dict.fromkeys(result.method for result in results)
    return pd.DataFrame(
        [_row(name, [r for r in results if r.method == name]) for name in names],
        columns=list(_COLUMNS),
    )


def _row(name: str, runs: Sequence[Result]) -> dict[str, object]:
    method = method_named(name)
    central = method.figure == "central"
    return {
        "method": method.title,
        "what leaves a client": method.leaves,
        "accuracy": percent_spread([run.accuracy for run in runs]),
        "of": "central model" if central else "mean client",
        "best round": percent_spread([run.best for run in runs]),
        "mean client": _spread(run.last.mean_client for run in runs),
        "ensemble": _spread(run.last.ensemble for run in runs),
        "steps a client": _mean(run.measured.client_steps for run in runs),
        "queries a client": _mean(run.last.queries for run in runs),
        "MB down": _mean((run.last.down / _MEGA for run in runs), digits=1),
        "MB up": _mean((run.last.up / _MEGA for run in runs), digits=1),
        "wall s": _mean(run.measured.seconds for run in runs),
        "client s": _mean(run.measured.client_seconds for run in runs),
        "server s": _mean(run.measured.server_seconds for run in runs),
        "several architectures": "yes" if method.several_architectures else "no",
        "public data": "yes" if method.public_data else "no",
    }


def _spread(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return percent_spread(found) if found else "–"


def _mean(values: Iterable[float], digits: int = 0) -> str:
    found = list(values)
    return f"{sum(found) / len(found):,.{digits}f}"


def markdown(frame: pd.DataFrame) -> str:
    """Return a table as Markdown."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def write_tables(folder: Path, results: Sequence[Result]) -> None:
    """Write ``table.md``, ``table.csv`` and ``table.json`` beside the results.

    Raises
    ------
    ComparisonError
        If they cannot be written.
    """
    frame = table(results)
    try:
        atomic_write_text(folder / "table.md", markdown(frame))
        atomic_write_text(folder / "table.csv", frame.to_csv(index=False))
        atomic_write_text(folder / "table.json", frame.to_json(orient="records", indent=1))
    except OSError as error:
        raise ComparisonError(f"{folder}: {error.strerror or error}") from error
