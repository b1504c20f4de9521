"""A run that ``flwr run`` submits to a SuperLink, followed to its end."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedzge_flwr.launch.session import Session, executable

CONNECTION = "fedzge"
"""The name by which Flower's commands know a launch's SuperLink."""

_ASKING_S = 120.0

_SERVERS = ("flwr-simulation", "flwr-serverapp")
"""Flower's names of the process that runs a ServerApp."""

_WAITING = ("pending", "starting")
"""How Flower's states of a run begin before there is such a process."""

_LAST_WORDS_S = 5.0
"""How long after that process Flower may still report; a kill it notices after minutes only."""

_ASKED_TIMES = 2
"""A machine under load may take longer than that: so often in turn must the run not have ended."""


def submit(launch: Session, command: Sequence[str | Path], otherwise: str) -> None:
    """Submit the run, show its progress until it ends, and check how it ended.

    Parameters
    ----------
    launch : Session
        The launch, whose SuperLink is known as `CONNECTION`.
    command : Sequence[str | Path]
        Submits and stays until the run has ended, as ``flwr run --stream`` does.
    otherwise : str
        What is going on when the run folder does not say.

    Raises
    ------
    LaunchError
        If the app is refused, or the run fails.
    """
    before = launch.written()
    flwr = launch.follow(command, otherwise, _Loss(launch).is_certain)
    run_id = _submitted(launch.log("flower"))
    if run_id is None:
        raise launch.failed("flwr run refused the app")
    if flwr.poll() is not None and launch.written() != before and launch.says_finished():
        launch.progress.poll("finished")
        return
    status = _status(launch, run_id)
    if flwr.poll() is None and not status.startswith("finished"):
        raise launch.failed(f"the server's process is gone, and Flower says '{status}' of the run")
    if status != "finished:completed":
        raise launch.failed(f"the run ended as '{status}'")
    launch.progress.poll("finished")


class _Loss:
    """Whether the process of this run's server is gone, and Flower has had the time to say so.

    Parameters
    ----------
    launch : Session
        The launch that started it.
    """

    def __init__(self, launch: Session) -> None:
        self._launch = launch
        self._there_until = time.monotonic()
        self._asked = 0

    def is_certain(self) -> bool:
        """Look, and say whether it has been gone for long enough."""
        now = time.monotonic()
        if not self._launch.family.has_lost(_SERVERS):
            self._there_until, self._asked = now, 0
        if now - self._there_until <= _LAST_WORDS_S:
            return False
        # What has ended may have been of another's run, while this one waits for its turn.
        run_id = _submitted(self._launch.log("flower"))
        status = _status(self._launch, run_id) if run_id is not None else _WAITING[0]
        self._asked = 0 if status.startswith(_WAITING) else self._asked + 1
        # From here: asking takes seconds itself.
        self._there_until = time.monotonic()
        return status.startswith("finished") or self._asked == _ASKED_TIMES


def _submitted(log: Path) -> str | None:
    """Return the id of the run that ``flwr run`` has started, once it has."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"Successfully started run (\d+)", text)
    return found and found.group(1)


def _status(launch: Session, run_id: str) -> str:
    """Ask how a run ended: ``flwr run`` exits with 0 whatever became of it."""
    listing = launch.family.run(
        [executable("flwr"), "list", CONNECTION, "--run-id", run_id, "--format", "json"],
        timeout=_ASKING_S,
    )
    with suppress(ValueError, KeyError, IndexError):
        return str(json.loads(listing[listing.index("{") :])["runs"][0]["status"])
    return f"unknown ({listing.strip()[:200]})"
