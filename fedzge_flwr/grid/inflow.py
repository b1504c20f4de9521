"""How much of others' messages Flower's grid loads before anybody can look at it.

A reply lies at the SuperLink as objects, which the grid loads and rebuilds. From 300 MB of packed
numbers it makes Python lists of gigabytes. Flower declares no sizes: so they are added up while
objects come in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.serverapp import Grid

_CALLS = ("PullMessages", "PullObject")
"""The requests by which Flower's grid loads replies, from its client of the SuperLink."""


class InflowError(Exception):
    """A reply takes more than it may; ``held`` bytes of it had come."""

    def __init__(self, held: int) -> None:
        super().__init__(f"{held} bytes")
        self.held = held


@contextmanager
def at_most(grid: Grid, num_bytes: int) -> Iterator[None]:
    """Have a grid stop loading replies when they take more bytes.

    Grids without a SuperLink, such as that of a simulation, have all messages in memory already:
    nothing is limited.

    Raises
    ------
    InflowError
        From within, by what loads them.
    """
    client = getattr(grid, "_runtime_client", None)
    gauge = _Gauge(num_bytes)
    # A new gauge each time: the grid loads in threads, and may leave one behind.
    watched = {name: gauge.on(getattr(client, name)) for name in _CALLS if hasattr(client, name)}
    for name, call in watched.items():
        setattr(client, name, call)
    try:
        yield
    finally:
        for name in watched:
            delattr(client, name)


class _Gauge:
    """Adds up the sizes of what some calls return."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._lock = threading.Lock()

    def on(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call that raises once all that is watched has returned too much."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            response = call(*args, **kwargs)
            with self._lock:
                self._held += response.ByteSize()
                if self._held > self._most:
                    raise InflowError(self._held)
            return response

        return watched
