"""The folder of a node below its owner's ``state-dir``, and who may write there at a time."""

from __future__ import annotations

import fcntl
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedzge_flwr.common.errors import StateError
from fedzge_flwr.common.files import atomic_path, make_folder

NODE_FOLDER = "node"
"""Where below ``state-dir`` the account of a node is; experiments are beside it."""

_SECRET_BYTES = 32


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


def new_secret() -> bytes:
    """Return 32 bytes that nobody knows."""
    return secrets.token_bytes(_SECRET_BYTES)


def node_secret(folder: Path) -> bytes:
    """Return the secret of a node's folder; the first to ask makes it, and the folder.

    Raises
    ------
    StateError
        If it cannot be read or made, or is none.
    """
    path = folder / "noise.key"
    with explained(folder):
        make_folder(folder, mode=0o700)
    with explained(folder), locked(folder / "noise.lock"):
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_bytes(new_secret())
            path.chmod(0o600)
        secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise StateError(
            f"{path} is not a key: the noise of this client's answers and its model's first values "
            "are drawn from it; restore it, or remove it to have others"
        )
    return secret
