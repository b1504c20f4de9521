"""Whether clients have the images that they had before: what a run goes on with."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fedzge_flwr.config.sections import RunSettings
from fedzge_flwr.wire.messages import HelloReply

LOGGER = logging.getLogger("flwr.fedzge")

_KEY_DIGITS = 16
_WHAT_TO_DO = "bring those back, start a new run, or go on with these by 'data-changes' = \"warn\""


class OwnData:
    """How many images each client has, and what tells them from others, as it said first.

    Parameters
    ----------
    run : RunSettings
        Its ``data-changes``.
    """

    def __init__(self, run: RunSettings) -> None:
        self._changes = run.data_changes
        self._known: dict[int, tuple[int, str]] = {}

    def all(self) -> dict[int, tuple[int, str]]:
        """Return what is known, by partition, for `restore`."""
        return dict(sorted(self._known.items()))

    def restore(self, known: Mapping[int, tuple[int, str]]) -> None:
        """Take up what `all` returned."""
        self._known = dict(known)

    def note(self, hello: HelloReply) -> None:
        """Hold a client to what it says now; warn if that is something else than before."""
        if change := self._change(hello):
            LOGGER.warning("client %d has %s ('data-changes' = \"warn\")", hello.partition, change)
        self._known[hello.partition] = (hello.num_examples, hello.data)

    def refusal(self, hello: HelloReply) -> str:
        """Return why a client may not take part with its images; empty: it may."""
        change = self._change(hello)
        if not change or self._changes == "warn":
            return ""
        return f"client {hello.partition} has {change}: {_WHAT_TO_DO}"

    def _change(self, hello: HelloReply) -> str:
        """Return how a client's images differ from those before; empty: not, as far as is known."""
        if hello.partition not in self._known:
            return ""
        number, data = self._known[hello.partition]
        if number != hello.num_examples:
            return f"{hello.num_examples} images, and not {number} as before"
        # Under another key, of a state-dir that is new, the same images look like others.
        comparable = data and data[:_KEY_DIGITS] == hello.data[:_KEY_DIGITS]
        return "other images than before" if comparable and data != hello.data else ""
