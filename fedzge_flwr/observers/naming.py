"""Where a run's folder goes, for those who make it and those who only look for it."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.common.reading import parse_json, place, read_within
from fedzge_flwr.common.text import same_name
from fedzge_flwr.config.sections import Settings

WARNINGS_FILE = "warnings.log"
"""In the run folder: the server's warnings, a line each."""

_MAX_SAME_SECOND = 99
# With time, recipe, seed and number it is within a run's name.
_MOST_DATASET_BYTES = 100
_MOST_CONFIG_BYTES = 16_000_000


def automatic_run_name(settings: Settings) -> str:
    """Return local date and time, data set, recipe and seed, e.g. ``20260131-120000-…-s0``."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{name_without_seed(settings)}-s{settings.run.seed}"


def name_without_seed(settings: Settings) -> str:
    """Return data set and recipe as a part of a run's name.

    A project's data set may be named as no folder can be: what is no letter, digit, ``_``, ``-`` or
    ``.`` is ``_`` here, and a long name is cut.
    """
    dataset = re.sub(r"[^\w.-]", "_", same_name(settings.data.dataset))
    cut = dataset.encode()[:_MOST_DATASET_BYTES].decode(errors="ignore")
    return f"{cut}-{settings.run.recipe}"


def free_run_folder(settings: Settings) -> Path:
    """Return the absolute path of a folder that is not there yet.

    ``run-name`` below ``output-dir``; without a name, an automatic one, numbered if it is taken.

    Raises
    ------
    RunFolderError
        If ``run-name`` is taken.
    """
    # A relative path is relative to whoever serves the run, so the user is told it in full.
    parent = place(settings.run.output_dir, "output-dir")
    name = settings.run.run_name
    if name:
        if os.path.lexists(parent / name):
            raise RunFolderError(
                f"'run-name' = '{name}': {parent / name} exists already; choose another name, or "
                "remove it"
            )
        return parent / name
    automatic = automatic_run_name(settings)
    for suffix in ("", *(f"-{number}" for number in range(2, _MAX_SAME_SECOND + 1))):
        if not os.path.lexists(parent / (automatic + suffix)):
            return parent / (automatic + suffix)
    raise RunFolderError(f"{parent} already holds {_MAX_SAME_SECOND} runs named {automatic}")


def reserved_run_folder(settings: Settings) -> Path | None:
    """Return the folder of ``run-name`` if it is there and empty.

    So a launch leaves it for the run that it starts, lest another run takes the name.
    """
    if not settings.run.run_name:
        return None
    folder = place(settings.run.output_dir, "output-dir") / settings.run.run_name
    with suppress(OSError):
        if not folder.is_symlink() and not any(folder.iterdir()):
            return folder
    return None


def config_of(folder: Path) -> dict[str, Any]:
    """Return what a run folder's ``config.json`` holds; nothing if that is no such file.

    No link is followed: the folder may be someone else's.
    """
    try:
        found = parse_json(read_within(folder, "config.json", _MOST_CONFIG_BYTES))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def run_to_resume(settings: Settings) -> Path:
    """Return the folder of the run that ``resume`` names.

    Raises
    ------
    RunFolderError
        If there is no such run.
    """
    path = place(settings.run.resume, "resume")
    if not (path / "config.json").is_file():
        raise RunFolderError(
            f"'resume' = '{path}' is not the folder of a run; if it was moved, name where it is now"
        )
    return path
