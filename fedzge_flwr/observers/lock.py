"""A run folder has one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.common.text import printable

_LOGGER = logging.getLogger("flwr.fedzge")
_FILE = "run.lock"
# Whoever only looks whether a folder is free holds it for a moment.
_TRIES = 10
_BETWEEN_TRIES_S = 0.05
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})
_LONGEST_HOLDER = 200


class FolderLock:
    """Holds a run folder for this process, until `release` or the process's end.

    It is the kernel's lock (``flock``) on the file ``run.lock`` of the folder, not the file itself:
    it goes with the process that has it, whatever ends it. On a file system without locks the log
    warns, and nothing is held.

    Parameters
    ----------
    folder : Path
        The run folder.

    Raises
    ------
    RunFolderError
        If another process holds it, or the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            # A folder that others made may have a link there.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(folder / _FILE, flags, 0o666)
        except OSError as error:
            raise RunFolderError(
                f"run folder {folder} cannot be written ({error.strerror}); make it one that you "
                "may write to"
            ) from error
        self._close = weakref.finalize(self, os.close, handle)
        try:
            _take(handle)
        except BlockingIOError:
            with suppress(OSError):
                holder = os.pread(handle, _LONGEST_HOLDER, 0).decode(errors="replace").strip()
            self._close()
            raise RunFolderError(
                f"run folder {folder} is being written by {printable(holder) or 'another process'}"
                ": wait until that has ended, or end it"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self._close()
                raise RunFolderError(
                    f"run folder {folder} cannot be locked ({error.strerror})"
                ) from error
            _LOGGER.warning(
                "run folder %s cannot be locked (%s): see to it that one process alone writes it",
                folder,
                error.strerror,
            )
            return
        _sign(handle)

    def release(self) -> None:
        """Let go of the folder."""
        self._close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _take(handle: int) -> None:
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise
            time.sleep(_BETWEEN_TRIES_S)


def _sign(handle: int) -> None:
    """Say who holds it, for those who are refused."""
    since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    # For people alone: what holds is the lock.
    with suppress(OSError):
        os.ftruncate(handle, 0)
        who = f"process {os.getpid()} on {socket.gethostname()} since {since}\n"
        os.pwrite(handle, who.encode(), 0)
