"""A copy of what Flower packs of an app: ``python -m fedzge_flwr.launch.staging APP FOLDER``.

``flwr run`` and ``flwr build`` look at every file below the app's folder, those of a virtual
environment included, which takes them 10 seconds in a checkout that holds one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from pathlib import Path

from pathspec import PathSpec

from fedzge_flwr.common.errors import ConfigError

# Flower looks at it too, for what not to pack.
_ALWAYS = ("pyproject.toml", ".gitignore")


def stage(app: Path, folder: Path) -> Path:
    """Copy the files that an app's ``fab-include`` names.

    Parameters
    ----------
    app : Path
        The app's folder.
    folder : Path
        Where to copy them to; made if need be.

    Returns
    -------
    Path
        ``folder``, or ``app`` itself if it does not say what is to be packed.

    Raises
    ------
    ConfigError
        If what it says is no list of patterns.
    """
    patterns = _patterns(app / "pyproject.toml")
    if patterns is None:
        return app
    spec = PathSpec.from_lines("gitignore", patterns)
    for place, folders, files in os.walk(app):
        folders[:] = [name for name in folders if not _is_foreign(Path(place) / name)]
        for path in (Path(place) / name for name in files):
            relative = path.relative_to(app)
            wanted = relative.as_posix() in _ALWAYS or spec.match_file(relative.as_posix())
            # Editors mark a file that is open by a link to nowhere, and a pipe has no end.
            if wanted and path.is_file():
                target = folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    return folder


def _patterns(file: Path) -> list[str] | None:
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Flower says what is wrong with it.
        return None
    named = list[str]()
    for key in ("tool", "flwr", "app"):
        named.append(key)
        found = found.get(key, {})
        if not isinstance(found, dict):
            raise ConfigError(f"{file}: '{'.'.join(named)}' is no table; mend it")
    patterns = found.get("fab-include")
    if patterns is None:
        return None
    if not isinstance(patterns, list) or not all(isinstance(item, str) for item in patterns):
        raise ConfigError(f"{file}: 'fab-include' = {patterns!r}: give a list of patterns")
    return patterns


def _is_foreign(folder: Path) -> bool:
    """Say whether a folder is hidden, a cache, or a virtual environment."""
    return folder.name.startswith((".", "__pycache__")) or (folder / "pyvenv.cfg").is_file()


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{stage(Path(sys.argv[1]), Path(sys.argv[2]))}\n")
    except ConfigError as error:
        sys.exit(f"error: {error}")
