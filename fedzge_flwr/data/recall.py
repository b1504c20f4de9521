"""Small results that take seconds to work out, kept on disk between processes.

In a deployment every message to a node is answered by a new process. What libraries that take long
to import have worked out once is read back from the user's cache folder (``XDG_CACHE_HOME`` or what
the platform has for it); without such a folder it is worked out anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import platformdirs

from fedzge_flwr.common.files import atomic_path, remove_remains
from fedzge_flwr.common.reading import open_file
from fedzge_flwr.common.version import __version__

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

_KEPT = 100


def recall(
    name: str, compute: Callable[[], Arrays], *, library: str, **depends_on: object
) -> Arrays:
    """Return named arrays as they were computed before, or compute and keep them.

    Parameters
    ----------
    name : str
        What they are; the file's name begins with it.
    compute : Callable
        Makes the arrays; what it raises is raised, and nothing is kept.
    library : str
        The distribution whose version they also depend on.
    **depends_on
        All that they depend on, as JSON can write it.
    """
    key = {**depends_on, "library": version(library), "package": __version__}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = _folder()
    if folder is None:
        return compute()
    path = folder / f"{name}-{digest}.npz"
    found = _read(path)
    if found is None:
        found = compute()
        # Nothing but time is lost.
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(path, found)
    return found


def _folder() -> Path | None:
    """Return the folder that results are kept in; None: the user has no home, nor names one."""
    try:
        folder = Path(platformdirs.user_cache_dir("fedzge-flwr", appauthor=False))
    except RuntimeError:
        return None
    # Some versions of platformdirs leave it as it is; of an empty HOME Python makes the root.
    rootless = os.environ.get("HOME") == "" and not os.environ.get("XDG_CACHE_HOME")
    return None if rootless or "~" in folder.parts else folder


def digest_of(array: npt.NDArray[Any]) -> str:
    """Return the SHA-256 of an array's values: what may depend on them is kept under."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _read(path: Path) -> Arrays | None:
    try:
        # Opened here: NumPy leaves the file of a damaged archive open.
        with open_file(path) as file:
            # A cache folder can be one that others write to as well.
            if os.fstat(file.fileno()).st_uid not in (os.geteuid(), 0):
                return None
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
    except Exception:  # noqa: BLE001 - NumPy raises whatever a damaged file suggests
        return None


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)
    remove_remains(path.parent)
    newest = sorted(path.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime, reverse=True)
    for old in newest[_KEPT:]:
        old.unlink(missing_ok=True)
