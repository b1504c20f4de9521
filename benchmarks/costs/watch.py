"""Something sampled in a thread while a run goes on."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Watch(ABC):
    """Takes a sample again and again between entering and leaving it as a context.

    Parameters
    ----------
    every : float
        Seconds from the start of one sample to that of the next, if it takes less.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @abstractmethod
    def sample(self) -> None:
        """Look once."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            self.sample()
            self._stopped.wait(max(self._every - (time.monotonic() - began), 0.0))
