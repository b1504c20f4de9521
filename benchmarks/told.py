"""What a user can mend is told in one line, as the command ``fedzge`` tells it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedzge_flwr.common.errors import DataError, FedZGEError
from fedzge_flwr.common.file_kinds import unreadable


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
