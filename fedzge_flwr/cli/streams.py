"""Standard streams that never end a command: whatever their encoding, and whoever closes them."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_STREAMS = {1: "stdout", 2: "stderr"}
# Whoever read is gone: `| head`, a terminal that is closed. That is theirs to decide.
_READER_IS_GONE = frozenset({errno.EPIPE, errno.EIO, errno.ECONNRESET})


# What is printed for people to look at; names of files and others' texts are told exactly.
_PLAIN = {"…": "...", "–": "-", "±": "+-", "→": "->"}


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write for a character that an encoding lacks one that it has, or as in a text of Python."""
    if isinstance(error, UnicodeEncodeError):
        plain = _PLAIN.get(error.object[error.start])
        if plain is not None:
            return plain, error.start + 1
    return codecs.backslashreplace_errors(error)


class _Enduring(io.FileIO):
    """A descriptor that takes what is written, also when it goes nowhere; it is never closed."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, or from the first failure on, do as if."""
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
        return memoryview(data).nbytes


@contextmanager
def enduring_streams() -> Iterator[None]:
    r"""Replace standard output and error for a block, with which the process ends.

    What an encoding lacks is written in plain characters, or as Python has it in a text
    (``\u00e9``). Descriptors that are closed lead nowhere from now on, so that no file of a run
    gets their numbers.

    Raises
    ------
    SystemExit
        Always, with the block's code; 1 if a full disk or the like kept output from being written.
    """
    for descriptor in (0, *_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free: this one.
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error("plainly", _plainly)
    raw = {name: _Enduring(descriptor) for descriptor, name in _STREAMS.items()}
    for name, file in raw.items():
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        stream = io.TextIOWrapper(io.BufferedWriter(file), encoding, "plainly", line_buffering=True)
        setattr(sys, name, stream)
    code: Any = 0
    try:
        yield
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout.flush()
    lost = raw["stdout"].lost
    if lost is not None and lost.errno not in _READER_IS_GONE:
        print(f"error: output could not be written ({lost.strerror})", file=sys.stderr)
        code = code or 1
    sys.exit(code)
