"""The server's warnings in the run folder."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from fedzge_flwr.common.files import append_line, cut_half_line

_LOGGER = logging.getLogger("flwr.fedzge")


class WarningsFile(logging.Handler):
    """Appends each warning to a file as a line; what cannot be written is in the log anyway.

    Nothing is written before `open`: a folder that is refused stays as it is.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._path = path
        self._early: list[str] | None = []
        self.addFilter(lambda record: record.levelno == logging.WARNING)
        _LOGGER.addHandler(self)

    def open(self) -> None:
        """Write what there has been, and from now on all at once."""
        with suppress(OSError):
            cut_half_line(self._path)
        early, self._early = self._early or [], None
        for line in early:
            self._write(line)

    def close(self) -> None:
        """Take note of no more."""
        _LOGGER.removeHandler(self)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a warning, or keep it until `open`."""
        line = " ".join(record.getMessage().split())
        if self._early is None:
            self._write(line)
        else:
            self._early.append(line)

    def _write(self, line: str) -> None:
        with suppress(OSError):
            append_line(self._path, line, durable=False)
