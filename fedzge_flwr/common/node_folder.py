"""The folder of a node below its owner's ``state-dir``, and who may write there at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedzge_flwr.common.errors import StateError

NODE_FOLDER = "node"
"""Where below ``state-dir`` the account of a node is; experiments are beside it."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Run a block that no other process runs at the same time under this lock."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Make one line of what goes wrong in an owner's folder.

    Raises
    ------
    StateError
        For an error of the operating system or of safetensors.
    """
    from safetensors import SafetensorError

    try:
        yield
    except StateError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for both
        reason = getattr(error, "strerror", None) or error
        raise StateError(
            f"'state-dir': {folder} cannot be written ({reason}); free space, or name a "
            "folder that the node may write to"
        ) from error
