"""Memory of this process's descendants while something runs."""

from __future__ import annotations

from collections.abc import Callable

import psutil

from benchmarks.costs.watch import Watch

_EVERY_S = 0.5


class MemoryWatch(Watch):
    """Samples resident memory of all descendants, in a thread.

    Parameters
    ----------
    stage : Callable[[], int]
        What the descendants are at: peaks are kept by this number.

    Attributes
    ----------
    peaks : dict[tuple[int, str], int]
        Largest resident bytes of one process, by stage and kind: ``"worker"`` of Ray, ``"server"``
        (Flower's engine, in which the ServerApp runs), ``"other"``.
    """

    def __init__(self, stage: Callable[[], int]) -> None:
        super().__init__(_EVERY_S)
        self._stage = stage
        self.peaks: dict[tuple[int, str], int] = {}

    def at(self, stage: int, kind: str | None = None) -> int:
        """Return the largest resident bytes at a stage, of a kind or of any."""
        return max(
            (
                size
                for (when, what), size in self.peaks.items()
                if when == stage and kind in (None, what)
            ),
            default=0,
        )

    def peak(self, kind: str) -> int:
        """Return the largest resident bytes of a kind."""
        return max((size for (_, what), size in self.peaks.items() if what == kind), default=0)

    def sample(self) -> None:
        """Look once at every descendant."""
        stage, this = self._stage(), psutil.Process()
        own = this.cmdline()
        for process in this.children(recursive=True):
            try:
                command = process.cmdline()
                # A child between fork and exec is this process still, memory and all.
                if command != own:
                    key = (stage, _kind(" ".join(command)))
                    self.peaks[key] = max(self.peaks.get(key, 0), process.memory_info().rss)
            except psutil.Error:
                continue


def _kind(command: str) -> str:
    if command.startswith("ray::"):
        return "worker"
    return "server" if "launch/engine.py" in command else "other"
