"""What a user can mend is told in one line, as the command ``fedzge`` tells it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedzge_flwr.common.errors import DataError, FedZGEError
from fedzge_flwr.common.file_kinds import unreadable
from fedzge_flwr.common.files import atomic_write_text


def told(main: Callable[[], None]) -> None:
    """Run a benchmark; end in one line and with exit code 1 at what its user can mend."""
    try:
        main()
    except FedZGEError as error:
        sys.exit(f"error: {error}")


def kept_in(path: Path | None, kind: type) -> Any:
    """Return what an earlier call has kept in a JSON file; nothing yet if there is none.

    Parameters
    ----------
    path : Path, optional
        The file.
    kind : type
        What it holds: ``list`` or ``dict``.

    Raises
    ------
    DataError
        If it is something else.
    """
    if path is None or not path.exists():
        return kind()
    fix = "remove it, or name another"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise unreadable(path, "what a benchmark has kept", error, fix) from error
    if not isinstance(found, kind):
        raise DataError(f"{path}: not what this benchmark has kept; {fix}")
    return found


def run_once(path: Path, key: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> None:
    """Run what a JSON file of runs does not have yet, and add it there.

    Parameters
    ----------
    path : Path
        The file: a list of dictionaries.
    key : Mapping[str, Any]
        What tells a run from all others.
    run : Callable[[], Mapping[str, Any]]
        Returns its figures; they, the key and the seconds that it took are kept and printed.

    Raises
    ------
    DataError
        If the file is something else.
    """
    if any(
        all(kept.get(name) == value for name, value in key.items()) for kept in kept_in(path, list)
    ):
        return
    started = time.perf_counter()
    found = {**key, **run(), "seconds": time.perf_counter() - started}
    print(json.dumps(found), flush=True)
    # Another process may have finished a run for the same file meanwhile.
    atomic_write_text(path, json.dumps([*kept_in(path, list), found], indent=1))
