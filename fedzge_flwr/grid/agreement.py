"""What a client says that it has otherwise than the server: its version, its settings."""

from __future__ import annotations

import logging

from fedzge_flwr.common.text import clients_named
from fedzge_flwr.common.version import __version__
from fedzge_flwr.config.agreement import differing_keys, digits_of, learning_by
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.wire.messages import HelloReply, HelloRequest

LOGGER = logging.getLogger("flwr.fedzge")


class Agreement:
    """What clients have otherwise than the server, told once.

    Parameters
    ----------
    settings : Settings
        The run's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._differing: dict[str, list[int]] = {}

    def request(self) -> HelloRequest:
        """Return what asks a node who it is, and whether its settings are these."""
        return HelloRequest(round=0, version=__version__, settings=digits_of(self._settings))

    def note(self, hello: HelloReply) -> None:
        """Warn of another version; keep for `tell` that settings are others."""
        if hello.version != __version__:
            LOGGER.warning(
                "client %d runs fedzge-flwr %s, the server %s",
                hello.partition,
                hello.version,
                __version__,
            )
        if differing_keys(hello.differs):
            self._differing.setdefault(hello.differs, []).append(hello.partition)

    def tell(self) -> None:
        """Warn of the settings that clients have otherwise, a line for all that have the same."""
        here = learning_by(self._settings)
        for bits, partitions in self._differing.items():
            keys = ", ".join(f"'{key}' (here {here[key]})" for key in differing_keys(bits))
            LOGGER.warning(
                "%s: other settings than this run's of %s: give the black box the "
                "server's, settings=…, of a module that both apps import",
                clients_named(partitions),
                keys,
            )
        self._differing.clear()
