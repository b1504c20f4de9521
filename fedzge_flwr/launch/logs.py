"""The logs of a launch: what they say first, and where they are kept when it did not end well."""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from fedzge_flwr.common.files import make_folder
from fedzge_flwr.common.text import printable
from fedzge_flwr.observers.lock import FolderLock

# Of the app, which says in one line what is wrong.
_OF_APP = re.compile(r"fedzge: (.+)")
# What comes first is the cause, what follows it are others' complaints about it: a logger's line,
# the last line of a traceback, Ray's mark of an error, or a command's own word.
_ERRORS = (
    re.compile(r"\bERROR\b[ :]+(?P<text>\S.*)"),
    re.compile(r"^(?P<text>(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)"),
    re.compile(r"^\[[-\d :,.]+ [EC] [\d ]+\] *(?:\(\w+\) *)?(?P<text>\S.*)"),
    re.compile(r"^[│|\s]*(?P<text>(?:error|fatal|fedzge)\b ?:.*?)[│|\s]*$", re.IGNORECASE),
)
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_MOST_CHARACTERS = 600
_RAY_LOGS = Path("ray") / "session_latest" / "logs"
_MOST_RAY_LOGS = 40


def of_app(log: Path) -> str | None:
    """Return the one line of a log in which the app said why it failed."""
    found = _OF_APP.findall(_text(log))
    return str(found[-1]).strip() if found else None


def first_error(log: Path) -> str:
    """Return the first line of a log that tells of an error; without one, its last line."""
    lines = [line.rstrip() for line in _COLOURS.sub("", _text(log)).splitlines() if line.strip()]
    for line in lines:
        for pattern in _ERRORS:
            if found := pattern.search(line):
                return printable(found["text"].strip(), _MOST_CHARACTERS)
    return printable(lines[-1].strip(), _MOST_CHARACTERS) if lines else "its log is empty"


def keep(home: Path, folder: Path, *, whole: bool = True) -> Path:
    """Copy a launch's logs to where they outlive it, over those that were copied before.

    The ``whole`` has also those of what prepared the run, and of Ray's own processes; what a run
    that ended well leaves is Flower's log.

    That is the run folder, if it holds a run yet and nobody else writes it; else ``NAME-logs``
    beside the place where it would be, so that the name stays free; else, where nothing can be
    written, a temporary folder.

    Returns
    -------
    Path
        The folder in which they are.
    """
    with suppress(OSError):
        # An empty one is only reserved.
        if any(folder.iterdir()):
            with FolderLock(folder):
                return _copy(home, folder, whole=whole)
    with suppress(OSError):
        beside = folder.with_name(f"{folder.name}-logs")
        make_folder(beside)
        return _copy(home, beside, whole=whole)
    with suppress(OSError):
        return _copy(home, Path(tempfile.mkdtemp(prefix="fedzge-logs-")), whole=whole)
    return home


def _copy(home: Path, where: Path, *, whole: bool) -> Path:
    for log in home.glob("*.log" if whole else "flower.log"):
        shutil.copyfile(log, where / log.name)
    if whole and (home / _RAY_LOGS).is_dir():
        _keep_of_ray(home / _RAY_LOGS, where / "ray-logs")
    return where


def _keep_of_ray(logs: Path, where: Path) -> None:
    """Copy what Ray's own processes and its first workers have written, if anything."""
    found = [path for path in logs.iterdir() if path.is_file() and path.stat().st_size]
    # Its own have short names; a worker's has its id.
    for path in sorted(found, key=lambda path: (len(path.name), path.name))[:_MOST_RAY_LOGS]:
        where.mkdir(exist_ok=True)
        with suppress(OSError):
            shutil.copyfile(path, where / path.name)


def _text(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
